"""This process's copies of what every request needs to know and few ever change: queue policies, workers' directives.

A copy has a topic. In the database each topic has a number that every change raises, in its own transaction; a copy
is replaced when the number is another than at its last load. The numbers of all topics are compared in one query
each COMPARE_SECONDS, and at once when another process says so in a hint. Who changes something calls `refresh` after
its COMMIT: then this process knows it before it answers, the others within a moment; losing the hint costs
COMPARE_SECONDS. While the database is away the copies stay as they are.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import structlog

from app.engine.running import Component
from app.queue.errors import UnavailableError

COMPARE_SECONDS = 0.5
COMPARE_PAUSE_SECONDS = 0.02
"""The least time between two comparisons, however many hints come."""

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Topic:
    load: Callable[[], Awaitable[None]]
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Loads follow each other: an older one never replaces what a newer one has brought."""
    begun: int = 0
    """How many loads have begun."""
    done: int = 0
    """Which of them was the last that succeeded."""
    number: int | None = None
    """The number of the database's state that the copy has, or an older one; None before the first load."""


class Copies(Component):
    """Keeps the copies of this process.

    `numbers` reads the topics' numbers, `tell` lets other processes know that a topic has changed.
    """

    def __init__(
        self,
        numbers: Callable[[], Awaitable[Mapping[str, int]]],
        tell: Callable[[str], None],
        every_seconds: float = COMPARE_SECONDS,
    ) -> None:
        super().__init__()
        self._numbers = numbers
        self._tell = tell
        self._every_seconds = every_seconds
        self._topics: dict[str, _Topic] = {}
        self._to_compare = asyncio.Event()
        self._away = False

    def keep(self, topic: str, load: Callable[[], Awaitable[None]]) -> None:
        """Keep the copy of `topic`, which `load` reads anew and puts in the place of the one before."""
        self._topics[topic] = _Topic(load)

    async def load(self) -> None:
        """Load all copies: before the first request. Raises UnavailableError."""
        for name in self._topics:
            await self._load(name)

    async def refresh(self, topic: str) -> None:
        """Load a copy after a change made here, and tell the other processes. Raises UnavailableError.

        Also then the change stands; this copy follows when the database is back.
        """
        self._tell(topic)
        await self._load(topic)

    def hint(self, topics: Iterable[str]) -> None:
        """Compare soon: another process has changed these."""
        if not self._topics.keys().isdisjoint(topics):
            self._to_compare.set()

    async def compare(self) -> None:
        """Replace those copies whose numbers have changed. Raises UnavailableError."""
        numbers = await self._numbers()
        for name, topic in self._topics.items():
            if topic.number != numbers.get(name, 0):
                await self._load(name)

    async def _load(self, name: str) -> None:
        topic = self._topics[name]
        asked = topic.begun
        async with topic.turn:
            if topic.done > asked:
                return  # one that began after this call has brought all that this one would
            topic.begun += 1
            # Read first: what is changed in between is loaded twice, not never.
            number = (await self._numbers()).get(name, 0)
            await topic.load()
            topic.number = number
            topic.done = topic.begun

    async def _run(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._every_seconds):
                    await self._to_compare.wait()
            self._to_compare.clear()
            try:
                await self.compare()
            except UnavailableError as error:
                if not self._away:  # once an outage, not twice a second
                    log.warning("copies_not_compared", error=str(error))
                self._away = True
            else:
                self._away = False
            await asyncio.sleep(COMPARE_PAUSE_SECONDS)
