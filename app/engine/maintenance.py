"""What has to happen without a request: delayed jobs become ready, expired leases end, counts are folded, old jobs go.

Every task is a bounded step that any number of processes may take at once: rows that another one holds are skipped.
A task that fails is tried again in the next round, and does not keep the others from running.
"""

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta

from app.engine.retention import Retention
from app.engine.running import Component
from app.engine.schedules import Schedules
from app.engine.wakeup import Wakeups
from app.queue.events import (
    AttemptEnded,
    JobEnqueued,
    JobEvent,
    JobExpired,
    JobPromoted,
    MaintenanceFailed,
    MaintenanceRan,
    Observer,
)
from app.queue.lifecycle import State
from app.queue.model import Verdict
from app.queue.policy import decide_expiry
from app.store.jobs import BEGINNING, Jobs, Line, Place

BATCH = 500
FOLD_BATCH = 10_000
STEPS_PER_ROUND = 40
"""After so many full batches of one task the others have their turn."""

FIRST_KEY = ("", "")

OUTAGE_SECONDS_MIN = 5.0
"""The reaper's silence for less than this (or three rounds) is no outage."""
OUTAGE_SECONDS_MAX = 300.0
DAYS_EVERY_SECONDS = 600.0

EVERYTHING_EVERY_SECONDS = 60.0
UNDER_WAY = timedelta(seconds=20)
"""What a task looks at again: another transaction may have held it, or not have committed it, at the last time."""
DELTAS_UNDER_WAY = 10_000
"""Deltas get their numbers before they are committed: so many may come after one that was folded."""

FIRE_BATCH = 100
"""Schedules decided in one transaction: each brings one job, with its payload, at most."""
RUNS_EVERY_SECONDS = 10.0

ON_TIME_PAUSE_SECONDS = 0.005
"""The least time between two turns: a row that others hold, or deal with, must not make a loop that never rests."""


class Reach:
    """How far back a task looks: at what has come lately, and over everything at first and now and then.

    What a task has dealt with leaves dead entries in front of its index; while a long transaction keeps VACUUM from
    taking them away, looking over everything each time would cost more each time.
    """

    def __init__(self) -> None:
        self._looked_at = BEGINNING
        self._everything_due_at = -math.inf

    def since(self) -> datetime:
        """Return from which instant of the database's clock on the task is to look now."""
        everything = time.monotonic() >= self._everything_due_at
        return BEGINNING if everything or self._looked_at == BEGINNING else self._looked_at - UNDER_WAY

    def looked(self, since: datetime, until: datetime, *, at_all: bool) -> None:
        """Note that the task has looked at this time, and whether at all that came in it."""
        if at_all:
            self._looked_at = until
            if since == BEGINNING:
                self._everything_due_at = time.monotonic() + EVERYTHING_EVERY_SECONDS


class OnTime:
    """Runs a task between the rounds too, at the instant when its next row is due."""

    def __init__(
        self,
        name: str,
        task: Callable[[], Awaitable[int]],
        next_due_seconds: Callable[[], Awaitable[float | None]],
        observer: Observer,
        every_seconds: float,
    ) -> None:
        self._name = name
        self._task = task
        self._next_due_seconds = next_due_seconds
        self._observer = observer
        self._every_seconds = every_seconds
        self._due_at = math.inf
        self._sooner = asyncio.Event()

    def expect(self, due_seconds: float) -> None:
        """Note that a row is due in so many seconds."""
        due_at = asyncio.get_running_loop().time() + max(due_seconds, ON_TIME_PAUSE_SECONDS)
        if due_at < self._due_at:
            self._due_at = due_at
            self._sooner.set()

    async def run(self) -> None:
        """Run until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            self._due_at = math.inf
            due_at = loop.time() + await self._look()
            self._due_at = min(self._due_at, due_at)
            while self._due_at > loop.time():
                self._sooner.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(self._due_at):
                        await self._sooner.wait()
            try:
                await self._task()
            except Exception as error:  # noqa: BLE001  # as in a round: the rest must go on
                self._observer.on(MaintenanceFailed(task=self._name, error=repr(error)))
                await asyncio.sleep(self._every_seconds)

    async def _look(self) -> float:
        """Return in how many seconds to run next: what other processes bring in tells nobody."""
        try:
            due = await self._next_due_seconds()
        except Exception as error:  # noqa: BLE001  # as in a round
            self._observer.on(MaintenanceFailed(task=self._name, error=repr(error)))
            due = None
        soonest = self._every_seconds if due is None else min(due, self._every_seconds)
        return max(soonest, ON_TIME_PAUSE_SECONDS)


class Maintenance(Component):
    """Runs the tasks of this process, round after round."""

    def __init__(
        self,
        jobs: Jobs,
        schedules: Schedules,
        wakeups: Wakeups,
        observer: Observer,
        retention: Retention,
        every_seconds: float,
    ) -> None:
        super().__init__()
        self._jobs = jobs
        self._schedules = schedules
        self._wakeups = wakeups
        self._observer = observer
        self._retention = retention
        self._every_seconds = every_seconds
        self._days_due_at = 0.0
        self._reaping, self._expiring, self._promoting, self._folding = Reach(), Reach(), Reach(), Reach()
        self._folded_to = 0
        self._swept_to = FIRST_KEY
        self._runs_swept_to, self._runs_due_at = "", 0.0
        self._promoting_on_time = OnTime(
            "promote",
            self.promote,
            lambda: jobs.next_due_seconds(self._promoting.since()),
            observer,
            every_seconds,
        )
        self._firing_on_time = OnTime(
            "schedules", self.fire, schedules.next_due_seconds, observer, every_seconds
        )
        self._firing_keyed_on_time = OnTime(
            "keyed_schedules",
            schedules.fire_keyed,
            schedules.next_keyed_due_seconds,
            observer,
            every_seconds,
        )

    @property
    def tasks(self) -> dict[str, Callable[[], Awaitable[int]]]:
        """What a round does, in this order; each returns how many rows it changed."""
        return {
            "reap": self.reap,
            "expire": self.expire,
            "schedules": self.fire,
            "promote": self.promote,
            # Behind the urgent ones: it may have to wait for keys that others hold.
            "keyed_schedules": self._schedules.fire_keyed,
            "fold": self.fold,
            "retain": self.retain,
            "sweep": self.sweep,
            "days": self.days,
        }

    async def run_once(self) -> dict[str, int]:
        """Take every task's turn once; return how many rows each changed. Failures go to the observer."""
        changed = {}
        for name, task in self.tasks.items():
            began = time.perf_counter()
            try:
                changed[name] = await task()
            except Exception as error:  # noqa: BLE001  # whatever it is: the next round and the other tasks must go on
                self._observer.on(MaintenanceFailed(task=name, error=repr(error)))
            else:
                took = time.perf_counter() - began
                self._observer.on(MaintenanceRan(task=name, changed=changed[name], took_seconds=took))
        return changed

    async def reap(self) -> int:
        """Turn expired leases into retries or dead letters."""
        silence = max(OUTAGE_SECONDS_MIN, 3 * self._every_seconds)
        await self._jobs.survive_outage(silence, OUTAGE_SECONDS_MAX)

        since = now = self._reaping.since()

        async def step() -> int:
            nonlocal now
            verdicts, now = await self._jobs.reap(
                BATCH, lambda lease, now: decide_expiry(lease, now, random.random()), since
            )
            for verdict in verdicts:
                for event in events_of(verdict):
                    self._observer.on(event)
            self._wakeups.placed(copy_places(verdicts))
            self.delayed(verdicts)
            return len(verdicts)

        ended = await _while_full(step, BATCH)
        self._reaping.looked(since, now, at_all=ended < BATCH * STEPS_PER_ROUND)
        return ended

    async def expire(self) -> int:
        """Bury jobs whose start deadline has passed; claims do not hand them out meanwhile."""
        since = now = self._expiring.since()

        async def step() -> int:
            nonlocal now
            expired, now = await self._jobs.expire(BATCH, since)
            for job in expired:
                self._observer.on(JobExpired(job_id=job.job_id, queue=job.queue, type=job.type))
            return len(expired)

        gone = await _while_full(step, BATCH)
        self._expiring.looked(since, now, at_all=gone < BATCH * STEPS_PER_ROUND)
        return gone

    async def promote(self) -> int:
        """Make delayed jobs ready whose time has come, and call those who wait for them."""
        since = now = self._promoting.since()

        async def step() -> int:
            nonlocal now
            promoted, now = await self._jobs.promote(BATCH, since)
            for job in promoted:
                line = job.place.line
                self._observer.on(JobPromoted(job_id=job.job_id, queue=line.queue, type=line.type or ""))
            self._wakeups.placed([job.place for job in promoted])
            return len(promoted)

        promoted = await _while_full(step, BATCH)
        self._promoting.looked(since, now, at_all=promoted < BATCH * STEPS_PER_ROUND)
        return promoted

    async def fire(self) -> int:
        """Decide the fires of schedules that are due, but for those whose jobs have a unique key."""
        # One that has missed several fires is due again at once.
        return await _while_full(lambda: self._schedules.fire(FIRE_BATCH), 1)

    async def fold(self) -> int:
        """Fold the deltas into the counts."""
        since = self._folding.since()
        begin = 0 if since == BEGINNING else self._folded_to - DELTAS_UNDER_WAY
        last: int | None = None

        async def step() -> int:
            nonlocal last
            folded, last_of_step = await self._jobs.fold(FOLD_BATCH, begin)
            last = last_of_step or last
            return folded

        folded = await _while_full(step, FOLD_BATCH)
        self._folded_to = max(last or 0, self._folded_to)
        self._folding.looked(since, datetime.now(UTC), at_all=folded < FOLD_BATCH * STEPS_PER_ROUND)
        return folded

    async def retain(self) -> int:
        """Remove jobs, row by row, and runs of schedules whose retention has ended."""
        return await self._retention.rows() + await self._retain_runs()

    async def _retain_runs(self) -> int:
        if time.monotonic() < self._runs_due_at:
            return 0
        self._runs_due_at = time.monotonic() + RUNS_EVERY_SECONDS
        removed, self._runs_swept_to = await self._schedules.retain_runs(self._runs_swept_to)
        return removed

    async def sweep(self) -> int:
        """Forget unique keys that nobody holds, and requests whose repeats nobody expects any more.

        A round looks at one page of the unique keys, and goes on while most of what it finds can go.
        """
        swept = await _while_full(lambda: self._jobs.sweep_requests(BATCH), BATCH)
        for _ in range(STEPS_PER_ROUND):
            looked, removed, last = await self._jobs.sweep_keys(self._swept_to, BATCH)
            self._swept_to = last if looked == BATCH else FIRST_KEY
            swept += removed
            if removed <= BATCH // 2:
                break
        return swept

    async def days(self) -> int:
        """Make the days ahead, and drop those of completed jobs and attempts whose retention has ended."""
        if time.monotonic() < self._days_due_at:
            return 0
        # Also when it fails: the urgent tasks must not wait for its next try in every round.
        self._days_due_at = time.monotonic() + DAYS_EVERY_SECONDS
        return await self._retention.days()

    def expect(self, due_seconds: float) -> None:
        """Note that a delayed job is due in so many seconds: it is promoted then, not a round later."""
        self._promoting_on_time.expect(due_seconds)

    def expect_fire(self, due_seconds: float) -> None:
        """Note that a schedule is due in so many seconds: it fires then."""
        self._firing_on_time.expect(due_seconds)
        self._firing_keyed_on_time.expect(due_seconds)

    def delayed(self, verdicts: Iterable[Verdict]) -> None:
        """Expect the jobs that the verdicts have delayed."""
        for verdict in verdicts:
            if verdict.run_at is not None and verdict.state in {State.SCHEDULED, State.RETRY}:
                self.expect((verdict.run_at - verdict.decided_at).total_seconds())

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._go_round())
            tasks.create_task(self._promoting_on_time.run())
            tasks.create_task(self._firing_on_time.run())
            tasks.create_task(self._firing_keyed_on_time.run())

    async def _go_round(self) -> None:
        while True:
            await self.run_once()
            # Jitter keeps replicas that started together from working on the same rows for ever.
            await asyncio.sleep(self._every_seconds * random.uniform(0.8, 1.2))


def events_of(verdict: Verdict) -> Iterator[JobEvent]:
    """Tell of a verdict, and of the copy that it has enqueued."""
    lease, copied = verdict.lease, verdict.copied
    yield AttemptEnded(
        job_id=lease.job_id,
        queue=lease.queue,
        type=lease.type,
        worker=lease.worker,
        attempt=lease.attempt,
        outcome=verdict.outcome,
        state=verdict.state,
        ran_seconds=max((verdict.decided_at - lease.leased_at).total_seconds(), 0.0),
    )
    if copied is not None:
        yield JobEnqueued(job_id=copied.job_id, queue=copied.queue, type=copied.type, state=State.READY)


def copy_places(verdicts: Iterable[Verdict]) -> list[Place]:
    """Return where the copies stand that the verdicts have enqueued."""
    copies = [verdict.copied for verdict in verdicts if verdict.copied is not None]
    return [Place(Line(copy.queue, copy.type), copy.priority, copy.ready_at) for copy in copies]


def ready_places(verdicts: Sequence[Verdict]) -> list[Place]:
    """Return where the jobs stand that the verdicts have put back in line: at their old places."""
    return [
        Place(Line(verdict.lease.queue, verdict.lease.type), verdict.lease.priority, verdict.lease.ready_at)
        for verdict in verdicts
        if verdict.state is State.READY
    ]


async def _while_full(step: Callable[[], Awaitable[int]], batch: int) -> int:
    total = 0
    for _ in range(STEPS_PER_ROUND):
        changed = await step()
        total += changed
        if changed < batch:
            break
    return total
