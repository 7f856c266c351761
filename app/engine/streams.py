"""Streams of what happens to jobs, for whoever listens. They are hints, not a log.

What happens is kept in a ring, under numbers that only grow; a stream is no more than a place in it. A reader who is
too slow falls out of the ring and is told to look for himself (a reset): nobody waits for him, and he costs no memory.
Who was cut off begins again where he was, as long as that is in the ring. It is filled while somebody listens here and
for LINGER_SECONDS after; else an event costs one look at a flag.

Processes tell each other over the connection of the hints (see `wakeup.py`), and only while somebody listens:

- Who has listeners, or had them lately, says so each ANNOUNCE_SECONDS. The others believe it for BELIEF_SECONDS.
- They then say what happens with them, in batches, one each BATCH_SECONDS at most. When more happens than a batch
  holds they say instead that it is missing, and the listeners are told to look for themselves.
- Whose connection was lost may have missed something, and may not have been heard: all are told so. He also asks who
  listens.
"""

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from uuid import UUID, uuid4

from app.engine.running import Component
from app.engine.wakeup import HINT_BYTES_MAX, Wakeups
from app.queue.errors import UnavailableError
from app.queue.events import TOLD, JobEvent, Observer, QueueEvent, StreamReset, told
from app.queue.lifecycle import State

KEPT_MAX = 10_000

LINGER_SECONDS = 60.0
ANNOUNCE_SECONDS = 10.0
BELIEF_SECONDS = 25.0
OTHERS_MAX = 1000

BATCH_SECONDS = 0.05
BATCH_EVENTS_MAX = 1000
BATCH_HINTS_MAX = 16

READ_MAX = 256
"""A stream hands out so many events at once, some 64 KiB."""
LOOKED_AT_MAX = 2000
"""A stream looks at so many events without letting others have their turn."""
READ_PAUSE_SECONDS = 0.02
"""The least time between two readings of a stream: what comes in between is read together."""

COME_BACK_SECONDS = 5
CUT_SECONDS = 2.0
"""At a stop, who has not taken the end of his stream by then is cut off."""

AT_MAX = 253_402_300_799
"""The last second that a date can have."""

KIND = "events"
"""The kind of our words among the hints."""


class Told(NamedTuple):
    """What happened to one job, as listeners are told of it."""

    name: str
    job_id: UUID
    queue: str
    type: str
    state: State
    at: float
    """When the process that did it told of it, by its clock: in seconds since 1970."""


class Reset(NamedTuple):
    """Something is missing here: who listens must look for himself how things stand."""

    reason: str


class Entry(NamedTuple):
    """What stands in the ring, and the id from which a stream can be resumed behind it."""

    id: str
    what: Told | Reset


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a listener wants to be told of; an empty set wants all."""

    queues: frozenset[str] = frozenset()
    types: frozenset[str] = frozenset()
    job_ids: frozenset[UUID] = frozenset()

    def has(self, what: Told | Reset) -> bool:
        """Whether it is to be told of."""
        return isinstance(what, Reset) or (
            (not self.queues or what.queue in self.queues)
            and (not self.types or what.type in self.types)
            and (not self.job_ids or what.job_id in self.job_ids)
        )


class Ring:
    """The last `kept` of what happened. Numbers begin at 1, and grow by one."""

    def __init__(self, kept: int) -> None:
        self._slots: list[Told | Reset | None] = [None] * kept
        self.first = 1
        """The number of the oldest that is kept; `last + 1` when nothing is."""
        self.last = 0

    def add(self, what: Told | Reset) -> None:
        """Keep it under the next number."""
        self.last += 1
        self._slots[self.last % len(self._slots)] = what
        self.first = max(self.first, self.last - len(self._slots) + 1)

    def clear(self) -> None:
        """Forget all, and leave a number out: nobody resumes over what was not kept."""
        self._slots = [None] * len(self._slots)
        self.last += 1
        self.first = self.last + 1

    def __getitem__(self, number: int) -> Told | Reset:
        what = self._slots[number % len(self._slots)]
        assert what is not None  # noqa: S101  # all from first to last are there
        return what


class Stream:
    """A listener's place in the ring."""

    def __init__(self, streams: "Streams", wanted: Wanted, position: int | None) -> None:
        """`position` is the number of the last that he was told; None when he can not go on from where he was."""
        self._streams = streams
        self._wanted = wanted
        self._position = streams.ring.last if position is None else position
        self._reset = position is None
        self._read_at = 0.0
        self._left = False
        if self._reset:
            streams.note_reset("resume")

    @property
    def id(self) -> str:
        """From where to resume after all that was read."""
        return self._streams.id_of(self._position)

    def leave(self) -> None:
        """Let who reads see the end."""
        self._left = True
        self._streams.call()

    async def read(self, wait_seconds: float) -> list[Entry] | None:
        """Return what came since the last reading, nothing if nothing does in so many seconds, None at the end."""
        ring, loop = self._streams.ring, asyncio.get_running_loop()
        try:
            async with asyncio.timeout(wait_seconds):
                await asyncio.sleep(self._read_at + READ_PAUSE_SECONDS - loop.time())
                while not (found := self._take()):
                    if self._left or self._streams.draining:
                        return None
                    if self._position == ring.last:
                        await self._streams.news()
                    else:
                        await asyncio.sleep(0)  # others have their turn
        except TimeoutError:
            return []
        self._read_at = loop.time()
        return found

    def _take(self) -> list[Entry]:
        ring, found = self._streams.ring, []
        if self._reset:
            found.append(Entry(self.id, Reset("resume")))
            self._reset = False
        elif self._position < ring.first - 1:
            self._position = ring.last
            self._streams.note_reset("slow")
            found.append(Entry(self.id, Reset("slow")))
        for number in range(self._position + 1, min(ring.last, self._position + LOOKED_AT_MAX) + 1):
            if len(found) == READ_MAX:
                break
            self._position = number
            if self._wanted.has(what := ring[number]):
                found.append(Entry(self.id, what))
        return found


class Streams(Component):
    """The listeners of this process, and what they listen to; an observer of what happens here."""

    def __init__(self, streams_max: int, observer: Observer) -> None:
        """`observer` hears of resets: what it hears of jobs it hears from elsewhere."""
        super().__init__()
        self.ring = Ring(KEPT_MAX)
        self.count = 0
        self.draining = False
        self._observer = observer
        self._cuts: set[Callable[[], None]] = set()
        self._streams_max = streams_max
        self._process = uuid4().hex[:16]
        self._news = asyncio.Event()
        self._recording = asyncio.Event()
        self._left_at = 0.0
        self._wakeups: Wakeups | None = None
        # For the other processes: who listens until when, and what they are to be told.
        self._others: dict[str, float] = {}
        self._pending: list[Told] = []
        self._missing = False
        self._batch_due = False
        self._words: list[dict[str, Any]] = []
        self._idle = True

    def attach(self, wakeups: Wakeups) -> None:
        """Use the connection of these hints."""
        self._wakeups = wakeups
        wakeups.attach(KIND, self)

    def on(self, event: QueueEvent) -> None:
        """Let listeners know."""
        if self._idle or not isinstance(event, JobEvent):
            return
        happening = told(event)
        if happening is None:
            return
        what = Told(happening.name, event.job_id, event.queue, event.type, happening.state, time.time())
        if self._recording.is_set():
            self._add(what)
        if self._others:
            self._tell_others(what)

    @contextmanager
    def stream(self, wanted: Wanted, last_id: str | None, cut: Callable[[], None]) -> Iterator[Stream]:
        """Listen for the length of the block: from now on, or from behind the event `last_id`.

        `cut` ends the connection of a listener who does not even take the end of his stream. Raises UnavailableError
        when too many listen already.
        """
        if self.count >= self._streams_max:
            message = f"There are {self._streams_max} event streams already; come back a little later."
            raise UnavailableError(message, COME_BACK_SECONDS)
        self._record()
        self.count += 1
        self._cuts.add(cut)
        try:
            yield Stream(self, wanted, self.ring.last if last_id is None else self._position(last_id))
        finally:
            self.count -= 1
            self._cuts.discard(cut)
            self._left_at = time.monotonic()

    async def news(self) -> None:
        """Wait until something comes into the ring, or until the end."""
        self._news.clear()
        await self._news.wait()

    def send_all_away(self) -> None:
        """End all streams, and from now on those that come."""
        if not self.draining:
            for cut in self._cuts:
                asyncio.get_running_loop().call_later(CUT_SECONDS, cut)
        self.draining = True
        self.call()

    def call(self) -> None:
        """Let all streams look up."""
        self._news.set()

    def note_reset(self, reason: str) -> None:
        """Count a reset."""
        self._observer.on(StreamReset(reason=reason))

    def id_of(self, number: int) -> str:
        """Return the id that names a place in this process's ring."""
        return f"{self._process}-{number}"

    def words(self) -> list[Any]:
        """Take what is to be said to the other processes."""
        words, self._words = self._words, []
        return words

    def heard(self, origin: str, word: Any) -> None:
        """Hear what another process says."""
        if word.get("who") and self._recording.is_set():
            self._say({"listening": True})
        if word.get("listening"):
            self._believe(origin)
        if self._recording.is_set():
            if word.get("missing"):
                self._miss("missing")
            for row in word.get("told", ()):
                self._add(_told_by_others(*row))

    def connected(self) -> None:
        """Note that words are heard from now on, and that some may have been lost before."""
        if self._recording.is_set():
            self._miss("missing")
            self._say({"listening": True})
        if self._others:
            self._missing = True
            self._batch_soon()
        self._say({"who": True})

    async def _run(self) -> None:
        while True:
            await self._recording.wait()
            self._say({"listening": True})
            await asyncio.sleep(ANNOUNCE_SECONDS)
            if not self.count and time.monotonic() - self._left_at >= LINGER_SECONDS:
                self._recording.clear()
                self._look_idle()

    def _record(self) -> None:
        if not self._recording.is_set():
            self.ring.clear()
            self._recording.set()
            self._look_idle()

    def _position(self, last_id: str) -> int | None:
        """Return the number that an id names, if all behind it is still there."""
        process, _, number = last_id.rpartition("-")
        if process != self._process or not number.isascii() or not number.isdecimal() or len(number) > 18:  # noqa: PLR2004
            return None
        return int(number) if self.ring.first - 1 <= int(number) <= self.ring.last else None

    def _add(self, what: Told | Reset) -> None:
        self.ring.add(what)
        self._news.set()

    def _miss(self, reason: str) -> None:
        self.note_reset(reason)
        self._add(Reset(reason))

    def _say(self, word: dict[str, Any]) -> None:
        if word not in self._words:
            self._words.append(word)
        if self._wakeups is not None:
            self._wakeups.speak()

    def _believe(self, origin: str) -> None:
        now = time.monotonic()
        if len(self._others) < OTHERS_MAX or origin in self._others:
            self._others[origin] = now + BELIEF_SECONDS
        self._look_idle()

    def _tell_others(self, what: Told) -> None:
        if len(self._pending) >= BATCH_EVENTS_MAX:
            self._missing = True
            self._pending.clear()
        elif not self._missing:
            self._pending.append(what)
        self._batch_soon()

    def _batch_soon(self) -> None:
        if not self._batch_due:
            self._batch_due = True
            asyncio.get_running_loop().call_later(BATCH_SECONDS, self._batch)

    def _batch(self) -> None:
        self._batch_due = False
        now = time.monotonic()
        self._others = {origin: until for origin, until in self._others.items() if until > now}
        self._look_idle()
        hints = [] if self._missing or not self._others else _hints(self._pending)
        if self._missing or len(hints) + len(self._words) > BATCH_HINTS_MAX:
            self._words = [word for word in self._words if "told" not in word]
            hints = [{"missing": True}]
        self._missing = False
        self._pending.clear()
        if self._others:
            for hint in hints:
                self._say(hint)

    def _look_idle(self) -> None:
        self._idle = not self._others and not self._recording.is_set()


def _told_by_others(name: str, job_id: str, queue: str, type_: str, state: str, at: float) -> Told:
    if name not in TOLD or not 0 <= at <= AT_MAX:
        raise ValueError
    return Told(name, UUID(job_id), str(queue), str(type_), State(state), at)


def _hints(pending: Sequence[Told]) -> list[dict[str, Any]]:
    """Return the fewest words that tell of all, each small enough for a hint."""
    hints: list[dict[str, Any]] = []
    size = HINT_BYTES_MAX
    for what in pending:
        row = [what.name, str(what.job_id), what.queue, what.type, what.state, round(what.at, 3)]
        length = len(json.dumps(row)) + 2
        size += length
        if size > HINT_BYTES_MAX:
            hints.append({"told": []})
            size = length + 100  # what is around them
        hints[-1]["told"].append(row)
    return hints
