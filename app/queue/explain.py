"""Why a job is not running, from the facts: pure, in words and in data.

The words are for whoever looks at night, tired: what holds the job, since when, and what to do where something can be
done. The first reason is what holds it now; the others would hold it then, or are worth knowing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from app.queue.lifecycle import State
from app.queue.policy import NOT_RETRYABLE, RETRIES_EXHAUSTED

MINUTE, HOUR, DAY = 60, 3600, 86_400


class Code(StrEnum):
    """What may keep a job from running."""

    SCHEDULED = "scheduled"
    """Its `run_at` is in the future."""
    BACKOFF = "backoff"
    """It failed, and waits for its next attempt."""
    MAINTENANCE_LATE = "maintenance_late"
    """Something is due that maintenance has not done yet."""
    QUEUE_PAUSED = "queue_paused"
    NO_WORKER = "no_worker"
    """Nobody asks for jobs of its queue and type."""
    WORKERS_QUIET = "workers_quiet"
    """Those who ask for such jobs are told to take none."""
    HELD = "held"
    """Its concurrency key's turn has not come."""
    IN_LINE = "in_line"
    """Jobs of its queue that stand before it."""
    DEADLINE = "deadline"
    """It must start before an instant, or should have."""
    ACTIVE = "active"
    """It runs."""
    CANCEL_REQUESTED = "cancel_requested"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """All that is known of a job's standing, at one instant. What does not go with its state is None."""

    now: datetime
    state: State
    queue: str
    type: str
    priority: int
    attempt: int
    retries_left: int = 0
    error_type: str | None = None
    since: datetime | None = None
    """Since when it is ready."""
    run_at: datetime | None = None
    expires_at: datetime | None = None
    """The start deadline, where it still holds."""
    ahead: int = 0
    ahead_max: int = 1000
    """So many that stand before it were counted at most."""
    paused: bool = False
    workers: int = 0
    """How many ask for such jobs."""
    willing: int = 0
    """How many of them may take some."""
    last_worker: str | None = None
    last_seen_at: datetime | None = None
    """When anybody was last heard of who asked for such jobs, and his name if he told it."""
    worker: str | None = None
    leased_at: datetime | None = None
    heartbeat_at: datetime | None = None
    lease_expires_at: datetime | None = None
    deadline_at: datetime | None = None
    cancel_requested: bool = False
    reason: str | None = None
    finished_at: datetime | None = None
    maintained_seconds_ago: float | None = None
    """How long ago any process last did maintenance."""


@dataclass(frozen=True, slots=True)
class Reason:
    """One reason, in words, with its facts: instants, durations in seconds, names, numbers."""

    code: Code
    message: str
    facts: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


def explain(facts: Facts) -> list[Reason]:
    """Return why the job is not running, or how it has ended: what holds it now comes first."""
    return _EXPLAINED[facts.state](facts)


def span(seconds: float) -> str:
    """Return a duration as people say it."""
    seconds = max(seconds, 0.0)
    if seconds < 10:  # noqa: PLR2004  # where a tenth of a second still says something
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < MINUTE:
        return f"{whole} s"
    if whole < HOUR:
        return f"{whole // MINUTE} min {whole % MINUTE} s"
    if whole < DAY:
        return f"{whole // HOUR} h {whole % HOUR // MINUTE} min"
    return f"{whole // DAY} d {whole % DAY // HOUR} h"


def _ready(facts: Facts) -> list[Reason]:
    return [*_passed_deadline(facts), *_paused(facts), *_nobody(facts), _line(facts), *_deadline_ahead(facts)]


def _held(facts: Facts) -> list[Reason]:
    turn = Reason(Code.HELD, "It waits for the turn of its concurrency key.", {"since": facts.since})
    return [*_passed_deadline(facts), *_paused(facts), turn, *_nobody(facts), *_deadline_ahead(facts)]


def _delayed(facts: Facts) -> list[Reason]:
    assert facts.run_at is not None  # noqa: S101  # a delayed job has one
    in_seconds = _seconds(facts.now, facts.run_at)
    if in_seconds <= 0:
        first = _late(
            facts, facts.run_at, "It is due since {late}, and maintenance has not made it ready yet"
        )
    elif facts.state is State.RETRY:
        error = "" if facts.error_type is None else f" ({facts.error_type})"
        first = Reason(
            Code.BACKOFF,
            f"Attempt {facts.attempt} did not succeed{error}; the next one may begin in {span(in_seconds)}."
            f" Retries left: {facts.retries_left}.",
            {
                "run_at": facts.run_at,
                "in_seconds": in_seconds,
                "attempt": facts.attempt,
                "retries_left": facts.retries_left,
                "error_type": facts.error_type,
            },
        )
    else:
        first = Reason(
            Code.SCHEDULED,
            f"It is not to run before its run_at, in {span(in_seconds)}.",
            {"run_at": facts.run_at, "in_seconds": in_seconds},
        )
    return [*_passed_deadline(facts), first, *_paused(facts), *_nobody(facts), *_deadline_ahead(facts)]


def _active(facts: Facts) -> list[Reason]:
    assert facts.leased_at is not None  # noqa: S101  # a lease has both
    assert facts.lease_expires_at is not None  # noqa: S101
    who = "a worker without a name" if facts.worker is None else facts.worker
    since = _seconds(facts.leased_at, facts.now)
    left = _seconds(facts.now, facts.lease_expires_at)
    heard = "no heartbeat yet"
    if facts.heartbeat_at is not None:
        heard = f"last heartbeat {span(_seconds(facts.heartbeat_at, facts.now))} ago"
    lease = (
        f"its lease ends in {span(left)} without a word"
        if left > 0
        else f"its lease ran out {span(-left)} ago"
    )
    reasons = [
        Reason(
            Code.ACTIVE,
            f"It runs: {who} has it for {span(since)}, attempt {facts.attempt}; {heard}; {lease}.",
            {
                "worker": facts.worker,
                "attempt": facts.attempt,
                "since": facts.leased_at,
                "heartbeat_at": facts.heartbeat_at,
                "lease_expires_at": facts.lease_expires_at,
                "overdue_seconds": max(-left, 0.0),
                "deadline_at": facts.deadline_at,
            },
        )
    ]
    if facts.cancel_requested:
        reasons.insert(
            0,
            Reason(
                Code.CANCEL_REQUESTED,
                "Someone wants it cancelled: its worker learns of it at its next heartbeat. An ack still completes it.",
            ),
        )
    if left <= 0:
        reasons.append(
            _late(
                facts,
                facts.lease_expires_at,
                "Its lease is over since {late}, and maintenance has not ended it yet",
            )
        )
    return reasons


def _completed(facts: Facts) -> list[Reason]:
    return [
        Reason(
            Code.COMPLETED,
            f"It is done: acked {_ago(facts.finished_at, facts.now)}, in attempt {facts.attempt}.",
            _end(facts),
        )
    ]


def _failed(facts: Facts) -> list[Reason]:
    why = {
        RETRIES_EXHAUSTED: "its retries are used up",
        NOT_RETRYABLE: "its worker said that a retry is of no use",
    }.get(facts.reason or "", facts.reason or "unknown")
    error = "" if facts.error_type is None else f" The last error was {facts.error_type}."
    return [
        Reason(
            Code.FAILED,
            f"It failed for good {_ago(facts.finished_at, facts.now)}, in attempt {facts.attempt}: {why}.{error}"
            " A retry brings it back.",
            {**_end(facts), "reason": facts.reason, "error_type": facts.error_type},
        )
    ]


def _cancelled(facts: Facts) -> list[Reason]:
    return [
        Reason(
            Code.CANCELLED,
            f"Someone cancelled it {_ago(facts.finished_at, facts.now)}. A retry brings it back.",
            _end(facts),
        )
    ]


def _expired(facts: Facts) -> list[Reason]:
    return [
        Reason(
            Code.EXPIRED,
            "No worker took it before its start deadline; it was given up"
            f" {_ago(facts.finished_at, facts.now)}. A retry brings it back.",
            {**_end(facts), "expires_at": facts.expires_at},
        )
    ]


_EXPLAINED: Mapping[State, Callable[[Facts], list[Reason]]] = {
    State.READY: _ready,
    State.HELD: _held,
    State.SCHEDULED: _delayed,
    State.RETRY: _delayed,
    State.ACTIVE: _active,
    State.COMPLETED: _completed,
    State.FAILED: _failed,
    State.CANCELLED: _cancelled,
    State.EXPIRED: _expired,
}


def _paused(facts: Facts) -> list[Reason]:
    if not facts.paused:
        return []
    return [
        Reason(
            Code.QUEUE_PAUSED,
            f"The queue {facts.queue} is paused: none of its jobs is handed out until someone resumes it.",
            {"queue": facts.queue},
        )
    ]


def _nobody(facts: Facts) -> list[Reason]:
    if facts.willing:
        return []
    what = f"jobs of queue {facts.queue} and type {facts.type}"
    if facts.workers:
        return [
            Reason(
                Code.WORKERS_QUIET,
                f"Whoever asks for {what} is told to take no more ({facts.workers} of them, quiet or terminate)."
                " Resume a worker, or start one.",
                {"queue": facts.queue, "type": facts.type, "workers": facts.workers},
            )
        ]
    last = "Nobody ever has, as far as is known."
    if facts.last_seen_at is not None:
        who = "a worker without a name" if facts.last_worker is None else facts.last_worker
        last = f"The last one was {who}, heard of {_ago(facts.last_seen_at, facts.now)}."
    return [
        Reason(
            Code.NO_WORKER,
            f"No worker has asked for {what} in the last minute. {last} Start one, or look at what it leases.",
            {
                "queue": facts.queue,
                "type": facts.type,
                "last_worker": facts.last_worker,
                "last_seen_at": facts.last_seen_at,
            },
        )
    ]


def _line(facts: Facts) -> Reason:
    is_capped = facts.ahead >= facts.ahead_max
    known: dict[str, object] = {
        "priority": facts.priority,
        "ahead": min(facts.ahead, facts.ahead_max),
        "ahead_is_capped": is_capped,
        "since": facts.since,
    }
    waited = "" if facts.since is None else f", ready for {span(_seconds(facts.since, facts.now))}"
    if not facts.ahead:
        message = f"It is the first in line in its queue (priority {facts.priority}{waited}): the next lease that may take it does."
    else:
        many = f"{facts.ahead_max}+" if is_capped else str(facts.ahead)
        jobs = "job is" if facts.ahead == 1 else "jobs are"
        message = (
            f"{many} ready {jobs} before it in its queue (priority {facts.priority}{waited}):"
            " of higher priority, or ready before it."
        )
    return Reason(Code.IN_LINE, message, known)


def _passed_deadline(facts: Facts) -> list[Reason]:
    if facts.expires_at is None or facts.expires_at > facts.now:
        return []
    late = _seconds(facts.expires_at, facts.now)
    return [
        Reason(
            Code.DEADLINE,
            f"Its start deadline passed {span(late)} ago: no worker gets it any more, and maintenance is about to make it"
            " expired.",
            {"expires_at": facts.expires_at, "left_seconds": 0.0},
        )
    ]


def _deadline_ahead(facts: Facts) -> list[Reason]:
    if facts.expires_at is None or facts.expires_at <= facts.now:
        return []
    left = _seconds(facts.now, facts.expires_at)
    return [
        Reason(
            Code.DEADLINE,
            f"A worker must take it in the next {span(left)}, else it expires.",
            {"expires_at": facts.expires_at, "left_seconds": left},
        )
    ]


def _late(facts: Facts, due_at: datetime, what: str) -> Reason:
    late = _seconds(due_at, facts.now)
    ago = facts.maintained_seconds_ago
    last = "never, as far as is known" if ago is None else f"{span(ago)} ago"
    return Reason(
        Code.MAINTENANCE_LATE,
        f"{what.format(late=span(late))}. Maintenance last ran {last}.",
        {"due_at": due_at, "late_seconds": late, "maintained_seconds_ago": ago},
    )


def _end(facts: Facts) -> dict[str, object]:
    return {"finished_at": facts.finished_at, "attempt": facts.attempt, "worker": facts.worker}


def _ago(instant: datetime | None, now: datetime) -> str:
    return "at some time" if instant is None else f"{span(_seconds(instant, now))} ago"


def _seconds(begin: datetime, end: datetime) -> float:
    return (end - begin).total_seconds()
