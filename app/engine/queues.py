"""What operators do with whole queues: give them a policy, pause, resume, purge, delete them.

A change is in force here before its answer goes, and in all other processes within a second.
"""

import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

from app.engine.copies import Copies
from app.engine.operating import BULK_SECONDS
from app.queue.errors import QueueNotFoundError, UnavailableError
from app.queue.events import Observer, QueueChange, QueueChanged, QueuePurged
from app.queue.lifecycle import State, summed_up
from app.queue.model import PRIORITY_MAX, PRIORITY_MIN, Queue, QueuePolicy
from app.queue.policy import check_policy
from app.store.jobs import BEGINNING
from app.store.queues import BY_ID, TOPIC, PurgeStep, QueueSeen, StoredQueues

PURGE_BATCH = 500
PURGE_PASSES_MAX = 3
UNDER_WAY = timedelta(seconds=1)
"""Jobs that are stored together stand microseconds after each other in line, the last of them after now."""


@dataclass(frozen=True, slots=True)
class QueueShown:
    """A queue as it stands, with how many jobs it has under the names of the HTTP API."""

    queue: Queue
    jobs: dict[str, int]
    oldest_ready_seconds: float | None


class Purged(NamedTuple):
    """How many jobs a purge has removed, and whether it has left some: it had taken its time."""

    removed: int
    more: bool


class _Purge:
    """How far one purge has got. However many are delayed, those that wait get half of its time."""

    def __init__(self, seconds: float) -> None:
        self.half = time.monotonic() + seconds / 2
        self.until = self.half + seconds / 2
        self.removed = 0
        self.missed = False
        self.left = False

    async def take(self, steps: AsyncGenerator[PurgeStep[Any]], until: float) -> None:
        """Take these steps, until then."""
        async with aclosing(steps):
            async for step in steps:
                self.removed += step.changed
                self.missed |= step.missed > 0
                if step.next is not None and time.monotonic() >= until:
                    self.left = True
                    return


Oldest = Callable[[Mapping[str, Mapping[State, int]]], Awaitable[dict[str, float]]]


class Queues:
    """The use cases. Methods raise UnavailableError; after a change it may stand all the same.

    `now` is the database's clock. `oldest` tells for each queue of which these counts know ready jobs how long the oldest has waited.
    """

    def __init__(
        self,
        stored: StoredQueues,
        copies: Copies,
        observer: Observer,
        now: Callable[[], Awaitable[datetime]],
        oldest: Oldest,
        purge_seconds: float = BULK_SECONDS,
    ) -> None:
        self._stored = stored
        self._now = now
        self._copies = copies
        self._observer = observer
        self._oldest = oldest
        self.purge_seconds = purge_seconds

    async def page(self, limit: int, after: str) -> tuple[list[QueueShown], str | None]:
        """Return queues that have a policy or jobs, by their names, and the name after which the next page begins."""
        seen, last = await self._stored.page(limit, after)
        return await self._shown(seen), last

    async def queue(self, name: str) -> QueueShown:
        """Return a queue. Raises QueueNotFoundError when it has neither a policy nor jobs."""
        seen = await self._stored.one(name)
        if seen is None:
            raise QueueNotFoundError
        [shown] = await self._shown([seen])
        return shown

    async def put(self, name: str, policy: QueuePolicy, *, paused: bool | None) -> tuple[QueueShown, bool]:
        """Replace a queue's policy; return the queue, and whether it is new. `paused` None leaves it paused or not.

        Raises InvalidRequestError.
        """
        check_policy(name, policy)
        put = await self._stored.put(name, policy, paused)
        await self._changed(name, QueueChange.CREATED if put.created else QueueChange.POLICY)
        return await self._after(put.queue), put.created

    async def pause(self, name: str) -> QueueShown:
        """Let leases pass a queue over; jobs still come in, and what is leased goes on."""
        return await self._pause(name, paused=True)

    async def resume(self, name: str) -> QueueShown:
        """Let leases take from a queue again, and call those that wait for it."""
        return await self._pause(name, paused=False)

    async def delete(self, name: str) -> None:
        """Forget a queue. Raises QueueNotFoundError, and QueueNotEmptyError when jobs of it are kept."""
        if not await self._stored.delete(name):
            raise QueueNotFoundError
        await self._changed(name, QueueChange.DELETED)

    async def purge(self, name: str) -> Purged:
        """Remove all that waits or is delayed. Raises QueueNotFoundError.

        What others move meanwhile is followed: from delayed to waiting, and in a second and a third pass. What has been
        done stands: where the database goes away under way, the answer says that there is more.
        """
        await self.queue(name)
        call = _Purge(self.purge_seconds)
        try:
            for _ in range(PURGE_PASSES_MAX):
                call.left = call.missed = False
                await call.take(self._delayed_steps(name), call.half)
                await call.take(self._ready_steps(name), call.until)
                if call.left or not call.missed:
                    break
        except UnavailableError:
            if not call.removed:
                raise
            call.left = True
        finally:
            if call.removed:
                self._observer.on(QueuePurged(queue=name, removed=call.removed))
        return Purged(call.removed, call.left or call.missed)

    async def _delayed_steps(self, name: str) -> AsyncGenerator[PurgeStep[UUID]]:
        for place in BY_ID:
            # What comes from now on is not looked at: a busy producer must not keep this going.
            last, after = await self._stored.last_id(place), UUID(int=0)
            while last is not None:
                step = await self._stored.purge_by_id(name, place, after, last, PURGE_BATCH)
                yield step
                if step.next is None:
                    break
                after = step.next

    async def _ready_steps(self, name: str) -> AsyncGenerator[PurgeStep[datetime]]:
        until = await self._now() + UNDER_WAY
        for priority in range(PRIORITY_MAX, PRIORITY_MIN - 1, -1):
            since: datetime | None = BEGINNING
            while since is not None:
                step = await self._stored.purge_ready(name, priority, since, until, PURGE_BATCH)
                yield step
                since = step.next

    async def _pause(self, name: str, *, paused: bool) -> QueueShown:
        queue = await self._stored.pause(name, paused=paused)
        await self._changed(name, QueueChange.PAUSED if paused else QueueChange.RESUMED)
        return await self._after(queue)

    async def _after(self, queue: Queue) -> QueueShown:
        seen = await self._stored.one(queue.name) or QueueSeen(queue, {})
        [shown] = await self._shown([seen])
        return shown

    async def _shown(self, seen: Sequence[QueueSeen]) -> list[QueueShown]:
        oldest = await self._oldest({each.queue.name: each.counts for each in seen})
        return [QueueShown(each.queue, summed_up(each.counts), oldest.get(each.queue.name)) for each in seen]

    async def _changed(self, name: str, change: QueueChange) -> None:
        self._observer.on(QueueChanged(queue=name, change=change))
        await self._copies.refresh(TOPIC)
