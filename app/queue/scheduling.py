"""When a schedule fires, and why it does not: pure functions of its rhythm, what is known of it, and the present instant.

A rhythm is a function from an instant to the fires after it, in order and without end (or to none, where there are
no more). Those of an interval are made here; those of a cron expression come from `engine/cron.py`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from itertools import islice
from typing import NamedTuple
from uuid import UUID

from app.queue.model import JobRequest

LATE = timedelta(seconds=60)
"""A fire that nobody has decided for longer than this is missed."""

COUNTED_MAX = 1000
"""Of fires that come to nothing together so many are counted, so that a year's outage is decided at once too."""

PREVIEWED = 5

OVERLAP = "overlap"
MISSED = "missed"
PAUSED = "paused"
RHYTHM = "rhythm"

Rhythm = Callable[[datetime], Iterator[datetime]]
"""The fires after an instant, each later than the one before."""


class Overlap(StrEnum):
    """What a schedule does when it is to fire while a job of its own has not ended."""

    ALLOW = "allow"
    SKIP = "skip"


class Missed(StrEnum):
    """What becomes of fires that nobody could decide in time."""

    SKIP = "skip"
    ONCE = "once"
    """One job for all of them."""


class RunOutcome(StrEnum):
    """What became of a fire."""

    FIRED = "fired"
    SKIPPED = "skipped"
    TRIGGERED = "triggered"
    """It was no fire: somebody asked for a job at once."""
    FAILED = "failed"
    """It was to fire, but the queue refuses its job, or nobody can tell its rhythm."""


class Plan(NamedTuple):
    """What an operator asks of a schedule: exactly one of `cron` and `every_seconds` is set.

    Neither is where what was stored can not be read: then the other fields say nothing.
    """

    job: JobRequest
    cron: str | None = None
    every_seconds: float | None = None
    timezone: str = "UTC"
    overlap: Overlap = Overlap.ALLOW
    missed: Missed = Missed.SKIP

    @property
    def is_readable(self) -> bool:
        """Whether the fields say what was asked."""
        return self.cron is not None or self.every_seconds is not None

    def keeps_time_with(self, other: "Plan") -> bool:
        """Whether both have the same rhythm."""
        return (self.cron, self.every_seconds, self.timezone) == (
            other.cron,
            other.every_seconds,
            other.timezone,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What was decided of a fire, or of several together."""

    fire_at: datetime
    """When it was to fire; of several the first."""
    decided_at: datetime
    outcome: RunOutcome
    reason: str | None = None
    fires: int = 1
    job_id: UUID | None = None


class RunPosition(NamedTuple):
    """Where a run stands among those of its schedule."""

    fire_at: datetime
    triggered: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A schedule as it stands."""

    name: str
    plan: Plan
    paused: bool
    created_at: datetime
    anchored_at: datetime
    """From when on an interval counts: the creation, or the last change of the rhythm."""
    next_fire_at: datetime | None = None
    """The first fire that nobody has decided; None when there will be none: none comes any more, or it is set aside."""
    job_ids: tuple[UUID, ...] = ()
    """Its newest jobs."""
    last_run: Run | None = None


class Decision(NamedTuple):
    """What becomes of the first undecided fire, and of those missed together with it."""

    fire_at: datetime
    fires: int
    fire: bool
    reason: str | None
    next_fire_at: datetime | None
    failed: bool = False

    def run(self, now: datetime) -> Run:
        """Return the run to note."""
        nothing = RunOutcome.FAILED if self.failed else RunOutcome.SKIPPED
        return Run(
            fire_at=self.fire_at,
            decided_at=now,
            outcome=RunOutcome.FIRED if self.fire else nothing,
            reason=self.reason,
            fires=self.fires,
        )


def interval(anchored_at: datetime, every_seconds: float) -> Rhythm:
    """Return the rhythm of an interval: its first fire is one interval after the anchor."""
    step = timedelta(seconds=every_seconds)

    def after(instant: datetime) -> Iterator[datetime]:
        number = max((instant - anchored_at) // step, 0)
        while True:
            number += 1
            yield anchored_at + number * step

    return after


def decide_fire(schedule: Schedule, rhythm: Rhythm, now: datetime, *, busy: bool) -> Decision | None:
    """Decide the first undecided fire; None when it is not due. `busy`: a job of the schedule has not ended.

    All that was missed is decided together; fires that are due but not late are decided one after the other.
    """
    fire_at = schedule.next_fire_at
    if fire_at is None or fire_at > now:
        return None
    in_time = now - LATE
    is_late = fire_at < in_time
    fires, next_fire_at = _until(fire_at, rhythm, in_time) if is_late else (1, next(rhythm(fire_at), None))
    reason = MISSED if is_late else None
    fire = not is_late or schedule.plan.missed is Missed.ONCE
    if fire and busy and schedule.plan.overlap is Overlap.SKIP:
        fire, reason = False, OVERLAP
    return Decision(fire_at, fires, fire, reason, next_fire_at)


def decide_resume(schedule: Schedule, rhythm: Rhythm, now: datetime) -> Decision | None:
    """Decide what was due while the schedule was paused: nothing of it fires. None when nothing was."""
    fire_at = schedule.next_fire_at
    if fire_at is None or fire_at > now:
        return None
    just_after = now + timedelta.resolution
    fires, next_fire_at = _until(fire_at, rhythm, just_after)
    return Decision(fire_at, fires, fire=False, reason=PAUSED, next_fire_at=next_fire_at)


def set_aside(schedule: Schedule, now: datetime) -> Decision | None:
    """Decide the first undecided fire of a schedule whose rhythm can not be told: nothing fires until it begins anew.

    None when it is not due.
    """
    fire_at = schedule.next_fire_at
    if fire_at is None or fire_at > now:
        return None
    return Decision(fire_at, 1, fire=False, reason=RHYTHM, next_fire_at=None, failed=True)


def preview(schedule: Schedule, rhythm: Rhythm) -> list[datetime]:
    """Return the next fires; none of a schedule that is paused."""
    if schedule.paused or schedule.next_fire_at is None:
        return []
    return [schedule.next_fire_at, *islice(rhythm(schedule.next_fire_at), PREVIEWED - 1)]


def _until(first: datetime, rhythm: Rhythm, end: datetime) -> tuple[int, datetime | None]:
    """Count the fires from `first` on, before `end`, as far as COUNTED_MAX; return the first one not before `end` too."""
    fires = 1
    for fire_at in rhythm(first):
        if fire_at >= end:
            return fires, fire_at
        if fires == COUNTED_MAX:
            return fires, next(rhythm(end - timedelta.resolution), None)
        fires += 1
    return fires, None
