"""Leases begin where this process has come to, and nothing that lands behind is lost."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from uuid_utils.compat import uuid7

from app.engine.cursors import NEAR, PLACES_MAX, SLACK, Cursors
from app.queue.model import LeasedJob
from app.store.jobs import BEGINNING, END, Claim, Line, Place
from tests.conftest import Replica, World
from tests.store.conftest import holding, idle_replica, logged

NOW = datetime(2026, 1, 1, tzinfo=UTC)
LINE = Line("q")
TYPED = Line("q", "default")

LEASING = """
INSERT INTO leases (id, queue, type, priority, attempt, noted, lease_id, since, leased_at, expires_at, lease_seconds,
                    cancel_requested)
VALUES ($1, 'q', 'default', 5, 1, false, gen_random_uuid(), now(), now(), now(), 30, false)"""
"""Stops a claim of this job, with its snapshot taken."""


def job(since: datetime, priority: int = 5) -> LeasedJob:
    return LeasedJob(
        id=uuid7(),
        queue="q",
        type="default",
        payload=b"null",
        attempt=1,
        max_retries=3,
        priority=priority,
        lease_id=uuid4(),
        leased_at=NOW,
        lease_expires_at=NOW,
        ready_at=since,
        created_at=since,
        run_at=since,
        tags=(),
        metadata=b"{}",
        traceparent=None,
        last_error=None,
    )


def learn(cursors: Cursors, *jobs: LeasedJob, more: bool, at: datetime = NOW) -> None:
    """Let a claim take these jobs, and leave some or none."""
    with cursors.claiming([LINE]) as look:
        look.found(Claim(list(jobs), contended=more, claimed_at=at))


def begins(cursors: Cursors, priority: int = 5) -> list[datetime]:
    return [stretch.since for stretch in cursors.ahead([LINE]) if stretch.priority == priority]


def place(since: datetime, line: Line = TYPED) -> Place:
    return Place(line, 5, since)


def ago(**how_long: float) -> datetime:
    return NOW - timedelta(**how_long)


class TestMoving:
    def test_a_line_of_which_nothing_is_known_is_looked_at_from_its_front(self):
        stretches = Cursors().ahead([LINE])
        assert [stretch.priority for stretch in stretches] == list(range(10, -1, -1))
        assert {(stretch.since, stretch.until) for stretch in stretches} == {(BEGINNING, END)}

    def test_a_claim_that_leaves_jobs_moves_on_past_those_that_it_took(self):
        cursors = Cursors()
        learn(cursors, job(ago(hours=2)), job(ago(hours=1)), more=True)
        assert begins(cursors) == [ago(hours=1) - SLACK]
        assert begins(cursors, 6) == [NOW - SLACK], "of a higher priority there was nothing left"
        assert begins(cursors, 4) == [BEGINNING], "at a lower priority it has not looked"

    @pytest.mark.parametrize("jobs", [[], [job(ago(hours=1))]])
    def test_a_claim_that_takes_all_it_saw_moves_on_to_now(self, jobs: list[LeasedJob]):
        cursors = Cursors()
        learn(cursors, *jobs, more=False)
        assert [begins(cursors, priority) for priority in range(11)] == [[NOW - SLACK]] * 11

    def test_a_claim_that_got_nothing_of_what_others_hold_stays(self):
        cursors = Cursors()
        learn(cursors, more=True)
        assert begins(cursors) == [BEGINNING]

    def test_never_moves_back_by_a_claim(self):
        cursors = Cursors()
        learn(cursors, more=False)
        learn(cursors, job(ago(hours=1)), more=True)
        assert begins(cursors) == [NOW - SLACK]


class TestLanding:
    def test_a_job_close_behind_takes_the_cursor_back(self):
        cursors = Cursors()
        learn(cursors, more=False)
        cursors.landed(place(ago(seconds=5)))
        assert begins(cursors) == [ago(seconds=5)]

    def test_a_job_far_behind_is_a_place_of_its_own_until_it_is_passed(self):
        cursors = Cursors()
        learn(cursors, more=False)
        for hours in (1, 2):
            cursors.landed(place(ago(hours=hours)))
        assert begins(cursors) == [NOW - SLACK, ago(hours=2), ago(hours=1)]
        learn(cursors, job(ago(hours=1.5)), more=True)
        assert begins(cursors) == [NOW - SLACK, ago(hours=1)]
        learn(cursors, more=False)
        assert begins(cursors) == [NOW - SLACK]

    def test_of_too_many_places_the_cursor_goes_back_to_the_first(self):
        cursors = Cursors()
        learn(cursors, more=False)
        for number in range(PLACES_MAX + 1):
            cursors.landed(place(NOW - 2 * NEAR - timedelta(seconds=number)))
        assert begins(cursors) == [NOW - 2 * NEAR - timedelta(seconds=PLACES_MAX)]

    def test_what_lands_during_a_claim_is_not_passed_by_it(self):
        cursors = Cursors()
        with cursors.claiming([LINE]) as look:
            cursors.landed(place(ago(hours=2)))
            look.found(Claim([job(ago(hours=1))], contended=False, claimed_at=NOW))
        assert begins(cursors) == [NOW - SLACK, ago(hours=2)]

    def test_what_landed_before_a_claim_is_passed_by_it(self):
        cursors = Cursors()
        with cursors.claiming([LINE]):
            cursors.landed(place(ago(hours=2)))
            learn(cursors, job(ago(hours=2)), more=False)
        assert begins(cursors) == [NOW - SLACK]

    def test_a_claim_remembers_only_what_lands_on_its_own_lines(self):
        """Two busy kinds of lease always have a claim under way: what is kept must end with each."""
        cursors = Cursors()
        with cursors.claiming([LINE]) as mine, cursors.claiming([Line("other")]) as other:
            cursors.landed(place(NOW))
            assert (len(mine.landed), other.landed) == (1, [])

    def test_of_two_jobs_at_one_place_the_second_is_still_remembered(self):
        cursors = Cursors()
        learn(cursors, more=False)
        cursors.landed(place(ago(hours=1)))
        learn(cursors, job(ago(hours=1)), more=True)
        assert begins(cursors) == [NOW - SLACK, ago(hours=1)]

    def test_a_claim_that_fails_takes_back_the_cursors_of_those_that_have_passed_it(self):
        cursors = Cursors()

        def fail() -> None:
            with cursors.claiming([TYPED]):
                learn(cursors, more=False)
                raise ValueError("gone")

        with pytest.raises(ValueError, match="gone"):
            fail()
        assert begins(cursors) == [BEGINNING]

    def test_a_clock_that_has_gone_back_takes_the_cursors_with_it(self):
        cursors = Cursors()
        learn(cursors, more=False)
        learn(cursors, more=False, at=ago(hours=2))
        assert begins(cursors) == [ago(hours=2) - SLACK]


class TestSweeping:
    def test_looks_at_the_last_minute_each_time_and_at_all_that_is_older_in_turn(self):
        cursors = Cursors()
        learn(cursors, more=False)
        windows = set()
        for _ in range(5):
            sweep = [(each.since, each.until) for each in cursors.behind() if each.priority == 5]
            assert sweep[0] == (ago(minutes=1) - SLACK, NOW - SLACK)
            windows.update(sweep)
        edges = sorted(windows)
        assert edges[0][0] == BEGINNING
        assert [until for _, until in edges[:-1]] == [since for since, _ in edges[1:]]

    def test_looks_in_all_windows_when_told_to(self):
        cursors = Cursors()
        learn(cursors, more=False)
        sweep = sorted(
            (each.since, each.until) for each in cursors.behind(everything=True) if each.priority == 5
        )
        assert (sweep[0][0], sweep[-1][1]) == (BEGINNING, NOW - SLACK)
        assert [until for _, until in sweep[:-1]] == [since for since, _ in sweep[1:]]

    def test_of_lines_that_nobody_asks_for_any_more_nothing_is_kept(self, monkeypatch: pytest.MonkeyPatch):
        cursors = Cursors()
        learn(cursors, more=False)
        monkeypatch.setattr("app.engine.cursors.FORGOTTEN_AFTER_SECONDS", -1.0)
        assert cursors.behind() == []
        assert begins(cursors) == [BEGINNING]


async def empty(queue: Replica) -> None:
    """Let the replica's cursors move on to now."""
    assert await queue.lease(wait_seconds=0) == []


async def leased_long_ago(queue: Replica, *, others: int = 1) -> dict[str, Any]:
    """Lease a job that has been ready for an hour, then all that came after it."""
    queue.clock.move(-3600)
    await queue.enqueue()
    queue.clock.move(3600)
    old = await queue.lease_one()
    for _ in range(others):
        await queue.enqueue()
    await queue.lease(max_jobs=others)
    await empty(queue)
    return old


async def test_a_released_job_is_leased_again_though_the_cursor_has_passed_its_place(queue: Replica):
    old = await leased_long_ago(queue)
    await queue.verb("release", old)
    assert (await queue.lease_one(wait_seconds=0))["id"] == old["id"]


async def test_a_released_job_is_leased_before_the_jobs_that_came_after_it(queue: Replica):
    old = await leased_long_ago(queue)
    await queue.enqueue()
    await queue.verb("release", old)
    assert (await queue.lease_one(wait_seconds=0))["id"] == old["id"]


async def test_a_release_is_heard_by_the_cursors_of_others(world: World):
    one, two = await world.replica(), await world.replica()
    old = await leased_long_ago(one)
    await empty(two)
    waiting = asyncio.create_task(two.lease(wait_seconds=30))
    while not two.machine.service.wakeups.waiters:
        await asyncio.sleep(0.002)
    await one.verb("release", old)
    assert [job["id"] for job in await waiting] == [old["id"]]


async def test_a_release_of_which_no_hint_came_is_found_by_the_sweep(world: World):
    """As is a job whose enqueue took so long to commit that the cursor had passed it."""
    one, two = await world.replica(), await world.replica()
    old = await leased_long_ago(one)
    await empty(two)
    await two.machine.service.wakeups.stop()
    await one.verb("release", old)
    assert await two.lease(wait_seconds=0) == []
    for _ in range(5):
        await two.machine.service.wakeups.look()
    assert [job["id"] for job in await two.lease(wait_seconds=0)] == [old["id"]]


async def test_a_release_during_a_claim_that_passes_its_place_is_not_lost(world: World):
    queue = await idle_replica(world)
    old = await leased_long_ago(queue)
    fresh = await queue.enqueue()
    async with holding(world, LEASING, fresh["id"]):
        claiming = asyncio.create_task(queue.lease(wait_seconds=0))
        await world.blocked(1)
        assert (await queue.verb("release", old)).status_code == 200
    assert [job["id"] for job in await claiming] == [fresh["id"]]
    assert [job["id"] for job in await queue.lease(wait_seconds=0)] == [old["id"]]


async def test_a_new_job_whose_commit_was_slow_is_told_to_the_cursors_of_others(world: World):
    """The poll is a minute away: without its place in the hint, the lease would look behind it in vain."""
    one, two = await idle_replica(world), await idle_replica(world)
    async with holding(world, "LOCK TABLE deltas IN SHARE MODE"):
        storing = asyncio.create_task(one.enqueue())
        await world.blocked(1)
        await asyncio.sleep(2 * SLACK.total_seconds())
        two.machine.service._cursors.move_on(
            [LINE], Claim([], contended=False, claimed_at=datetime.now(UTC)), []
        )
        leasing = asyncio.create_task(two.lease(wait_seconds=30))
        while not two.machine.service.wakeups.waiters:
            await asyncio.sleep(0.002)
    job = await storing
    assert [leased["id"] for leased in await leasing] == [job["id"]]


async def test_jobs_are_leased_when_the_databases_clock_has_gone_back(queue: Replica):
    await queue.enqueue()
    await queue.lease_one()
    await empty(queue)
    queue.clock.move(-7200)
    ids = [(await queue.enqueue())["id"] for _ in range(3)]
    assert [job["id"] for job in await queue.lease(max_jobs=3, wait_seconds=0)] == ids


async def test_while_nothing_can_be_cleaned_a_lease_walks_over_no_dead_entries(world: World):
    """A transaction that stays open keeps VACUUM, and every index scan, from taking leased jobs' entries away."""
    queue = await idle_replica(world, db_pool_size=1)
    connection = await world.connect()

    async def entries_read() -> int:
        await connection.execute("SELECT pg_stat_clear_snapshot()")
        return int(
            await connection.fetchval(
                "SELECT idx_tup_read FROM pg_stat_all_indexes"
                " WHERE schemaname = 'leaseq' AND indexrelname = 'ready_by_queue'"
            )
        )

    async with holding(world, "SELECT txid_current()"):
        for _ in range(1000):
            await queue.enqueue()
        assert len(await queue.lease(max_jobs=1000)) == 1000
        await queue.enqueue()
        async with logged(queue):
            await queue.lease_one()
        await queue.machine.database.hot.execute("SELECT pg_stat_force_next_flush()")
        before = await entries_read()
        await queue.enqueue()
        await queue.lease_one()
        await queue.machine.database.hot.execute("SELECT pg_stat_force_next_flush()")
        assert await entries_read() - before < 100
