"""What operators do to jobs: cancel, retry, delete, edit, one by one or many at a time.

A method answers after the COMMIT of what it did, tells the observer, and calls who waits for what became ready.
"""

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import NamedTuple
from uuid import UUID

from app.engine.policies import Policies
from app.engine.wakeup import Wakeups
from app.queue.editing import EDITABLE, Editable, Edited, JobEdit, edit
from app.queue.errors import (
    DuplicateJobError,
    JobNotFoundError,
    QueueError,
    UnavailableError,
    WrongStateError,
)
from app.queue.events import (
    BulkRan,
    BulkVerb,
    CancelRequested,
    JobCancelled,
    JobDeleted,
    JobEdited,
    JobEvent,
    JobRetried,
    Observer,
)
from app.queue.lifecycle import CANCELLABLE, RETRIABLE, TERMINAL, State
from app.queue.model import Job, JobFilter
from app.store.jobs import Jobs, Moved
from app.store.reads import Reads

LOOKS_MAX = 10
"""How often a verb looks again for a job that others move at that moment, before it gives up for now."""

STEP = 500
"""How many jobs a call for many changes in one transaction."""
LOOKED_AT = 2_000
"""How many a call for many looks at in one read, of each place."""
BULK_SECONDS = 20.0
"""After so long a call for many answers what it has done; its caller may go on."""

ALLOWED = {
    BulkVerb.RETRY: RETRIABLE,
    BulkVerb.CANCEL: CANCELLABLE,
    BulkVerb.DELETE: TERMINAL,
    BulkVerb.UPDATE: EDITABLE,
}
"""The states of the jobs that a verb touches; others do not match."""


class Position(NamedTuple):
    """Where a call for many has got to: behind one job's id, and up to which it goes."""

    after: UUID
    until: UUID


class Bulk(NamedTuple):
    """What a call for many did: how many jobs it found and changed, and where to go on if that was not all."""

    matched: int
    changed: int
    position: Position | None


Change = Callable[[Sequence[UUID]], Awaitable[Sequence[Moved]]]


class Operating:
    """The use cases. Methods raise JobNotFoundError, WrongStateError and UnavailableError.

    `expect` hears in how many seconds a job is due that has been delayed.
    """

    def __init__(
        self,
        jobs: Jobs,
        reads: Reads,
        observer: Observer,
        wakeups: Wakeups,
        policies: Policies,
        expect: Callable[[float], None],
        bulk_seconds: float = BULK_SECONDS,
    ) -> None:
        self._jobs = jobs
        self._reads = reads
        self._observer = observer
        self._wakeups = wakeups
        self._policies = policies
        self._expect = expect
        self.bulk_seconds = bulk_seconds

    async def cancel(self, job_id: UUID) -> Job:
        """Cancel a job at once, or an active one at its worker's next word."""
        await self._move(job_id, self._cancel, "cancelled", CANCELLABLE, State.CANCELLED)
        return await self._job(job_id)

    async def retry(self, job_id: UUID) -> Job:
        """Bring a dead job back with a fresh budget. Raises DuplicateJobError when another has its unique key."""

        async def retry(job_ids: Sequence[UUID]) -> Sequence[Moved]:
            moved, taken = await self._retry(job_ids)
            if taken:
                raise DuplicateJobError(taken[job_id])
            return moved

        await self._move(job_id, retry, "retried", RETRIABLE)
        return await self._job(job_id)

    async def delete(self, job_id: UUID) -> None:
        """Remove a terminal job."""
        await self._move(job_id, self._delete, "deleted", TERMINAL)

    async def edit(self, job_id: UUID, wanted: JobEdit) -> Job:
        """Change a job that no worker has. Raises InvalidRequestError for what this job can not take."""
        self._check(wanted)
        await self._move(
            job_id,
            lambda ids: self._edit(ids, lambda job, now: edit(job, wanted, now)),
            "changed",
            EDITABLE,
        )
        return await self._job(job_id)

    async def bulk(
        self,
        verb: BulkVerb,
        wanted: JobFilter,
        *,
        changes: JobEdit | None = None,
        dry_run: bool = False,
        position: Position | None = None,
    ) -> Bulk:
        """Take a verb for all jobs that match, in short transactions, the oldest job first.

        Jobs that were not there when the call began (at its first `position`) are not touched. What has been done
        stands: where the database goes away under way, the answer says where to go on.
        """
        if changes is not None:
            self._check(changes)
        states = ALLOWED[verb] & (frozenset(wanted.states) or ALLOWED[verb])
        if not states:
            return Bulk(0, 0, None)
        began = time.monotonic()
        wanted = replace(wanted, states=tuple(sorted(states)))
        if position is None:
            last = await self._reads.last_id(wanted.states)
            position = None if last is None else Position(UUID(int=0), last)
        change = None if dry_run else self._change(verb, wanted, changes)
        done = Bulk(0, 0, None) if position is None else await self._sweep(wanted, position, change, began)
        if not dry_run:
            self._observer.on(
                BulkRan(
                    verb=verb,
                    matched=done.matched,
                    changed=done.changed,
                    finished=done.position is None,
                    took_seconds=time.monotonic() - began,
                )
            )
        return done

    async def _sweep(
        self, wanted: JobFilter, position: Position, change: Change | None, began: float
    ) -> Bulk:
        """Go over all jobs step by step, and change those that match; without `change` only count them."""
        start = position
        matched = changed = 0
        while True:
            try:
                looked = await self._reads.look(wanted, LOOKED_AT, after=position.after, until=position.until)
                for step in _steps(looked.ids):
                    if position != start and self._is_over(began):
                        return Bulk(matched, changed, position)
                    if change is not None:
                        changed += len(await change(step))
                    matched += len(step)
                    position = position._replace(after=step[-1])
            except UnavailableError:
                if position == start:
                    raise
                return Bulk(matched, changed, position)
            if looked.last is None:
                return Bulk(matched, changed, None)
            position = position._replace(after=looked.last)
            if self._is_over(began):
                return Bulk(matched, changed, position)

    def _is_over(self, began: float) -> bool:
        return time.monotonic() - began >= self.bulk_seconds

    def _check(self, changes: JobEdit) -> None:
        if isinstance(changes.dead_letter_queue, str):
            self._policies.check_known("dead_letter_queue", changes.dead_letter_queue)

    def _change(self, verb: BulkVerb, wanted: JobFilter, changes: JobEdit | None) -> Change:
        match verb:
            case BulkVerb.CANCEL:
                return lambda ids: self._cancel(ids, wanted.states)
            case BulkVerb.DELETE:
                return lambda ids: self._delete(ids, wanted.states)
            case BulkVerb.UPDATE if changes is not None:
                return lambda ids: self._edit(ids, _lenient(changes, wanted.states))
            case _:
                return lambda ids: self._retry_free(ids, wanted.states)

    async def _cancel(
        self, job_ids: Sequence[UUID], states: Sequence[State] = tuple(CANCELLABLE)
    ) -> Sequence[Moved]:
        moved = await self._jobs.cancel(job_ids, states)
        for each in moved:
            self._tell(CancelRequested if each.state is State.ACTIVE else JobCancelled, each)
        return moved

    async def _retry(
        self, job_ids: Sequence[UUID], states: Sequence[State] = tuple(RETRIABLE)
    ) -> tuple[Sequence[Moved], Mapping[UUID, UUID]]:
        moved, taken = await self._jobs.retry(job_ids, states)
        for each in moved:
            self._tell(JobRetried, each)
        self._wakeups.placed([each.place for each in moved if each.place is not None])
        return moved, taken

    async def _retry_free(self, job_ids: Sequence[UUID], states: Sequence[State]) -> Sequence[Moved]:
        """Retry many: one whose unique key another job has stays where it is."""
        moved, _ = await self._retry(job_ids, states)
        return moved

    async def _delete(
        self, job_ids: Sequence[UUID], states: Sequence[State] = tuple(TERMINAL)
    ) -> Sequence[Moved]:
        moved = await self._jobs.delete(job_ids, states)
        for each in moved:
            self._tell(JobDeleted, each)
        return moved

    async def _edit(
        self, job_ids: Sequence[UUID], decide: Callable[[Editable, datetime], Edited | None]
    ) -> Sequence[Moved]:
        moved = await self._jobs.edit(job_ids, decide)
        for each in moved:
            self._tell(JobEdited, each)
            if each.due_in_seconds is not None:
                self._expect(each.due_in_seconds)
        # One that kept its place in line may stand behind the cursors: its priority or its type may be another.
        self._wakeups.placed([each.place for each in moved if each.place is not None], old=True)
        return moved

    def _tell(self, event: type[JobEvent], moved: Moved) -> None:
        self._observer.on(event(job_id=moved.job_id, queue=moved.queue, type=moved.type))

    async def _job(self, job_id: UUID) -> Job:
        job = await self._reads.job(job_id)
        if job is None:
            raise JobNotFoundError
        return job

    async def _move(
        self,
        job_id: UUID,
        move: Change,
        participle: str,
        allowed: frozenset[State],
        done: State | None = None,
    ) -> None:
        """Move a job by its id; nothing is moved when it already is where it should go."""
        for _ in range(LOOKS_MAX):
            if await move([job_id]):
                return
            state = (await self._job(job_id)).state
            if state is done:
                return
            if state not in allowed:
                raise WrongStateError(state, participle)
            # It may be moved, but was not there: another transaction was moving it. Look again, with new eyes.
        message = "The job is being moved by others again and again; try later."
        raise UnavailableError(message)


def _lenient(changes: JobEdit, states: Sequence[State]) -> Callable[[Editable, datetime], Edited | None]:
    """Return the rule for many: a job that is in another state, or can not take the changes, is left as it is."""

    def decide(job: Editable, now: datetime) -> Edited | None:
        if job.state not in states:
            return None
        try:
            return edit(job, changes, now)
        except QueueError:
            return None

    return decide


def _steps(job_ids: Sequence[UUID]) -> list[Sequence[UUID]]:
    return [job_ids[first : first + STEP] for first in range(0, len(job_ids), STEP)]
