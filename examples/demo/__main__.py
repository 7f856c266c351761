"""Run the demonstration: ``python -m examples.demo``. Its exit code is 0 when everything is right, else 1."""

import argparse
import os
import secrets
import signal
import sys
import sysconfig
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from datetime import datetime
from io import TextIOWrapper
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
from rich.console import Console
from rich.markup import escape

from examples.demo.processes import LANGUAGES, Fleet, ProcessError, service
from examples.demo.screen import (
    DeadLetter,
    Row,
    Screen,
    cross,
    dead_letters_table,
    fact,
    results_table,
    shown,
    tick,
)
from examples.demo.traffic import Counts, Feed, Job, Ledger, done
from examples.demo.verdict import judge
from examples.producer import digest_job, regular_files

WORKERS_PER_LANGUAGE = 2
STALL_SECONDS = 60
TICK_SECONDS = 0.25
SETTLE_SECONDS = 0.2  # for what is on its way when a worker freezes
LOOKS = 4  # at a frozen worker, before it may go on
BUSY_JOBS_PER_WORKER = 8
SHOWN = 20  # dead letters, problems
# Caches, which any Python program may rewrite meanwhile, and other people's packages.
SKIPPED_DIRECTORIES = ("__pycache__", "site-packages")


@dataclass(frozen=True)
class Size:
    """How much the demonstration does."""

    files: int | None
    lease_seconds: float
    max_retries: int  # of what cannot be read; the rest has the service's default


FULL = Size(files=None, lease_seconds=5, max_retries=3)
QUICK = Size(files=200, lease_seconds=2, max_retries=1)


def main() -> int:
    """Parse the command line and run; however it ends, nothing is left behind."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo",
        description="Digest the files of a tree with workers in three languages, kill one, verify all.",
    )
    parser.add_argument(
        "--root", type=Path, default=Path(sysconfig.get_path("stdlib")), help="the directory tree"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="take the first N files only")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK.files} files, short leases, one retry")
    parser.add_argument("--url", help="use this running service and start none")
    arguments = parser.parse_args()
    size = QUICK if arguments.quick else FULL
    if arguments.limit is not None:
        size = replace(size, files=arguments.limit)

    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    console = Console(highlight=False)
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:  # as nohup has it
            signal.signal(signum, lambda *_: _interrupted.set())
    try:
        with ExitStack() as stack:
            return 0 if Demo(console, stack, arguments.root.resolve(), size, arguments.url).run() else 1
    except KeyboardInterrupt:
        console.print("[yellow]Interrupted. All that was started has been stopped.")
        return 130
    except (ProcessError, OSError, ValueError, httpx.HTTPError) as error:
        cross(console, escape(str(error) or repr(error)))
        return 1


_interrupted = threading.Event()


def pause(seconds: float) -> None:
    """Sleep. Raises KeyboardInterrupt after a signal.

    It comes here and nowhere else: not between the start of a process and the note that it must be ended, and
    not while things are being cleared up.
    """
    if _interrupted.wait(seconds):
        raise KeyboardInterrupt


class Demo:
    """The demonstration: one tree, one queue, some workers, one of which will die."""

    def __init__(self, console: Console, stack: ExitStack, root: Path, size: Size, url: str | None) -> None:
        """Look at the tree, start the service unless ``url`` names one, and the workers; ``stack`` ends them.

        Raises ProcessError when the service does not come up, ValueError when the tree has no file.
        """
        self.console = console
        self.stack = stack
        self.size = size
        self.directory = Path(stack.enter_context(TemporaryDirectory(prefix="leaseq-demo-")))
        self.unreadable = _make_unreadable(self.directory / "unreadable")
        self.files = self._collect(root)
        self.total = len(self.files) + len(self.unreadable)
        self.queue = f"files-{secrets.token_hex(4)}" if url else "files"
        self.url = url or self._start_service()
        fact(console, "service", f"{escape(self.url)}[dim] · queue {self.queue}")
        self.ledger = stack.enter_context(closing(Ledger(self.url, self.queue)))
        self.fleet, self.rows = self._start_workers()
        self.victim = ""
        self.orphans: list[str] = []  # The jobs that the victim held when it died.

    def run(self) -> bool:
        """Feed, watch, kill, verify; return whether everything is right.

        Raises ProcessError when a worker dies by itself or nothing moves any more.
        """
        hopeless = [self._job(name) | {"max_retries": self.size.max_retries} for name in self.unreadable]
        feed = Feed(self.url, hopeless + [self._job(name) for name in self.files])
        self.stack.callback(feed.stop)
        with Screen(self.console, self.total) as screen:
            self._watch(feed, screen)
        exit_codes = self.fleet.stop()
        return self._report(exit_codes)

    def _job(self, name: str) -> Job:
        return digest_job(self.queue, Path(name))

    def _collect(self, root: Path) -> list[str]:
        """List the tree's files; those that are not ours to read join the unreadable ones."""
        files, strange = [], 0
        for path in islice(regular_files(root, SKIPPED_DIRECTORIES), self.size.files):
            pause(0)
            try:
                name = os.fsencode(path).decode()
            except UnicodeDecodeError:
                strange += 1
                continue
            if os.access(path, os.R_OK):
                files.append(name)
            else:
                self.unreadable[name] = "EACCES"
        if not files:
            raise ValueError(f"no files in {root}")
        self.console.print("[bold]leaseq, at work", end="\n\n")
        fact(self.console, "tree", f"{shown(str(root))}[dim] · {len(files):,} files")
        if strange:
            fact(
                self.console,
                "",
                f"[dim]{strange:,} more left out: names that are not UTF-8 do not fit into JSON",
            )
        return files

    def _start_service(self) -> str:
        with self.console.status("starting the service"):
            return self.stack.enter_context(
                service(self.directory / "data", self.directory / "service.log", pause)
            )

    def _start_workers(self) -> tuple[Fleet, list[Row]]:
        environment = {
            "LEASEQ_URL": self.url,
            "LEASEQ_QUEUE": self.queue,
            "LEASEQ_LEASE_SECONDS": str(self.size.lease_seconds),
        }
        fleet = Fleet(environment, self.directory)
        self.stack.callback(fleet.stop)
        rows = []
        for language in LANGUAGES:
            try:
                title = f"{language.title} {language.version()}"
            except ProcessError as reason:
                rows.append(Row(language.name, language.title, absence=str(reason)))
            else:
                rows.append(Row(language.name, title, str(WORKERS_PER_LANGUAGE)))
                fleet.start(language, WORKERS_PER_LANGUAGE)
        fact(
            self.console,
            "workers",
            f"{', '.join(fleet.workers)}[dim] · leases of {self.size.lease_seconds:g} s",
        )
        return fleet, rows

    def _watch(self, feed: Feed, screen: Screen) -> None:
        seen, seen_at = None, time.monotonic()
        orphans_told = False
        while True:
            counts = self.ledger.counts()
            screen.update(counts)
            self.fleet.check(self.victim)
            if not self.victim:
                self._kill_if_time(feed, counts)
            elif not orphans_told and all(self.ledger.job(job_id)["finished_at"] for job_id in self.orphans):
                orphans_told = True
                for job_id in self.orphans:
                    tick(self.console, self._fate(job_id))
            if feed.finished() and done(counts) >= self.total:
                return
            if counts != seen:
                seen, seen_at = counts, time.monotonic()
            if time.monotonic() > seen_at + STALL_SECONDS:
                raise ProcessError(f"nothing has moved for {STALL_SECONDS} s: {dict(counts)}")
            pause(TICK_SECONDS)

    def _kill_if_time(self, feed: Feed, counts: Counts) -> None:
        """Kill a worker once a quarter is done, if it holds a job at that moment; else try at the next tick.

        A small tree may be finished too soon for that: there the victim is frozen while it waits for a job,
        and the second half of the files is let go only then.
        """
        idle = feed.holding_back and not counts["waiting"] and not counts["active"]
        busy = counts["waiting"] > BUSY_JOBS_PER_WORKER * len(self.fleet.workers)
        if not idle and not (busy and done(counts) >= self.total // 4):
            return
        pause(SETTLE_SECONDS)
        name = f"{LANGUAGES[0].name}-{WORKERS_PER_LANGUAGE}"
        worker = self.fleet.workers[name]
        worker.signal(signal.SIGSTOP)
        if idle:
            feed.release()
        held: set[str] = set()
        for _ in range(LOOKS):
            pause(SETTLE_SECONDS)
            before, held = held, {job["id"] for job in self.ledger.jobs(state="active", worker=name)}
            if held & before:
                worker.signal(signal.SIGKILL)
                self.victim, self.orphans = name, sorted(held)
                self.rows[0] = replace(self.rows[0], workers=f"{WORKERS_PER_LANGUAGE}, one killed")
                feed.release()
                cross(self.console, f"[bold]{name} killed[/] with a job in hand")
                return
        worker.signal(signal.SIGCONT)

    def _fate(self, job_id: str) -> str:
        """Tell who ended a job of the killed worker. Raises ProcessError if nobody did, or the dead one."""
        job, attempts = self.ledger.job(job_id), self.ledger.attempts(job_id)
        first, last = attempts[0], attempts[-1]
        name = shown(Path(job["payload"]["path"]).name)
        if job["finished_at"] is None or last["worker"] == self.victim:
            raise ProcessError(
                f"{name}, which {self.victim} held when it was killed, was not done by another"
            )
        seconds = (_time(last["ended_at"]) - _time(first["started_at"])).total_seconds()
        return (
            f"{self.victim}'s [bold]{name}[/] was done by [bold]{last['worker']}[/]"
            f"[dim] · attempt {last['attempt']}, after {seconds:.1f} s"
        )

    def _report(self, exit_codes: dict[str, int]) -> bool:
        """Verify, print the tables and what is right and wrong; return whether nothing is wrong."""
        completed, dead = self.ledger.jobs(state="completed"), self.ledger.jobs(state="failed")
        with self.console.status("verifying with sha256sum"):
            verdict = judge(self.files, self.unreadable, completed, dead)

        self.console.print()
        per_language = Counter(str((job["result"] or {}).get("language")) for job in completed)
        retries = sum(job["retry_count"] for job in (*completed, *dead))
        self.console.print(results_table(self.rows, per_language, len(dead), retries, _seconds(completed)))
        letters = [
            DeadLetter(
                Path(job["payload"]["path"]).name,
                (job["last_error"] or {}).get("type") or "?",
                [attempt["worker"] for attempt in self.ledger.attempts(job["id"])],
            )
            for job in dead[:SHOWN]
        ]
        self.console.print(dead_letters_table(letters))

        problems = verdict.problems
        fates = []
        for job_id in self.orphans:
            try:
                fates.append(self._fate(job_id))
            except ProcessError as problem:
                problems.append(str(problem))
        if not self.victim:
            problems.append("no worker could be killed while it held a job")
        problems += [
            f"{name} did not leave as asked: exit code {code}"
            for name, code in exit_codes.items()
            if code and name != self.victim
        ]
        mark = tick if verdict.verified == len(self.files) else cross
        mark(self.console, f"{verdict.verified:,} of {len(self.files):,} digests are those of sha256sum")
        for fate in fates:
            tick(self.console, fate)
        for sentence in problems[:SHOWN]:
            cross(self.console, escape(sentence))
        if len(problems) > SHOWN:
            cross(self.console, f"and {len(problems) - SHOWN:,} more")
        return not problems


def _make_unreadable(directory: Path) -> dict[str, str]:
    """Make what no worker can read; return each path with the error that it must bring."""
    directory.mkdir()
    (directory / "a-directory").mkdir()
    (directory / "dangling-link").symlink_to("nowhere")
    errors = {"missing": "ENOENT", "a-directory": "EISDIR", "dangling-link": "ENOENT"}
    if os.geteuid() != 0:  # For root nothing is forbidden.
        (directory / "forbidden").touch(mode=0)
        errors["forbidden"] = "EACCES"
    return {str(directory / name): error for name, error in errors.items()}


def _seconds(jobs: Sequence[Job]) -> float:
    """Return the time from the first job's creation to the last one's end, at least a millisecond."""
    if not jobs:
        return 0.001
    began = min(_time(job["created_at"]) for job in jobs)
    ended = max(_time(job["finished_at"]) for job in jobs)
    return max((ended - began).total_seconds(), 0.001)


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)


if __name__ == "__main__":
    sys.exit(main())
