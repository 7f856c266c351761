"""Who works: a register of workers, made from their leases and heartbeats, and what operators want of each.

What a process hears of workers it keeps in memory and writes down every WRITE_SECONDS, all at once: a lease costs
nothing more. What they are told (their directives) every process knows by its copy (see `copies.py`).
"""

import asyncio
import itertools
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import structlog

from app.engine.copies import Copies
from app.engine.leasing import LeaseRequest
from app.engine.running import Component
from app.engine.wakeup import Waiter
from app.queue.errors import UnavailableError, WorkerNotFoundError
from app.queue.events import Observer, WorkerDirected
from app.queue.model import Directive, Worker
from app.store.workers import POLLED_SECONDS, TOPIC, Sighting, StoredWorkers

WRITE_SECONDS = 2.0
WRITE_BATCH = 1000

WORKERS_MAX = 10_000
"""The last heard of are known, so many."""
FORGOTTEN_AFTER_SECONDS = 86_400.0
FORGET_EVERY_SECONDS = 60.0
FORGET_STEPS_MAX = 20

WISHES_MAX = 10
"""What one worker asks for in turn: so many different requests are remembered."""

Wish = tuple[tuple[str, ...], tuple[str, ...] | None]
"""Queues and types."""

log = structlog.get_logger(__name__)


class Workers(Component):
    """The register, as this process keeps it. Methods that ask the database raise UnavailableError."""

    def __init__(self, stored: StoredWorkers, copies: Copies, observer: Observer) -> None:
        super().__init__()
        self._stored = stored
        self._copies = copies
        self._observer = observer
        self.write_seconds = WRITE_SECONDS
        self._wishes: OrderedDict[str, OrderedDict[Wish, float]] = OrderedDict()
        self._heard_of: dict[str | Wish, None] = {}
        """Since the last write: workers, and for those without a name what they ask for."""
        self._writing = asyncio.Lock()
        self._forget_due_at = 0.0
        self._directives: dict[str, Directive] = {}
        self._waiting: dict[str, set[Waiter]] = {}

    def directive(self, name: str | None) -> Directive:
        """Return what a worker is told."""
        return Directive.CONTINUE if name is None else self._directives.get(name, Directive.CONTINUE)

    def may_lease(self, name: str | None) -> bool:
        """Whether a worker may take jobs."""
        return self.directive(name) is Directive.CONTINUE

    def asks(self, wanted: LeaseRequest) -> None:
        """Note that a worker asks for jobs."""
        wish = wanted.queues, wanted.types
        if wanted.worker is None:
            self._hear_of(wish)
            return
        self._hear_of(wanted.worker)
        wishes = self._wishes.setdefault(wanted.worker, OrderedDict())
        wishes[wish] = time.monotonic()
        wishes.move_to_end(wish)
        if len(wishes) > WISHES_MAX:
            wishes.popitem(last=False)
        self._wishes.move_to_end(wanted.worker)
        if len(self._wishes) > WORKERS_MAX:
            self._wishes.popitem(last=False)

    def beats(self, name: str | None) -> None:
        """Note a worker's sign of life."""
        if name is not None:
            self._hear_of(name)

    @contextmanager
    def attending(self, name: str | None, waiter: Waiter) -> Iterator[None]:
        """Let the worker's waiting lease end when the worker is told something else, for the length of the block."""
        if name is None:
            yield
            return
        waiting = self._waiting.setdefault(name, set())
        waiting.add(waiter)
        try:
            yield
        finally:
            waiting.discard(waiter)
            if not waiting and self._waiting.get(name) is waiting:
                del self._waiting[name]

    async def load(self) -> None:
        """Read anew what workers are told; answer the waiting leases of those that are told something else."""
        before, self._directives = self._directives, await self._stored.directives()
        for name in before.keys() | self._directives.keys():
            if before.get(name) is not self._directives.get(name):
                for waiter in self._waiting.get(name, ()):
                    waiter.send_away()

    async def page(self, limit: int, after: str) -> tuple[list[Worker], str | None]:
        """Return workers by their names, and the name after which the next page begins."""
        return await self._stored.page(limit, after)

    async def direct(self, name: str, directive: Directive) -> Worker:
        """Tell a worker what to do: in force here at once, elsewhere within a second. Raises WorkerNotFoundError."""
        if name in self._heard_of:
            await self.write()
        if not await self._stored.direct(name, directive):
            raise WorkerNotFoundError
        self._observer.on(WorkerDirected(worker=name, directive=directive))
        await self._copies.refresh(TOPIC)
        worker = await self._stored.one(name)
        if worker is None:
            raise WorkerNotFoundError
        return worker

    async def write(self) -> None:
        """Write down who has been heard of since the last time; forget who was not for long."""
        async with self._writing:
            heard_of, self._heard_of = self._heard_of, {}
            sightings = [self._sighting(each) for each in heard_of]
            new = 0
            try:
                for begin in range(0, len(sightings), WRITE_BATCH):
                    new += await self._stored.saw(sightings[begin : begin + WRITE_BATCH])
            except BaseException:
                # Whatever it was: who has been heard of is not forgotten for it.
                self._heard_of = dict(itertools.islice((heard_of | self._heard_of).items(), WORKERS_MAX))
                raise
            # New ones may be some too many.
            if new or time.monotonic() >= self._forget_due_at:
                await self._forget()

    async def _forget(self) -> None:
        self._forget_due_at = time.monotonic() + FORGET_EVERY_SECONDS
        for _ in range(FORGET_STEPS_MAX):
            if not await self._stored.forget(FORGOTTEN_AFTER_SECONDS, WORKERS_MAX):
                break

    async def _run(self) -> None:
        away = False
        while True:
            await asyncio.sleep(self.write_seconds)
            try:
                await self.write()
            except UnavailableError as error:
                if not away:  # once an outage
                    log.warning("workers_not_written", error=str(error))
                away = True
            else:
                away = False

    def _hear_of(self, who: str | Wish) -> None:
        if len(self._heard_of) < WORKERS_MAX:
            self._heard_of[who] = None

    def _sighting(self, who: str | Wish) -> Sighting:
        if not isinstance(who, str):
            return Sighting(None, *who)
        wishes = self._wishes.get(who)
        if not wishes:
            return Sighting(who)
        # A worker may ask for this and that in turn; what it has not asked for since it asked last is over.
        lately = next(reversed(wishes.values())) - POLLED_SECONDS
        present = [wish for wish, asked_at in wishes.items() if asked_at >= lately]
        queues = dict.fromkeys(queue for queues, _ in present for queue in queues)
        types = [types for _, types in present if types is not None]
        every = len(types) < len(present)
        return Sighting(who, tuple(queues), None if every else tuple(dict.fromkeys(itertools.chain(*types))))
