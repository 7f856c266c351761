"""What the queue talks about: frozen values, durations in seconds, instants as aware UTC datetimes.

`payload`, `result`, `metadata` and errors are JSON text as bytes: the queue stores and hands them on, it never
looks into them. What every request makes is a named tuple: a frozen dataclass costs four times as much to make.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from types import MappingProxyType
from typing import NamedTuple
from uuid import UUID

from app.queue.lifecycle import State

PRIORITY_MIN = 0
PRIORITY_MAX = 10
PRIORITIES: Mapping[str, int] = MappingProxyType({"fast": 10, "normal": 5, "bulk": 1})


class BackoffStrategy(StrEnum):
    """How the delay grows from one retry to the next."""

    EXPONENTIAL = "exponential"
    LINEAR = "linear"
    FIXED = "fixed"


class Jitter(StrEnum):
    """How much of a delay d is left to chance: none, the upper half, all of it."""

    NONE = "none"
    EQUAL = "equal"
    FULL = "full"


@dataclass(frozen=True, slots=True)
class Backoff:
    """How long a failed job waits before its next attempt."""

    strategy: BackoffStrategy = BackoffStrategy.EXPONENTIAL
    initial_seconds: float = 1.0
    factor: float = 2.0
    max_seconds: float = 3600.0
    jitter: Jitter = Jitter.EQUAL


@dataclass(frozen=True, slots=True)
class BackoffRequest:
    """The part of a backoff that a producer named; the rest comes from the defaults."""

    strategy: BackoffStrategy | None = None
    initial_seconds: float | None = None
    factor: float | None = None
    max_seconds: float | None = None
    jitter: Jitter | None = None


NOTHING_NAMED = BackoffRequest()


class UniqueScope(StrEnum):
    """How long a job holds its unique key."""

    QUEUED = "queued"
    """Until its first lease; a retry does not take it back."""
    UNFINISHED = "unfinished"
    """Until it ends."""
    WINDOW = "window"
    """For `window_seconds` from its creation, whatever becomes of it, unless it is deleted."""


class OnConflict(StrEnum):
    """What a new job does whose unique key another one holds."""

    RETURN = "return"
    """It gives way: the holder is answered."""
    REJECT = "reject"
    """It is refused."""
    REPLACE = "replace"
    """A holder that no worker has at this moment takes its fields; otherwise it gives way."""


class Unique(NamedTuple):
    """A key that only one job of a queue may hold at a time, and how long this job holds it."""

    key: str
    scope: UniqueScope = UniqueScope.UNFINISHED
    window_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class JobDefaults:
    """What a job gets where its producer named nothing."""

    lease_seconds: float = 30.0
    max_retries: int = 3
    backoff: Backoff = field(default_factory=Backoff)
    timeout_seconds: float | None = None
    priority: int = PRIORITIES["normal"]
    delay_seconds: float | None = None
    """Of jobs that name neither run_at nor delay_seconds."""
    expires_in_seconds: float | None = None
    """Counted from when the job may start."""
    dead_letter_queue: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobPolicy:
    """What jobs get that name nothing themselves; None leaves it to the next layer.

    What names or describes a single job (payload, tags, metadata, keys, instants) has no default.
    """

    priority: int | None = None
    delay_seconds: float | None = None
    lease_seconds: float | None = None
    timeout_seconds: float | None = None
    max_retries: int | None = None
    backoff: BackoffRequest = NOTHING_NAMED
    expires_in_seconds: float | None = None
    dead_letter_queue: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class QueuePolicy(JobPolicy):
    """How a queue treats its jobs: defaults for all, and for those of one type, and how long they are kept."""

    types: Mapping[str, JobPolicy] = field(default_factory=dict)
    retention_seconds: float | None = None
    """Of completed jobs; None: as the environment says."""
    dead_retention_seconds: float | None = None
    """Of failed, cancelled and expired jobs; None: as the environment says."""
    keep_payload: bool = True
    """Whether completed jobs keep their payload, tags and metadata."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Keeping:
    """How long jobs are kept that have ended, in seconds: completed ones; failed, cancelled and expired ones."""

    completed_seconds: float
    dead_seconds: float


class Queue(NamedTuple):
    """A queue that somebody has given a policy, or paused."""

    name: str
    policy: QueuePolicy
    paused: bool


class JobRequest(NamedTuple):
    """A job as its producer asks for it; None where nothing was named."""

    queue: str
    type: str = "default"
    payload: bytes = b"null"
    priority: int | None = None
    run_at: datetime | None = None
    delay_seconds: float | None = None
    lease_seconds: float | None = None
    timeout_seconds: float | None = None
    max_retries: int | None = None
    backoff: BackoffRequest = NOTHING_NAMED
    tags: tuple[str, ...] = ()
    metadata: bytes = b"{}"
    traceparent: str | None = None
    expires_at: datetime | None = None
    expires_in_seconds: float | None = None
    unique: Unique | None = None
    dead_letter_queue: str | None = None
    on_conflict: OnConflict = OnConflict.RETURN


class NewJob(NamedTuple):
    """A job with every field resolved, ready to be stored.

    At most one of run_at and delay_seconds is set. Of expires_at and expires_in_seconds the later holds.
    """

    id: UUID
    queue: str
    type: str
    payload: bytes
    priority: int
    run_at: datetime | None
    delay_seconds: float | None
    lease_seconds: float
    timeout_seconds: float | None
    max_retries: int
    backoff: Backoff
    tags: tuple[str, ...]
    metadata: bytes
    traceparent: str | None
    expires_at: datetime | None = None
    expires_in_seconds: float | None = None
    unique: Unique | None = None
    dead_letter_queue: str | None = None
    source: bytes | None = None
    """Of a dead letter's copy: where it came from, as JSON."""
    on_conflict: OnConflict = OnConflict.RETURN
    """What becomes of it when another job holds its unique key; not kept with it."""


class IdempotencyKey(NamedTuple):
    """What a client calls one of its requests, so that a repeat of it does nothing more."""

    owner: str
    """Whose it is: the keys of different clients do not meet."""
    path: str
    key: str
    body_hash: bytes


class Progress(NamedTuple):
    """How far a worker says it is."""

    percent: float | None
    message: str | None


class Job(NamedTuple):
    """A job as it stands."""

    id: UUID
    queue: str
    type: str
    state: State
    payload: bytes
    priority: int
    attempt: int
    budget_start: int
    """The attempt at which the present retry budget began: 0, or the attempt at the last manual retry."""
    max_retries: int
    backoff: Backoff
    lease_seconds: float
    timeout_seconds: float | None
    tags: tuple[str, ...]
    metadata: bytes
    traceparent: str | None
    created_at: datetime
    run_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    worker: str | None = None
    cancel_requested: bool = False
    reason: str | None = None
    last_error: bytes | None = None
    result: bytes | None = None
    expires_at: datetime | None = None
    """The start deadline."""
    unique: Unique | None = None
    dead_letter_queue: str | None = None
    source: bytes | None = None
    progress: Progress | None = None
    checkpoint: bytes | None = None
    then: Sequence[UUID] = ()
    """Of an ack's answer: the jobs that its follow-ups have come to."""

    @property
    def retry_count(self) -> int:
        """How many retries of the present budget have begun."""
        return max(self.attempt - self.budget_start - 1, 0)


class LeasedJob(NamedTuple):
    """A job in a worker's hands: what a lease reply carries."""

    id: UUID
    queue: str
    type: str
    payload: bytes
    attempt: int
    max_retries: int
    priority: int
    lease_id: UUID
    leased_at: datetime
    lease_expires_at: datetime
    ready_at: datetime
    """When it became ready: the start of its wait."""
    created_at: datetime
    run_at: datetime
    tags: tuple[str, ...]
    metadata: bytes
    traceparent: str | None
    last_error: bytes | None
    checkpoint: bytes | None = None
    """What an earlier attempt has kept to go on from."""
    source: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """A lease as the deciding rules see it, together with its job's retry policy."""

    job_id: UUID
    lease_id: UUID
    queue: str
    type: str
    worker: str | None
    attempt: int
    leased_at: datetime
    expires_at: datetime
    deadline_at: datetime | None
    """Where timeout_seconds ends the attempt, whatever heartbeats say."""
    cancel_requested: bool
    priority: int
    ready_at: datetime
    """Its place in line, which a released job keeps."""
    max_retries: int
    budget_start: int
    backoff: Backoff
    dead_letter_queue: str | None = None
    source: bytes | None = None


@dataclass(frozen=True, slots=True)
class WorkError:
    """What a worker says went wrong."""

    message: str
    type: str | None = None
    stack: str | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """A failed attempt: its error, and what the worker asks for."""

    error: WorkError
    retry: bool = True
    retry_in_seconds: float | None = None


class Outcome(StrEnum):
    """How an attempt ended."""

    ACKED = "acked"
    FAILED = "failed"
    RELEASED = "released"
    LEASE_EXPIRED = "lease_expired"
    TIMED_OUT = "timed_out"
    CANCELLED = "cancelled"


class Verb(StrEnum):
    """Which request ended an attempt; no verb where the maintenance ended it."""

    ACK = "ack"
    FAIL = "fail"
    RELEASE = "release"


class Copied(NamedTuple):
    """The copy of a dead letter that was enqueued with its verdict: ready at once."""

    job_id: UUID
    queue: str
    type: str
    priority: int
    ready_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What becomes of a job whose attempt ended otherwise than by an ack."""

    lease: Lease
    state: State
    """READY, SCHEDULED, RETRY, FAILED or CANCELLED."""
    outcome: Outcome
    attempt: int
    """The attempts that count from now on: a released one does not."""
    decided_at: datetime
    run_at: datetime | None = None
    reason: str | None = None
    error: WorkError | None = None
    copied: Copied | None = None


class Done(NamedTuple):
    """An attempt that was acked, when nobody asked for the whole job."""

    id: UUID
    queue: str
    type: str
    worker: str | None
    attempt: int
    started_at: datetime
    finished_at: datetime
    then: Sequence[UUID] = ()
    """The jobs that its follow-ups have come to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """The recorded answer to a verb that ended an attempt."""

    state: State
    run_at: datetime | None
    then: Sequence[UUID] = ()
    """Of an ack: the jobs that its follow-ups have come to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """The answer to a heartbeat."""

    job_id: UUID
    queue: str
    type: str
    worker: str | None
    lease_expires_at: datetime
    cancel_requested: bool
    progressed: bool
    """Whether it brought progress."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One attempt of a job, running or ended."""

    attempt: int
    worker: str | None
    started_at: datetime
    ended_at: datetime | None
    outcome: Outcome | None
    error: bytes | None


class Directive(StrEnum):
    """What an operator wants of a worker as a whole."""

    CONTINUE = "continue"
    QUIET = "quiet"
    """Take no more jobs; finish those in hand."""
    TERMINATE = "terminate"
    """Take no more jobs, and end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """A worker, as known from its leases and heartbeats."""

    name: str
    queues: tuple[str, ...]
    """What its leases ask for."""
    types: tuple[str, ...] | None
    active: int
    """How many leases it holds."""
    first_seen_at: datetime
    last_seen_at: datetime
    directive: Directive


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFilter:
    """Which jobs a listing or a bulk verb wants; an empty tuple or None asks for all."""

    ids: tuple[UUID, ...] = ()
    states: tuple[State, ...] = ()
    queues: tuple[str, ...] = ()
    types: tuple[str, ...] = ()
    tag: str | None = None
    worker: str | None = None
    error: str | None = None
    """An error group, or the exact type of an error."""
    created_after: datetime | None = None
    created_before: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureGroup:
    """Failed jobs of one queue whose last errors are alike."""

    error_group: str
    type: str | None
    message: str
    """Of the sample's error, as is the type."""
    count: int
    first_at: datetime
    """When the first of those that are kept failed."""
    last_at: datetime
    sample_job_id: UUID
    """The youngest of them."""


Decide = Callable[[Lease, datetime], Verdict]
"""A rule: what becomes of this lease's job, at this instant of the database's clock."""


class Ack(NamedTuple):
    """A worker's word that a job is done."""

    job_id: UUID
    lease_id: UUID
    result: bytes | None
    shown: bool = True
    """Whether its worker gets to see the job as it stands then."""
    then: tuple[NewJob, ...] = ()
    """The jobs to enqueue in the same transaction."""


@dataclass(frozen=True, slots=True)
class Ending:
    """A worker's word that an attempt is over but its job is not done: the rule says what becomes of it."""

    job_id: UUID
    lease_id: UUID
    verb: Verb
    decide: Decide


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A worker's word that it is still at work; None extends by the lease's own length."""

    job_id: UUID
    lease_id: UUID
    extend_seconds: float | None
    progress: Progress | None = None
    checkpoint: bytes | None = None


Word = Ack | Ending | Heartbeat
"""What a worker says of a job that it has leased."""
