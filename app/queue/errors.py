"""What can go wrong, in the queue's own words. `code` is stable: clients match on it, never on the text."""

from collections.abc import Mapping, Sequence
from typing import ClassVar
from uuid import UUID

from app.queue.lifecycle import State


class QueueError(Exception):
    """A request that the queue refuses; its text is a sentence for the person who reads the answer."""

    code: ClassVar[str]


class JobNotFoundError(QueueError):
    """There is no such job: never enqueued, deleted, or past its retention."""

    code = "not_found"

    def __init__(self) -> None:
        super().__init__(
            "There is no such job: it was never stored, or has been deleted, or its retention has ended."
        )


class QueueNotFoundError(QueueError):
    """There is no such queue: nobody has given it a policy, and it has no jobs."""

    code = "not_found"

    def __init__(self) -> None:
        super().__init__("There is no such queue: none of this name has a policy, or a job that is kept.")


class QueueNotEmptyError(QueueError):
    """Jobs of the queue are kept, so it can not be deleted."""

    code = "queue_not_empty"

    def __init__(self, kept: Mapping[str, int]) -> None:
        jobs = ", ".join(f"{count} {name}" for name, count in kept.items() if count)
        super().__init__(f"Jobs of this queue are kept ({jobs}): purge, finish and delete them first.")


class WorkerNotFoundError(QueueError):
    """There is no such worker: none of this name was heard of lately."""

    code = "not_found"

    def __init__(self) -> None:
        super().__init__("There is no such worker: none of this name was heard of in the last day.")


class ScheduleNotFoundError(QueueError):
    """There is no schedule of that name."""

    code = "not_found"

    def __init__(self) -> None:
        super().__init__("There is no schedule of that name.")


class LeaseLostError(QueueError):
    """The lease named is not the one that the job has now. Nothing was changed."""

    code = "lease_lost"

    def __init__(self, state: State) -> None:
        super().__init__(
            f"This lease does not stand any more; the job is {state}. Drop the work: nothing was changed."
        )
        self.state = state


class WrongStateError(QueueError):
    """The job's state does not allow what was asked."""

    code = "wrong_state"

    def __init__(self, state: State, verb: str) -> None:
        super().__init__(f"A job that is {state} can not be {verb}.")
        self.state = state


class DuplicateJobError(QueueError):
    """Another job holds the unique key, and the request does not want to give way to it. Nothing was changed."""

    code = "duplicate"

    def __init__(self, job_id: UUID | None = None) -> None:
        super().__init__(f"{'Another job' if job_id is None else f'The job {job_id}'} holds this unique key.")
        self.job_id = job_id


class IdempotencyConflictError(QueueError):
    """An earlier request had the same `Idempotency-Key` and another body. Nothing was changed."""

    code = "idempotency_conflict"

    def __init__(self) -> None:
        super().__init__("This Idempotency-Key stands for an earlier request with another body.")


class InvalidRequestError(QueueError):
    """A field's value is not acceptable."""

    code = "invalid"

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


class InvalidItemsError(QueueError):
    """Items of a request that is taken as a whole or not at all are not acceptable. Nothing was changed."""

    code = "invalid"

    def __init__(self, problems: Sequence[tuple[str, str]]) -> None:
        """Each problem names its field, and says what is wrong with it."""
        super().__init__(f"{len(problems)} of the items can not be taken, so none is.")
        self.problems = problems


class UnavailableError(QueueError):
    """The service can not answer now; the same request may succeed after `retry_after_seconds`.

    With `outcome_unknown` the connection died under way: what was asked may have happened or not.
    """

    code = "unavailable"

    def __init__(self, message: str, retry_after_seconds: int = 1, *, outcome_unknown: bool = False) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds
        self.outcome_unknown = outcome_unknown
