"""The composition root: the only place that builds the parts and puts them together."""

import asyncio
import gc
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import datetime

import structlog
import uvicorn

from app.api.app import Api, create_api
from app.api.operate import show_process
from app.api.protocol import Protocol
from app.engine.service import Service
from app.engine.streams import Streams
from app.engine.watching import Watching
from app.queue.errors import UnavailableError
from app.queue.events import Observer
from app.queue.model import Keeping
from app.settings import Settings
from app.store.database import Database
from app.store.jobs import Jobs
from app.store.migrate import is_migrated, upgrade
from app.store.queues import publish_defaults
from app.telemetry import EventLog, Everyone, Metrics, Showing

GARBAGE_THRESHOLD = 20_000

KEEP_ALIVE_SECONDS = 75
"""Longer than the idle time of usual proxies: a connection that we close first costs its next request a 502."""

log = structlog.get_logger(__name__)


class NotMigratedError(Exception):
    """The schema is older than this code; the text says what to do."""


@dataclass(frozen=True)
class Machine:
    """The parts of one process."""

    settings: Settings
    database: Database
    jobs: Jobs
    service: Service
    api: Api
    showing: Showing | None
    """None where no other process shows the metrics of this one."""


def build(
    settings: Settings,
    *,
    clock: Callable[[], datetime | None] = lambda: None,
    observers: Sequence[Observer] = (),
    process: int | None = None,
) -> Machine:
    """Build the parts; nothing connects or runs yet.

    `clock` moves the database's clock in tests. `process` is the number of this process among several that serve
    one address.
    """
    database = database_of(settings)
    jobs = Jobs(database, clock)
    metrics = Metrics(process)
    watching = Watching(database, jobs, settings.max_job_watchers)
    streams = Streams(settings.max_event_streams, metrics)
    service = Service(
        database,
        jobs,
        Everyone([metrics, EventLog(settings.log_level), watching, streams, *observers]),
        settings.defaults,
        Keeping(completed_seconds=settings.retention_seconds, dead_seconds=settings.dead_retention_seconds),
        create_queues=settings.create_queues,
        maintenance_seconds=settings.maintenance_seconds,
        poll_seconds=settings.poll_seconds,
        max_lease_waiters=settings.max_lease_waiters,
        watching=watching,
        streams=streams,
    )
    api = create_api(
        service,
        metrics,
        body_bytes_max=settings.max_body_bytes,
        payload_bytes_max=settings.max_payload_bytes,
    )
    showing = None if process is None else Showing(lambda: show_process(service, metrics))
    return Machine(settings, database, jobs, service, api, showing)


def database_of(settings: Settings) -> Database:
    """Return the database that the settings name. Raises SettingsError when they name none."""
    return Database(
        settings.require_database_url(),
        schema=settings.schema_name,
        pool_size=settings.db_pool_size,
        direct_url=settings.database_listen_url,
        pooled=settings.pooler == "transaction",
    )


@asynccontextmanager
async def connected(machine: Machine) -> AsyncIterator[Machine]:
    """Connect to a migrated database for the length of the block.

    Raises UnavailableError, or NotMigratedError when migrations are missing that the settings do not let us apply.
    """
    try:
        await ensure_migrated(machine.database, migrate=machine.settings.migrate)
        await machine.database.start()
        await machine.jobs.prepare()
        await machine.service.copies.load()
        yield machine
    finally:
        await machine.database.close()


async def ensure_migrated(database: Database, *, migrate: bool) -> None:
    """Apply missing migrations. Raises UnavailableError, or NotMigratedError when some are missing and `migrate` is off."""
    if await is_migrated(database):
        return  # also where the role may do no more than read and write rows
    if not migrate:
        message = "The database lacks migrations: run `python -m app migrate`, or set QUEUE_MIGRATE=true."
        raise NotMigratedError(message)
    await upgrade(database)


@asynccontextmanager
async def running(machine: Machine) -> AsyncIterator[Machine]:
    """Run everything but the HTTP server for the length of the block. Raises as `connected` does."""
    settings = machine.settings
    async with connected(machine):
        await publish_defaults(
            machine.database,
            settings.defaults,
            max_payload_bytes=settings.max_payload_bytes,
            create_queues=settings.create_queues,
        )
        await machine.service.start()
        if machine.showing is not None:
            await machine.showing.start()
        try:
            yield machine
        finally:
            await machine.service.stop()
            if machine.showing is not None:
                await machine.showing.stop()


class Server(uvicorn.Server):
    """uvicorn, which tells the service of a stop before it waits for the requests to end."""

    def __init__(self, machine: Machine) -> None:
        settings = machine.settings
        super().__init__(
            uvicorn.Config(
                machine.api.front,
                host=settings.host,
                port=settings.port,
                http=Protocol,
                lifespan="off",
                # Nothing asks who the client is: every request would pay for the question.
                proxy_headers=False,
                access_log=False,
                log_config=None,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=max(1, round(settings.shutdown_seconds)),
            )
        )
        self._service = machine.service

    @property
    def port(self) -> int:
        """The port that it serves on, once it does: also when the settings asked for any free one."""
        port: int = self.servers[0].sockets[0].getsockname()[1]
        return port

    def stop(self) -> None:
        """Stop as at SIGTERM."""
        self.handle_exit(signal.SIGTERM, None)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer the waiting leases, then wait for all requests to end."""
        log.info("stopping")
        self._service.drain()
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop at SIGINT and SIGTERM. uvicorn's own way raises the signal again afterwards, amid our own clean-up."""
        with stop_signals(lambda number: self.handle_exit(number, None)):
            yield


@contextmanager
def stop_signals(heed: Callable[[int], None]) -> Iterator[None]:
    """Call `heed` at SIGINT and SIGTERM for the length of the block; from then on they are ignored."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, heed, number)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
            # It stops already: another signal must not keep the rest, such as the database, from being stopped.
            signal.signal(number, signal.SIG_IGN)


async def serve(
    settings: Settings,
    ready: Callable[[Server], None],
    *,
    listeners: list[socket.socket] | None = None,
    process: int | None = None,
) -> None:
    """Serve until a signal comes; `ready` is called once requests are taken.

    `listeners` are bound already, by the parent of the processes of which this one has the number `process`.
    Raises UnavailableError when the database does not answer at the start, or the address can not be had.
    """
    async with running(build(settings, process=process)) as machine:
        server = Server(machine)
        serving = asyncio.create_task(_serve_until_stopped(server, listeners))
        while not server.started and not serving.done():  # noqa: ASYNC110  # uvicorn has no event for it
            await asyncio.sleep(0.01)
        if server.started:
            _spare_the_collector()
            ready(server)
        await serving


def _spare_the_collector() -> None:
    """Let the garbage collector pass over what lives as long as the process, and look less often at the rest.

    A request makes hundreds of objects that reference counting frees by itself; at the default threshold the collector
    would run every few requests, and each of its long runs would stop the loop.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(GARBAGE_THRESHOLD, 20, 50)


async def _serve_until_stopped(server: Server, listeners: list[socket.socket] | None) -> None:
    try:
        await server.serve(listeners)
    except (SystemExit, OSError):
        # Caught here: out of a task it would leave the event loop, past everybody who awaits the task.
        raise address_refused(server.config.host, server.config.port) from None


def address_refused(host: str, port: int) -> UnavailableError:
    """Return the error that an address can not be had."""
    return UnavailableError(f"The address {host}:{port} can not be served on: is it taken?")
