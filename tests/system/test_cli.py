"""`python -m app` as a person at a terminal meets it: what each command prints, and its exit code."""

import os
import re
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest
from typer.testing import CliRunner

from app.cli import cli
from tests.conftest import World, with_database
from tests.system.conftest import PROJECT, Processes, postmaster

NOBODY_THERE = "postgresql://leaseq@127.0.0.1:1/leaseq"


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody else serves on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def sentence(said: str) -> str:
    """Check that a person is told one thing, in a sentence; return it."""
    lines = said.strip().splitlines()
    assert len(lines) == 1, said
    assert not lines[0].startswith("{"), said
    return lines[0]


@pytest.fixture
def invoke() -> Iterator[Callable[..., tuple[int, str]]]:
    """Run a command that ends before it starts anything, without the price of a process."""

    def invoke(*arguments: str, **variables: str) -> tuple[int, str]:
        kept = {name: None for name in os.environ if name.startswith(("QUEUE_", "DATABASE_URL"))}
        result = CliRunner().invoke(cli, arguments, env={**kept, **variables})
        assert result.exception is None or isinstance(result.exception, SystemExit)
        return result.exit_code, result.output

    before = signal.getsignal(signal.SIGTERM)
    yield invoke
    signal.signal(signal.SIGTERM, before)


def test_help_names_every_command_and_what_it_does(invoke: Callable[..., tuple[int, str]]):
    code, said = invoke("--help")
    assert code == 0
    for command in ("serve", "migrate", "maintain", "openapi"):
        assert re.search(rf"\b{command}\b +\w+", said), command


@pytest.mark.parametrize("command", ["serve", "migrate", "maintain", "openapi"])
def test_every_command_has_help(command: str, invoke: Callable[..., tuple[int, str]]):
    code, said = invoke(command, "--help")
    assert code == 0
    assert command in said


@pytest.mark.parametrize("arguments", [("unknown",), ("serve", "--unknown"), ("migrate", "extra")])
def test_what_is_no_command_is_a_wrong_usage(
    arguments: tuple[str, ...], invoke: Callable[..., tuple[int, str]]
):
    code, said = invoke(*arguments)
    assert code == 2
    assert arguments[-1] in said


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        pytest.param("QUEUE_PORT", "99999", "QUEUE_PORT is '99999'", id="number out of range"),
        pytest.param("QUEUE_LEASE_SECONDS", "soon", "QUEUE_LEASE_SECONDS is 'soon'", id="no number"),
        pytest.param("QUEUE_MAX_RETRYS", "3", "Did you mean QUEUE_MAX_RETRIES?", id="misspelt"),
        pytest.param("QUEUE_HOST", "192.0.2.1", "QUEUE_AUTH=off", id="open to strangers"),
        pytest.param("DATABASE_URL", "mysql://h/d", "must begin with postgresql://", id="other database"),
        pytest.param("DATABASE_URL", "host=h nonsense=1", "unknown", id="unknown word"),
        pytest.param("DATABASE_URL", "postgresql://h:port/d", "not a URL", id="port is no number"),
        pytest.param("DATABASE_URL", "postgresql://h/d?sslmode=maybe", "sslmode", id="no such sslmode"),
    ],
)
@pytest.mark.parametrize("command", ["serve", "migrate", "maintain"])
def test_wrong_setting_is_told_in_one_sentence(
    command: str, name: str, value: str, told: str, invoke: Callable[..., tuple[int, str]]
):
    code, said = invoke(command, **{name: value})
    assert code == 1
    assert told in sentence(said)


async def test_wrong_setting_ends_the_process_before_anything_is_made(processes: Processes):
    data_dir = processes.directory / "never"
    code, said = await processes.run("serve", QUEUE_DATA_DIR=data_dir, QUEUE_PORT="99999")
    assert code == 1
    assert "QUEUE_PORT is '99999'" in sentence(said)
    assert not data_dir.exists()


@pytest.mark.parametrize("arguments", [("serve",), ("maintain", "--once")])
async def test_database_out_of_reach_is_told_in_one_sentence(
    arguments: tuple[str, ...], processes: Processes
):
    code, said = await processes.run(*arguments, DATABASE_URL=NOBODY_THERE)
    assert code == 1
    assert "database" in sentence(said)


async def test_database_that_does_not_exist_is_told_in_one_sentence(cluster_url: str, processes: Processes):
    code, said = await processes.run("migrate", DATABASE_URL=with_database(cluster_url, "missing"))
    assert code == 1
    assert "not exist" in sentence(said)


async def test_password_that_is_wrong_is_told_in_one_sentence(cluster_url: str, processes: Processes):
    parts = urlsplit(cluster_url)
    wrong = urlunsplit(parts._replace(netloc=f"{parts.username}:sesame@{parts.netloc.rpartition('@')[2]}"))
    code, said = await processes.run("migrate", DATABASE_URL=wrong)
    assert code == 1
    assert "password" in sentence(said)
    assert "sesame" not in said


async def test_address_that_is_taken_is_told_in_one_sentence(world: World, processes: Processes, taken: int):
    code, said = await processes.run(
        "serve", DATABASE_URL=world.database_url, QUEUE_PORT=taken, QUEUE_LOG_LEVEL="error"
    )
    assert code == 1
    assert "Traceback" not in said
    last = said.strip().splitlines()[-1]
    assert f"127.0.0.1:{taken}" in last
    assert not last.startswith("{")


async def test_embedded_server_does_not_outlive_a_start_that_failed(
    processes: Processes, data_dir: Path, taken: int
):
    code, _ = await processes.run("serve", QUEUE_DATA_DIR=data_dir, QUEUE_PORT=taken)
    assert code == 1
    assert postmaster(data_dir) is None


async def test_schema_that_lacks_migrations_is_refused_when_they_may_not_be_applied(
    world: World, processes: Processes
):
    unmigrated = {"DATABASE_URL": world.database_url, "QUEUE_SCHEMA": "another"}
    code, said = await processes.run("serve", QUEUE_MIGRATE="false", QUEUE_PORT=0, **unmigrated)
    assert code == 1
    assert "python -m app migrate" in sentence(said)

    code, said = await processes.run("migrate", **unmigrated)
    assert (code, said) == (0, "The schema another is at head.\n")
    await processes.serve(QUEUE_MIGRATE="false", **unmigrated)


async def test_migrate_goes_down_only_where_no_job_is_lost(world: World, processes: Processes):
    job = await (await world.replica()).enqueue()
    code, said = await processes.run("migrate", "--down", "--to", "base", DATABASE_URL=world.database_url)
    assert code == 1
    assert "unfinished jobs" in sentence(said)
    assert (await (await world.replica()).job(job["id"]))["state"] == "ready"


async def test_migrate_goes_down_and_up_again(cluster_url: str, template_url: str, processes: Processes):
    admin = await asyncpg.connect(cluster_url)
    name = f"leaseq_down_and_up_{os.getpid()}"
    await admin.execute(f"CREATE DATABASE {name} TEMPLATE {urlsplit(template_url).path[1:]}")
    try:
        url = with_database(cluster_url, name)
        code, said = await processes.run("migrate", "--down", "--to", "base", DATABASE_URL=url)
        assert (code, said) == (0, "The schema leaseq is at base.\n")
        code, said = await processes.run("migrate", "--to", "0001", DATABASE_URL=url)
        assert (code, said) == (0, "The schema leaseq is at 0001.\n")
    finally:
        await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
        await admin.close()


async def test_revision_that_does_not_exist_is_told_in_one_sentence(world: World, processes: Processes):
    code, said = await processes.run("migrate", "--to", "nonsense", DATABASE_URL=world.database_url)
    assert code == 1
    assert "nonsense" in sentence(said)


async def test_maintain_once_tells_how_many_rows_each_task_changed(world: World, processes: Processes):
    queue = await world.replica()
    await queue.machine.service.maintenance.stop()
    await queue.enqueue()
    await queue.enqueue()
    await queue.enqueue("later", delay_seconds=0.001)
    [job, *_] = await queue.lease(max_jobs=2)
    connection = await world.connect()
    await connection.execute("UPDATE leases SET expires_at = now() WHERE id = $1", job["id"])
    code, said = await processes.run(
        "maintain",
        "--once",
        DATABASE_URL=world.database_url,
        QUEUE_LOG_LEVEL="error",
        # However long the process takes to start, it is no outage that leases get their time back for.
        QUEUE_MAINTENANCE_SECONDS=3600,
    )
    assert code == 0, said
    changed = {task: int(count) for task, count in (line.split() for line in said.splitlines())}
    assert changed.keys() == {
        *("days", "reap", "expire", "schedules", "promote", "keyed_schedules", "fold", "retain", "sweep")
    }
    assert (changed["reap"], changed["promote"], changed["retain"]) == (1, 1, 0)
    assert changed["fold"] > 0


async def test_maintain_goes_on_until_a_signal_ends_it(world: World, processes: Processes):
    queue = await world.replica()
    await queue.machine.service.maintenance.stop()
    process = processes.start("maintain", DATABASE_URL=world.database_url, QUEUE_MAINTENANCE_SECONDS="0.05")
    for _ in range(2):
        await queue.enqueue(delay_seconds=0.01)
        [leased] = await queue.lease(wait_seconds=30)
        await queue.verb("ack", leased)
    process.signal(signal.SIGTERM)
    assert await process.ends() in {0, 128 + signal.SIGTERM}
    assert process.said == ""


async def test_openapi_check_says_that_the_file_is_what_the_routes_say(processes: Processes):
    file = PROJECT / "openapi.yaml"
    before = file.stat().st_mtime_ns
    code, said = await processes.run("openapi", "--check", DATABASE_URL=NOBODY_THERE)
    assert (code, said) == (0, "")
    assert file.stat().st_mtime_ns == before
