"""The rules of unique keys: who holds one, and what becomes of a new job that wants it.

A key's row says which job took it last. Whether that job still holds it is asked only when another one wants it, so
a job that is leased or ends has nothing to give back.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple
from uuid import UUID

from app.queue.lifecycle import State
from app.queue.model import NewJob, OnConflict, UniqueScope

REPLACEABLE = frozenset({State.READY, State.SCHEDULED, State.RETRY, State.HELD})
"""The states in which a holder may take the fields of a new job: no worker has it at that moment."""


class Holder(NamedTuple):
    """The job that took a key last, and what decides whether it still holds it."""

    job_id: UUID
    scope: UniqueScope
    until: datetime | None
    """Where its window ends."""
    state: State | None
    """None when it has ended, or is gone."""
    started: bool
    """Whether a worker has ever had it."""


def holds(holder: Holder, now: datetime) -> bool:
    """Whether the key is still taken."""
    match holder.scope:
        case UniqueScope.QUEUED:
            return holder.state in REPLACEABLE and not holder.started
        case UniqueScope.UNFINISHED:
            return holder.state is not None
        case UniqueScope.WINDOW:
            return holder.until is not None and holder.until > now


def needs_key(scope: UniqueScope, until: datetime | None, now: datetime, *, started: bool) -> bool:
    """Whether a dead job that comes back needs its key again: not where even as a living one it would not hold it."""
    match scope:
        case UniqueScope.QUEUED:
            return not started
        case UniqueScope.UNFINISHED:
            return True
        case UniqueScope.WINDOW:
            return until is not None and until > now


def to_store(rivals: Sequence[NewJob]) -> NewJob:
    """Return the job to store for several that want one free key: the first, with the fields of the last to replace it."""
    first = rivals[0]
    replacing = to_replace_with(rivals[1:])
    return first if replacing is None else replacing._replace(id=first.id)


def to_replace_with(rivals: Sequence[NewJob]) -> NewJob | None:
    """Return the job whose fields the holder is to take; None when none of the rivals wants that."""
    return next((job for job in reversed(rivals) if job.on_conflict is OnConflict.REPLACE), None)
