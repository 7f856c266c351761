"""What the measurements find: series with their spread, rows that compare with a goal, tables, plots."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Series:
    """The same figure, a value a round."""

    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Iterable[float]) -> "Series":
        """Keep the values. There must be one."""
        return cls(tuple(values))

    @property
    def median(self) -> float:
        """The middle of the rounds."""
        return statistics.median(self.values)

    def over(self, other: "Series") -> "Series":
        """Divide round by round: what ran in turn is compared with its neighbour."""
        return Series.of(mine / theirs for mine, theirs in zip(self.values, other.values, strict=True))

    def overlaps(self, other: "Series") -> bool:
        """Whether the spreads meet: then noise may be all the difference."""
        return min(self.values) <= max(other.values) and min(other.values) <= max(self.values)

    def text(self, unit: str = "") -> str:
        """Write it as `median (least-most)`."""
        spread = f" ({number(min(self.values))}–{number(max(self.values))})" if len(self.values) > 1 else ""  # noqa: RUF001
        return f"{number(self.median)}{unit}{spread}"


def number(value: float) -> str:
    """Write a figure with as many digits as mean something."""
    for least, digits in ((100, 0), (10, 1), (0.1, 2)):
        if abs(value) >= least:
            return f"{value:,.{digits}f}"
    return f"{value:.3g}"


def quantile(values: Sequence[float], share: float) -> float:
    """Return the value that `share` of all do not exceed. There must be one."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


@dataclass(frozen=True)
class Row:
    """A line of the table of goals. `reached` is None where the goal can not be judged; `note` says why."""

    what: str
    ours: str
    against: str
    theirs: str
    ratio: str
    goal: str
    reached: bool | None
    note: str = ""


def at_least(
    goal: float, what: str, ours: Series, against: str, theirs: Series, unit: str = "/s", note: str = ""
) -> Row:
    """Compare rates: the median ratio must reach the goal."""
    ratio = ours.over(theirs)
    return Row(
        what,
        ours.text(unit),
        against,
        theirs.text(unit),
        ratio.text(" ×"),  # noqa: RUF001  # a multiplication sign is what is meant
        f"≥ {number(goal)} ×",  # noqa: RUF001
        None if note else ratio.median >= goal,
        note,
    )


def at_most(goal: float, what: str, ours: Series, against: str, theirs: Series, unit: str = " ms") -> Row:
    """Compare costs: the median ratio must not pass the goal."""
    ratio = ours.over(theirs)
    return Row(
        what,
        ours.text(unit),
        against,
        theirs.text(unit),
        ratio.text(" ×"),  # noqa: RUF001
        f"≤ {number(goal)} ×",  # noqa: RUF001
        ratio.median <= goal,
    )


def within(limit: float, what: str, ours: Series, unit: str) -> Row:
    """Hold a figure against a fixed limit."""
    return Row(what, ours.text(unit), "—", "—", "—", f"≤ {number(limit)}{unit}", ours.median <= limit)


@dataclass(frozen=True)
class Table:
    """Figures for information."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""


Line = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Plot:
    """Lines to draw, by label. `name` becomes the file's."""

    name: str
    title: str
    across: str
    up: str
    lines: Mapping[str, Line]
    log_across: bool = False
    log_up: bool = False


@dataclass
class Findings:
    """What a section found."""

    rows: list[Row] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
