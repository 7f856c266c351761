"""`python -m benchmarks`: measure leaseq beside its peers, say which goals are reached, write docs/benchmarks.md."""

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import psycopg
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from app.store.embedded import EmbeddedDatabaseError
from benchmarks import footprint, latency, throughput
from benchmarks.lab import FULL, QUICK, Lab, prepare_peers
from benchmarks.processes import SIGNALS, BenchmarkError, require_tools
from benchmarks.report import Section, machine, show, show_goals, write
from benchmarks.results import Findings

SECTIONS: dict[str, tuple[str, Callable[[Lab], Findings]]] = {
    "enqueue": ("Enqueue one by one", throughput.enqueue),
    "work": ("Take and finish one by one", throughput.work),
    "batch": ("Take and finish in batches", throughput.batch),
    "prices": ("What each layer costs", throughput.prices),
    "pick-up": ("Pick-up latency", latency.pick_up),
    "backlog": ("Lease by backlog", latency.backlog),
    "flat": ("Lease while everything grows", latency.flat),
    "pinned": ("Lease with a pinned xmin horizon", latency.pinned),
    "waiters": ("Idle long-polls", footprint.waiters),
    "cost": ("Cost of a job", footprint.cost),
    "generator": ("The load generator", throughput.generator),
    "curve": ("Throughput by concurrency", throughput.curve),
    "others": ("Other queues", throughput.others),
}
NOT_QUICK = ("prices", "flat", "generator", "curve", "others")
PAPER_COLUMNS = 160
"""Where the output is no terminal, whose width is known."""


def main() -> int:
    """Parse the command line and measure; return 0 if all could be measured, whatever the goals."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="coarsely, in less than three minutes")
    parser.add_argument(
        "--only",
        choices=SECTIONS,
        action="append",
        metavar="NAME",
        help=f"one of {', '.join(SECTIONS)}; repeatable",
    )
    parser.add_argument("--rounds", type=int, metavar="N", help="how often each pair runs")
    parser.add_argument("--seconds", type=int, metavar="S", help="how long each run takes")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks.md and its plots")
    arguments = parser.parse_args()

    plan = QUICK if arguments.quick else FULL
    plan = replace(plan, rounds=arguments.rounds or plan.rounds, seconds=arguments.seconds or plan.seconds)
    names = arguments.only or [name for name in SECTIONS if not (arguments.quick and name in NOT_QUICK)]

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PAPER_COLUMNS
    SIGNALS.install()
    bar = Progress(
        SpinnerColumn(),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        console=console,
        transient=True,
    )
    sections: list[Section] = []
    title = "Ground"
    task = bar.add_task("setting up", total=len(names))

    def says(text: str) -> None:
        bar.update(task, description=f"{title}: {text}")
        if not console.is_terminal:
            console.print(f"{title}: {text}", style="dim")

    with TemporaryDirectory(prefix="leaseq-bench-") as temporary, ExitStack() as stack, bar:
        directory = Path(temporary)
        try:
            require_tools("wrk")
            prepare_peers(directory / "npm.log")
            lab = Lab(stack, directory, plan, says)
            ground = machine(lab)
        except (BenchmarkError, EmbeddedDatabaseError) as error:
            console.print(f"[red]{error}")
            return 1
        for name in names:
            title, measure = SECTIONS[name]
            lab.says("starting")
            began = time.monotonic()
            try:
                section = Section(name, title, measure(lab))
            except (BenchmarkError, EmbeddedDatabaseError, psycopg.Error, OSError) as error:
                section = Section(name, title, Findings(), failure=str(error) or repr(error))
            sections.append(section)
            lab.clear()
            console.print(f"{title}: {time.monotonic() - began:.0f} s", style="dim")
            show(console, section)
            bar.advance(task)
    show_goals(console, sections)
    if arguments.write:
        console.print(f"Written: {write(sections, ground, plan, list(SECTIONS), quick=arguments.quick).name}")
    return 1 if any(section.failure for section in sections) else 0


if __name__ == "__main__":
    sys.exit(main())
