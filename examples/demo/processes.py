"""The processes of the demonstration: the service and the workers. Whatever starts here ends here."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

EXAMPLES = Path(__file__).resolve().parents[1]
READY_SECONDS = 120
STOP_SECONDS = 40
# What a program needs to run at all; nothing else of ours, such as a DATABASE_URL, reaches the processes.
KEPT_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH")


class ProcessError(Exception):
    """A process did not do what it should; the text says which, and what it said last."""


class Process:
    """A child in a process group of its own: Ctrl-C is ours to handle, and nothing of it outlives us."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        """Start the command; what it prints goes to the file ``log``."""
        self.name = name
        self._log = log
        self._leaving = False
        kept = {key: os.environ[key] for key in KEPT_ENVIRONMENT if key in os.environ}
        with log.open("wb") as output:
            self._child = subprocess.Popen(
                command,
                cwd=EXAMPLES.parent,
                env={**kept, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def running(self) -> bool:
        """Whether the process is still there."""
        return self._child.poll() is None

    @property
    def last_words(self) -> str:
        """The end of what it printed."""
        return self._log.read_text(errors="replace")[-2000:].strip()

    def signal(self, signum: int) -> None:
        """Send a signal to the process and to its children."""
        if self.running:
            os.killpg(self._child.pid, signum)

    def leave(self) -> None:
        """Ask it to leave, once; with SIGTERM to itself alone, as a supervisor does."""
        if not self._leaving:
            self._leaving = True
            self._child.terminate()

    def stop(self) -> int:
        """Ask it to leave, end it if it stays; return its exit code (negative: the signal that ended it)."""
        self.leave()
        try:
            self._child.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:
            self.signal(signal.SIGKILL)
        return self._child.wait()


@contextmanager
def service(data: Path, log: Path, pause: Callable[[float], None] = time.sleep) -> Iterator[str]:
    """Run the service on a free loopback port with its data in ``data``; give its URL once it is ready.

    Raises ProcessError when it ends or is not ready in time, and whatever ``pause``, with which it waits, raises.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {"QUEUE_HOST": "127.0.0.1", "QUEUE_PORT": str(port), "QUEUE_DATA_DIR": str(data)}
    process = Process("service", (sys.executable, "-m", "app", "serve"), environment, log)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(process, url, pause)
        yield url
    finally:
        process.stop()


def _wait_until_ready(process: Process, url: str, pause: Callable[[float], None]) -> None:
    give_up_at = time.monotonic() + READY_SECONDS
    with httpx.Client(base_url=url, trust_env=False) as client:
        while process.running and time.monotonic() < give_up_at:
            try:
                if client.get("/health/ready").is_success:
                    return
            except httpx.TransportError:
                pass
            pause(0.05)
    state = f"is not ready after {READY_SECONDS} s" if process.running else "ended before it was ready"
    raise ProcessError(f"the service {state}; its last words:\n{process.last_words}")


@dataclass(frozen=True)
class Language:
    """One of the example workers, and what must be installed to run it."""

    name: str
    title: str
    command: tuple[str, ...]
    tools: tuple[str, ...]
    least_version: int

    def version(self) -> str:
        """Return the language's version. Raises ProcessError when something that it needs is missing."""
        missing = [tool for tool in self.tools if not shutil.which(tool)]
        if missing:
            raise ProcessError(f"no {', '.join(missing)}")
        answer = subprocess.run(
            (self.command[0], "--version"), capture_output=True, text=True, check=False, timeout=30
        ).stdout
        version = re.search(r"\d+(\.\d+)*", answer)
        if not version or int(version[0].split(".")[0]) < self.least_version:
            raise ProcessError(f"{version[0] if version else 'no version'}, needs {self.least_version}")
        return version[0]


LANGUAGES = (
    Language("python", "Python", (sys.executable, str(EXAMPLES / "worker.py")), (), 3),
    Language("node", "Node", ("node", str(EXAMPLES / "worker.mjs")), ("node",), 18),
    Language("shell", "bash", ("bash", str(EXAMPLES / "worker.sh")), ("bash", "curl", "jq", "sha256sum"), 4),
)


class Fleet:
    """The workers of every language that is installed."""

    def __init__(self, environment: Mapping[str, str], directory: Path) -> None:
        """Prepare; the workers keep their logs and temporary files in ``directory``."""
        self._environment = environment
        self._directory = directory
        self.workers: dict[str, Process] = {}

    def start(self, language: Language, count: int) -> None:
        """Start workers named after their language and a number."""
        for number in range(1, count + 1):
            name = f"{language.name}-{number}"
            environment = {**self._environment, "LEASEQ_WORKER": name, "TMPDIR": str(self._directory)}
            self.workers[name] = Process(name, language.command, environment, self._directory / f"{name}.log")

    def check(self, killed: str | None) -> None:
        """Raise ProcessError if a worker, other than the one killed, has ended."""
        for name, worker in self.workers.items():
            if name != killed and not worker.running:
                raise ProcessError(f"{name} ended by itself; its last words:\n{worker.last_words}")

    def stop(self) -> dict[str, int]:
        """End all, each in its own way to leave; return their exit codes by name."""
        for worker in self.workers.values():
            worker.signal(signal.SIGCONT)
            worker.leave()
        return {name: worker.stop() for name, worker in self.workers.items()}
