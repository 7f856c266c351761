"""Processes that end with us, whichever way we go, and the processor time that they take."""

import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import psutil

ROOT = Path(__file__).resolve().parents[1]
STOP_SECONDS = 30
SAID_LAST = 500  # characters
# What a program needs to run at all; no setting of ours, such as a DATABASE_URL, reaches the processes.
KEPT_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH")


class BenchmarkError(Exception):
    """Something can not be measured; the text is a sentence that says why."""


class _Signals:
    """Signals become one SystemExit; not while a process is started, and only once: clean-ups run to their end."""

    def __init__(self) -> None:
        self._held = False
        self._pending: int | None = None

    def install(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._arrived)

    def _arrived(self, number: int, _frame: FrameType | None) -> None:
        self._pending = number
        if not self._held:
            self._leave()

    def _leave(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        sys.exit(128 + (self._pending or 0))

    @contextmanager
    def held(self) -> Iterator[None]:
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._pending is not None:
            self._leave()


SIGNALS = _Signals()


@contextmanager
def running(
    command: Sequence[str | Path],
    log: Path,
    *,
    cwd: Path = ROOT,
    environment: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command for the length of the block; standard output is a pipe, the rest goes to the file `log`.

    `environment` is added to the little that every program needs.
    """
    kept = {name: os.environ[name] for name in KEPT_ENVIRONMENT if name in os.environ}
    child: subprocess.Popen[bytes] | None = None
    try:
        with log.open("ab") as errors, SIGNALS.held():
            child = subprocess.Popen(
                command,
                cwd=cwd,
                env={**kept, "PYTHONPATH": str(ROOT), **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                # A session of its own: Ctrl-C is ours to handle, and what it starts itself can be ended with it.
                start_new_session=True,
            )
        yield child
    finally:
        if child is not None:
            _end(child)


def _end(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    with suppress(subprocess.TimeoutExpired):
        child.wait(STOP_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    if child.stdout is not None:
        child.stdout.close()


def output(
    command: Sequence[str | Path],
    log: Path,
    timeout_seconds: float,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Run a command to its end and return what it printed. Raises BenchmarkError when it fails or takes too long."""
    with running(command, log, environment=environment) as child:
        try:
            printed, _ = child.communicate(timeout=timeout_seconds)
        except subprocess.TimeoutExpired:
            message = f"{Path(command[0]).name} {command[1]} took more than {timeout_seconds:.0f} s."
            raise BenchmarkError(message) from None
        if child.returncode != 0:
            message = f"{Path(command[0]).name} {command[1]} failed: {last_words(log)}"
            raise BenchmarkError(message)
    return printed.decode()


def last_words(log: Path) -> str:
    """Return the end of a log."""
    return log.read_text(errors="replace")[-SAID_LAST:].strip()


def free_port() -> int:
    """Return a loopback port that nobody uses at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def cpu_seconds(pid: int) -> float:
    """Return the processor time that a process, its children and its former children have taken."""
    root = psutil.Process(pid)
    times = root.cpu_times()
    total = times.user + times.system + times.children_user + times.children_system
    for child in root.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            own = child.cpu_times()
            total += own.user + own.system
    return float(total)


def own_children_cpu_seconds() -> float:
    """Return the processor time of all processes that we have started and seen end."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def machine_cpu_seconds() -> float:
    """Return the processor time that the whole machine has been busy."""
    times = psutil.cpu_times()
    return float(times.user + times.system + times.nice + times.irq + times.softirq)


def rss_bytes(pid: int) -> int:
    """Return the memory that a process and its children hold."""
    root = psutil.Process(pid)
    return int(sum(each.memory_info().rss for each in (root, *root.children(recursive=True))))


def raise_open_files(count: int) -> None:
    """Let us, and the processes that we start, have `count` files open. Raises BenchmarkError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= count:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, max(hard, count)))
    except (ValueError, OSError):
        message = f"{count} files must be open at once, but the limit is {hard}: raise it with `ulimit -n`."
        raise BenchmarkError(message) from None


def require_tools(*packages: str) -> None:
    """Install what is missing, with apt-get where we are root. Raises BenchmarkError.

    A package's name is its program's.
    """
    missing = [name for name in packages if shutil.which(name) is None]
    if not missing:
        return
    apt = shutil.which("apt-get")
    if apt is None or os.geteuid() != 0:
        message = f"The benchmarks need {', '.join(missing)}: install them with your package manager."
        raise BenchmarkError(message)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for words in (("update", "-qq"), ("install", "-y", "-qq", "--no-install-recommends", *missing)):
        done = subprocess.run([apt, *words], env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            message = f"apt-get {words[0]} failed: {done.stderr.strip()[-500:]}"
            raise BenchmarkError(message)
