"""What operators do with whole queues: give them a policy, pause, resume, purge, delete them.

A change is in force here before its answer goes, and in all other processes within a second.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from app.engine.copies import Copies
from app.queue.errors import QueueNotFoundError
from app.queue.events import Observer, QueueChange, QueueChanged
from app.queue.lifecycle import State, summed_up
from app.queue.model import Queue, QueuePolicy
from app.queue.policy import check_policy
from app.store.queues import TOPIC, QueueSeen, StoredQueues


@dataclass(frozen=True, slots=True)
class QueueShown:
    """A queue as it stands, with how many jobs it has under the names of the HTTP API."""

    queue: Queue
    jobs: dict[str, int]
    oldest_ready_seconds: float | None


Oldest = Callable[[Mapping[str, Mapping[State, int]]], Awaitable[dict[str, float]]]


class Queues:
    """The use cases. Methods raise UnavailableError; after a change it may stand all the same.

    `oldest` tells for each queue of which these counts know ready jobs how long the oldest has waited.
    """

    def __init__(self, stored: StoredQueues, copies: Copies, observer: Observer, oldest: Oldest) -> None:
        self._stored = stored
        self._copies = copies
        self._observer = observer
        self._oldest = oldest

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
