"""The way back for dead letters: a queue's failed jobs to where they failed, and copies that wait in it to their homes."""

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import NamedTuple
from uuid import UUID

from app.engine.operating import BULK_SECONDS, LOOKED_AT, STEP
from app.engine.policies import Policies
from app.engine.wakeup import Wakeups
from app.queue.errors import InvalidRequestError, UnavailableError
from app.queue.events import (
    BulkRan,
    BulkVerb,
    JobDeleted,
    JobEdited,
    JobEnqueued,
    JobEvent,
    JobRetried,
    Observer,
)
from app.queue.lifecycle import State
from app.queue.model import JobFilter
from app.store.jobs import Moved
from app.store.reads import Reads
from app.store.redriving import AT_THE_HEAD, Copy, Standing, StoredDeadLetters

OF_ONE_STATEMENT = timedelta(milliseconds=1)
"""Copies that were made by one statement became ready a microsecond after each other."""


@dataclass(frozen=True, slots=True)
class Redrive:
    """What somebody wants back: the failed jobs and the copies of a queue, or those of one error group.

    At most `limit` of them; None: all. `to` is where they go; None: where they come from.
    """

    queue: str
    error_group: str | None = None
    limit: int | None = None
    to: str | None = None


class Redriven(NamedTuple):
    """How many were found and went back, and whether there may be more."""

    matched: int
    changed: int
    more: bool


class _Call:
    """How far one call has got."""

    def __init__(self, wanted: Redrive, seconds: float) -> None:
        self._limit = wanted.limit
        self._half = time.monotonic() + seconds / 2
        self._until = self._half + seconds / 2
        self.matched = 0
        self.changed = 0
        self.cut_short = False
        self.copies_left = False

    @property
    def step(self) -> int:
        """How many to take next: 0 when the call is over."""
        if self.cut_short:
            return 0
        return STEP if self._limit is None else min(STEP, self._limit - self.changed)

    @property
    def half_over(self) -> bool:
        """Whether half of the call's time is over: however long the line is, the failed jobs get the other half."""
        return time.monotonic() >= self._half

    def took(self, matched: int, changed: int) -> None:
        """Note what a step did."""
        self.matched += matched
        self.changed += changed

    def check_time(self) -> None:
        """End the call when it has taken its time."""
        self.cut_short = time.monotonic() >= self._until


class Redriving:
    """The use case. `now` reads the database's clock."""

    def __init__(
        self,
        stored: StoredDeadLetters,
        reads: Reads,
        now: Callable[[], Awaitable[datetime]],
        observer: Observer,
        wakeups: Wakeups,
        policies: Policies,
        seconds: float = BULK_SECONDS,
    ) -> None:
        self._stored = stored
        self._reads = reads
        self._now = now
        self._observer = observer
        self._wakeups = wakeups
        self._policies = policies
        self.seconds = seconds

    async def redrive(self, wanted: Redrive) -> Redriven:
        """Send dead letters back in short transactions, first the copies, the oldest first.

        What has failed or come in since the call began is not touched. What has been done stands: where the database
        goes away under way, the answer says that there is more. Raises InvalidRequestError, UnavailableError.
        """
        if wanted.to is not None:
            if wanted.to == wanted.queue:
                raise InvalidRequestError("to", "is the queue itself")
            self._policies.check_known("to", wanted.to)
        began = time.monotonic()
        call = _Call(wanted, self.seconds)
        try:
            until = await self._now() + OF_ONE_STATEMENT
            # In this order a copy that has failed itself goes back in line, and not home at once: it was tried here.
            await self._copies(wanted, call, until)
            await self._failed(wanted, call)
        except UnavailableError:
            if call.matched == 0:
                raise
            call.cut_short = True
        more = call.step == 0 or call.copies_left
        self._observer.on(
            BulkRan(
                verb=BulkVerb.REDRIVE,
                matched=call.matched,
                changed=call.changed,
                finished=not more,
                took_seconds=time.monotonic() - began,
            )
        )
        return Redriven(call.matched, call.changed, more)

    async def _failed(self, wanted: Redrive, call: _Call) -> None:
        failed = JobFilter(queues=(wanted.queue,), states=(State.FAILED,), error=wanted.error_group)
        after, newest = UUID(int=0), await self._reads.newest_id(failed)
        while newest is not None and (step := call.step):
            ids = await self._reads.ids(failed, step, after=after, until=newest)
            if not ids:
                break
            moved = await self._stored.retry_failed(ids, wanted.queue, wanted.to)
            self._tell(JobRetried, moved)
            self._wakeups.placed([each.place for each in moved if each.place is not None])
            call.took(len(ids), len(moved))
            call.check_time()
            after = ids[-1]

    async def _copies(self, wanted: Redrive, call: _Call, until: datetime) -> None:
        after: Standing | None = AT_THE_HEAD
        while after is not None and (step := call.step):
            if after is not AT_THE_HEAD and call.half_over:
                call.copies_left = True
                return
            copies, after = await self._stored.copies(
                wanted.queue, wanted.error_group, after, until, LOOKED_AT
            )
            if len(copies) > step:
                copies, after = copies[:step], copies[step - 1].standing
            if copies:
                call.took(len(copies), await self._send(copies, wanted.to))

    async def _send(self, copies: Sequence[Copy], to: str | None) -> int:
        if to is None:
            return await self._take_home(copies)
        moved = await self._stored.move_copies(copies, to)
        self._tell(JobEdited, moved)
        # They keep their places by time, which may be behind the cursors of the other queue.
        self._wakeups.placed([each.place for each in moved if each.place is not None], old=True)
        return len(moved)

    async def _take_home(self, copies: Sequence[Copy]) -> int:
        home = await self._stored.take_home(copies)
        self._tell(JobRetried, home.retried)
        self._tell(JobDeleted, home.removed)
        for new in home.new:
            line = new.place.line
            self._observer.on(
                JobEnqueued(job_id=new.job_id, queue=line.queue, type=line.type or "", state=State.READY)
            )
        places = [each.place for each in home.retried if each.place is not None]
        self._wakeups.placed([*places, *(new.place for new in home.new)])
        return len(home.removed)

    def _tell(self, event: type[JobEvent], moved: Sequence[Moved]) -> None:
        for each in moved:
            self._observer.on(event(job_id=each.job_id, queue=each.queue, type=each.type))
