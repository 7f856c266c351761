"""The connections: what DATABASE_URL may say, the sessions' settings, and what a fault becomes."""

import asyncio
import re
from typing import Any
from urllib.parse import parse_qs, urlsplit

import asyncpg
import pytest
from sqlalchemy import text

from app.queue.errors import UnavailableError
from app.store import database as database_module
from app.store import schedules
from app.store.database import (
    HOT_SETTINGS,
    SQL_DIRECTORY,
    Database,
    DatabaseUrlError,
    Transaction,
    connect_arguments,
    is_away,
    statement,
)
from app.store.schema import BODY_COLUMNS
from tests.conftest import Replica, World
from tests.store.conftest import holding, idle_replica


class TestUrl:
    @pytest.mark.parametrize(
        ("url", "words"),
        [
            ("mysql://u:secret@h/d", "must begin with postgresql://"),
            ("postgresql://u:secret@[::1/d", "not a URL"),
            ("secret", "neither"),
            ("dbname='secret", "neither"),
            ("dbname=d password=secret colour=red", "unknown parameter"),
            ("dbname=d password=secret port=abc", "(?i)port"),
            ("postgresql://u:secret@h:abc/d", "not a URL"),
        ],
    )
    def test_that_is_wrong_is_refused_with_a_sentence_that_keeps_the_password(self, url: str, words: str):
        with pytest.raises(DatabaseUrlError, match=words) as refused:
            connect_arguments(url)
        assert str(refused.value).startswith("DATABASE_URL")
        assert "secret" not in str(refused.value)

    async def test_may_be_words_that_lead_to_the_same_database(self, world: World):
        parts = urlsplit(world.database_url)
        query = parse_qs(parts.query)
        words = {
            "host": query.get("host", [parts.hostname])[0],
            "port": query.get("port", [parts.port])[0],
            "user": parts.username,
            "password": parts.password,
            "dbname": parts.path.removeprefix("/"),
        }
        url = " ".join(f"{word}='{value}'" for word, value in words.items() if value)
        database = Database(url, schema="leaseq")
        await database.start()
        assert await database.hot.fetchval("SELECT current_database()") == words["dbname"]
        await database.close()


@pytest.fixture
async def database(world: World) -> Any:
    database = Database(world.database_url, schema="leaseq", pool_size=2)
    await database.start()
    yield database
    await database.close()


NAMES = sorted(path.stem for path in SQL_DIRECTORY.glob("*.sql"))
PARTS = {
    "line": "r.queue",
    "shown": "*",
    "place": "ready",
    "state": "'ready'",
    "kept": ", ".join(f"body.{column}" for column in BODY_COLUMNS),
    "then": "",
    "then_value": "",
    "of_group": "",
    "schedule": schedules._SCHEDULE,
    "which": schedules._ONE,
    "keyed": schedules._KEYED,
    "kind": schedules._PLAIN,
}
"""What the store puts in the place of those names."""


class TestStatements:
    @pytest.mark.parametrize("name", NAMES)
    def test_have_every_placeholder_filled_in(self, name: str):
        filled = statement(name, 'we"ird', **PARTS)
        assert re.findall(r"\{[a-z_.]+\}", filled) == []
        if "{schema}" in (SQL_DIRECTORY / f"{name}.sql").read_text():
            assert '"we""ird".' in filled

    @pytest.mark.parametrize("name", NAMES)
    async def test_are_understood_by_the_server(self, database: Database, name: str):
        async with database.hot.acquire() as connection:
            await connection.prepare(statement(name, "leaseq", **PARTS))

    async def test_carry_every_column_of_a_body(self, world: World):
        connection = await world.connect()
        columns = await connection.fetch(
            "SELECT column_name FROM information_schema.columns"
            " WHERE (table_schema, table_name) = ('leaseq', 'jobs') ORDER BY ordinal_position"
        )
        assert tuple(row["column_name"] for row in columns) == BODY_COLUMNS

    async def test_of_the_verbs_run_in_sessions_that_allow_one_plan(self, database: Database):
        for name, value in HOT_SETTINGS.items():
            assert await database.hot.fetchval(f"SHOW {name}") == value

    async def test_keep_the_settings_of_their_session_from_one_to_the_next(self, database: Database):
        for _ in range(2):
            await database.transact(lambda transaction: transaction.query("SET LOCAL enable_seqscan = on"))
        async with database.hot.acquire() as one, database.hot.acquire() as two:
            for connection in (one, two):
                assert await connection.fetchval("SHOW enable_seqscan") == "off"

    async def test_of_reads_have_a_time_limit_of_their_own(self, database: Database):
        async with database.reading.connect() as connection:
            assert await connection.scalar(text("SHOW statement_timeout")) == "5s"


class TestFaults:
    async def test_a_verb_before_the_start_is_a_mistake_of_the_program(self, world: World):
        with pytest.raises(RuntimeError, match="not been started"):
            await Database(world.database_url, schema="leaseq").fetch("now")

    @pytest.mark.parametrize(
        "url",
        ["postgresql://127.0.0.1:1/none", "postgresql:///none?host=/nowhere", "host=/nowhere dbname=none"],
    )
    async def test_a_server_that_is_not_there_is_unavailable(self, url: str):
        database = Database(url, schema="leaseq")
        with pytest.raises(UnavailableError, match=r"The database (is away|can not be reached)"):
            await database.start()
        await database.close()

    async def test_a_lock_that_is_held_too_long_is_503_with_retry_after_and_changes_nothing(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setitem(HOT_SETTINGS, "lock_timeout", "50ms")
        queue = await idle_replica(world)
        job = await queue.enqueue()
        leased = await queue.lease_one()
        async with holding(world, "SELECT FROM leases WHERE id = $1 FOR UPDATE", job["id"]):
            for verb in ("ack", "heartbeat", "release"):
                answer = await queue.verb(verb, leased)
                assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
                assert int(answer.headers["retry-after"]) >= 1
        assert (await queue.job(job["id"]))["state"] == "active"
        assert (await queue.verb("ack", leased)).status_code == 200

    async def test_a_statement_that_takes_too_long_is_unavailable(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setitem(HOT_SETTINGS, "statement_timeout", "50ms")
        database = Database(world.database_url, schema="leaseq")
        await database.start()
        with pytest.raises(UnavailableError):
            await database.transact(lambda transaction: transaction.query("SELECT pg_sleep(10)"))
        await database.close()

    async def test_an_exhausted_pool_is_unavailable_and_recovers(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(database_module, "ACQUIRE_TIMEOUT_SECONDS", 0.05)
        database = Database(world.database_url, schema="leaseq", pool_size=1)
        await database.start()
        async with database.hot.acquire():
            with pytest.raises(UnavailableError):
                await database.fetch("now")
        assert await database.fetch("now")
        await database.close()

    async def test_a_connection_that_the_server_ended_is_replaced(self, world: World, queue: Replica):
        await queue.enqueue()
        connection = await world.connect()
        await connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name = 'leaseq'"
        )
        answers = [
            await queue.http.post("/jobs", json={"queue": "q"})
            for _ in range(queue.machine.settings.db_pool_size + 1)
        ]
        assert {answer.status_code for answer in answers} <= {201, 503}
        assert answers[-1].status_code == 201

    async def test_a_deadlock_is_resolved_by_doing_the_work_again(self, database: Database, queue: Replica):
        await queue.enqueue("a")
        await queue.enqueue("b")
        await queue.machine.jobs.fold(10)
        runs: list[str] = []
        both = asyncio.Barrier(2)
        one_is_done = asyncio.Event()

        async def lock(transaction: Transaction, first: str, second: str) -> None:
            if first in runs:
                await one_is_done.wait()
            runs.append(first)
            await transaction.query("SELECT FROM leaseq.counts WHERE queue = $1 FOR UPDATE", first)
            if len(runs) <= 2:
                await both.wait()
            await transaction.query("SELECT FROM leaseq.counts WHERE queue = $1 FOR UPDATE", second)

        async def run(first: str, second: str) -> None:
            await database.transact(lambda transaction: lock(transaction, first, second))
            one_is_done.set()

        await asyncio.gather(run("a", "b"), run("b", "a"))
        assert len(runs) == 3

    async def test_work_that_fails_leaves_nothing_behind(self, world: World, database: Database):
        async def work(transaction: Transaction) -> None:
            await transaction.query("INSERT INTO leaseq.queues (name) VALUES ('half')")
            raise LookupError

        with pytest.raises(LookupError):
            await database.transact(work)
        connection = await world.connect()
        assert await connection.fetchval("SELECT count(*) FROM queues") == 0

    @pytest.mark.parametrize(
        ("error", "away"),
        [
            (asyncpg.AdminShutdownError("bye"), True),
            (asyncpg.CannotConnectNowError("starting"), True),
            (asyncpg.TooManyConnectionsError("full"), True),
            (asyncpg.DiskFullError("full"), True),
            (asyncpg.LockNotAvailableError("locked"), True),
            (asyncpg.QueryCanceledError("too long"), True),
            (asyncpg.DeadlockDetectedError("deadlock"), True),
            (asyncpg.SerializationError("again"), True),
            (asyncpg.ReadOnlySQLTransactionError("a standby now"), True),
            (asyncpg.ConnectionDoesNotExistError("gone"), True),
            (asyncpg.InterfaceError("connection is closed"), True),
            (ConnectionResetError(), True),
            (TimeoutError(), True),
            (asyncpg.UniqueViolationError("twice"), False),
            (asyncpg.CheckViolationError("no day"), False),
            (asyncpg.PostgresSyntaxError("what"), False),
            (asyncpg.UndefinedTableError("none"), False),
            (asyncpg.InsufficientPrivilegeError("no"), False),
            (ValueError("wrong"), False),
        ],
        ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
    )
    def test_only_what_time_can_mend_is_called_away(self, error: Exception, away: bool):
        assert is_away(error) is away
