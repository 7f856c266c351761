"""Enqueueing once only: jobs with a unique key, and requests with an `Idempotency-Key`.

They touch rows that strangers may hold, so they never share a flush with plain jobs. Their line's flush waits for a
lock only shortly; if somebody holds one of the keys for longer, each call is tried alone, and who is in the way of
nobody is stored.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import NamedTuple
from uuid import UUID

from app.engine.batching import Batcher
from app.engine.maintenance import Maintenance
from app.engine.wakeup import Wakeups
from app.queue.errors import DuplicateJobError, JobNotFoundError, QueueError, UnavailableError
from app.queue.events import JobEnqueued, JobReplaced, Observer
from app.queue.lifecycle import State
from app.queue.model import IdempotencyKey, Job, JobRequest, NewJob
from app.store.database import is_blocked
from app.store.jobs import Jobs, Line, Place
from app.store.once import Answered, Call, Duplicate, Outcome, Refused, Repeat, Stored
from app.store.reads import Reads

LOCK_SECONDS = 0.5
"""How long a flush of several waits for a key that somebody else holds at that moment."""
ALONE_LOCK_SECONDS = 2.0
ALONE_SECONDS = 4.0
"""How long the calls of a flush that was held up are tried one by one, and how long each of them waits."""
TRIES_MAX = 5
"""How often a job is enqueued anew because the one that held its key was deleted before it could be shown."""

BYTES_PER_WEIGHT = 16 * 1024


class Enqueued(NamedTuple):
    """The job that a request to enqueue has come to."""

    job: Job
    duplicate: bool = False
    """Whether it was there before."""
    replaced: bool = False
    """Whether it has taken the request's fields."""


class Once:
    """Enqueues what has a key."""

    def __init__(
        self,
        jobs: Jobs,
        reads: Reads,
        observer: Observer,
        wakeups: Wakeups,
        maintenance: Maintenance,
        resolve: Callable[[JobRequest], Awaitable[NewJob]],
    ) -> None:
        self._jobs = jobs
        self._reads = reads
        self._observer = observer
        self._wakeups = wakeups
        self._maintenance = maintenance
        self._resolve = resolve
        self._line: Batcher[Call, Answered | Exception] = Batcher(
            self._flush, weight=_weight, key=_who, told=self._note
        )

    async def drained(self) -> None:
        """Wait until everything in line has been written."""
        await self._line.drained()

    async def enqueue(self, request: JobRequest, key: IdempotencyKey | None = None) -> Enqueued:
        """Store one job, or return the one that stands for it.

        Raises InvalidRequestError, DuplicateJobError, IdempotencyConflictError; JobNotFoundError when the job that
        the key stands for is not kept any more.
        """
        error: QueueError = DuplicateJobError()
        for _ in range(TRIES_MAX):
            answer = await self._line.submit(Call([await self._resolve(request)], key))
            match answer:
                case Exception():
                    raise answer
                case Repeat(ids):
                    return await self._repeated(ids[0])
                case [Stored(job)]:
                    return Enqueued(job)
                case [Refused(refusal)]:
                    raise refusal
                case [Duplicate(job_id, replaced)]:
                    job_or_none = await self._reads.job(job_id)
                    if job_or_none is not None:
                        return Enqueued(job_or_none, duplicate=True, replaced=replaced)
                    # Deleted meanwhile; or past its retention, while its window still lasts.
                    error = DuplicateJobError(job_id)
        raise error

    async def _repeated(self, job_id: UUID | None) -> Enqueued:
        if job_id is None:
            raise DuplicateJobError
        job = await self._reads.job(job_id)
        if job is None:
            raise JobNotFoundError
        return Enqueued(job, duplicate=True)

    async def _flush(self, calls: Sequence[Call]) -> Sequence[Answered | Exception]:
        answers: list[Answered | Exception] = []
        try:
            lock_seconds = LOCK_SECONDS if len(calls) > 1 else ALONE_LOCK_SECONDS
            answers += await self._jobs.store(calls, lock_seconds=lock_seconds)
        except UnavailableError as error:
            if not is_blocked(error):
                raise
            answers = [_busy()] if len(calls) == 1 else await self._one_by_one(calls)
        self.wake(outcome for answer in answers if isinstance(answer, list) for outcome in answer)
        return answers

    async def _one_by_one(self, calls: Sequence[Call]) -> list[Answered | Exception]:
        answers: list[Answered | Exception] = []
        clock = asyncio.get_running_loop().time
        until = clock() + ALONE_SECONDS
        for call in calls:
            if clock() > until:
                answers.append(_busy())
                continue
            try:
                answers += await self._jobs.store([call], lock_seconds=ALONE_LOCK_SECONDS)
            except UnavailableError as error:
                answers.append(_busy() if is_blocked(error) else error)
            except Exception as error:  # noqa: BLE001  # handed to the one who waits for it: others are stored already
                answers.append(error)
        return answers

    def wake(self, outcomes: Iterable[Outcome | None]) -> None:
        """Call whoever waits for what has become ready, and expect what will."""
        new: list[Place] = []
        old: list[Place] = []
        for outcome in outcomes:
            match outcome:
                case Stored(job) if job.state is State.READY:
                    new.append(Place(Line(job.queue, job.type), job.priority, job.created_at))
                case Stored(job):
                    self._maintenance.expect((job.run_at - job.created_at).total_seconds())
                case Duplicate(replacement=moved) if moved is not None and moved.state is State.READY:
                    place = Place(Line(moved.queue, moved.type), moved.priority, moved.since)
                    (old if moved.kept_place else new).append(place)
                case Duplicate(replacement=moved) if moved is not None:
                    self._maintenance.expect((moved.run_at - moved.now).total_seconds())
                case _:
                    pass
        self._wakeups.placed(new)
        self._wakeups.placed(old, old=True)

    def note(self, outcomes: Iterable[Outcome | None]) -> None:
        """Tell the observer what has been stored and replaced."""
        for outcome in outcomes:
            match outcome:
                case Stored(job):
                    self._observer.on(
                        JobEnqueued(job_id=job.id, queue=job.queue, type=job.type, state=job.state)
                    )
                case Duplicate(job_id, replacement=moved) if moved is not None:
                    self._observer.on(
                        JobReplaced(job_id=job_id, queue=moved.queue, type=moved.type, state=moved.state)
                    )
                case _:
                    pass

    def _note(self, answer: Answered | Exception) -> None:
        if isinstance(answer, list):
            self.note(answer)


def _who(call: Call) -> object:
    """Return what no two calls of a flush may share: an `Idempotency-Key`. Unique keys they may."""
    return id(call) if call.key is None else call.key[:3]


def _weight(call: Call) -> int:
    return sum(1 + len(job.payload) // BYTES_PER_WEIGHT for job in call.jobs if job is not None)


def _busy() -> UnavailableError:
    return UnavailableError("Another request holds this key at this moment; come back a little later.")
