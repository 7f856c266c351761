"""Enqueueing once only, and many at once: jobs with a unique key, requests with an `Idempotency-Key`, batches.

Those with keys touch rows that strangers may hold, so they never share a flush with plain jobs. Their line's flush waits for a
lock only shortly; if somebody holds one of the keys for longer, each call is tried alone: at once those in whose way
nobody is, then the others. A batch is a transaction of its own, a few at a time.
"""

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import NamedTuple
from uuid import UUID

from app.engine.batching import Batcher
from app.engine.maintenance import Maintenance
from app.engine.wakeup import Wakeups
from app.queue.errors import (
    DuplicateJobError,
    InvalidItemsError,
    InvalidRequestError,
    JobNotFoundError,
    QueueError,
    UnavailableError,
)
from app.queue.events import JobEnqueued, JobReplaced, Observer
from app.queue.lifecycle import State
from app.queue.model import IdempotencyKey, Job, JobRequest, NewJob
from app.store.database import is_blocked
from app.store.jobs import Jobs, Line, Place
from app.store.once import Answered, Call, Duplicate, Outcome, Refused, Repeat, Stored, UndoneError
from app.store.reads import Reads

LOCK_SECONDS = 0.5
"""How long a flush of several waits for a key that somebody else holds at that moment."""
GLANCE_LOCK_SECONDS = 0.01
"""How long each call of a flush that was held up waits when all of them are tried one by one."""
ALONE_LOCK_SECONDS = 2.0
ALONE_SECONDS = 4.0
"""How long those that were held up again are tried once more, and how long each of them waits."""
TRIES_MAX = 5
"""How often a job is enqueued anew because the one that held its key was deleted before it could be shown."""

BATCHES_MAX = 2
"""How many batches are read and written at once."""
BATCHES_IN_LINE_MAX = 8
BATCH_WAIT_SECONDS = 5.0
BATCH_AGAIN_SECONDS = 5
BATCH_LOCK_SECONDS = 5.0
TOO_MANY_BATCHES = "There are too many batches at once; come back a little later, or send smaller ones."
SLICE = 200
"""After so many jobs of a batch others have their turn."""
STATES_AT_ONCE = 500

BYTES_PER_WEIGHT = 16 * 1024


class Enqueued(NamedTuple):
    """The job that a request to enqueue has come to."""

    job: Job
    duplicate: bool = False
    """Whether it was there before."""
    replaced: bool = False
    """Whether it has taken the request's fields."""


class Item(NamedTuple):
    """What came of one job of a batch."""

    job_id: UUID
    state: State
    duplicate: bool = False
    replaced: bool = False


class Once:
    """Enqueues what has a key."""

    def __init__(
        self,
        jobs: Jobs,
        reads: Reads,
        observer: Observer,
        wakeups: Wakeups,
        maintenance: Maintenance,
        resolve: Callable[[JobRequest, datetime | None], Awaitable[NewJob]],
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
        self._batches = asyncio.Semaphore(BATCHES_MAX)
        self._batches_in_line = 0

    async def drained(self) -> None:
        """Wait until everything in line has been written."""
        await self._line.drained()

    async def enqueue(self, request: JobRequest, key: IdempotencyKey | None = None) -> Enqueued:
        """Store one job, or return the one that stands for it.

        Raises InvalidRequestError, DuplicateJobError, IdempotencyConflictError; JobNotFoundError when the job that
        the key stands for is not kept any more. What can not be stored by now may be a repeat all the same.
        """
        error: QueueError = DuplicateJobError()
        for _ in range(TRIES_MAX):
            match await self._ask(request, key):
                case Exception() as refusal:
                    raise refusal
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

    async def _ask(self, request: JobRequest, key: IdempotencyKey | None) -> Answered | Exception:
        try:
            job = await self._resolve(request, None)
        except InvalidRequestError:
            answer = None if key is None else await self._jobs.earlier(key)
            if answer is None:
                raise
            return answer
        return await self._line.submit(Call([job], key))

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for a batch's turn: each takes much memory and a connection. Raises UnavailableError."""
        if self._batches_in_line >= BATCHES_IN_LINE_MAX:
            raise UnavailableError(TOO_MANY_BATCHES, BATCH_AGAIN_SECONDS)
        self._batches_in_line += 1
        try:
            async with asyncio.timeout(BATCH_WAIT_SECONDS):
                await self._batches.acquire()
        except TimeoutError:
            raise UnavailableError(TOO_MANY_BATCHES, BATCH_AGAIN_SECONDS) from None
        finally:
            self._batches_in_line -= 1
        try:
            yield
        finally:
            self._batches.release()

    async def batch(
        self, requests: Sequence[JobRequest | QueueError], key: IdempotencyKey | None, *, atomic: bool
    ) -> list[Item | QueueError]:
        """Store many jobs in one transaction; return what came of each, in order. Takes a `turn`.

        What is an error already is passed on, but where this is a repeat. With `atomic` all are stored or none: raises
        InvalidItemsError then. Raises IdempotencyConflictError.
        """
        wanted = await self._resolve_all(requests)
        answer = await self._store_all(wanted, key, atomic=atomic)
        if isinstance(answer, QueueError):
            raise answer
        outcomes: list[Outcome | None]
        if isinstance(answer, Repeat):
            outcomes = [_again(job_id, each) for job_id, each in zip(answer.job_ids, wanted, strict=True)]
        else:
            outcomes = answer
            await self.tell(outcomes)
        states = await self._states([each.job_id for each in outcomes if isinstance(each, Duplicate)])
        return [
            each if isinstance(each, QueueError) and outcome is None else _item(outcome, states)
            for each, outcome in zip(wanted, outcomes, strict=True)
        ]

    async def _store_all(
        self, wanted: Sequence[NewJob | QueueError], key: IdempotencyKey | None, *, atomic: bool
    ) -> Answered:
        new = [None if isinstance(each, QueueError) else each for each in wanted]
        if atomic and not all(new):
            # Perhaps an earlier call has stored them, when they could be.
            earlier = None if key is None else await self._jobs.earlier(key)
            if earlier is not None:
                return earlier
            _refuse_whole(wanted)
        if key is None and not any(new):
            return [None] * len(new)
        try:
            [answer] = await self._jobs.store([Call(new, key, atomic)], lock_seconds=BATCH_LOCK_SECONDS)
        except UndoneError as undone:
            _refuse_whole(each.error if isinstance(each, Refused) else each for each in undone.outcomes)
            raise
        return answer

    async def _resolve_all(self, requests: Sequence[JobRequest | QueueError]) -> list[NewJob | QueueError]:
        now = None
        wanted: list[NewJob | QueueError] = []
        for number, request in enumerate(requests):
            if number % SLICE == SLICE - 1:
                await asyncio.sleep(0)
            if isinstance(request, QueueError):
                wanted.append(request)
                continue
            if now is None and (request.expires_at or request.expires_in_seconds) is not None:
                now = await self._jobs.now()
            try:
                wanted.append(await self._resolve(request, now))
            except InvalidRequestError as error:
                wanted.append(error)
        return wanted

    async def tell(self, outcomes: Sequence[Outcome | None]) -> None:
        """Wake and note, a part at a time."""
        for begin in range(0, len(outcomes), SLICE):
            if begin:
                await asyncio.sleep(0)
            part = outcomes[begin : begin + SLICE]
            self.wake(part)
            self.note(part)

    async def _states(self, job_ids: Sequence[UUID]) -> dict[UUID, State]:
        states: dict[UUID, State] = {}
        for begin in range(0, len(job_ids), STATES_AT_ONCE):
            states |= await self._reads.states(job_ids[begin : begin + STATES_AT_ONCE])
        return states

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
        """Store each call by itself: first those in whose way nobody is, then the others, as far as there is time."""
        answers: dict[int, Answered | Exception] = {}
        await self._try_each(calls, range(len(calls)), GLANCE_LOCK_SECONDS, answers)
        blocked = [number for number in range(len(calls)) if number not in answers]
        await self._try_each(calls, blocked, ALONE_LOCK_SECONDS, answers, ALONE_SECONDS)
        return [answers.get(number) or _busy() for number in range(len(calls))]

    async def _try_each(
        self,
        calls: Sequence[Call],
        numbers: Iterable[int],
        lock_seconds: float,
        answers: dict[int, Answered | Exception],
        seconds: float = math.inf,
    ) -> None:
        """Store each call of these numbers, and note what came of it; those that are blocked have no answer."""
        clock = asyncio.get_running_loop().time
        until = clock() + seconds
        held: set[tuple[str, str]] = set()
        for number in numbers:
            call = calls[number]
            keys = {(job.queue, job.unique.key) for job in call.jobs if job is not None and job.unique}
            if clock() > until:
                return
            if keys & held:
                # Behind another one that waits for this key: it would wait as long, or overtake it.
                continue
            try:
                [answers[number]] = await self._jobs.store([call], lock_seconds=lock_seconds)
            except UnavailableError as error:
                if is_blocked(error):
                    held |= keys
                else:
                    answers[number] = error
            except Exception as error:  # noqa: BLE001  # handed to the one who waits for it: others are stored already
                answers[number] = error

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


def _again(job_id: UUID | None, wanted: NewJob | QueueError) -> Outcome | None:
    """Return what came of an item before; of one that was refused then, and is an error now, nothing."""
    if job_id is not None:
        return Duplicate(job_id)
    return None if isinstance(wanted, QueueError) else Refused(DuplicateJobError())


def _item(outcome: Outcome | None, states: Mapping[UUID, State]) -> Item | QueueError:
    match outcome:
        case Stored(job):
            return Item(job.id, job.state)
        case Duplicate(job_id, replaced) if job_id in states:
            return Item(job_id, states[job_id], duplicate=True, replaced=replaced)
        case Duplicate(job_id):
            # Deleted since, or past its retention while its window still lasts.
            return DuplicateJobError(job_id)
        case Refused(error):
            return error
        case None:
            message = "an item without an error has an outcome"
            raise AssertionError(message)


def _refuse_whole(items: Iterable[object]) -> None:
    """Raise InvalidItemsError if any of the items is an error."""
    problems = []
    for number, error in enumerate(items):
        place = f"jobs[{number}]"
        match error:
            case InvalidRequestError(field=field, message=message):
                problems.append((place if field == "body" else f"{place}.{field}", message))
            case DuplicateJobError():
                problems.append((f"{place}.unique", str(error)))
            case QueueError():
                problems.append((place, str(error)))
            case _:
                pass
    if problems:
        raise InvalidItemsError(problems)


def _who(call: Call) -> object:
    """Return what no two calls of a flush may share: an `Idempotency-Key`. Unique keys they may."""
    return id(call) if call.key is None else call.key[:3]


def _weight(call: Call) -> int:
    return sum(1 + len(job.payload) // BYTES_PER_WEIGHT for job in call.jobs if job is not None)


def _busy() -> UnavailableError:
    return UnavailableError("Another request holds this key at this moment; come back a little later.")
