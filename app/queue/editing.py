"""What may be changed of a job that no worker has, and what becomes of it then."""

from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from enum import Enum
from typing import NamedTuple, TypeVar
from uuid import UUID

from app.queue.errors import InvalidRequestError, WrongStateError
from app.queue.lifecycle import RETRIABLE, State
from app.queue.model import Backoff, BackoffRequest
from app.queue.policy import DEADLINE_TOO_EARLY, check_dead_letter_queue, merge_backoff

EDITABLE = frozenset({State.SCHEDULED, State.READY, State.HELD, State.RETRY}) | RETRIABLE


class Kept(Enum):
    """What is said of a field that stays as it is: None would clear it."""

    KEPT = "kept"


KEPT = Kept.KEPT
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEdit:
    """The changes that somebody wants; at most one of run_at and delay_seconds, and of the two for the deadline.

    The queue and the unique key make a job the one that it is, and can not be changed.
    """

    type: str | Kept = KEPT
    payload: bytes | Kept = KEPT
    priority: int | Kept = KEPT
    run_at: datetime | Kept = KEPT
    delay_seconds: float | Kept = KEPT
    lease_seconds: float | Kept = KEPT
    timeout_seconds: float | Kept | None = KEPT
    max_retries: int | Kept = KEPT
    backoff: BackoffRequest | Kept = KEPT
    tags: tuple[str, ...] | Kept = KEPT
    metadata: bytes | Kept = KEPT
    expires_at: datetime | Kept | None = KEPT
    expires_in_seconds: float | Kept = KEPT
    dead_letter_queue: str | Kept | None = KEPT

    @property
    def is_empty(self) -> bool:
        """Whether it changes nothing."""
        return all(getattr(self, field.name) is KEPT for field in fields(self))


class Editable(NamedTuple):
    """A job as the rules for its change see it."""

    id: UUID
    queue: str
    state: State
    attempt: int
    type: str
    priority: int
    run_at: datetime
    lease_seconds: float
    timeout_seconds: float | None
    max_retries: int
    backoff: Backoff
    expires_at: datetime | None
    dead_letter_queue: str | None


class Edited(NamedTuple):
    """A job's fields as they are to be; None of payload, tags and metadata leaves them as they are."""

    id: UUID
    type: str
    priority: int
    due_at: datetime | None
    """When it is to be ready; None leaves it where it stands."""
    lease_seconds: float
    timeout_seconds: float | None
    max_retries: int
    backoff: Backoff
    tags: tuple[str, ...] | None
    metadata: bytes | None
    payload: bytes | None
    expires_at: datetime | None
    dead_letter_queue: str | None


def edit(job: Editable, wanted: JobEdit, now: datetime) -> Edited:
    """Return what becomes of a job. Raises WrongStateError, and InvalidRequestError for what it can not take.

    What has had its effect can not be changed: the start deadline of a job that has been started, and of one that has
    ended also when it is due. A retry makes it ready at once.
    """
    if job.state not in EDITABLE:
        raise WrongStateError(job.state, "changed")
    due_at = _due_at(wanted, now)
    expires_at = _deadline(wanted, job, now)
    if job.state in RETRIABLE:
        if due_at is not None:
            raise InvalidRequestError("run_at", f"is not for a job that is {job.state}: retry it")
        if expires_at != job.expires_at:
            raise InvalidRequestError("expires_at", f"is not for a job that is {job.state}")
    elif expires_at is not None and job.attempt == 0:
        is_new = expires_at != job.expires_at
        if (is_new or due_at is not None) and expires_at < (due_at or max(now, job.run_at)):
            raise InvalidRequestError("expires_at", DEADLINE_TOO_EARLY)
    dead_letter_queue = _of(wanted.dead_letter_queue, job.dead_letter_queue)
    if dead_letter_queue is not None and dead_letter_queue != job.dead_letter_queue:
        check_dead_letter_queue(job.queue, dead_letter_queue)
    return Edited(
        id=job.id,
        type=_of(wanted.type, job.type),
        priority=_of(wanted.priority, job.priority),
        due_at=due_at,
        lease_seconds=_of(wanted.lease_seconds, job.lease_seconds),
        timeout_seconds=_of(wanted.timeout_seconds, job.timeout_seconds),
        max_retries=_of(wanted.max_retries, job.max_retries),
        backoff=job.backoff
        if isinstance(wanted.backoff, Kept)
        else merge_backoff(wanted.backoff, job.backoff),
        tags=_of(wanted.tags, None),
        metadata=_of(wanted.metadata, None),
        payload=_of(wanted.payload, None),
        expires_at=expires_at,
        dead_letter_queue=dead_letter_queue,
    )


def _of(wanted: T | Kept, otherwise: T) -> T:
    return otherwise if isinstance(wanted, Kept) else wanted


def _due_at(wanted: JobEdit, now: datetime) -> datetime | None:
    if not isinstance(wanted.run_at, Kept):
        return max(wanted.run_at, now)
    if not isinstance(wanted.delay_seconds, Kept):
        return now + timedelta(seconds=wanted.delay_seconds)
    return None


def _deadline(wanted: JobEdit, job: Editable, now: datetime) -> datetime | None:
    expires_at = _of(wanted.expires_at, job.expires_at)
    if not isinstance(wanted.expires_in_seconds, Kept):
        expires_at = now + timedelta(seconds=wanted.expires_in_seconds)
    if expires_at != job.expires_at and job.state not in RETRIABLE and job.attempt > 0:
        raise InvalidRequestError("expires_at", "has had its effect: the job has been started")
    return expires_at
