"""Group commit: what arrives while a statement runs goes into the next one.

A commit costs a flush of the disk whatever it holds, so concurrent requests share one. There is no timer: a request
on an idle system is sent at once, alone; under load a batch is what came in during the flush before it. Only where
a flush seems to be stuck does the next one begin beside it.

An item waits in a bounded line (full: UnavailableError, the caller answers 503), is written in a batch of bounded
size, and gets its answer after the COMMIT. Its submitter may go away meanwhile: the item is written all the same, and
`orphaned` is told what came of it.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from contextvars import Context, copy_context
from dataclasses import dataclass
from itertools import chain
from typing import Generic, TypeVar

from app.queue.errors import UnavailableError

BATCH_MAX = 500
LINE_MAX = 20_000
"""How much may be in line, by the weight of its items."""

FLUSHES_MAX = 2
STUCK_SECONDS = 0.5
"""A flush that takes longer than this may have met a dead connection or a stranger's lock: the next one need not."""

Item = TypeVar("Item")
Answer = TypeVar("Answer")

Flush = Callable[[Sequence[Item]], Awaitable[Sequence[Answer]]]


@dataclass(frozen=True, slots=True)
class Waiting(Generic[Item, Answer]):
    """An item in line, who waits for its answer, and the context in which it is spoken of."""

    item: Item
    answer: "asyncio.Future[Answer]"
    context: Context


class Batcher(Generic[Item, Answer]):
    """Joins single items into batches, one batch at a time but where one is stuck.

    `flush` writes a batch, commits, and returns an answer an item, in order. When it fails with an error that is not
    a matter of time, the batch is halved until the bad item is alone, so that it spoils nothing for its neighbours.
    `weight` is an item's share of a batch; two items with the same `key` never share one. `told` hears of each answer,
    in the context of who submitted the item; it must not raise.
    """

    def __init__(
        self,
        flush: Flush[Item, Answer],
        *,
        weight: Callable[[Item], int] = lambda _: 1,
        key: Callable[[Item], Hashable] | None = None,
        told: Callable[[Answer], None] = lambda _: None,
        orphaned: Callable[[Answer], None] = lambda _: None,
        batch_max: int = BATCH_MAX,
    ) -> None:
        self._flush = flush
        self._weight = weight
        self._key = key
        self._told = told
        self._orphaned = orphaned
        self._batch_max = batch_max
        self._line: deque[Waiting[Item, Answer]] = deque()
        self._line_weight = 0
        self._flushing: set[asyncio.Task[None]] = set()
        self._next: asyncio.Task[None] | None = None
        """Of those that flush, the one that takes the next batch; None while all are stuck, and at rest."""

    async def submit(self, item: Item) -> Answer:
        """Write `item` with whatever else is in line; return its answer. Raises what its flush raises."""
        if self._line_weight >= LINE_MAX:
            raise UnavailableError("Too many requests are in line already; come back a little later.")
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._line.append(Waiting(item, answer, copy_context()))
        self._line_weight += self._weight(item)
        self._begin()
        try:
            return await answer
        except asyncio.CancelledError:
            # The answer may have come already, a turn of the loop before its submitter could take it.
            if answer.done() and not answer.cancelled() and answer.exception() is None:
                self._orphaned(answer.result())
            raise

    @property
    def idle(self) -> bool:
        """Whether nothing is in line and nothing is being written."""
        return not self._flushing

    async def drained(self) -> None:
        """Wait until everything in line has been written."""
        while self._flushing:
            await asyncio.wait(self._flushing)

    def _begin(self) -> None:
        if self._line and self._next is None and len(self._flushing) < FLUSHES_MAX:
            # In a context of nobody: it works for all of them, and for those to come.
            self._next = asyncio.create_task(self._flush_all(), context=Context())
            self._flushing.add(self._next)

    def _stuck(self) -> None:
        self._next = None
        self._begin()

    async def _flush_all(self) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101  # a coroutine that runs has a task
        batch: list[Waiting[Item, Answer]] = []
        try:
            while self._line and self._next in (task, None):
                self._next = task
                batch = self._next_batch()
                patience = asyncio.get_running_loop().call_later(STUCK_SECONDS, self._stuck)
                try:
                    await self._write(batch)
                finally:
                    patience.cancel()
        finally:
            self._flushing.discard(task)
            if self._next is task:
                self._next = None
            # Only when this task is cut off is there anybody without an answer.
            for waiting in batch:
                _refuse(
                    waiting.answer,
                    UnavailableError("The service was cut off. Whether anything has changed is not known."),
                )
            self._begin()

    def _next_batch(self) -> list[Waiting[Item, Answer]]:
        batch: list[Waiting[Item, Answer]] = []
        keys: set[Hashable] = set()
        later: list[Waiting[Item, Answer]] = []
        weight = 0
        while self._line and (not batch or weight + self._weight(self._line[0].item) <= self._batch_max):
            waiting = self._line.popleft()
            if self._key is not None:
                key = self._key(waiting.item)
                if key in keys:
                    later.append(waiting)
                    continue
                keys.add(key)
            batch.append(waiting)
            weight += self._weight(waiting.item)
        self._line.extendleft(reversed(later))
        self._line_weight -= weight
        return batch

    async def _write(self, batch: list[Waiting[Item, Answer]]) -> None:
        parts = deque([batch])
        while parts:
            part = parts.popleft()
            try:
                answers = await self._flush([waiting.item for waiting in part])
            except UnavailableError as error:
                # Not now, for the other parts too: trying each would only keep the line waiting.
                for waiting in chain(part, *parts):
                    _refuse(waiting.answer, UnavailableError(str(error), error.retry_after_seconds))
                return
            except Exception as error:  # noqa: BLE001  # handed to the one who waits for it
                if len(part) == 1:
                    _refuse(part[0].answer, error)
                else:
                    half = len(part) // 2
                    parts.extendleft([part[half:], part[:half]])
            else:
                for waiting, answer in zip(part, answers, strict=True):
                    waiting.context.run(self._told, answer)
                    if waiting.answer.done():
                        self._orphaned(answer)
                    else:
                        waiting.answer.set_result(answer)


def _refuse(future: "asyncio.Future[Answer]", error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
