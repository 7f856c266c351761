"""What operators do to jobs: cancel, retry, delete.

A method answers after the COMMIT of what it did, tells the observer, and calls who waits for what became ready.
"""

from collections.abc import Awaitable, Callable, Sequence
from uuid import UUID

from app.engine.wakeup import Wakeups
from app.queue.errors import DuplicateJobError, JobNotFoundError, UnavailableError, WrongStateError
from app.queue.events import CancelRequested, JobCancelled, JobDeleted, JobRetried, Observer
from app.queue.lifecycle import CANCELLABLE, RETRIABLE, TERMINAL, State
from app.queue.model import Job
from app.store.jobs import Jobs, Moved
from app.store.reads import Reads

LOOKS_MAX = 10
"""How often a verb looks again for a job that others move at that moment, before it gives up for now."""


class Operating:
    """The use cases. Methods raise JobNotFoundError, WrongStateError and UnavailableError."""

    def __init__(self, jobs: Jobs, reads: Reads, observer: Observer, wakeups: Wakeups) -> None:
        self._jobs = jobs
        self._reads = reads
        self._observer = observer
        self._wakeups = wakeups

    async def cancel(self, job_id: UUID) -> Job:
        """Cancel a job at once, or an active one at its worker's next word."""
        self._cancelled(
            await self._move(job_id, self._jobs.cancel, "cancelled", CANCELLABLE, State.CANCELLED)
        )
        return await self._job(job_id)

    async def retry(self, job_id: UUID) -> Job:
        """Bring a dead job back with a fresh budget. Raises DuplicateJobError when another has its unique key."""

        async def retry(job_ids: Sequence[UUID]) -> Sequence[Moved]:
            moved, taken = await self._jobs.retry(job_ids)
            if taken:
                raise DuplicateJobError(taken[job_id])
            return moved

        self._retried(await self._move(job_id, retry, "retried", RETRIABLE))
        return await self._job(job_id)

    async def delete(self, job_id: UUID) -> None:
        """Remove a terminal job."""
        self._deleted(await self._move(job_id, self._jobs.delete, "deleted", TERMINAL))

    def _cancelled(self, moved: Sequence[Moved]) -> None:
        for each in moved:
            event = CancelRequested if each.state is State.ACTIVE else JobCancelled
            self._observer.on(event(job_id=each.job_id, queue=each.queue, type=each.type))

    def _retried(self, moved: Sequence[Moved]) -> None:
        for each in moved:
            self._observer.on(JobRetried(job_id=each.job_id, queue=each.queue, type=each.type))
        self._wakeups.placed([each.place for each in moved if each.place is not None])

    def _deleted(self, moved: Sequence[Moved]) -> None:
        for each in moved:
            self._observer.on(JobDeleted(job_id=each.job_id, queue=each.queue, type=each.type))

    async def _job(self, job_id: UUID) -> Job:
        job = await self._reads.job(job_id)
        if job is None:
            raise JobNotFoundError
        return job

    async def _move(
        self,
        job_id: UUID,
        move: Callable[[Sequence[UUID]], Awaitable[Sequence[Moved]]],
        participle: str,
        allowed: frozenset[State],
        done: State | None = None,
    ) -> Sequence[Moved]:
        """Move a job by its id; nothing is moved when it already is where it should go."""
        for _ in range(LOOKS_MAX):
            moved = await move([job_id])
            if moved:
                return moved
            state = (await self._job(job_id)).state
            if state is done:
                return []
            if state not in allowed:
                raise WrongStateError(state, participle)
            # It may be moved, but was not there: another transaction was moving it. Look again, with new eyes.
        message = "The job is being moved by others again and again; try later."
        raise UnavailableError(message)
