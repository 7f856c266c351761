"""Words for facts: each state, each reason, and what a tired reader must not misread."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from app.queue.explain import Code, Facts, explain, span
from app.queue.lifecycle import TERMINAL, State

NOW = datetime(2026, 7, 1, 3, 0, tzinfo=UTC)


def after(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


OF_STATE: dict[State, dict[str, Any]] = {
    State.READY: {"since": after(-5)},
    State.HELD: {"since": after(-5)},
    State.SCHEDULED: {"run_at": after(60)},
    State.RETRY: {"run_at": after(60), "attempt": 2, "retries_left": 1},
    State.ACTIVE: {"leased_at": after(-5), "lease_expires_at": after(25), "attempt": 1, "worker": "w"},
    State.COMPLETED: {"finished_at": after(-5)},
    State.FAILED: {"finished_at": after(-5), "reason": "retries_exhausted"},
    State.CANCELLED: {"finished_at": after(-5)},
    State.EXPIRED: {"finished_at": after(-5), "expires_at": after(-6)},
}


def facts(state: State, **more: Any) -> Facts:
    known = {
        "now": NOW,
        "state": state,
        "queue": "emails",
        "type": "welcome",
        "priority": 5,
        "attempt": 0,
        "willing": 1,
    }
    return Facts(**{**known, **OF_STATE[state], **more})


def codes(*given: Any, **more: Any) -> list[Code]:
    return [reason.code for reason in explain(facts(*given, **more))]


@pytest.mark.parametrize("state", State)
def test_there_is_a_reason_for_every_state_in_a_sentence(state: State):
    for more in ({}, {"paused": True}, {"willing": 0}, {"willing": 0, "workers": 2}):
        reasons = explain(facts(state, **more))
        assert reasons
        assert len({reason.code for reason in reasons}) == len(reasons)
        for reason in reasons:
            assert reason.message[0].isupper() or reason.message[0].isdigit()
            assert reason.message.endswith(".")
            assert "None" not in reason.message
            assert "{" not in reason.message


@pytest.mark.parametrize("state", sorted(TERMINAL))
def test_what_has_ended_has_one_reason_and_no_queue_or_worker_matters(state: State):
    assert codes(state, paused=True, willing=0) == [Code(state.value)]


def test_what_holds_it_now_comes_first():
    everything: dict[str, Any] = {"paused": True, "willing": 0, "ahead": 3}
    passed, to_come = {"expires_at": after(-1)}, {"expires_at": after(10)}
    ready = [Code.QUEUE_PAUSED, Code.NO_WORKER, Code.IN_LINE]
    assert codes(State.READY, **everything, **passed) == [Code.DEADLINE, *ready]
    assert codes(State.READY, **everything, **to_come) == [*ready, Code.DEADLINE]
    assert codes(State.SCHEDULED, **everything) == [Code.SCHEDULED, Code.QUEUE_PAUSED, Code.NO_WORKER]
    assert codes(State.RETRY, **everything) == [Code.BACKOFF, Code.QUEUE_PAUSED, Code.NO_WORKER]
    assert codes(State.HELD, **everything) == [Code.QUEUE_PAUSED, Code.HELD, Code.NO_WORKER]


@pytest.mark.parametrize(("run_at", "code"), [(after(0.001), Code.SCHEDULED), (NOW, Code.MAINTENANCE_LATE)])
def test_due_is_what_is_due_at_this_very_instant(run_at: datetime, code: Code):
    assert codes(State.SCHEDULED, run_at=run_at)[0] is code


def test_a_deadline_is_past_at_its_very_instant():
    assert codes(State.READY, expires_at=NOW)[0] is Code.DEADLINE
    assert codes(State.READY, expires_at=after(0.001))[-1] is Code.DEADLINE


def test_a_lease_is_overdue_from_its_very_end_on():
    assert codes(State.ACTIVE, lease_expires_at=after(0.001)) == [Code.ACTIVE]
    assert codes(State.ACTIVE, lease_expires_at=NOW) == [Code.ACTIVE, Code.MAINTENANCE_LATE]


@pytest.mark.parametrize(
    ("ahead", "begin"),
    [
        (0, "It is the first in line"),
        (1, "1 ready job is"),
        (2, "2 ready jobs are"),
        (999, "999 ready"),
        (1000, "1000+ ready"),
    ],
)
def test_how_many_are_before_it(ahead: int, begin: str):
    [line] = explain(facts(State.READY, ahead=ahead))
    assert line.message.startswith(begin)
    assert line.facts["ahead_is_capped"] is (ahead == 1000)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({}, "Nobody ever has, as far as is known."),
        ({"last_seen_at": after(-7200)}, "a worker without a name, heard of 2 h 0 min ago."),
        ({"last_seen_at": after(-90), "last_worker": "m-1"}, "m-1, heard of 1 min 30 s ago."),
    ],
)
def test_who_asked_last(more: dict[str, Any], said: str):
    [nobody, _] = explain(facts(State.READY, willing=0, **more))
    assert "queue emails and type welcome" in nobody.message
    assert said in nobody.message


@pytest.mark.parametrize(
    ("ago", "said"),
    [(None, "Maintenance last ran never, as far as is known."), (75.0, "last ran 1 min 15 s ago.")],
)
def test_how_late_maintenance_is(ago: float | None, said: str):
    [late] = explain(facts(State.RETRY, run_at=after(-3), maintained_seconds_ago=ago))
    assert "due since 3.0 s" in late.message
    assert said in late.message


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (-1, "0.0 s"),
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (10, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (3599, "59 min 59 s"),
        (3600, "1 h 0 min"),
        (86_399, "23 h 59 min"),
        (86_400, "1 d 0 h"),
        (8 * 86_400 + 7200, "8 d 2 h"),
    ],
)
def test_durations_are_said_as_people_say_them(seconds: float, said: str):
    assert span(seconds) == said
