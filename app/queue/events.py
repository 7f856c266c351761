"""What happened, told once to whoever observes: metrics, logs, tests.

An event is published after its COMMIT and never carries a payload, a result or an error text.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Protocol
from uuid import UUID

from app.queue.lifecycle import State
from app.queue.model import Directive, Outcome
from app.queue.scheduling import RunOutcome


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEvent:
    """Something happened to one job."""

    job_id: UUID
    queue: str
    type: str


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEnqueued(JobEvent):
    """A producer stored a job."""

    state: State


@dataclass(frozen=True, slots=True, kw_only=True)
class JobReplaced(JobEvent):
    """A job that waits has taken the fields of a new one with the same unique key."""

    state: State


@dataclass(frozen=True, slots=True, kw_only=True)
class JobLeased(JobEvent):
    """A worker took a job that had waited, ready, for `waited_seconds`."""

    worker: str | None
    attempt: int
    waited_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class JobProgressed(JobEvent):
    """A worker told how far it is with a job."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobCompleted(JobEvent):
    """A worker acked a job after `ran_seconds`."""

    worker: str | None
    attempt: int
    ran_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptEnded(JobEvent):
    """An attempt ended otherwise than by an ack; `state` is what became of the job."""

    worker: str | None
    attempt: int
    outcome: Outcome
    state: State
    ran_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelRequested(JobEvent):
    """Someone asked for the end of an active job; its worker learns of it at its next heartbeat."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobCancelled(JobEvent):
    """A waiting or delayed job was cancelled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobExpired(JobEvent):
    """A job's start deadline passed before any worker took it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRetried(JobEvent):
    """An operator gave a dead job a fresh retry budget."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEdited(JobEvent):
    """An operator changed fields of a job that no worker had."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobDeleted(JobEvent):
    """Someone deleted a terminal job."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobPromoted(JobEvent):
    """A delayed job became ready."""


class QueueChange(StrEnum):
    """What someone did to a queue."""

    CREATED = "created"
    POLICY = "policy"
    PAUSED = "paused"
    RESUMED = "resumed"
    DELETED = "deleted"


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueChanged:
    """Someone made, changed, paused, resumed or deleted a queue."""

    queue: str
    change: QueueChange


@dataclass(frozen=True, slots=True, kw_only=True)
class QueuePurged:
    """Someone removed all that waited or was delayed in a queue, so many jobs."""

    queue: str
    removed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LeasesReplayed:
    """A worker asked again under a request's name, and got the leases that it has already."""

    worker: str | None
    leases: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerDirected:
    """Someone told a worker to go on, to take no more jobs, or to end."""

    worker: str
    directive: Directive


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamReset:
    """A listener was told that something is missing.

    The reason is `resume` (he wants to go on from what is not there any more), `slow` (he read too slowly), or `missing`
    (processes could not tell each other all).
    """

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleRan:
    """A schedule's fire was decided, or somebody has triggered it; `reason` says why there is no job, or why so late."""

    schedule: str
    outcome: RunOutcome
    reason: str | None
    fires: int
    job_id: UUID | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MaintenanceRan:
    """One maintenance task ran: how many rows it changed, and how long it took."""

    task: str
    changed: int
    took_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MaintenanceFailed:
    """One maintenance task failed; it is tried again at the next round."""

    task: str
    error: str


class BulkVerb(StrEnum):
    """What operators do to many jobs at a time."""

    RETRY = "retry"
    CANCEL = "cancel"
    DELETE = "delete"
    UPDATE = "update"
    REDRIVE = "redrive"


@dataclass(frozen=True, slots=True, kw_only=True)
class BulkRan:
    """One call for many jobs was answered: how many matched, and how many it changed."""

    verb: BulkVerb
    matched: int
    changed: int
    finished: bool
    """Whether it has seen all; else its caller may go on from where it ended."""
    took_seconds: float


QueueEvent = (
    JobEvent
    | QueueChanged
    | QueuePurged
    | WorkerDirected
    | LeasesReplayed
    | StreamReset
    | MaintenanceRan
    | MaintenanceFailed
    | BulkRan
    | ScheduleRan
)


TOLD = frozenset(
    f"job.{name}"
    for name in (
        "enqueued",
        "leased",
        "progress",
        "completed",
        "retry",
        "released",
        "failed",
        "cancelled",
        "expired",
    )
)
"""The names of what is told to those who watch jobs from outside."""


class Happening(NamedTuple):
    """What an event is to those who watch jobs from outside."""

    name: str
    state: State
    """The job's state from then on."""


def told(event: QueueEvent) -> Happening | None:  # noqa: PLR0911  # one line a kind
    """Return what is told of `event` to those who watch jobs; None when nothing is."""
    match event:
        case JobEnqueued():
            return Happening("job.enqueued", event.state)
        case JobReplaced():
            return Happening("job.replaced", event.state)
        case JobLeased():
            return Happening("job.leased", State.ACTIVE)
        case JobProgressed():
            return Happening("job.progress", State.ACTIVE)
        case JobCompleted():
            return Happening("job.completed", State.COMPLETED)
        case AttemptEnded():
            return Happening(_ENDS[event.state], event.state)
        case JobCancelled():
            return Happening("job.cancelled", State.CANCELLED)
        case JobExpired():
            return Happening("job.expired", State.EXPIRED)
        case JobRetried():
            return Happening("job.retry", State.READY)
        case _:
            return None


_ENDS = {
    State.READY: "job.released",
    State.SCHEDULED: "job.released",
    State.RETRY: "job.retry",
    State.FAILED: "job.failed",
    State.CANCELLED: "job.cancelled",
}


class Observer(Protocol):
    """Someone who is told what happened. `on` must be quick and must not raise."""

    def on(self, event: "QueueEvent") -> None:
        """Take note of `event`."""
