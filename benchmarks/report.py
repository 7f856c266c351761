"""What people read: tables on the terminal, and docs/benchmarks.md with its plots."""

import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import msgspec
import psutil
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.table import Table as Screen

from benchmarks.lab import PEERS, Lab, Plan, sql
from benchmarks.results import Findings, Plot, Row, Table

DOCS = Path(__file__).resolve().parents[1] / "docs"
GOALS = ("what", "leaseq", "against", "the other", "ratio", "goal", "reached")
SETTINGS = (
    "fsync",
    "synchronous_commit",
    "shared_buffers",
    "max_wal_size",
    "autovacuum_naptime",
    "wal_level",
)
SYNCS = 200
PAGE = bytes(8192)
GIB = 1024**3
MARKED_POINTS_MAX = 10

METHOD = """\
`make bench` sets everything up and measures; `make bench-quick` does the same in a few minutes, coarsely.

- **One machine, one PostgreSQL.** leaseq and every peer that uses PostgreSQL share the embedded one with its durable
  default settings, each in a database of its own. The machine runs the load, the service and the database.
- **Side by side, in turn.** A, B, A, B …, so that a change of the machine's mood meets both. A ratio is taken round by
  round between neighbours; the tables show the median and, in brackets, the least and the most.
- **Clean starts.** Before each run the tables are emptied, filled with what the run needs, vacuumed and analysed, and
  a checkpoint is made, for leaseq and pg-boss alike. Each run warms up first.
- **leaseq as it comes**: `python -m app serve`, one process (or two, where it says so), default settings, over HTTP with
  kept-alive connections from [wrk](https://github.com/wg/wrk). **Peers in-process**, with their defaults and no HTTP in
  between.
- Every payload is `{"to":"a@example.com","n":1}`. A run in which any request fails, or which runs out of jobs, is void.
- Buffers are those of `EXPLAIN (ANALYZE, BUFFERS)` of the very statement, planned under the service's session settings:
  they tell what latencies on a noisy machine may hide.
- The horizon is pinned by an idle `REPEATABLE READ` transaction in the same database, while a fixed number of jobs a
  second goes through its whole life, the same for leaseq and, after it, for the peer.
"""


@dataclass(frozen=True)
class Section:
    """A part of the benchmarks and what it found, or why it found nothing."""

    name: str
    title: str
    findings: Findings
    failure: str = ""


def machine(lab: Lab) -> Table:
    """Say on what all this was measured."""
    facts = [
        ("processor", f"{os.cpu_count()} cores, {_processor()}"),
        ("memory", f"{psutil.virtual_memory().total / GIB:.0f} GiB"),
        ("fdatasync of 8 KiB", f"{_sync_microseconds(lab.directory):.0f} µs (median)"),
        (
            "system",
            f"{platform.system()} {platform.release().split('-')[0]}, Python {platform.python_version()}",
        ),
    ]
    [(version,)] = sql(lab.url, "SHOW server_version")
    shown = [f"{name} = {sql(lab.url, f'SHOW {name}')[0][0]}" for name in SETTINGS]
    facts.append(("PostgreSQL", f"{version}, {', '.join(shown)}"))
    facts.append(("peers", ", ".join(_versions())))
    return Table("Machine", ("what", "which"), facts)


def _processor() -> str:
    found = Path("/proc/cpuinfo")
    lines = found.read_text().splitlines() if found.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _sync_microseconds(directory: Path) -> float:
    taken = []
    with (directory / "sync").open("wb", buffering=0) as file:
        for _ in range(SYNCS):
            file.write(PAGE)
            began = time.perf_counter()
            os.fdatasync(file.fileno())
            taken.append((time.perf_counter() - began) * 1e6)
    return statistics.median(taken)


def _versions() -> Iterable[str]:
    for name in ("pg-boss", "graphile-worker", "bullmq", "node"):
        found = PEERS / "node_modules" / name / "package.json"
        if found.exists():
            yield f"{name} {json.loads(found.read_text())['version']}"
    for name in ("pgqueuer", "procrastinate", "fastapi", "uvicorn"):
        yield f"{name} {importlib.metadata.version(name)}"


def show(console: Console, section: Section) -> None:
    """Print what a section found."""
    if section.failure:
        console.print(f"[red]✗ {section.title}: {escape(section.failure)}\n")
    for table in section.findings.tables:
        _print(console, table)


def show_goals(console: Console, sections: Sequence[Section]) -> None:
    """Print the table of goals."""
    _print(console, _goals(sections), {"reached": "green", "not reached": "red", "partly measured": "yellow"})
    for note in _notes(sections):
        console.print(f"[dim]{escape(note)}\n")


def _print(console: Console, table: Table, styles: dict[str, str] | None = None) -> None:
    screen = Screen(*table.columns, title=table.title, title_justify="left", title_style="bold")
    for row in table.rows:
        style = (styles or {}).get(row[-1])
        screen.add_row(*map(escape, row[:-1]), f"[{style}]{row[-1]}" if style else escape(row[-1]))
    console.print(screen)
    console.print(f"[dim]{escape(table.note)}\n" if table.note else "")


def _goals(sections: Sequence[Section]) -> Table:
    rows = [
        (row.what, row.ours, row.against, row.theirs, row.ratio, row.goal, _verdict(row))
        for section in sections
        for row in section.findings.rows
    ]
    rows += [
        (section.title, "—", "—", "—", "—", "—", "could not be measured")
        for section in sections
        if section.failure
    ]
    return Table("Goals", GOALS, rows)


def _verdict(row: Row) -> str:
    if row.reached is None:
        return "partly measured"
    return "reached" if row.reached else "not reached"


def _notes(sections: Sequence[Section]) -> list[str]:
    return [f"{row.what}: {row.note}" for section in sections for row in section.findings.rows if row.note]


def write(
    measured: Sequence[Section], ground: Table, plan: Plan, order: Sequence[str], *, quick: bool
) -> Path:
    """Write docs/benchmarks.md, its plots and its figures, and return the page's path.

    What was not measured this time stays as it was measured before, from the figures kept beside the plots.
    """
    pictures = DOCS / "benchmarks"
    kept = pictures / "figures.json"
    before = msgspec.json.decode(kept.read_bytes(), type=list[Section]) if kept.exists() else []
    known = {section.name: section for section in (*before, *measured)}
    sections = [known[name] for name in order if name in known]
    shutil.rmtree(pictures, ignore_errors=True)
    pictures.mkdir(parents=True)
    kept.write_bytes(msgspec.json.format(msgspec.json.encode(sections), indent=1) + b"\n")
    drawn = [plot for section in sections for plot in section.findings.plots]
    for plot in drawn:
        draw(plot, pictures / f"{plot.name}.svg")
    size = f"{plan.rounds} rounds of {plan.seconds} s after {plan.warmup_seconds} s of warm-up"
    parts = [
        "# Benchmarks\n",
        "leaseq beside its peers: written by `python -m benchmarks --write`, not by hand.\n",
        f"Measured with `--quick`, coarsely: {size}.\n" if quick else f"Measured in {size}.\n",
        _markdown(_goals(sections), heading="##"),
        *(f"> {note}\n" for note in _notes(sections)),
        *(f"![{plot.title}](benchmarks/{plot.name}.svg)\n" for plot in drawn),
        "## Method\n",
        METHOD,
        _markdown(ground, heading="##"),
        "## Details\n",
        *(_markdown(table, heading="###") for section in sections for table in section.findings.tables),
    ]
    page = DOCS / "benchmarks.md"
    page.write_text("\n".join(parts))
    return page


def _markdown(table: Table, heading: str) -> str:
    lines = [
        f"{heading} {table.title}\n",
        f"| {' | '.join(table.columns)} |",
        f"| {' | '.join('---' for _ in table.columns)} |",
        *(f"| {' | '.join(row)} |" for row in table.rows),
        "",
    ]
    if table.note:
        lines += [table.note, ""]
    return "\n".join(lines)


def draw(plot: Plot, path: Path) -> None:
    """Draw a plot as SVG: the same figures make the same file."""
    with mpl.rc_context({"svg.hashsalt": plot.name, "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        for label, line in plot.lines.items():
            marker = "o" if len(line) <= MARKED_POINTS_MAX else None
            axes.plot([x for x, _ in line], [y for _, y in line], label=label, marker=marker, linewidth=2)
        if plot.log_across:
            axes.set_xscale("log")
        if plot.log_up:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        axes.set(title=plot.title, xlabel=plot.across, ylabel=plot.up)
        axes.grid(visible=True, alpha=0.3)
        axes.legend()
        figure.savefig(path, format="svg", metadata={"Date": None})
