"""The use cases: the one door to the queue for the API, the dashboard and the command line.

A method answers after the COMMIT of what it did, tells the observer, and calls who waits for what became ready.
Methods raise the errors of `app.queue.errors`; UnavailableError of all of them.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from uuid_utils.compat import uuid7

from app.engine.maintenance import Keeping, Maintenance, attempt_ended, ready_lines
from app.engine.running import TaskOwner
from app.engine.wakeup import Wakeups
from app.queue.errors import JobNotFoundError, LeaseLostError, UnavailableError, WrongStateError
from app.queue.events import (
    CancelRequested,
    JobCancelled,
    JobCompleted,
    JobDeleted,
    JobEnqueued,
    JobLeased,
    JobRetried,
    Observer,
)
from app.queue.lifecycle import COUNTED_AS, TERMINAL, Event, State, may
from app.queue.model import (
    Attempt,
    Beat,
    Failure,
    Job,
    JobDefaults,
    JobFilter,
    JobRequest,
    LeasedJob,
    Settled,
    Verb,
    Verdict,
)
from app.queue.policy import decide_failure, decide_release, resolve
from app.store.database import Database
from app.store.jobs import Ack, Claim, Decide, Jobs, Line, Moved
from app.store.reads import Reads, WorkerSeen

LOOKS_MAX = 10
"""How often a verb looks again for a job that others move at that moment, before it gives up for now."""

CONTENDED_PAUSE_SECONDS = 0.02

GIVE_BACK_SECONDS_MAX = 5.0

READINESS_SECONDS_MAX = 2.0

CANCELLABLE = frozenset(state for state in State if may(state, Event.CANCEL))
RETRIABLE = frozenset(state for state in State if may(state, Event.RETRY))


@dataclass(frozen=True, slots=True)
class LeaseRequest:
    """What a worker asks for; None where it named nothing."""

    queues: Sequence[str]
    types: Sequence[str] | None = None
    worker: str | None = None
    max_jobs: int = 1
    wait_seconds: float = 20.0
    lease_seconds: float | None = None

    @property
    def lines(self) -> set[Line]:
        """Where it waits: at whole queues, or at their types."""
        return {Line(queue, type_) for queue in self.queues for type_ in self.types or (None,)}


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
        maintenance_seconds: float,
        poll_seconds: float,
        max_lease_waiters: int,
    ) -> None:
        self._database = database
        self._jobs = jobs
        self._reads = Reads(database)
        self._observer = observer
        self._defaults = defaults
        self._max_lease_waiters = max_lease_waiters
        self._draining = False
        self._owner = TaskOwner()
        self.wakeups = Wakeups(database, jobs, poll_seconds)
        self.maintenance = Maintenance(jobs, self.wakeups, observer, keeping, maintenance_seconds)

    async def start(self) -> None:
        """Begin to listen for hints and to do maintenance."""
        await self.wakeups.start()
        await self.maintenance.start()

    def drain(self) -> None:
        """Be ready to stop: waiting leases are answered at once, new ones refused, everything else goes on."""
        self._draining = True
        self.wakeups.send_all_away()

    async def stop(self) -> None:
        """Stop what runs in the background; requests must have ended."""
        self.drain()
        await self.maintenance.stop()
        await self._owner.settle(GIVE_BACK_SECONDS_MAX)
        await self.wakeups.stop()

    async def enqueue(self, request: JobRequest) -> Job:
        """Store one job."""
        [job] = await self._jobs.enqueue([resolve(request, self._defaults, uuid7())])
        self._observer.on(JobEnqueued(job_id=job.id, queue=job.queue, type=job.type, state=job.state))
        if job.state is State.READY:
            self.wakeups.announce({Line(job.queue, job.type): 1})
        return job

    async def lease(self, wanted: LeaseRequest, gone: "asyncio.Future[object]") -> list[LeasedJob]:
        """Take jobs, waiting for the first at most `wait_seconds`; an empty list when there is none.

        `gone` is done when nobody is there any more to take the answer: then nothing is leased, or what was
        leased meanwhile is released uncounted.
        """
        if self._draining:
            message = "The service is stopping."
            raise UnavailableError(message)
        if self.wakeups.waiters >= self._max_lease_waiters:
            message = f"There are {self._max_lease_waiters} waiting leases already; come back a little later."
            raise UnavailableError(message, retry_after_seconds=5)
        loop = asyncio.get_running_loop()
        until = loop.time() + wanted.wait_seconds
        with self.wakeups.waiting(wanted.lines) as waiter:
            gone.add_done_callback(lambda _: waiter.send_away())
            while not gone.done():
                waiter.listen()
                claim = await self._claim(wanted, gone)
                if gone.done():
                    break
                if claim.jobs:
                    waiter.looked(Line(job.queue, job.type) for job in claim.jobs)
                    return claim.jobs
                if self._draining or loop.time() >= until:
                    break
                if claim.contended:
                    # Others hold all that is ready. What they take is theirs, but what they let go calls nobody.
                    await asyncio.sleep(CONTENDED_PAUSE_SECONDS * random.uniform(0.5, 1.5))
                    continue
                waiter.looked(())
                if not await waiter.called(until):
                    break
        return []

    async def heartbeat(self, job_id: UUID, lease_id: UUID | None, extend_seconds: float | None) -> Beat:
        """Extend a lease. Raises JobNotFoundError, LeaseLostError."""
        beat = None if lease_id is None else await self._jobs.heartbeat(job_id, lease_id, extend_seconds)
        if beat is None:
            raise await self._lost(job_id)
        return beat

    async def ack(self, job_id: UUID, lease_id: UUID | None, result: bytes | None) -> Job:
        """Finish a job. Raises JobNotFoundError, LeaseLostError."""
        if lease_id is None:
            raise await self._lost(job_id)
        acked = await self._jobs.ack([Ack(job_id, lease_id, result)])
        if job_id not in acked:
            await self._recorded(job_id, lease_id, Verb.ACK)
            return await self.job(job_id)
        job = acked[job_id]
        self._observer.on(
            JobCompleted(
                job_id=job.id,
                queue=job.queue,
                type=job.type,
                worker=job.worker,
                attempt=job.attempt,
                ran_seconds=_seconds_between(job.started_at, job.finished_at),
            )
        )
        return job

    async def fail(self, job_id: UUID, lease_id: UUID | None, failure: Failure) -> Settled:
        """End an attempt that failed. Raises JobNotFoundError, LeaseLostError."""
        return await self._conclude(
            job_id,
            lease_id,
            Verb.FAIL,
            lambda lease, now: decide_failure(lease, failure, now, random.random()),
        )

    async def release(self, job_id: UUID, lease_id: UUID | None, delay_seconds: float) -> Settled:
        """Give a job back, its attempt uncounted. Raises JobNotFoundError, LeaseLostError."""
        return await self._conclude(
            job_id, lease_id, Verb.RELEASE, lambda lease, now: decide_release(lease, delay_seconds, now)
        )

    async def job(self, job_id: UUID) -> Job:
        """Return a job as it stands. Raises JobNotFoundError."""
        job = await self._reads.job(job_id)
        if job is None:
            raise JobNotFoundError
        return job

    async def page(self, wanted: JobFilter, limit: int, before: UUID | None) -> tuple[list[Job], UUID | None]:
        """Return a page of jobs, newest first, and the id after which the next one begins."""
        return await self._reads.page(wanted, limit, before)

    async def attempts(self, job_id: UUID) -> list[Attempt]:
        """Return the job's attempts, oldest first. Raises JobNotFoundError."""
        attempts = await self._reads.attempts(job_id)
        if not attempts:
            await self.job(job_id)
        return attempts

    async def cancel(self, job_id: UUID) -> Job:
        """Cancel a job at once, or an active one at its worker's next word. Raises JobNotFoundError, WrongStateError."""
        moved = await self._move(job_id, self._jobs.cancel, "cancelled", CANCELLABLE, done=State.CANCELLED)
        if moved is not None:
            event = CancelRequested if moved.state is State.ACTIVE else JobCancelled
            self._observer.on(event(job_id=job_id, queue=moved.queue, type=moved.type))
        return await self.job(job_id)

    async def retry(self, job_id: UUID) -> Job:
        """Bring a dead job back with a fresh budget. Raises JobNotFoundError, WrongStateError."""
        moved = await self._move(job_id, self._jobs.retry, "retried", RETRIABLE)
        if moved is not None:
            self._observer.on(JobRetried(job_id=job_id, queue=moved.queue, type=moved.type))
            self.wakeups.announce({Line(moved.queue, moved.type): 1})
        return await self.job(job_id)

    async def delete(self, job_id: UUID) -> None:
        """Remove a terminal job. Raises JobNotFoundError, WrongStateError."""
        moved = await self._move(job_id, self._jobs.delete, "deleted", TERMINAL)
        if moved is not None:
            self._observer.on(JobDeleted(job_id=job_id, queue=moved.queue, type=moved.type))

    async def counts(self) -> dict[str, dict[State, int]]:
        """Count what is kept now, by queue and state."""
        return await self._reads.counts()

    async def stats(self) -> Stats:
        """Count what is kept now, as the HTTP API names it."""
        return _stats(await self.counts())

    async def oldest_ready_seconds(self, counts: Mapping[str, Mapping[State, int]]) -> dict[str, float]:
        """Return for each queue with ready jobs how long its oldest one has waited."""
        return await self._reads.oldest_ready_seconds(
            [queue for queue, of in counts.items() if of[State.READY] > 0]
        )

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
        # Shielded: a claim cut off half-way would leave jobs leased to nobody until their leases expire.
        claiming = asyncio.ensure_future(
            self._jobs.lease(
                wanted.queues, wanted.types, wanted.max_jobs, wanted.lease_seconds, wanted.worker
            )
        )
        try:
            claim = await asyncio.shield(claiming)
        except asyncio.CancelledError:
            self._owner.spawn(self._give_back_when_claimed(claiming))
            raise
        if gone.done():
            await self._give_back(claim.jobs)
            return Claim(jobs=[], contended=False)
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

    async def _give_back_when_claimed(self, claiming: "asyncio.Future[Claim]") -> None:
        await self._give_back((await claiming).jobs)

    async def _give_back(self, leased: Sequence[LeasedJob]) -> None:
        """Release jobs that nobody is there to take."""
        if leased:
            leases = {job.id: job.lease_id for job in leased}
            await self._settle(leases, Verb.RELEASE, lambda lease, now: decide_release(lease, 0, now))

    async def _conclude(self, job_id: UUID, lease_id: UUID | None, verb: Verb, decide: Decide) -> Settled:
        if lease_id is None:
            raise await self._lost(job_id)
        verdicts = await self._settle({job_id: lease_id}, verb, decide)
        if not verdicts:
            return await self._recorded(job_id, lease_id, verb)
        return Settled(state=verdicts[0].state, run_at=verdicts[0].run_at)

    async def _settle(self, leases: Mapping[UUID, UUID], verb: Verb, decide: Decide) -> list[Verdict]:
        verdicts = list((await self._jobs.conclude(leases, verb, decide)).values())
        for verdict in verdicts:
            self._observer.on(attempt_ended(verdict))
        self.wakeups.announce(ready_lines(verdicts))
        return verdicts

    async def _recorded(self, job_id: UUID, lease_id: UUID, verb: Verb) -> Settled:
        """Return what was answered when this lease was ended by the same verb."""
        recorded = await self._jobs.recorded(job_id, lease_id)
        if recorded is None or recorded.verb is not verb:
            raise await self._lost(job_id)
        return recorded.settled

    async def _lost(self, job_id: UUID) -> LeaseLostError | JobNotFoundError:
        job = await self._reads.job(job_id)
        return JobNotFoundError() if job is None else LeaseLostError(job.state)

    async def _move(
        self,
        job_id: UUID,
        move: Callable[[UUID], Awaitable[Moved | None]],
        participle: str,
        allowed: frozenset[State],
        done: State | None = None,
    ) -> Moved | None:
        """Move a job by its id; None when it already is where it should go."""
        for _ in range(LOOKS_MAX):
            moved = await move(job_id)
            if moved is not None:
                return moved
            state = (await self.job(job_id)).state
            if state is done:
                return None
            if state not in allowed:
                raise WrongStateError(state, participle)
            # It may be moved, but was not there: another transaction was moving it. Look again, with new eyes.
        message = "The job is being moved by others again and again; try later."
        raise UnavailableError(message)


def _seconds_between(begin: datetime | None, end: datetime | None) -> float:
    return 0.0 if begin is None or end is None else max((end - begin).total_seconds(), 0.0)


def _stats(counts: Mapping[str, Mapping[State, int]]) -> Stats:
    names = list(dict.fromkeys(COUNTED_AS.values()))
    total = dict.fromkeys(names, 0)
    queues = {}
    for queue, states in counts.items():
        queues[queue] = dict.fromkeys(names, 0)
        for state, count in states.items():
            queues[queue][COUNTED_AS[state]] += count
            total[COUNTED_AS[state]] += count
    return Stats(jobs=total, queues=queues)
