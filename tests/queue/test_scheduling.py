"""When a schedule fires: the rules, by themselves."""

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import islice, pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.queue.model import JobRequest
from app.queue.scheduling import (
    COUNTED_MAX,
    LATE,
    Decision,
    Missed,
    Overlap,
    Plan,
    RunOutcome,
    Schedule,
    decide_fire,
    decide_resume,
    interval,
    preview,
)

NOON = datetime(2026, 6, 1, 12, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
EVERY_MINUTE = interval(NOON, 60)


def schedule(
    overlap: Overlap = Overlap.ALLOW,
    missed: Missed = Missed.SKIP,
    *,
    next_fire_at: datetime | None = NOON + MINUTE,
) -> Schedule:
    return Schedule(
        name="s",
        plan=Plan(JobRequest("q"), every_seconds=60, overlap=overlap, missed=missed),
        paused=False,
        created_at=NOON,
        anchored_at=NOON,
        next_fire_at=next_fire_at,
    )


def decide(given_schedule: Schedule, now: datetime, *, busy: bool = False) -> Decision:
    decision = decide_fire(given_schedule, EVERY_MINUTE, now, busy=busy)
    assert decision is not None
    return decision


def never(after: datetime) -> Iterator[datetime]:
    assert after
    return iter(())


class TestInterval:
    def test_the_first_fire_is_one_interval_after_the_anchor(self):
        assert next(EVERY_MINUTE(NOON)) == NOON + MINUTE
        assert next(EVERY_MINUTE(NOON - timedelta(days=1))) == NOON + MINUTE

    def test_a_fire_at_the_instant_itself_is_not_after_it(self):
        assert next(EVERY_MINUTE(NOON + MINUTE)) == NOON + 2 * MINUTE
        assert next(EVERY_MINUTE(NOON + MINUTE - timedelta.resolution)) == NOON + MINUTE

    @given(
        st.floats(1, 10**7),
        st.timedeltas(timedelta(0), timedelta(days=3650)),
    )
    def test_fires_are_whole_intervals_from_the_anchor(self, every: float, since: timedelta):
        step = timedelta(seconds=every)
        fires = list(islice(interval(NOON, every)(NOON + since), 5))
        assert all((fire - NOON) % step == timedelta(0) for fire in fires)
        assert [b - a for a, b in pairwise(fires)] == [step] * 4
        assert timedelta(0) < fires[0] - (NOON + since) <= step


class TestFiring:
    def test_nothing_is_due(self):
        assert decide_fire(schedule(), EVERY_MINUTE, NOON + MINUTE - timedelta.resolution, busy=False) is None
        assert decide_fire(schedule(next_fire_at=None), never, NOON, busy=False) is None

    def test_it_is_due(self):
        assert decide(schedule(), NOON + MINUTE) == Decision(
            NOON + MINUTE, 1, fire=True, reason=None, next_fire_at=NOON + 2 * MINUTE
        )

    def test_the_last_fire_of_all(self):
        decision = decide_fire(schedule(), never, NOON + MINUTE, busy=False)
        assert decision == Decision(NOON + MINUTE, 1, fire=True, reason=None, next_fire_at=None)

    def test_late_by_a_minute_is_in_time(self):
        assert decide(schedule(), NOON + MINUTE + LATE).fire

    @pytest.mark.parametrize(("missed", "fire"), [(Missed.SKIP, False), (Missed.ONCE, True)])
    def test_what_is_later_is_decided_together(self, missed: Missed, fire: bool):
        now = NOON + 10 * MINUTE
        assert decide(schedule(missed=missed), now) == Decision(
            NOON + MINUTE, 8, fire, "missed", NOON + 9 * MINUTE
        )

    def test_a_busy_schedule_that_may_not_overlap(self):
        decision = decide(schedule(Overlap.SKIP), NOON + MINUTE, busy=True)
        assert (decision.fire, decision.reason, decision.fires) == (False, "overlap", 1)
        assert decide(schedule(Overlap.SKIP), NOON + MINUTE, busy=False).fire
        assert decide(schedule(Overlap.ALLOW), NOON + MINUTE, busy=True).fire

    def test_one_for_all_that_was_missed_may_not_overlap_either(self):
        decision = decide(schedule(Overlap.SKIP, Missed.ONCE), NOON + 10 * MINUTE, busy=True)
        assert (decision.fire, decision.reason, decision.fires) == (False, "overlap", 8)

    def test_the_first_of_very_many_and_where_it_goes_on(self):
        now = NOON + timedelta(days=365)
        decision = decide(schedule(), now)
        assert (decision.fires, decision.next_fire_at) == (COUNTED_MAX, now - LATE)

    @given(
        st.sampled_from(Missed),
        st.lists(st.timedeltas(timedelta(0), timedelta(minutes=9)), max_size=30),
    )
    def test_whenever_it_is_looked_at_each_fire_is_decided_once(
        self, missed: Missed, pauses: list[timedelta]
    ):
        standing, now = schedule(missed=missed), NOON
        decided: list[datetime] = []
        for pause in pauses:
            now += pause
            while (decision := decide_fire(standing, EVERY_MINUTE, now, busy=False)) is not None:
                assert decision.fire_at <= now
                decided += islice(EVERY_MINUTE(decision.fire_at - MINUTE), decision.fires)
                standing = replace(standing, next_fire_at=decision.next_fire_at)
        due = (now - NOON) // MINUTE
        assert decided == [NOON + number * MINUTE for number in range(1, due + 1)]


class TestPause:
    def test_what_came_meanwhile_is_counted_and_does_not_fire(self):
        decision = decide_resume(schedule(), EVERY_MINUTE, NOON + 3 * MINUTE)
        assert decision == Decision(
            NOON + MINUTE, 3, fire=False, reason="paused", next_fire_at=NOON + 4 * MINUTE
        )
        run = decision.run(NOON)
        assert (run.outcome, run.reason, run.fires) == (RunOutcome.SKIPPED, "paused", 3)

    def test_nothing_came(self):
        assert decide_resume(schedule(), EVERY_MINUTE, NOON) is None

    def test_a_paused_schedule_has_no_next_fires(self):
        assert preview(schedule(), EVERY_MINUTE) == [NOON + number * MINUTE for number in range(1, 6)]
        assert preview(replace(schedule(), paused=True), EVERY_MINUTE) == []
        assert preview(schedule(next_fire_at=None), never) == []


@pytest.mark.parametrize(
    ("changed", "same"),
    [
        ({"job": JobRequest("other")}, True),
        ({"overlap": Overlap.SKIP, "missed": Missed.ONCE}, True),
        ({"every_seconds": 61.0}, False),
        ({"timezone": "Asia/Tokyo"}, False),
        ({"cron": "* * * * *", "every_seconds": None}, False),
    ],
)
def test_what_keeps_the_rhythm(changed: dict[str, Any], same: bool):
    plan = schedule().plan
    assert plan._replace(**changed).keeps_time_with(plan) is same
