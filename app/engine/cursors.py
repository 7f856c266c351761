"""How far this process has leased, so that a lease begins where there are jobs.

A claim walks an index from the front of its line. What has been leased leaves dead entries there, and while some
long transaction keeps VACUUM from taking them away, every claim would walk over all of them. So each line has a
cursor at each priority: the claim begins there.

A cursor is only ever a shortcut. What lands behind one is not lost:

- A claim passes over what others hold at that moment, and its cursor stays at the first such job.
- A job that this process has put behind a cursor (a released job keeps its place in line; a commit was slow) takes
  the cursor back, or is remembered as a place of its own when it is far behind.
- Other processes tell of such places in their hints.
- A sweep looks for what is behind all cursors, in windows of their age: the last minute each time, the older ones
  in turn, so that no sweep walks over everything at once.

Nothing in here is kept anywhere else: a new process begins at the front.
"""

import itertools
import time
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from app.queue.model import PRIORITY_MAX, PRIORITY_MIN
from app.store.jobs import BEGINNING, END, Claim, Line, Place, Stretch

SLACK = timedelta(milliseconds=20)
"""A cursor stays this far behind what it has passed: jobs get their place in line when their statement begins, and
are seen when it commits. Who takes longer is told of: by this process at once, by others in their hints."""
NEAR = timedelta(seconds=10)
"""A cursor is taken back by so much; a job that is farther behind is remembered by itself."""
PLACES_MAX = 100
"""Beyond so many remembered places at one cursor, it is taken back to the first of them."""

LINES_MAX = 2000
FORGOTTEN_AFTER_SECONDS = 600.0

_AGES = (*(timedelta(minutes=1) * 4**power for power in range(5)), END - BEGINNING)

LEVELS = range(PRIORITY_MAX, PRIORITY_MIN - 1, -1)


@dataclass(slots=True)
class _Cursor:
    at: datetime = BEGINNING
    behind: set[datetime] = field(default_factory=set)

    def move_on(self, to: datetime, passed: datetime) -> None:
        self.at = max(self.at, to)
        if self.behind:
            # Of two jobs with one place, one may be left.
            self.behind = {place for place in self.behind if place >= passed}

    def reset(self, to: datetime) -> None:
        self.at = to
        self.behind = {place for place in self.behind if place < to}

    def take_back(self, to: datetime) -> None:
        if to >= self.at:
            return
        if self.at - to > NEAR and len(self.behind) < PLACES_MAX:
            self.behind.add(to)
        else:
            self.at = min(self.behind | {to}) if self.at - to > NEAR else to
            self.behind = {place for place in self.behind if place < self.at}


@dataclass(slots=True)
class _Cursors:
    used_at: float
    by_priority: dict[int, _Cursor] = field(
        default_factory=lambda: {priority: _Cursor() for priority in LEVELS}
    )


class Cursors:
    """The cursors of one process."""

    def __init__(self) -> None:
        self._lines: OrderedDict[Line, _Cursors] = OrderedDict()
        self._under_way: list[Look] = []
        self._sweeps = 0

    @contextmanager
    def claiming(self, lines: Collection[Line]) -> Iterator["Look"]:
        """Yield where a claim at `lines` is to look; it tells what it has found."""
        look = Look(self, lines, self.ahead(lines), [])
        self._under_way.append(look)
        try:
            yield look
        except BaseException:
            # What it held is free again, and other claims have passed it over meanwhile.
            self._take_back_to(look.stretches)
            raise
        finally:
            self._under_way = [each for each in self._under_way if each is not look]

    def ahead(self, lines: Iterable[Line]) -> list[Stretch]:
        """Return the stretches of these lines in which ready jobs stand, by all that is known here."""
        stretches = []
        for line in lines:
            cursors = self._lines.get(line)
            if cursors is None:
                stretches += [Stretch(line, priority, BEGINNING, END) for priority in LEVELS]
                continue
            for priority, cursor in cursors.by_priority.items():
                stretches.append(Stretch(line, priority, cursor.at, END))
                stretches += [Stretch(line, priority, place, place) for place in sorted(cursor.behind)]
        return stretches

    def landed(self, place: Place) -> None:
        """Note that a job stands ready at `place`."""
        for look in self._under_way:
            if place.line in look.lines or Line(place.line.queue) in look.lines:
                look.landed.append(place)
        self._take_back(place)

    def behind(self, *, everything: bool = False) -> list[Stretch]:
        """Return where the next sweep is to look for jobs: the last minute behind each cursor, and one older window.

        Or behind them in all windows.
        """
        self._forget()
        self._sweeps += 1
        older = 1 + self._sweeps % (len(_AGES) - 1)
        windows = [(timedelta(0), _AGES[0]), (_AGES[older - 1], _AGES[older])]
        if everything:
            windows = [(timedelta(0), _AGES[0]), *itertools.pairwise(_AGES)]
        return [
            Stretch(line, priority, max(BEGINNING, _before(cursor.at, far)), _before(cursor.at, near))
            for line, cursors in self._lines.items()
            for priority, cursor in cursors.by_priority.items()
            for near, far in windows
            if _before(cursor.at, near) > BEGINNING
        ]

    def move_on(self, lines: Collection[Line], claim: Claim, landed: Iterable[Place]) -> None:
        """Move past what a claim at `lines` has taken; past everything, when it took all it saw.

        What `landed` while the claim ran may be behind what it took, and it did not see it.
        """
        if claim.contended and not claim.jobs:
            return
        now = claim.claimed_at - SLACK
        last = claim.jobs[-1] if claim.jobs else None
        for line in lines:
            for priority, cursor in self._used(line).by_priority.items():
                if (
                    cursor.at - now > NEAR
                ):  # the database's clock has gone back, and with it the places of new jobs
                    cursor.reset(now)
                if not claim.contended or last is None or priority > last.priority:
                    cursor.move_on(now, END)
                elif priority == last.priority:
                    cursor.move_on(last.ready_at - SLACK, last.ready_at)
            # What others hold may come back.
            for priority, since in claim.passed:
                self._used(line).by_priority[priority].take_back(since)
        for place in landed:
            self._take_back(place)

    def _take_back(self, place: Place) -> None:
        for line in (place.line, Line(place.line.queue)):
            cursors = self._lines.get(line)
            if cursors is not None:
                cursor = cursors.by_priority.get(place.priority)
                if cursor is not None:  # a hint may say anything
                    cursor.take_back(place.since)

    def _take_back_to(self, stretches: Iterable[Stretch]) -> None:
        begins: dict[tuple[str, int], datetime] = {}
        for stretch in stretches:
            where = stretch.line.queue, stretch.priority
            begins[where] = min(stretch.since, begins.get(where, stretch.since))
        for line, cursors in self._lines.items():
            for priority, cursor in cursors.by_priority.items():
                begin = begins.get((line.queue, priority))
                if begin is not None and begin < cursor.at:
                    cursor.reset(begin)

    def _used(self, line: Line) -> _Cursors:
        cursors = self._lines.get(line)
        if cursors is None:
            cursors = self._lines[line] = _Cursors(0.0)
            if len(self._lines) > LINES_MAX:
                self._lines.popitem(last=False)
        else:
            self._lines.move_to_end(line)
        cursors.used_at = time.monotonic()
        return cursors

    def _forget(self) -> None:
        long_ago = time.monotonic() - FORGOTTEN_AFTER_SECONDS
        while self._lines and next(iter(self._lines.values())).used_at < long_ago:
            self._lines.popitem(last=False)


@dataclass(frozen=True, slots=True)
class Look:
    """What one claim is to look at."""

    cursors: Cursors
    lines: Collection[Line]
    stretches: Sequence[Stretch]
    landed: list[Place]
    """What became ready on these lines since it began."""

    def found(self, claim: Claim) -> None:
        """Note what the claim has taken."""
        self.cursors.move_on(self.lines, claim, self.landed)


def _before(instant: datetime, age: timedelta) -> datetime:
    return BEGINNING if instant - BEGINNING <= age else instant - age
