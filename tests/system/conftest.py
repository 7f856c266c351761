"""Real processes of leaseq, and a PostgreSQL that a test may stop: whatever starts here ends here."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import httpx
import pytest

from app.store import embedded
from app.store.embedded import embedded_database

PROJECT = Path(__file__).resolve().parents[2]
PATIENCE_SECONDS = 60
READY_AT = "leaseq is ready at "
KEPT_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH")


async def until(condition: Callable[[], object], what: str) -> None:
    """Wait for the condition; fail naming `what` if it does not come true in time."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not condition():
            await asyncio.sleep(0.01)
    assert condition(), what


def is_gone(process_id: int) -> bool:
    """Tell whether a process has ended, be it that its parent (not ours to hurry) has not noticed yet."""
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def postmaster(data_dir: Path) -> int | None:
    """Return the process id of the embedded server, None when there is none."""
    try:
        return int((data_dir / "postgres" / "postmaster.pid").read_text().splitlines()[0])
    except (FileNotFoundError, IndexError):
        return None


class Process:
    """`python -m app …` with an environment of its own; what it says goes to a file."""

    def __init__(self, arguments: tuple[str, ...], directory: Path, variables: dict[str, object]) -> None:
        kept = {
            name: value
            for name, value in os.environ.items()
            if name in KEPT_ENVIRONMENT or name.startswith("COVERAGE_")
        }
        given = {name: str(value) for name, value in variables.items()}
        self.log = directory / f"{len(list(directory.iterdir()))}.log"
        with self.log.open("wb") as output:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "app", *arguments],
                cwd=directory,  # no `.env` there
                env={**kept, "PYTHONPATH": str(PROJECT), **given},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def running(self) -> bool:
        return self._child.poll() is None

    @property
    def said(self) -> str:
        return self.log.read_text()

    def signal(self, number: int) -> None:
        self._child.send_signal(number)

    async def ends(self) -> int:
        """Wait for its end; return its exit code."""
        await until(lambda: not self.running, "the process ends")
        return self._child.wait()

    def end(self) -> None:
        """End it at once if it still runs."""
        if self.running:
            self._child.kill()
        self._child.wait()


class Service(Process):
    """`python -m app serve`, and a client that talks to it."""

    async def starts(self) -> None:
        await until(lambda: READY_AT in self.said or not self.running, "the service serves")
        assert self.running, self.said
        answer = await self.http.get("/health/ready")
        assert answer.status_code == 200, answer.text

    @cached_property
    def url(self) -> str:
        return self.said.partition(READY_AT)[2].split()[0]

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @cached_property
    def http(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None)
        return httpx.AsyncClient(base_url=self.url, timeout=PATIENCE_SECONDS, limits=limits, trust_env=False)

    async def post(self, path: str, **body: Any) -> httpx.Response:
        return await self.http.post(path, json=body)

    async def enqueue(self, **fields: Any) -> dict[str, Any]:
        answer = await self.post("/jobs", **{"queue": "q", **fields})
        assert answer.status_code == 201, answer.text
        job: dict[str, Any] = answer.json()
        return job

    async def lease(self, wait_seconds: float = 0, **fields: Any) -> list[dict[str, Any]]:
        answer = await self.post("/lease", **{"queues": ["q"], "wait_seconds": wait_seconds, **fields})
        assert answer.status_code == 200, answer.text
        jobs: list[dict[str, Any]] = answer.json()["jobs"]
        return jobs

    async def verb(self, verb: str, leased: dict[str, Any], **fields: Any) -> httpx.Response:
        return await self.post(f"/jobs/{leased['id']}/{verb}", lease_id=leased["lease_id"], **fields)

    async def waiters(self, count: int) -> None:
        """Wait until so many leases wait there."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while f"leaseq_lease_waiters {float(count)}" not in (await self.http.get("/metrics")).text:
                await asyncio.sleep(0.01)

    async def hears(self) -> None:
        """Wait until it is ready and listens for hints."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while True:
                answer = await self.http.get("/health")
                if answer.status_code == 200 and answer.json()["listening"]:
                    return
                await asyncio.sleep(0.02)


class Processes:
    """Starts processes; all of them, and the embedded servers that they leave, end with the test."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.data_dirs: list[Path] = []
        self._logs = directory / "logs"
        self._logs.mkdir()
        self._started: list[Process] = []

    def start(self, *arguments: str, **variables: object) -> Process:
        process = Process(arguments, self._logs, variables)
        self._started.append(process)
        return process

    async def run(self, *arguments: str, **variables: object) -> tuple[int, str]:
        """Run to the end; return the exit code and what it said."""
        process = self.start(*arguments, **variables)
        return await process.ends(), process.said

    async def serve(self, **variables: object) -> Service:
        """Start a service on a free port, ready to be used."""
        service = Service(
            ("serve",), self._logs, {"QUEUE_PORT": 0, "QUEUE_LOG_LEVEL": "warning", **variables}
        )
        self._started.append(service)
        await service.starts()
        return service

    async def end(self) -> None:
        for process in self._started:
            process.end()
            if isinstance(process, Service) and "http" in vars(process):
                await process.http.aclose()
        for data_dir in self.data_dirs:
            if postmaster(data_dir) is not None:
                with embedded_database(data_dir):
                    """Take over what was left running, and stop it."""
        shutil.rmtree(self.directory)


@pytest.fixture
async def processes(tmp_path: Path) -> AsyncIterator[Processes]:
    directory = tmp_path / "processes"
    directory.mkdir()
    processes = Processes(directory)
    try:
        yield processes
    finally:
        await processes.end()


@pytest.fixture(scope="session")
def initialised(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A data directory after `python -m app migrate`, made once, because initdb takes most of a test's time."""
    directory = tmp_path_factory.mktemp("initialised")
    process = Process(("migrate",), directory, {"QUEUE_DATA_DIR": directory / "data"})
    asyncio.run(process.ends())
    assert "is at head" in process.said
    yield directory / "data"
    shutil.rmtree(directory)


@pytest.fixture
def data_dir(processes: Processes, initialised: Path) -> Path:
    """A data directory of a service that has run before."""
    data_dir = processes.directory / "data"
    subprocess.run(["/bin/cp", "-a", initialised, data_dir], check=True)
    processes.data_dirs.append(data_dir)
    return data_dir


@dataclass
class Cluster:
    """A migrated PostgreSQL that the test may stop, crash and start again."""

    data_dir: Path
    sockets: Path
    account: embedded._Account

    @property
    def url(self) -> str:
        password = quote((self.data_dir / "password").read_text(), safe="")
        return f"postgresql://leaseq:{password}@/leaseq?{urlencode({'host': self.sockets})}"

    def start(self) -> None:
        options = f"-k {self.sockets} -c listen_addresses='' -c fsync=off"
        self._control("start", "-l", str(self.data_dir / "postgres" / "log"), "-o", options)

    def stop(self, mode: str) -> None:
        self._control("stop", "-m", mode)

    def _control(self, *arguments: str) -> None:
        program = embedded._find_binaries() / "pg_ctl"
        answer = self.account.run([program, *arguments, "--wait", "-D", self.data_dir / "postgres"])
        assert answer.returncode == 0, answer.stdout


@pytest.fixture
def cluster(data_dir: Path) -> Iterator[Cluster]:
    temporary = Path(tempfile.gettempdir())
    sockets = Path(tempfile.mkdtemp(prefix="leaseq-test-"))
    account = embedded._database_account(embedded._find_binaries(), data_dir, temporary)
    account.own(sockets)
    cluster = Cluster(data_dir, sockets, account)
    cluster.start()
    try:
        yield cluster
    finally:
        process = postmaster(data_dir)
        if process is not None and not is_gone(process):
            cluster.stop("immediate")
        shutil.rmtree(sockets)


STOP_SIGNALS = [
    pytest.param(signal.SIGTERM, id="SIGTERM"),
    pytest.param(signal.SIGINT, id="SIGINT"),
]
