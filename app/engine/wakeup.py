"""Waiting leases, and how they learn that a job is ready.

A lease that found nothing waits in the room, holding no connection and no transaction. It is called when a job
becomes ready on one of its lines (a queue, or one type of a queue):

- by this process, at once, when the job was enqueued, released, retried or promoted here;
- by a hint from another process: a NOTIFY sent after the COMMIT, coalesced, at most one each HINT_PAUSE_SECONDS;
- by the poll, a look for the whole room each `poll_seconds` (jittered), because a hint may be lost. It also sweeps
  what is behind the cursors.

As many leases are called as there are jobs, the longest waiting first. Nothing is missed in between:

- A lease enters the room before it looks at the table, so a job either is seen or calls it.
- A lease that leaves with a call it has not used (its client vanished, it found another job) hands the call on.
- What calls nobody here is told to the other processes; what was called for here is not. They are told the places too,
  of each released job (it keeps its old place in line) and of the first among new ones: their cursors may have
  passed them.
- After the listening connection was lost, everybody is looked up once, since hints went by.

Losing every hint costs up to `poll_seconds`, never a job. Behind a pooler and without a way past it there are none.
"""

import asyncio
import heapq
import itertools
import json
import random
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any, Protocol
from uuid import uuid4

import structlog

from app.engine.cursors import PLACES_MAX, Cursors
from app.engine.running import Component
from app.queue.errors import UnavailableError
from app.store.database import Database
from app.store.jobs import Jobs, Line, Place

HINT_PAUSE_SECONDS = 0.01
HINT_BYTES_MAX = 7000
"""PostgreSQL refuses a NOTIFY of 8,000 bytes; what does not fit asks the others to look for themselves."""

PLACES_TOLD_MAX = 50
"""Beyond so many places in one hint, the others are asked to look for themselves."""
LINES_TOLD_MAX = 1000

LOOK_PAUSE_SECONDS = 0.05

CALLED_MAX = 1000
"""A look calls so many at each priority of a line; those who are left over are called by the next."""

SIGN_OF_LIFE_SECONDS = 10.0
RECONNECT_SECONDS_MAX = 5.0

log = structlog.get_logger(__name__)


class Waiter:
    """One waiting lease."""

    def __init__(self, room: "Room", lines: frozenset[Line], arrival: int) -> None:
        self._room = room
        self.lines = lines
        self.arrival = arrival
        self.called_for: Line | None = None
        self._heeded: Line | None = None
        self._answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    def listen(self) -> None:
        """Be ready for the next call. Call this before looking: what becomes ready from now on will call."""
        if self._answer.done():
            self._answer = asyncio.get_running_loop().create_future()
        if self.called_for is not None:
            self._heeded, self.called_for = self.called_for, None
            self._room.readmit(self)

    def looked(self, taken: Iterable[Line]) -> None:
        """Note what a look brought: the call before it was used, unless it brought only jobs of other lines."""
        taken = set(taken)
        if not taken or self._heeded in taken | {Line(line.queue) for line in taken}:
            self._heeded = None

    @property
    def unused(self) -> list[Line]:
        """The calls that somebody else should have."""
        return [line for line in (self._heeded, self.called_for) if line is not None]

    async def called(self, until: float, gone: "asyncio.Future[object]") -> bool:
        """Wait for a call until the loop's time `until`.

        False when the time is up, when the lease was sent away, and when its client has `gone`.
        """

        def leave(_gone: "asyncio.Future[object]") -> None:
            self.send_away()

        gone.add_done_callback(leave)
        try:
            async with asyncio.timeout_at(until):
                return await self._answer
        except TimeoutError:
            return False
        finally:
            gone.remove_done_callback(leave)

    def call(self, line: Line) -> None:
        """Tell it that a job is ready on `line`."""
        self.called_for = line
        if not self._answer.done():
            self._answer.set_result(True)

    def send_away(self) -> None:
        """End its waiting without a job."""
        if not self._answer.done():
            self._answer.set_result(False)


class Room:
    """The waiting leases of this process, in the order of their arrival.

    They may wait at the lines of `paused` queues, and go on waiting when these are resumed; until then nobody is called
    for them.
    """

    def __init__(self, paused: Callable[[], Collection[str]] = frozenset) -> None:
        self._paused = paused
        # Who has been called stands in no line until he listens again: a call never walks over those before it.
        self._lines: dict[Line, OrderedDict[Waiter, None]] = {}
        self._waiters: set[Waiter] = set()
        self._arrivals = itertools.count()

    def __len__(self) -> int:
        return len(self._waiters)

    def enter(self, lines: Iterable[Line]) -> Waiter:
        """Let a lease wait at `lines`."""
        waiter = Waiter(self, frozenset(lines), next(self._arrivals))
        self._waiters.add(waiter)
        for line in waiter.lines:
            self._lines.setdefault(line, OrderedDict())[waiter] = None
        return waiter

    def readmit(self, waiter: Waiter) -> None:
        """Let a lease that was called wait again, in front: the longest waiting are called first."""
        for line in waiter.lines:
            waiting = self._lines.setdefault(line, OrderedDict())
            waiting[waiter] = None
            waiting.move_to_end(waiter, last=False)

    def leave(self, waiter: Waiter) -> None:
        """Let a lease go."""
        self._waiters.discard(waiter)
        self._leave_lines(waiter)

    def call(self, line: Line, count: int) -> int:
        """Call up to `count` leases that would take a job of this queue and type; return how many were."""
        if not self._lines or line.queue in self._paused():
            return 0
        waiting = [self._lines[each] for each in {line, Line(line.queue)} if each in self._lines]
        longest = heapq.merge(*waiting, key=lambda waiter: waiter.arrival)
        called = list(itertools.islice(longest, count))
        for waiter in called:
            self._leave_lines(waiter)
            waiter.call(line)
        return len(called)

    def _leave_lines(self, waiter: Waiter) -> None:
        for line in waiter.lines:
            waiting = self._lines.get(line)
            if waiting is not None:
                waiting.pop(waiter, None)
                if not waiting:
                    del self._lines[line]

    def send_all_away(self) -> None:
        """End everybody's waiting without a job."""
        for waiter in self._waiters:
            waiter.send_away()

    def waiting(self) -> dict[Line, int]:
        """Return how many wait at each line at which they may be called."""
        paused = self._paused()
        return {line: len(waiters) for line, waiters in self._lines.items() if line.queue not in paused}


class Talker(Protocol):
    """Who shares the connection to the other processes. What is said may get lost."""

    def words(self) -> list[Any]:
        """Take what is to be said now, each small enough for one hint."""

    def heard(self, origin: str, word: Any) -> None:
        """Hear a word that the process `origin` has said, or anybody: ValueError or TypeError where it makes no sense."""

    def connected(self) -> None:
        """Note that words are heard from now on, and that some may have been lost before."""


class Wakeups(Component):
    """The room, and its connection to the other processes."""

    def __init__(
        self,
        database: Database,
        jobs: Jobs,
        cursors: Cursors,
        poll_seconds: float,
        paused: Callable[[], Collection[str]],
        changed: Callable[[Collection[str]], None],
    ) -> None:
        """`changed` hears of topics that another process has changed (see `copies.py`)."""
        super().__init__()
        self._changed = changed
        self._database = database
        self._jobs = jobs
        self._cursors = cursors
        self._poll_seconds = poll_seconds
        self._room = Room(paused)
        self._hints: dict[Line, int] = {}
        self._old_places: list[Place] = []
        self._first_places: dict[tuple[Line, int], Place] = {}
        self._others_look = False
        self._others_look_everywhere = False
        self._changes: set[str] = set()
        self._to_say = asyncio.Event()
        self._to_look = asyncio.Event()
        self._everywhere = False
        self._talkers: dict[str, Talker] = {}
        self._origin = uuid4().hex
        self._channel = f"leaseq {database.schema}"
        self.listening = asyncio.Event()
        """Set while hints from other processes are heard."""

    @contextmanager
    def waiting(self, lines: Iterable[Line]) -> Iterator[Waiter]:
        """Wait at `lines` for the length of the block; a call that was not used goes to the next in line."""
        waiter = self._room.enter(lines)
        try:
            yield waiter
        finally:
            self._room.leave(waiter)
            for line in waiter.unused:
                if self.announce({line: 1}):
                    # A call knows its line, not the place of the job: the others must look for it.
                    self._others_look_everywhere = True

    @property
    def waiters(self) -> int:
        """How many leases wait in this process."""
        return len(self._room)

    def placed(self, places: Sequence[Place], *, old: bool = False) -> None:
        """Tell whoever waits, and the cursors, that jobs stand ready now; at `old` places the others' cursors too."""
        ready: dict[Line, int] = {}
        for place in places:
            self._cursors.landed(place)
            ready[place.line] = ready.get(place.line, 0) + 1
        told = self.announce(ready)
        for place in [place for place in places if place.line in told]:
            if old and len(self._old_places) < PLACES_TOLD_MAX:
                self._old_places.append(place)
            elif old:
                self._others_look_everywhere = True
            elif len(self._first_places) >= PLACES_TOLD_MAX:
                # What has just become ready any look finds: going through all that is old for it would be a herd.
                self._others_look = True
            else:
                where = place.line, place.priority
                self._first_places[where] = min(place, self._first_places.get(where, place))

    def announce(self, ready: Mapping[Line, int]) -> set[Line]:
        """Call whoever waits, here first, for so many jobs on these lines; return of which the others will hear."""
        told = set()
        for line, count in ready.items():
            left = count - self._room.call(line, count)
            if left > 0:
                told.add(line)
                self._to_say.set()
                if len(self._hints) < LINES_TOLD_MAX or line in self._hints:
                    self._hints[line] = self._hints.get(line, 0) + left
                else:
                    self._others_look = True
        return told

    def tell_change(self, topic: str) -> None:
        """Let the other processes know that something has changed that they keep a copy of."""
        self._changes.add(topic)
        self._to_say.set()

    def attach(self, kind: str, talker: Talker) -> None:
        """Let `talker` say and hear words of this kind over our connection."""
        self._talkers[kind] = talker

    def speak(self) -> None:
        """Ask the talkers soon for what they have to say."""
        self._to_say.set()

    def send_all_away(self) -> None:
        """Answer all waiting leases now, without a job."""
        self._room.send_all_away()

    def look_soon(self) -> None:
        """Look for ready jobs, also far behind the cursors, before the next poll."""
        self._everywhere = True
        self._to_look.set()

    async def look(self, *, everywhere: bool = False) -> None:
        """Look for ready jobs that nobody was called for, and call; `everywhere`: far behind the cursors too.

        Raises UnavailableError.
        """
        behind = self._cursors.behind(everything=everywhere)
        for place in await self._jobs.look(behind, [PLACES_MAX] * len(behind)):
            self._cursors.landed(place)
        waiting = self._room.waiting()
        ahead = self._cursors.ahead(waiting)
        found = await self._jobs.look(ahead, [min(waiting[each.line], CALLED_MAX) for each in ahead])
        for line, count in Counter(place.line for place in found).items():
            self._room.call(line, count)

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._poll())
            if self._database.can_listen:
                tasks.create_task(self._stay_connected())
            else:
                log.warning(
                    "hints_off", why="DATABASE_LISTEN_URL is not set", poll_seconds=self._poll_seconds
                )

    async def _poll(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._poll_seconds * random.uniform(0.8, 1.2)):
                    await self._to_look.wait()
            everywhere, self._everywhere = self._everywhere, False
            self._to_look.clear()
            try:
                await self.look(everywhere=everywhere)
            except UnavailableError as error:
                log.warning("poll_failed", error=str(error))
            # Hints may ask for look after look.
            await asyncio.sleep(LOOK_PAUSE_SECONDS)

    async def _stay_connected(self) -> None:
        """Listen, and send hints. Whatever goes wrong here is tried again: the poll stands behind it."""
        tries = 0
        while True:
            try:
                # A hint is no promise: its COMMIT need not wait for the disk.
                connection = await self._database.connect(synchronous_commit="off")
                try:
                    await connection.add_listener(self._channel, self._heard)
                    # A connection that ends has something to say too: sending it fails, at once.
                    connection.add_termination_listener(lambda _: self._to_say.set())
                    self.listening.set()
                    # Hints may have gone by while nobody listened.
                    self.look_soon()
                    for talker in self._talkers.values():
                        talker.connected()
                    tries = 0
                    await self._talk(connection)
                finally:
                    self.listening.clear()
                    connection.terminate()
            except Exception as error:  # noqa: BLE001  # no error of one connection may end the listening
                log.warning("hints_lost", error=repr(error))
                tries = min(tries + 1, 10)
                await asyncio.sleep(min(0.05 * 2**tries, RECONNECT_SECONDS_MAX) * random.uniform(0.5, 1))

    async def _talk(self, connection: Any) -> None:
        """Send hints while there are any, and a sign of life else: a dead peer shows only when it is spoken to."""
        while True:
            try:
                async with asyncio.timeout(SIGN_OF_LIFE_SECONDS):
                    await self._to_say.wait()
            except TimeoutError:
                await connection.execute("SELECT 1")
                continue
            self._to_say.clear()
            messages = [self._message(), *self._words()]
            said, self._hints = self._hints, {}
            changes, self._changes = self._changes, set()
            self._old_places, self._first_places = [], {}
            self._others_look = self._others_look_everywhere = False
            try:
                await connection.execute(
                    "SELECT pg_notify($1, word) FROM unnest($2::text[]) AS word", self._channel, messages
                )
            except Exception:
                # They are said again over the next connection: one too many costs a look.
                self._hints = {**said, **self._hints}
                self._changes |= changes
                self._others_look_everywhere = True
                self._to_say.set()
                raise
            await asyncio.sleep(HINT_PAUSE_SECONDS)

    def _words(self) -> list[str]:
        return [
            json.dumps({"from": self._origin, kind: word})
            for kind, talker in self._talkers.items()
            for word in talker.words()
        ]

    def _message(self) -> str:
        changed = {"changed": sorted(self._changes)} if self._changes else {}
        said = {
            "from": self._origin,
            **changed,
            "ready": [[line.queue, line.type, count] for line, count in self._hints.items()],
            "places": [
                [place.line.queue, place.line.type, place.priority, place.since.isoformat()]
                for place in (*self._old_places, *self._first_places.values())
            ],
        }
        message = json.dumps(said)
        look = self._others_look or self._others_look_everywhere
        if not look and len(message) <= HINT_BYTES_MAX:
            return message
        where = {"everywhere": True} if self._others_look_everywhere or self._old_places else {}
        return json.dumps({"from": self._origin, "look": True, **where, **changed})

    def _heard(self, _connection: object, _pid: int, _channel: str, message: object) -> None:
        try:
            said = json.loads(str(message))
            if said["from"] == self._origin:
                return
            ready = [(Line(queue, type_), int(count)) for queue, type_, count in said.get("ready", ())]
            places = [
                Place(Line(queue, type_), int(priority), datetime.fromisoformat(since).astimezone(UTC))
                for queue, type_, priority, since in said.get("places", ())
            ]
            changed = {str(topic) for topic in said.get("changed", ())}
            for kind in self._talkers.keys() & said.keys():
                self._talkers[kind].heard(str(said["from"]), said[kind])
        except (ValueError, TypeError, KeyError, AttributeError):
            log.warning("hint_not_understood")  # anybody in the database may send one
            return
        if changed:
            self._changed(changed)
        if said.get("everywhere"):
            self.look_soon()
        elif said.get("look"):
            self._to_look.set()
        for place in places:
            self._cursors.landed(place)
        for line, count in ready:
            self._room.call(line, count)
