"""Several processes that serve one address: the parent binds it, starts them, keeps them running, and ends with them.

Each is a replica like any other, started with the same code and settings. It inherits sockets of its own that are
bound to the address, so that the kernel shares out the connections: from one socket for all, whoever is awake takes
a whole fleet of workers that come together. Another pair of sockets joins it to its parent: over it the parent is
told how the start went, and it closes when the parent dies, however that happens.
"""

import asyncio
import os
import shutil
import signal
import socket
import sys
import time
from asyncio.subprocess import DEVNULL, Process, create_subprocess_exec
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import structlog

from app.main import Server, address_refused, database_of, ensure_migrated, serve, stop_signals
from app.queue.errors import UnavailableError
from app.settings import Settings
from app.telemetry import SHARED_DIRECTORY, forget

READY = "ready"
PAUSE_SECONDS = 0.5
"""Before the first start again; each further one waits twice as long."""
PAUSE_SECONDS_MAX = 30.0
STEADY_SECONDS = 60.0
"""Who has lived that long before it died begins with the shortest pause again."""
BACKLOG = 2048
POOL_SIZE_LEAST = 4
"""With fewer connections, two words that wait for strangers' locks would leave none to the others."""
STOPPED = {0, 128 + signal.SIGINT, 128 + signal.SIGTERM}
"""The exit codes of a process that was asked to end, be it amid its start."""
MEMORY = Path("/dev/shm")  # noqa: S108  # what is made there has a random name and one owner

log = structlog.get_logger(__name__)


class StartError(Exception):
    """A process ended before all were ready; the text is its sentence, `code` its exit code."""

    def __init__(self, sentence: str, code: int) -> None:
        super().__init__(sentence)
        self.code = code


async def serve_together(settings: Settings, ready: Callable[[int], None]) -> int:
    """Serve with `settings.processes` processes until a signal comes; return the exit code.

    `ready` is called with the port once all of them take requests.
    Raises StartError, and UnavailableError and NotMigratedError as `serve` does.
    """
    database = database_of(settings)
    try:
        await ensure_migrated(database, migrate=settings.migrate)
    finally:
        await database.close()
    address = await _Address.had(settings.host, settings.port)
    with closing(address), _shared_directory() as directory:
        return await _Crew(settings, address, directory, ready).run()


class Parent:
    """The parent, as a process that it has started sees it."""

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)

    def tell(self, word: str) -> None:
        """Tell it that this process is READY, or in a sentence why it ends."""
        with suppress(OSError):  # it has gone itself
            self._socket.sendall(f"{word}\n".encode())

    async def serve(self, settings: Settings, number: int, descriptors: Sequence[int]) -> None:
        """Serve as process `number` until a signal comes or the parent has gone. Raises as `serve` does."""

        def ready(server: Server) -> None:
            self.tell(READY)
            # It never says anything, so what comes is its end.
            asyncio.get_running_loop().add_reader(self._socket, gone, server)

        def gone(server: Server) -> None:
            asyncio.get_running_loop().remove_reader(self._socket)
            log.warning("parent_gone")
            server.stop()
            # Nobody else is left to do it. What others have open stays theirs.
            shutil.rmtree(os.environ[SHARED_DIRECTORY], ignore_errors=True)

        listeners = [socket.socket(fileno=each) for each in descriptors]
        await serve(settings, ready, listeners=listeners, process=number)


class _Crew:
    """The processes, as their parent sees them."""

    def __init__(
        self,
        settings: Settings,
        address: "_Address",
        directory: Path,
        tell_ready: Callable[[int], None],
    ) -> None:
        self._settings = settings
        self._address = address
        self._directory = directory
        self._tell_ready = tell_ready
        self._running: dict[int, Process] = {}
        self._ready: set[int] = set()
        self._started = False
        self._stopping = asyncio.Event()
        self._failure: StartError | None = None
        self._code = 0

    async def run(self) -> int:
        """Keep all running until a signal comes and they have ended; return the exit code. Raises StartError."""
        with stop_signals(self._heed):
            async with asyncio.TaskGroup() as tasks:
                for number in range(1, self._settings.processes + 1):
                    tasks.create_task(self._keep(number))
        if self._failure is not None:
            raise self._failure
        return self._code

    def _heed(self, signal_number: int) -> None:
        if self._stopping.is_set():
            self._send(signal_number)  # the second Ctrl-C waits for no request any more
            return
        if not self._started:
            self._code = 128 + signal_number
        self._stop()

    def _stop(self) -> None:
        self._stopping.set()
        self._send(signal.SIGTERM)

    def _send(self, signal_number: int) -> None:
        for process in self._running.values():
            with suppress(ProcessLookupError):
                process.send_signal(signal_number)

    async def _keep(self, number: int) -> None:
        pause = PAUSE_SECONDS
        while not self._stopping.is_set():
            began = time.monotonic()
            code, sentence = await self._run(number)
            if self._stopping.is_set():
                if self._failure is None and code not in STOPPED:
                    log.error("process_ended", number=number, code=code, why=sentence or None)
                    self._code = max(self._code, code)
            elif not self._started:
                # It will hardly do better a second later, and whoever has started us waits for a word.
                self._failure = StartError(
                    sentence or f"A process ended at the start, with code {code}.", code
                )
                self._stop()
            else:
                if time.monotonic() - began > STEADY_SECONDS:
                    pause = PAUSE_SECONDS
                log.error(
                    "process_ended",
                    number=number,
                    code=code,
                    why=sentence or None,
                    started_again_in_seconds=pause,
                )
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), pause)
                pause = min(2 * pause, PAUSE_SECONDS_MAX)

    async def _run(self, number: int) -> tuple[int, str]:
        """Run process `number` to its end; return its exit code, and why it ended if it said so."""
        try:
            process, ours = await self._start(number)
        except (OSError, UnavailableError) as error:
            return 1, str(error)
        self._running[number] = process
        log.info("process_started", number=number, pid=process.pid)
        if self._stopping.is_set():  # while it was being started
            process.terminate()
        sentence = await self._listen(number, ours)
        code = await process.wait()
        del self._running[number]
        forget(number, self._directory)
        return code if code >= 0 else 128 - code, sentence

    async def _start(self, number: int) -> tuple[Process, socket.socket]:
        """Start process `number`; return it, and our end of what joins us. Raises OSError, UnavailableError."""
        variables = _share(self._settings, number).variables | {SHARED_DIRECTORY: str(self._directory)}
        ours, theirs = socket.socketpair()
        with theirs, ExitStack() as stack:
            # Theirs alone: what they hold ends with them, and nobody is let in whom none serves.
            listeners = [stack.enter_context(each) for each in self._address.bind()]
            if not self._started:
                # From now on the address is taken, so that a second service can not creep in amid the start.
                for listener in listeners:
                    listener.listen(BACKLOG)
            descriptors = [each.fileno() for each in (theirs, *listeners)]
            process = await create_subprocess_exec(
                *(sys.executable, "-m", "app", "replica", str(number), *map(str, descriptors)),
                pass_fds=descriptors,
                env=os.environ | variables,
                stdin=DEVNULL,
                # Ctrl-C at the terminal is for the parent, which passes it on.
                start_new_session=True,
            )
        return process, ours

    async def _listen(self, number: int, ours: socket.socket) -> str:
        """Take what a process tells until it ends; return all but that it is ready."""
        reader, writer = await asyncio.open_connection(sock=ours)
        said = []
        async for line in reader:
            word = line.decode().rstrip()
            if word == READY:
                self._is_ready(number)
            else:
                said.append(word)
        writer.close()
        return "\n".join(said)

    def _is_ready(self, number: int) -> None:
        self._ready.add(number)
        if len(self._ready) == self._settings.processes and not self._started and not self._stopping.is_set():
            self._started = True
            self._tell_ready(self._address.port)


def _share(settings: Settings, number: int) -> Settings:
    """Return the settings of one process: its part of what is meant for all, and none of the parent's work."""

    def part(total: int, least: int) -> int:
        return max(least, total // settings.processes + (number <= total % settings.processes))

    return settings.model_copy(
        update={
            "processes": 1,
            "migrate": False,
            "db_pool_size": part(settings.db_pool_size, POOL_SIZE_LEAST),
            "max_lease_waiters": part(settings.max_lease_waiters, 1),
            "max_job_watchers": part(settings.max_job_watchers, 1),
            "max_event_streams": part(settings.max_event_streams, 1),
        }
    )


class _Address:
    """The address that is served; it may be several, where a host name has more than one."""

    def __init__(self, host: str, reserved: list[socket.socket]) -> None:
        self._host = host
        self._reserved = reserved

    @classmethod
    async def had(cls, host: str, port: int) -> "_Address":
        """Return the address as a server alone would have it. Raises UnavailableError when it is taken."""
        loop = asyncio.get_running_loop()
        try:
            server = await loop.create_server(asyncio.Protocol, host, port, start_serving=False)
        except OSError:
            raise address_refused(host, port) from None
        reserved = [each.dup() for each in server.sockets]
        server.close()
        return cls(host, reserved)

    @property
    def port(self) -> int:
        """The port, also when the settings asked for any free one."""
        port: int = self._reserved[0].getsockname()[1]
        return port

    def bind(self) -> list[socket.socket]:
        """Return new sockets for one process. Raises UnavailableError."""
        sockets = []
        try:
            for place in self._reserved:
                bound = socket.socket(place.family, socket.SOCK_STREAM)
                sockets.append(bound)
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                if place.family == socket.AF_INET6:
                    bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                bound.bind(place.getsockname())
        except OSError:
            for each in sockets:
                each.close()
            raise address_refused(self._host, self.port) from None
        return sockets

    def close(self) -> None:
        """Let the address go."""
        for each in self._reserved:
            each.close()


@contextmanager
def _shared_directory() -> Iterator[Path]:
    """Make a directory for the metrics that the processes share: in memory, where a container may write too."""
    in_memory = str(MEMORY) if os.access(MEMORY, os.W_OK | os.X_OK) else None
    try:
        directory = TemporaryDirectory(prefix="leaseq-metrics-", dir=in_memory, ignore_cleanup_errors=True)
    except OSError:
        message = "The processes have no place to share their metrics: set TMPDIR to a directory that they may write to."
        raise UnavailableError(message) from None
    with directory as path:
        yield Path(path)
