"""Real parts: an embedded PostgreSQL, a cloned database per test, uvicorn on a free port. Time is moved by hand."""

import asyncio
import itertools
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import httpx
import pytest

from app.main import Machine, Server, build, running
from app.queue.events import MaintenanceRan, QueueEvent
from app.settings import Settings
from app.store.database import Database
from app.store.embedded import embedded_database
from app.store.jobs import Jobs
from app.store.migrate import upgrade
from tests.invariants import broken_invariants
from tests.pooler import pooler

TEMPLATE = "leaseq_template"
NEVER_SECONDS = 3600.0
"""For what a test does by hand, such as maintenance."""

_numbers = itertools.count(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the long ones begin first, so that they do not end alone."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def with_database(url: str, name: str) -> str:
    """Return `url` with another database in it."""
    return urlunsplit(urlsplit(url)._replace(path=f"/{name}"))


def through(pooler_url: str, database_url: str) -> str:
    """Return the way to a database through a pooler."""
    return with_database(pooler_url, urlsplit(database_url).path.removeprefix("/"))


class Clock:
    """The database's clock, as a test sees it: the real one until it is moved."""

    def __init__(self) -> None:
        self._now: datetime | None = None

    def __call__(self) -> datetime | None:
        return self._now

    def move(self, seconds: float) -> datetime:
        """Let time pass; from now on it stands still but for further moves."""
        self._now = (self._now or datetime.now(UTC)) + timedelta(seconds=seconds)
        return self._now

    def set(self, instant: datetime | str) -> None:
        """Stop the clock at `instant`."""
        self._now = datetime.fromisoformat(instant) if isinstance(instant, str) else instant


class Recorder:
    """An observer that keeps what it is told, and lets a test wait for it."""

    def __init__(self) -> None:
        self.events: list[QueueEvent] = []
        self._news = asyncio.Event()

    def on(self, event: QueueEvent) -> None:
        self.events.append(event)
        self._news.set()

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    async def wait_for(self, kind: type, count: int = 1) -> list[Any]:
        async with asyncio.timeout(10):
            while len(self.of(kind)) < count:
                self._news.clear()
                await self._news.wait()
        return self.of(kind)


@dataclass
class Replica:
    """One process's worth of leaseq, in this process: its parts, and a client that talks to it over HTTP."""

    machine: Machine
    server: Server
    http: httpx.AsyncClient
    clock: Clock
    events: Recorder
    serving: "asyncio.Task[None]"
    has_first_round: bool

    async def enqueue(self, queue: str = "q", **fields: Any) -> dict[str, Any]:
        answer = await self.http.post("/jobs", json={"queue": queue, **fields})
        assert answer.status_code == 201, answer.text
        job: dict[str, Any] = answer.json()
        return job

    async def lease(self, *queues: str, wait_seconds: float = 0, **fields: Any) -> list[dict[str, Any]]:
        asked = {"queues": list(queues) or ["q"], "wait_seconds": wait_seconds, **fields}
        answer = await self.http.post("/lease", json=asked)
        assert answer.status_code == 200, answer.text
        jobs: list[dict[str, Any]] = answer.json()["jobs"]
        return jobs

    async def lease_one(self, *queues: str, **fields: Any) -> dict[str, Any]:
        [job] = await self.lease(*queues, **fields)
        return job

    async def verb(self, verb: str, leased: dict[str, Any], **fields: Any) -> httpx.Response:
        """Call heartbeat, ack, fail or release with the lease of a leased job."""
        body = {"lease_id": leased["lease_id"], **fields}
        return await self.http.post(f"/jobs/{leased['id']}/{verb}", json=body)

    async def fail(self, leased: dict[str, Any], message: str = "boom", **fields: Any) -> dict[str, Any]:
        answer = await self.verb("fail", leased, error={"message": message}, **fields)
        assert answer.status_code == 200, answer.text
        settled: dict[str, Any] = answer.json()
        return settled

    async def job(self, job_id: str) -> dict[str, Any]:
        answer = await self.http.get(f"/jobs/{job_id}")
        assert answer.status_code == 200, answer.text
        job: dict[str, Any] = answer.json()
        return job

    async def attempts(self, job_id: str) -> list[dict[str, Any]]:
        answer = await self.http.get(f"/jobs/{job_id}/attempts")
        assert answer.status_code == 200, answer.text
        attempts: list[dict[str, Any]] = answer.json()["attempts"]
        return attempts

    async def stats(self) -> dict[str, int]:
        counts: dict[str, int] = (await self.http.get("/stats")).json()["jobs"]
        return counts

    async def maintain(self) -> dict[str, int]:
        """Do one round of maintenance, once the replica's own first one is over; every task must succeed."""
        if self.has_first_round:
            await self.first_round()
        changed = await self.machine.service.maintenance.run_once()
        assert set(changed) == set(self.machine.service.maintenance.tasks), self.events.events[-5:]
        return changed

    async def first_round(self) -> None:
        """Wait until the round of maintenance that every replica begins with is over."""
        await self.events.wait_for(MaintenanceRan, len(self.machine.service.maintenance.tasks))


@dataclass
class World:
    """A database of its own, and any number of replicas that serve it."""

    database_url: str
    clock: Clock
    stack: AsyncExitStack
    overrides: dict[str, Any] = field(default_factory=dict)
    pooled_url: str | None = None
    """The same database through a pooler, if the replicas are to go that way."""
    on_time: bool = False
    """Whether replicas promote a delayed job at the instant when it is due; else it waits for `maintain`, however slow
    the machine is that runs the test."""
    by_hand: bool = False
    """Whether nothing at all is maintained but by `maintain`, not even when a replica starts."""

    def settings(self, **overrides: Any) -> Settings:
        wanted: dict[str, Any] = {
            "database_url": self.database_url if self.pooled_url is None else self.pooled_url,
            "database_listen_url": self.database_url,
            "pooler": "none" if self.pooled_url is None else "transaction",
            "host": "127.0.0.1",
            "port": 0,
            "migrate": False,
            "maintenance_seconds": NEVER_SECONDS,
            "poll_seconds": 60.0,
            "shutdown_seconds": 5.0,
            "db_pool_size": 4,
        }
        return Settings(_env_file=None, **{**wanted, **self.overrides, **overrides})

    async def replica(self, **overrides: Any) -> Replica:
        return await self.stack.enter_async_context(self._replica(**overrides))

    async def connect(self) -> "asyncpg.Connection[asyncpg.Record]":
        """Open a connection of the test's own, closed at the end of the test."""
        connection = await asyncpg.connect(self.database_url)
        self.stack.push_async_callback(connection.close)
        await connection.execute("SET search_path TO leaseq")
        return connection

    async def blocked(self, count: int = 1) -> None:
        """Wait until so many of the service's connections wait for a lock."""
        connection = await self.connect()
        async with asyncio.timeout(10):
            while count > await connection.fetchval(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
                " AND application_name = 'leaseq' AND wait_event_type = 'Lock'"
            ):
                await asyncio.sleep(0.005)

    @asynccontextmanager
    async def _replica(self, **overrides: Any) -> AsyncIterator[Replica]:
        events = Recorder()
        machine = build(self.settings(**overrides), clock=self.clock, observers=[events])
        if self.by_hand:
            machine.service.maintenance._run = asyncio.Event().wait  # type: ignore[method-assign,assignment]
        async with running(machine):
            if not self.on_time:
                # Like maintenance, by hand.
                machine.service.workers.write_seconds = NEVER_SECONDS
                machine.service.maintenance.expect = lambda due_seconds: None  # type: ignore[method-assign]  # noqa: ARG005
                machine.service.maintenance.expect_fire = lambda due_seconds: None  # type: ignore[method-assign]  # noqa: ARG005
            if machine.database.can_listen:
                await machine.service.wakeups.listening.wait()
            server = Server(machine)
            # Not `serve`: signals are the test runner's.
            serving = asyncio.create_task(server._serve())
            while not server.started:
                await asyncio.sleep(0.002)
            base_url = f"http://127.0.0.1:{server.port}"
            async with httpx.AsyncClient(base_url=base_url, timeout=30) as http:
                yield Replica(machine, server, http, self.clock, events, serving, not self.by_hand)
            server.should_exit = True
            await serving


@pytest.fixture(scope="session")
def cluster_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A PostgreSQL for the whole run: the embedded one, or the one that TEST_DATABASE_URL names."""
    given = os.environ.get("TEST_DATABASE_URL")
    if given:
        yield given
        return
    # Nothing here has to outlive the machine's power; the tests that kill processes do not need fsync either.
    options = {"fsync": "off", "full_page_writes": "off", "max_wal_size": "512MB"}
    with embedded_database(tmp_path_factory.mktemp("cluster"), options=options) as url:
        yield url


@pytest.fixture(scope="session")
def pooler_url(cluster_url: str) -> Iterator[str]:
    """The cluster through a pooler in transaction mode."""
    with pooler(cluster_url) as url:
        yield url


@pytest.fixture(scope="session")
def template_url(cluster_url: str) -> str:
    """A migrated, empty database to clone."""

    async def make() -> None:
        await _recreate(cluster_url, TEMPLATE, "template0")
        database = Database(with_database(cluster_url, TEMPLATE), schema="leaseq")
        await upgrade(database)
        await database.start()
        await Jobs(database).prepare()
        await database.close()

    asyncio.run(make())
    return with_database(cluster_url, TEMPLATE)


@pytest.fixture
async def database_url(cluster_url: str, template_url: str) -> AsyncIterator[str]:
    """A database for one test, cloned from the template."""
    name = f"leaseq_{os.getpid()}_{next(_numbers)}"
    await _recreate(cluster_url, name, urlsplit(template_url).path.removeprefix("/"))
    yield with_database(cluster_url, name)
    await _execute(cluster_url, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def world(database_url: str, clock: Clock, request: pytest.FixtureRequest) -> AsyncIterator[World]:
    """A database with replicas to come; at the end every job must be in exactly one place and counted right.

    With LEASEQ_TEST_POOLER in the environment, the replicas of all tests go through a pooler.
    """
    pooled_url = None
    if os.environ.get("LEASEQ_TEST_POOLER"):
        pooled_url = through(request.getfixturevalue("pooler_url"), database_url)
    async with AsyncExitStack() as stack:
        yield World(database_url, clock, stack, pooled_url=pooled_url)
    connection = await asyncpg.connect(database_url)
    try:
        assert await broken_invariants(connection) == []
    finally:
        await connection.close()


@pytest.fixture
async def queue(world: World) -> Replica:
    """One replica of leaseq."""
    return await world.replica()


async def _recreate(cluster_url: str, name: str, template: str) -> None:
    await _execute(cluster_url, f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
    await _execute(cluster_url, f"CREATE DATABASE {name} TEMPLATE {template}")


async def _execute(url: str, statement: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()
