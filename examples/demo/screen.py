"""What the demonstration shows: a live bar on a terminal, a line now and then in a log, tables at the end."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from examples.demo.traffic import Counts, done


def shown(path: str) -> str:
    """Return a path as rich markup that harms neither markup nor screen."""
    return escape(path if path.isprintable() else repr(path))


def fact(console: Console, name: str, text: str) -> None:
    """Print one of the facts that the demonstration begins with (rich markup)."""
    console.print(f"  [bold]{name:<9}[/]{text}", soft_wrap=True)


def tick(console: Console, text: str) -> None:
    """Print something that is as it should be (rich markup)."""
    console.print(f"  [green]✓[/] {text}", soft_wrap=True)


def cross(console: Console, text: str) -> None:
    """Print something that is not as it should be (rich markup)."""
    console.print(f"  [red]✗[/] {text}", soft_wrap=True)


# Chosen so that the table fits into 80 columns, also where a language is left out.
BAR_WIDTH = 14


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.finished_speed or task.speed or 0:,.0f} jobs/s", style="cyan")


class Screen:
    """The live part: a bar with the queue's counts below it, and whatever is printed meanwhile above it."""

    def __init__(self, console: Console, total: int) -> None:
        """Prepare for ``total`` jobs."""
        self._console = console
        self._total = total
        self._printed_percent = 0
        self._states = Text(style="dim")
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]✓"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
            TextColumn("[bold]{task.percentage:>3.0f} %"),
            _Rate(),
            TimeElapsedColumn(),
            expand=True,
            speed_estimate_period=4,
        )
        self._task = self._progress.add_task("", total=total)
        self._live = Live(Group(self._progress, self._states), console=console, refresh_per_second=12)

    def __enter__(self) -> Self:
        """Show the bar, if this is a terminal."""
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leave the bar as it stands."""
        self._live.stop()

    def update(self, counts: Counts) -> None:
        """Show how far the queue is; without a terminal, one line for each tenth."""
        states = (
            f"waiting {counts['waiting']:,} · active {counts['active']:,} · "
            f"retrying {counts['delayed']:,} · dead letters {counts['failed']:,}"
        )
        if self._console.is_terminal:
            self._progress.update(self._task, completed=done(counts))
            self._states.plain = f"  {states}"
            return
        percent = 100 * done(counts) // self._total
        if percent // 10 > self._printed_percent // 10:
            self._printed_percent = percent
            self._console.print(
                f"  {percent:>3} %  {done(counts):,}/{self._total:,} · {states}", soft_wrap=True
            )


@dataclass(frozen=True)
class Row:
    """The workers of one language; ``absence`` says why there are none."""

    name: str
    title: str
    workers: str = ""
    absence: str = ""


def results_table(
    rows: Iterable[Row], completed: Mapping[str, int], dead: int, retries: int, seconds: float
) -> Table:
    """Show how many jobs the workers of each language completed, of those that took ``seconds`` in all."""
    total = sum(completed.values())
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for title in ("Language", "Workers", "Jobs", "Share", "", "Jobs/s"):
        table.add_column(title, justify="right" if title in {"Jobs", "", "Jobs/s"} else "left", no_wrap=True)
    for row in rows:
        if row.absence:
            table.add_row(row.title, f"left out: {escape(row.absence)}", "-", "", "", "-", style="dim")
        else:
            jobs = completed.get(row.name, 0)
            share = jobs / max(total, 1)
            bar = ProgressBar(total=1, completed=share, width=BAR_WIDTH, complete_style="cyan")
            table.add_row(row.title, row.workers, f"{jobs:,}", bar, f"{share:.0%}", f"{jobs / seconds:,.0f}")
    table.add_section()
    table.add_row("[bold]Completed", "", f"[bold]{total:,}", "", "", f"[bold]{total / seconds:,.0f}")
    table.add_row("Retries", "", f"{retries:,}")
    table.add_row("Dead letters", "", f"{dead:,}")
    return table


@dataclass(frozen=True)
class DeadLetter:
    """A job that used up its retries."""

    path: str
    error: str
    tried_by: Sequence[str]


def dead_letters_table(letters: Iterable[DeadLetter]) -> Table:
    """Show the dead letters, and who tried each in vain."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for title in ("Dead letter", "Error", "Tried by"):
        table.add_column(title)
    for letter in letters:
        table.add_row(shown(letter.path), escape(letter.error), ", ".join(letter.tried_by))
    return table
