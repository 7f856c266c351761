"""The ground on which all stand: one PostgreSQL, a database for each, services, load, and what each run took."""

import asyncio
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

import psycopg

from app.store.embedded import embedded_database
from benchmarks import processes
from benchmarks.processes import BenchmarkError, free_port, last_words, output, require_tools, running
from benchmarks.results import Series

HERE = Path(__file__).resolve().parent
PEERS = HERE / ".peers"
START_SECONDS = 60
GRACE_SECONDS = 120  # for what a run does before and after its time
NPM_SECONDS = 600
FILL_CHUNK = 500_000
SQL_TRIES = 5
QUEUE = "bench"
# The verbs' tables; a service that has none of its jobs any more goes on as if it were new.
EMPTIED = ("jobs", "ready", "scheduled", "leases", "history", "attempts", "dead", "deltas", "counts")

FILL = """
WITH new AS MATERIALIZED (
  SELECT uuidv7() AS id, n FROM generate_series(1, %(count)s::int) AS n
), body AS (
  INSERT INTO leaseq.jobs (id, created_at, queue, type, priority, run_at, lease_seconds, max_retries, backoff,
                             budget_start, tags, metadata, payload)
  SELECT id, now(), %(queue)s, 'default', 5, now(), 30, 3,
         '{"strategy": "exponential", "initial_seconds": 1, "factor": 2, "max_seconds": 3600, "jitter": "equal"}',
         0, '[]', '{}', '{"to":"a@example.com","n":1}'
    FROM new
), waiting AS (
  INSERT INTO leaseq.ready (id, queue, type, priority, attempt, noted, since)
  SELECT id, %(queue)s, 'default', 5, 0, false, now() - interval '1 second' + n * interval '1 microsecond' FROM new
)
INSERT INTO leaseq.deltas (queue, ready) VALUES (%(queue)s, %(count)s)"""

T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """How much is done."""

    rounds: int
    seconds: int
    warmup_seconds: int
    curve: Sequence[int]
    pick_ups: int
    backlogs: Sequence[int]
    leases: int
    pinned_seconds: int
    waiters: int
    quiet_seconds: int
    renewal_seconds: int
    cost_jobs: int
    flat: int


FULL = Plan(
    rounds=5,
    seconds=5,
    warmup_seconds=1,
    curve=(1, 4, 16, 64, 256),
    pick_ups=300,
    backlogs=(10_000, 100_000, 1_000_000, 10_000_000),
    leases=1000,
    pinned_seconds=600,
    waiters=10_000,
    quiet_seconds=10,
    renewal_seconds=30,
    cost_jobs=3000,
    flat=1_000_000,
)
QUICK = Plan(
    rounds=2,
    seconds=1,
    warmup_seconds=1,
    curve=(),
    pick_ups=60,
    backlogs=(10_000, 300_000),
    leases=300,
    pinned_seconds=20,
    waiters=2000,
    quiet_seconds=5,
    renewal_seconds=0,
    cost_jobs=300,
    flat=0,
)


@dataclass(frozen=True)
class Run:
    """What one run did. `shares` is the processor time of each party, 1 being a core for the whole run."""

    jobs: int
    seconds: float
    p50_ms: float = 0.0
    p99_ms: float = 0.0
    requests: int = 0
    shares: Mapping[str, float] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Jobs a second."""
        return self.jobs / self.seconds


def rates(runs: Sequence[Run]) -> Series:
    """Return the jobs a second of each run."""
    return Series.of(run.rate for run in runs)


@dataclass(frozen=True)
class Service:
    """A leaseq, or something else that wrk can talk to."""

    name: str
    port: int
    pid: int


def sql(url: str, text: str, **values: object) -> list[tuple[Any, ...]]:
    """Run a statement by itself and return its rows."""
    for tries_left in reversed(range(SQL_TRIES)):
        with psycopg.connect(url, autocommit=True) as connection:
            try:
                found = connection.execute(text.encode(), values or None)
                return found.fetchall() if found.description else []
            except psycopg.errors.DeadlockDetected:  # TRUNCATE meets the maintenance of a service
                if not tries_left:
                    raise
    return []


def fill(url: str, count: int, queue: str = QUEUE) -> None:
    """Make `count` more jobs ready."""
    for left in range(count, 0, -FILL_CHUNK):
        sql(url, FILL, count=min(left, FILL_CHUNK), queue=queue)


def tidy(url: str) -> None:
    """Have PostgreSQL do now what it would do some time during the measurement."""
    sql(url, "VACUUM (ANALYZE)")
    sql(url, "CHECKPOINT")


class Lab:
    """Opens the ground and closes it; the only place that starts anything."""

    def __init__(
        self, stack: ExitStack, directory: Path, plan: Plan, says: Callable[[str], None], **options: str
    ) -> None:
        """Start PostgreSQL, with `options` added to its default settings. `says` tells what is going on."""
        self.plan = plan
        self.directory = directory
        self.says = says
        self._queues = 0
        self._databases: set[str] = set()
        self.log = directory / "log"
        self.log.touch()
        data = directory / "postgres"
        self.url = stack.enter_context(embedded_database(data, options=options))
        # The programs run from other directories, and perhaps as another user.
        [found] = list(data.rglob("postmaster.pid"))
        self.postgres_pid = int(found.read_text().splitlines()[0])

    def database(self, name: str) -> str:
        """Make a database, new, and return its URL."""
        name = f"bench_{name}"
        self._drop(name)
        sql(self.url, f"CREATE DATABASE {name}")
        self._databases.add(name)
        return urlunsplit(urlsplit(self.url)._replace(path=f"/{name}"))

    def clear(self) -> None:
        """Remove all databases that were made here."""
        for name in self._databases:
            self._drop(name)
        self._databases.clear()

    def _drop(self, name: str) -> None:
        sql(self.url, f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    @contextmanager
    def leaseq(self, url: str, **environment: str) -> Iterator[Service]:
        """Run `python -m app serve`, as it comes, for the length of the block."""
        places = {"DATABASE_URL": url, "QUEUE_PORT": "0", "QUEUE_LOG_FORMAT": "json"}
        command = (sys.executable, "-m", "app", "serve")
        with running(command, self.log, cwd=self.directory, environment=places | environment) as child:
            assert child.stdout is not None  # noqa: S101  # running() makes it a pipe
            while not (
                ready := re.search(rb"ready at http://127.0.0.1:(\d+)", line := child.stdout.readline())
            ):
                if not line:
                    message = f"leaseq did not start: {last_words(self.log)}"
                    raise BenchmarkError(message)
            yield Service("leaseq", int(ready[1]), child.pid)

    @contextmanager
    def echo(self) -> Iterator[Service]:
        """Run the bare FastAPI application for the length of the block."""
        port = free_port()
        command = (sys.executable, *("-m", "uvicorn", "--loop", "uvloop", "--http", "httptools"))
        options = (
            "--no-access-log",
            "--log-level",
            "warning",
            "--port",
            str(port),
            "benchmarks.peers.echo:app",
        )
        with running((*command, *options), self.log) as child:
            _wait_for(port)
            yield Service("echo", port, child.pid)

    @contextmanager
    def layers(self, upto: str) -> Iterator[Service]:
        """Run the service's layers up to one, without a database, for the length of the block."""
        port = free_port()
        command = (sys.executable, "-m", "benchmarks.peers.layers", upto, str(port))
        with running(command, self.log) as child:
            _wait_for(port)
            yield Service(upto, port, child.pid)

    @contextmanager
    def trivial(self) -> Iterator[Service]:
        """Run the least that can answer wrk for the length of the block."""
        port = free_port()
        with running((sys.executable, "-m", "benchmarks.peers.trivial", str(port)), self.log) as child:
            _wait_for(port)
            yield Service("trivial", port, child.pid)

    @contextmanager
    def redis(self, *, durable: bool) -> Iterator[str]:
        """Run Redis, without persistence or with every write synced, for the length of the block; give its URL."""
        require_tools("redis-server")
        port = free_port()
        persistence = (
            ("--appendonly", "yes", "--appendfsync", "always") if durable else ("--appendonly", "no")
        )
        data = self.directory / f"redis-{port}"
        data.mkdir()
        place = ("--bind", "127.0.0.1", "--port", str(port), "--dir", str(data), "--daemonize", "no")
        with running(("redis-server", *place, "--save", "", *persistence), self.log):
            _wait_for(port)
            yield f"redis://127.0.0.1:{port}"

    def new_queue(self) -> str:
        """Return a queue's name that has not been used yet."""
        self._queues += 1
        return f"{QUEUE}-{self._queues}"

    def fresh(self, url: str, jobs: int = 0) -> str:
        """Leave nothing in a leaseq but `jobs` ready jobs, in a queue that it has never seen; return its name."""
        queue = self.new_queue()
        sql(url, f"TRUNCATE {', '.join(f'leaseq.{table}' for table in EMPTIED)}")
        fill(url, jobs, queue)
        tidy(url)
        return queue

    def fresh_pgboss(self, url: str, jobs: int = 0) -> None:
        """Leave nothing in a pg-boss but `jobs` jobs."""
        sql(url, "TRUNCATE pgboss.job")
        if jobs:
            self.peer("pgboss", url, "fill", count=jobs)
        tidy(url)

    def pgboss(self, name: str = "pgboss") -> str:
        """Make a database with pg-boss in it and return its URL."""
        url = self.database(name)
        self.peer("pgboss", url, "fill", count=0)
        return url

    def wrk(
        self,
        service: Service,
        mode: str,
        *,
        queue: str = QUEUE,
        connections: int = 64,
        batch: int = 1,
        warm: bool = True,
    ) -> Run:
        """Load a service with load.lua, after a warm-up. Raises BenchmarkError if it was not all successes."""
        if warm:
            self._wrk(service, mode, queue, connections, batch, self.plan.warmup_seconds)
        return self._wrk(service, mode, queue, connections, batch, self.plan.seconds)

    def _wrk(
        self, service: Service, mode: str, queue: str, connections: int, batch: int, seconds: int
    ) -> Run:
        before = self._cpu_seconds(service), processes.own_children_cpu_seconds()
        printed = output(
            (
                *("wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "10s"),
                *("-s", HERE / "load.lua", f"http://127.0.0.1:{service.port}/jobs"),
                *("--", mode, queue, str(batch)),
            ),
            self.log,
            seconds + GRACE_SECONDS,
        )
        spent = [after - was for after, was in zip(self._cpu_seconds(service), before[0], strict=True)]
        generator = processes.own_children_cpu_seconds() - before[1]
        found = json.loads(printed.splitlines()[-1])
        if found["errors"]:
            message = f"{found['errors']} of {found['requests']} requests ({mode}) to {service.name} failed."
            raise BenchmarkError(message)
        if found["empty"]:
            message = (
                f"{service.name} ran out of jobs ({mode}); it was faster than the benchmark is made for."
            )
            raise BenchmarkError(message)
        own, postgres, machine = spent
        names = {"generator": generator, service.name: own, "PostgreSQL": postgres}
        names["others"] = max(0.0, machine - generator - own - postgres)
        return Run(
            jobs=found["requests"] if mode == "enqueue" else found["jobs"],
            seconds=found["seconds"],
            p50_ms=found["p50_ms"],
            p99_ms=found["p99_ms"],
            requests=found["requests"],
            shares={name: value / found["seconds"] for name, value in names.items()},
        )

    def _cpu_seconds(self, service: Service) -> tuple[float, float, float]:
        return (
            processes.cpu_seconds(service.pid),
            processes.cpu_seconds(self.postgres_pid),
            processes.machine_cpu_seconds(),
        )

    def peer(self, name: str, url: str, verb: str, **words: object) -> dict[str, Any]:
        """Run a peer and return its answer. Raises BenchmarkError when it fails or takes too long."""
        wanted: dict[str, object] = {
            "url": url,
            "verb": verb,
            "queue": QUEUE,
            "concurrency": 64,
            "batch": 1,
            "count": 10**9,
            "seconds": self.plan.seconds,
            "warmup_seconds": self.plan.warmup_seconds,
            **words,
        }
        limit_seconds = float(str(wanted["seconds"])) + GRACE_SECONDS
        script = PEERS / f"{name}.mjs"
        program = (
            (PEERS / "node_modules/node/bin/node", script)
            if script.exists()
            else (sys.executable, "-m", f"benchmarks.peers.{name}")
        )
        wanted["limit_seconds"] = limit_seconds
        printed = output((*program, json.dumps(wanted)), self.log, limit_seconds + GRACE_SECONDS)
        answer: dict[str, Any] = json.loads(printed.splitlines()[-1])
        return answer

    def peer_run(self, name: str, url: str, verb: str, **words: object) -> Run:
        """Run a peer for its rate."""
        found = self.peer(name, url, verb, **words)
        if not found["jobs"] or not found["seconds"]:
            message = f"{name} {verb} did nothing in its time."
            raise BenchmarkError(message)
        share = found["cpu_seconds"] / found["seconds"]
        return Run(jobs=found["jobs"], seconds=found["seconds"], shares={"generator": share})


def _wait_for(port: int) -> None:
    async def knock() -> None:
        async with asyncio.timeout(START_SECONDS):
            while True:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                except OSError:
                    await asyncio.sleep(0.02)
                else:
                    writer.close()
                    return

    try:
        asyncio.run(knock())
    except TimeoutError:
        message = "A server of the benchmarks did not start."
        raise BenchmarkError(message) from None


def prepare_peers(log: Path) -> None:
    """Install the peers of package.json, once, below `.peers`. Raises BenchmarkError."""
    PEERS.mkdir(exist_ok=True)
    wanted = (HERE / "package.json").read_bytes()
    stamp = PEERS / ".installed"
    if not stamp.exists() or stamp.read_bytes() != wanted:
        npm = shutil.which("npm")
        if npm is None:
            message = "The peers need npm: install Node.js with your package manager."
            raise BenchmarkError(message)
        (PEERS / "package.json").write_bytes(wanted)
        words = (
            "install",
            "--prefix",
            str(PEERS),
            "--no-package-lock",
            "--no-audit",
            "--no-fund",
            "--loglevel=error",
        )
        # npm's own settings, and those of the network, may stand in the environment.
        output((npm, *words), log, NPM_SECONDS, os.environ)
        stamp.write_bytes(wanted)
    for script in (HERE / "peers").glob("*.mjs"):
        # A module finds its packages from where it lies.
        shutil.copy(script, PEERS)


def in_turn(lab: Lab, sides: Mapping[str, Callable[[], T]]) -> dict[str, list[T]]:
    """Run A, B, A, B …, so that a change of the machine's mood meets all sides."""
    found: dict[str, list[T]] = {name: [] for name in sides}
    for number in range(lab.plan.rounds):
        for name, run in sides.items():
            lab.says(f"{name}, round {number + 1} of {lab.plan.rounds}")
            found[name].append(run())
    return found
