"""The use cases: the one door to the queue for the API, the dashboard and the command line.

A method answers after the COMMIT of what it did, tells the observer, and calls who waits for what became ready.
Methods raise the errors of `app.queue.errors`; UnavailableError of all of them.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType
from typing import Any, TypeVar
from uuid import UUID

from uuid_utils.compat import uuid7

from app.engine.batching import Batcher
from app.engine.copies import Copies
from app.engine.cursors import Cursors
from app.engine.explaining import Explaining
from app.engine.leasing import Claims, LeaseRequest
from app.engine.maintenance import Maintenance, copy_places, events_of, ready_places
from app.engine.once import Once
from app.engine.operating import Operating
from app.engine.policies import Policies
from app.engine.queues import Queues
from app.engine.redriving import Redriving
from app.engine.retention import Retention
from app.engine.running import TaskOwner
from app.engine.schedules import Schedules
from app.engine.streams import Streams
from app.engine.wakeup import Waiter, Wakeups
from app.engine.watching import Watching
from app.engine.workers import Workers
from app.queue.errors import (
    InvalidRequestError,
    JobNotFoundError,
    LeaseLostError,
    QueueError,
    UnavailableError,
)
from app.queue.events import (
    JobCompleted,
    JobEnqueued,
    JobLeased,
    JobProgressed,
    LeasesReplayed,
    Observer,
)
from app.queue.lifecycle import State, summed_up
from app.queue.model import (
    Ack,
    Attempt,
    Beat,
    Done,
    Ending,
    Failure,
    FailureGroup,
    Heartbeat,
    Job,
    JobDefaults,
    JobFilter,
    JobRequest,
    Keeping,
    LeasedJob,
    NewJob,
    Settled,
    Verb,
    Verdict,
    Word,
)
from app.queue.policy import check_deadline, decide_failure, decide_release, needs_clock
from app.store.database import Database
from app.store.jobs import BEGINNING, Claim, Jobs, Line, Place
from app.store.once import Outcome
from app.store.queues import TOPIC as QUEUES
from app.store.queues import StoredQueues
from app.store.reads import Reads, WorkerSeen
from app.store.redriving import StoredDeadLetters
from app.store.retained import Retained
from app.store.schedules import ScheduleStore
from app.store.standing import Standing
from app.store.workers import TOPIC as WORKERS
from app.store.workers import StoredWorkers

LOOKS_AT_ONCE_MAX = 4
"""How often a lease looks, without a pause, while others hold what is ready: most often they have taken it by then, and
the next look sees what is behind."""

CONTENDED_PAUSE_SECONDS = 0.02

BYTES_PER_WEIGHT = 16 * 1024
"""A batch of BATCH_MAX carries some 8 MB at most, but for one item that is larger by itself."""

Said = Job | Done | Verdict | Settled | Beat
"""What comes of a worker's word: of an ack the job, of an ending its verdict (or the recorded answer), of a heartbeat
the lease's new end."""

T = TypeVar("T")
Answered = TypeVar("Answered", bound=Said)

GIVE_BACK_SECONDS_MAX = 5.0

READINESS_SECONDS_MAX = 2.0


@dataclass(frozen=True, slots=True)
class Stats:
    """How many jobs are kept, under the names of the HTTP API, in all and by queue."""

    jobs: dict[str, int]
    queues: dict[str, dict[str, int]]


@dataclass(frozen=True, slots=True)
class Health:
    """How the parts are. `problem` is a sentence when the service should get no requests now."""

    problem: str | None
    database: bool
    listening: bool
    maintenance_seconds_ago: float | None
    workers: list[WorkerSeen]
    stats: Stats | None
    oldest_ready_seconds: dict[str, float]


class Service:
    """The queue, as one process offers it."""

    def __init__(
        self,
        database: Database,
        jobs: Jobs,
        observer: Observer,
        defaults: JobDefaults,
        keeping: Keeping,
        *,
        create_queues: bool,
        maintenance_seconds: float,
        poll_seconds: float,
        max_lease_waiters: int,
        watching: Watching,
        streams: Streams,
    ) -> None:
        self._database = database
        self._jobs = jobs
        self._reads = Reads(database)
        self._observer = observer
        self._max_lease_waiters = max_lease_waiters
        self._draining = False
        self._owner = TaskOwner()
        self._enqueues = Batcher(self._store, weight=_weight, told=self._stored)
        self._cursors = Cursors()
        stored = StoredQueues(database)
        self.policies = Policies(stored, defaults, keeping, strict=not create_queues)
        self._claims = Claims(
            jobs,
            self._cursors,
            lambda: self.policies.paused,
            lambda claim: self._owner.spawn(self._give_back(claim)),
        )
        self._acks = Batcher(self._grouped(jobs.ack), weight=_weight, key=_job_id, told=self._note)
        self._endings = Batcher(self._grouped(jobs.conclude), key=_job_id, told=self._note)
        self._heartbeats = Batcher(
            self._grouped(jobs.heartbeat), weight=_weight, key=_job_id, told=self._note
        )
        self.watching = watching
        self.streams = streams
        self.wakeups = Wakeups(
            database,
            jobs,
            self._cursors,
            poll_seconds,
            lambda: self.policies.paused,
            lambda topics: self.copies.hint(topics),  # noqa: PLW0108  # each of the two needs the other
        )
        streams.attach(self.wakeups)
        self.copies = Copies(stored.change_numbers, self.wakeups.tell_change)
        self.copies.keep(QUEUES, self._load_policies)
        self.queues = Queues(stored, self.copies, observer, jobs.now, self.oldest_ready_seconds)
        self.operating = Operating(
            jobs,
            self._reads,
            observer,
            self.wakeups,
            self.policies,
            lambda seconds: self.maintenance.expect(seconds),  # noqa: PLW0108  # made later
        )
        self.redriving = Redriving(
            StoredDeadLetters(database, jobs), self._reads, jobs.now, observer, self.wakeups, self.policies
        )
        self.workers = Workers(StoredWorkers(database, jobs.clock), self.copies, observer)
        self.copies.keep(WORKERS, self.workers.load)
        self.schedules = Schedules(
            ScheduleStore(database, jobs),
            observer,
            make=self._made,
            job=self.job,
            stored=self._tell_stored,
            # There is no maintenance yet.
            expect=lambda due_seconds: self.maintenance.expect_fire(due_seconds),  # noqa: PLW0108
        )
        self.maintenance = Maintenance(
            jobs,
            self.schedules,
            self.wakeups,
            observer,
            Retention(jobs, Retained(database), self.policies),
            maintenance_seconds,
        )
        self.once = Once(jobs, self._reads, observer, self.wakeups, self.maintenance, self._resolved)
        self.explaining = Explaining(self._reads, Standing(database, jobs.clock), self._cursors, self.workers)

    async def start(self) -> None:
        """Begin to listen for hints and to do maintenance; the copies must have been loaded."""
        await self.copies.start()
        await self.wakeups.start()
        await self.watching.start()
        await self.workers.start()
        await self.streams.start()
        await self.maintenance.start()

    def drain(self) -> None:
        """Be ready to stop: whoever waits is answered at once, new leases are refused, everything else goes on."""
        self._draining = True
        self.wakeups.send_all_away()
        self.watching.send_all_away()
        self.streams.send_all_away()

    async def stop(self) -> None:
        """Stop what runs in the background; requests must have ended."""
        self.drain()
        await self.maintenance.stop()
        await self.watching.stop()
        await self.workers.stop()
        await self.streams.stop()
        for line in (self._enqueues, self._claims, self._acks, self._endings, self._heartbeats):
            await line.drained()
        await self.once.drained()
        await self._owner.settle(GIVE_BACK_SECONDS_MAX)
        await self.wakeups.stop()
        await self.copies.stop()

    async def enqueue(self, request: JobRequest) -> Job:
        """Store one job that has no unique key.

        Raises InvalidRequestError for what its queue does not take, or a deadline before it is due.
        """
        return await self._enqueues.submit(await self._resolved(request))

    async def lease(self, wanted: LeaseRequest, gone: "asyncio.Future[object]") -> Sequence[LeasedJob]:
        """Take jobs, waiting for the first at most `wait_seconds`; an empty list when there are none for this worker.

        `gone` is done when nobody is there any more to take the answer: then nothing is leased, or what was
        leased meanwhile is released uncounted.
        """
        if self._draining:
            message = "The service is stopping."
            raise UnavailableError(message)
        if self.wakeups.waiters >= self._max_lease_waiters:
            message = f"There are {self._max_lease_waiters} waiting leases already; come back a little later."
            raise UnavailableError(message, retry_after_seconds=5)
        until = asyncio.get_running_loop().time() + wanted.wait_seconds
        self.workers.asks(wanted)
        # One that is to take no jobs waits all the same: a client that knows nothing of directives must not ask again
        # and again.
        lines = wanted.lines if self.workers.may_lease(wanted.worker) else ()
        with self.wakeups.waiting(lines) as waiter, self.workers.attending(wanted.worker, waiter):
            if not lines:
                # What it holds already it may be told again.
                return await self._replayed(wanted, gone) or await self._sit_out(waiter, until, gone)
            leased = await self._lease(wanted, waiter, until, gone)
            if not leased and wanted.wait_seconds > 0:
                # Another process may have leased for a twin of it meanwhile.
                return await self._replayed(wanted, gone)
            return leased

    async def _replayed(self, wanted: LeaseRequest, gone: "asyncio.Future[object]") -> Sequence[LeasedJob]:
        """Return what stands under the request's name, if it has one."""
        if wanted.request_id is None or gone.done():
            return []
        claim = await self._claims.replay(wanted.request_id)
        if claim.jobs:
            self._observer.on(LeasesReplayed(worker=wanted.worker, leases=len(claim.jobs)))
        return claim.jobs

    async def _sit_out(
        self, waiter: Waiter, until: float, gone: "asyncio.Future[object]"
    ) -> Sequence[LeasedJob]:
        await waiter.called(until, gone)
        return []

    async def _lease(
        self, wanted: LeaseRequest, waiter: Waiter, until: float, gone: "asyncio.Future[object]"
    ) -> Sequence[LeasedJob]:
        loop = asyncio.get_running_loop()
        looks = 0
        while not gone.done() and self.workers.may_lease(wanted.worker):
            waiter.listen()
            claim = await self._claim(wanted, gone)
            if gone.done():
                break
            if claim.jobs:
                waiter.looked(Line(job.queue, job.type) for job in claim.jobs)
                return claim.jobs
            looks += 1
            if claim.contended and looks < LOOKS_AT_ONCE_MAX:
                continue
            if self._draining or loop.time() >= until:
                break
            if claim.contended:
                # Others hold all that is ready. What they take is theirs, but what they let go calls nobody.
                await asyncio.sleep(CONTENDED_PAUSE_SECONDS * random.uniform(0.5, 1.5))
                continue
            waiter.looked(())
            if not await waiter.called(until, gone):
                break
        return []

    async def ack(
        self, job_id: UUID, lease_id: UUID, result: bytes | None, then: Sequence[JobRequest] = ()
    ) -> Job:
        """Finish a job, and enqueue its follow-ups in the same transaction.

        Raises JobNotFoundError, LeaseLostError, DuplicateJobError, and InvalidRequestError for a follow-up that its
        queue does not take.
        """
        new, error = await self.follow_ups(then)
        ack = Ack(job_id, lease_id, result, then=new)
        answer = await self._say(ack, {} if error is None else {job_id: error})
        if isinstance(answer, Job):
            return answer
        return (await self.job(job_id))._replace(then=answer.then if isinstance(answer, Settled) else ())

    async def follow_ups(
        self, requests: Sequence[JobRequest]
    ) -> tuple[tuple[NewJob, ...], InvalidRequestError | None]:
        """Return follow-ups as an ack takes them, or why it can not: the first one that its queue does not take."""
        jobs = []
        for number, request in enumerate(requests):
            try:
                jobs.append(await self._resolved(request))
            except InvalidRequestError as error:
                return (), InvalidRequestError(f"then[{number}].{error.field}", error.message)
        return tuple(jobs), None

    async def fail(self, job_id: UUID, lease_id: UUID, failure: Failure) -> Settled:
        """End an attempt that failed. Raises JobNotFoundError, LeaseLostError."""
        return _settled(await self._say(failed(job_id, lease_id, failure)))

    async def release(self, job_id: UUID, lease_id: UUID, delay_seconds: float) -> Settled:
        """Give a job back, its attempt uncounted. Raises JobNotFoundError, LeaseLostError."""
        return _settled(await self._say(released(job_id, lease_id, delay_seconds)))

    async def heartbeat(self, heartbeat: Heartbeat) -> Beat:
        """Extend a lease, and note what its worker tells. Raises JobNotFoundError, LeaseLostError."""
        answer = await self._say(heartbeat)
        assert isinstance(answer, Beat)  # noqa: S101  # there is no record of heartbeats to answer from
        return answer

    async def settle(
        self, words: Sequence[Word], refused: Mapping[UUID, QueueError] = MappingProxyType({})
    ) -> list[Said | QueueError]:
        """Take what a worker says of its jobs, each named once; return what came of each word, in order.

        The words on jobs in `refused` can not be taken any more: they get that error, but where they are repeats.

        One word joins the group commit of its kind, several are one transaction of their own. A word on a lease
        that the same verb has ended before gets the answer that was recorded; on another that does not stand, an
        error.
        """
        answers: Mapping[UUID, Said | QueueError] = {}
        taken = [word for word in words if word.job_id not in refused]
        if len(taken) > 1 or any(isinstance(word, Ack) and word.then for word in taken):
            answers = await self._jobs.settle(taken, self.once.tell)
            self._tell([answer for answer in answers.values() if not isinstance(answer, QueueError)])
        elif taken and (answer := await self._settle_one(taken[0])) is not None:
            answers = {taken[0].job_id: answer}
        recalled = await self._recall([word for word in words if word.job_id not in answers])
        for job_id, error in refused.items():
            if isinstance(recalled[job_id], LeaseLostError | JobNotFoundError):
                recalled[job_id] = error
        return [answers.get(word.job_id) or recalled[word.job_id] for word in words]

    async def job(self, job_id: UUID) -> Job:
        """Return a job as it stands. Raises JobNotFoundError."""
        return await self._reads.require(job_id)

    async def page(self, wanted: JobFilter, limit: int, before: UUID | None) -> tuple[list[Job], UUID | None]:
        """Return a page of jobs, newest first, and the id after which the next one begins."""
        return await self._reads.page(wanted, limit, before)

    async def attempts(self, job_id: UUID) -> list[Attempt]:
        """Return the job's attempts, oldest first. Raises JobNotFoundError."""
        attempts = await self._reads.attempts(job_id)
        if not attempts:
            await self.job(job_id)
        return attempts

    async def failures(self, queue: str) -> list[FailureGroup]:
        """Return the queue's failed jobs in groups of alike errors, the largest first."""
        return await self._reads.failures(queue)

    async def counts(self) -> dict[str, dict[State, int]]:
        """Count what is kept now, by queue and state."""
        return await self._reads.counts()

    async def stats(self) -> Stats:
        """Count what is kept now, as the HTTP API names it."""
        return _stats(await self.counts())

    async def oldest_ready_seconds(self, counts: Mapping[str, Mapping[State, int]]) -> dict[str, float]:
        """Return for each queue with ready jobs how long its oldest one has waited."""
        lines = [Line(queue) for queue, of in counts.items() if of.get(State.READY, 0) > 0]
        ahead = self._cursors.ahead(lines)
        found = await self._jobs.look(ahead, [1] * len(ahead))
        now = await self._jobs.now()
        oldest: dict[str, float] = {}
        for place in found:
            queue = place.line.queue
            oldest[queue] = max(oldest.get(queue, 0.0), (now - place.since).total_seconds())
        return oldest

    def pool_usage(self) -> tuple[int, int]:
        """Return how many connections the verbs' pool has, and how many of them are idle."""
        return self._database.hot.get_size(), self._database.hot.get_idle_size()

    async def maintenance_seconds_ago(self) -> float | None:
        """Return how long ago any process last did maintenance; None when none ever has."""
        return await self._reads.reaped_seconds_ago()

    async def readiness(self) -> str | None:
        """Return why this process should get no requests now, in a sentence; None when it should."""
        if self._draining:
            return "The service is stopping."
        try:
            async with asyncio.timeout(READINESS_SECONDS_MAX):
                await self._reads.ping()
        except (UnavailableError, TimeoutError):
            return "The database does not answer."
        return None

    async def health(self) -> Health:
        """Look at every part."""
        problem = await self.readiness()
        try:
            counts = await self.counts()
            return Health(
                problem=problem,
                database=True,
                listening=self.wakeups.listening.is_set(),
                maintenance_seconds_ago=await self.maintenance_seconds_ago(),
                workers=await self._reads.workers(),
                stats=_stats(counts),
                oldest_ready_seconds=await self.oldest_ready_seconds(counts),
            )
        except UnavailableError:
            return Health(
                problem=problem or "The database does not answer.",
                database=False,
                listening=self.wakeups.listening.is_set(),
                maintenance_seconds_ago=None,
                workers=[],
                stats=None,
                oldest_ready_seconds={},
            )

    async def _claim(self, wanted: LeaseRequest, gone: "asyncio.Future[object]") -> Claim:
        claim = await self._claims.claim(wanted)
        if gone.done():
            await self._give_back(claim)
            return Claim([], contended=False, claimed_at=claim.claimed_at)
        if claim.delivery is not None and claim.delivery.is_replay:
            self._observer.on(LeasesReplayed(worker=wanted.worker, leases=len(claim.jobs)))
            return claim
        for job in claim.jobs:
            self._observer.on(
                JobLeased(
                    job_id=job.id,
                    queue=job.queue,
                    type=job.type,
                    worker=wanted.worker,
                    attempt=job.attempt,
                    waited_seconds=_seconds_between(job.ready_at, job.leased_at),
                )
            )
        return claim

    async def _give_back(self, claim: Claim) -> None:
        """Release jobs that nobody is there to take. Leases that were handed out before, or again, stand."""
        endings = [released(job.id, job.lease_id, 0) for job in claim.jobs]
        if not endings:
            return
        if claim.delivery is None:
            answers = await self._jobs.conclude(endings)
        elif claim.delivery.is_replay:
            return
        else:
            answers = await self._jobs.take_back(claim.delivery, endings)
        self._tell(answers.values())

    async def _settle_one(self, word: Word) -> Said | None:
        batcher, write = self._way_of(word)
        answer: Said | None = await batcher.submit(word)
        if answer is None and await self._jobs.stands(word.job_id, word.lease_id):
            # In other hands at this moment: worth waiting for, but not for a whole group.
            async with self._database.aside():
                answer = (await write([word])).get(word.job_id)
            if answer is not None:
                self._tell([answer])
        return answer

    def _way_of(
        self, word: Word
    ) -> "tuple[Batcher[Any, Any], Callable[[Sequence[Any]], Awaitable[Mapping[UUID, Any]]]]":
        match word:
            case Ack():
                return self._acks, self._jobs.ack
            case Ending():
                return self._endings, self._jobs.conclude
            case Heartbeat():
                return self._heartbeats, self._jobs.heartbeat

    async def _say(self, word: Word, refused: Mapping[UUID, QueueError] = MappingProxyType({})) -> Said:
        [answer] = await self.settle([word], refused)
        if isinstance(answer, QueueError):
            raise answer
        return answer

    async def _load_policies(self) -> None:
        resumed = await self.policies.load()
        self._jobs.keeping_no_payload = self.policies.keeping_no_payload
        if resumed:
            # Who waits at a queue that goes on has heard nothing of what became ready there meanwhile.
            self.wakeups.look_soon()

    async def _resolved(self, request: JobRequest, now: datetime | None = None) -> NewJob:
        """Return the job as it is to be stored. `now` spares asking for it, where a start deadline needs it."""
        if now is None:
            now = await self._jobs.now() if needs_clock(request) else BEGINNING
        return self._made(request, now)

    def _made(self, request: JobRequest, now: datetime = BEGINNING) -> NewJob:
        job = self.policies.resolve(request, uuid7())
        if request.expires_at is not None or request.expires_in_seconds is not None:
            # With its queue's delay, where it names none.
            check_deadline(request._replace(delay_seconds=job.delay_seconds), now)
        return job

    async def _store(self, new: Sequence[NewJob]) -> list[Job]:
        jobs = await self._jobs.enqueue(new)
        places = []
        for job in jobs:
            if job.state is State.READY:
                places.append(Place(Line(job.queue, job.type), job.priority, job.created_at))
            else:
                self.maintenance.expect((job.run_at - job.created_at).total_seconds())
        self.wakeups.placed(places)
        return jobs

    def _stored(self, job: Job) -> None:
        self._observer.on(JobEnqueued(job_id=job.id, queue=job.queue, type=job.type, state=job.state))

    def _tell_stored(self, outcomes: Sequence[Outcome]) -> None:
        self.once.wake(outcomes)
        self.once.note(outcomes)

    def _grouped(
        self, write: Callable[..., Awaitable[Mapping[UUID, Answered]]]
    ) -> Callable[[Sequence[Word]], Awaitable[list[Answered | None]]]:
        """Let a verb write a group of words, and answer in their order; None for a lease that is lost, or held."""

        async def flush(words: Sequence[Word]) -> list[Answered | None]:
            answers = await write(words, wait=False)
            self._wake(answers.values())
            return [answers.get(word.job_id) for word in words]

        return flush

    def _tell(self, answers: Collection[Said]) -> None:
        for answer in answers:
            self._note(answer)
        self._wake(answers)

    def _note(self, answer: Said | None) -> None:
        """Tell the observer what came of a word."""
        match answer:
            case Job() | Done():
                self._observer.on(_completed(answer))
            case Verdict():
                for event in events_of(answer):
                    self._observer.on(event)
            case Beat():
                self.workers.beats(answer.worker)
                if answer.progressed:
                    self._observer.on(
                        JobProgressed(job_id=answer.job_id, queue=answer.queue, type=answer.type)
                    )
            case _:
                pass

    def _wake(self, answers: Iterable[Said]) -> None:
        """Call whoever waits for what has become ready, and expect what will."""
        verdicts = [answer for answer in answers if isinstance(answer, Verdict)]
        if verdicts:
            self.wakeups.placed(ready_places(verdicts), old=True)
            self.wakeups.placed(copy_places(verdicts))
            self.maintenance.delayed(verdicts)

    async def _recall(self, words: Sequence[Word]) -> dict[UUID, Settled | QueueError]:
        """Return the recorded answers to words whose leases do not stand, or why there is none."""
        if not words:
            return {}
        try:
            return await self._looked_up(words)
        except UnavailableError as error:
            # Other words of the same call are settled, and must be answered.
            return {word.job_id: error for word in words}

    async def _looked_up(self, words: Sequence[Word]) -> dict[UUID, Settled | QueueError]:
        ending = {word.job_id: word.lease_id for word in words if _verb(word) is not None}
        recorded = await self._jobs.recorded(ending) if ending else {}
        recalled: dict[UUID, Settled | QueueError] = {}
        for word in words:
            record = recorded.get(word.job_id)
            if record is not None and record.verb is not None and record.verb is _verb(word):
                recalled[word.job_id] = record.settled
                if record.settled.state is State.READY or record.settled.then:
                    # Perhaps it was this very call whose COMMIT got lost, and nobody has been called.
                    self.wakeups.look_soon()
        lost = [word.job_id for word in words if word.job_id not in recalled]
        states = await self._reads.states(lost) if lost else {}
        for job_id in lost:
            recalled[job_id] = LeaseLostError(states[job_id]) if job_id in states else JobNotFoundError()
        return recalled


def _job_id(item: Ack | Ending | Heartbeat) -> UUID:
    return item.job_id


def _weight(item: NewJob | Ack | Heartbeat) -> int:
    """Return an item's share of a batch, and of a line: what it carries counts, so that both are bounded in bytes too.

    Endings need none: what an error says is cut at 20 KiB.
    """
    match item:
        case NewJob():
            carried: bytes | None = item.payload
        case Ack():
            carried = item.result
        case Heartbeat():
            carried = item.checkpoint
    return 1 + len(carried or b"") // BYTES_PER_WEIGHT


def failed(job_id: UUID, lease_id: UUID, failure: Failure) -> Ending:
    """Return the word that an attempt has failed."""
    return Ending(
        job_id,
        lease_id,
        Verb.FAIL,
        lambda lease, now: decide_failure(lease, failure, now, random.random()),
    )


def released(job_id: UUID, lease_id: UUID, delay_seconds: float) -> Ending:
    """Return the word that a job is given back."""
    return Ending(
        job_id, lease_id, Verb.RELEASE, lambda lease, now: decide_release(lease, delay_seconds, now)
    )


def _verb(word: Word) -> Verb | None:
    match word:
        case Ack():
            return Verb.ACK
        case Ending():
            return word.verb
        case Heartbeat():
            return None


def _settled(answer: Said) -> Settled:
    if isinstance(answer, Verdict):
        return Settled(state=answer.state, run_at=answer.run_at)
    assert isinstance(answer, Settled)  # noqa: S101  # what an ending gets, at once or recorded
    return answer


def _completed(job: Job | Done) -> JobCompleted:
    return JobCompleted(
        job_id=job.id,
        queue=job.queue,
        type=job.type,
        worker=job.worker,
        attempt=job.attempt,
        ran_seconds=_seconds_between(job.started_at, job.finished_at),
    )


def _seconds_between(begin: datetime | None, end: datetime | None) -> float:
    return 0.0 if begin is None or end is None else max((end - begin).total_seconds(), 0.0)


def _stats(counts: Mapping[str, Mapping[State, int]]) -> Stats:
    queues = {queue: summed_up(states) for queue, states in counts.items()}
    total = summed_up({})
    for sums in queues.values():
        for name, count in sums.items():
            total[name] += count
    return Stats(jobs=total, queues=queues)
