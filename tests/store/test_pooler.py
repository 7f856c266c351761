"""Through a pooler of transactions: what it carries, what it must not be asked, and what is left without a way past it.

The whole API's tests go through it too: `make pooler`.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from sqlalchemy import text
from structlog.testing import capture_logs

from app.store.database import HOT_SETTINGS, READ_SETTINGS, Database, Transaction
from app.store.migrate import is_migrated, upgrade
from tests.conftest import NEVER_SECONDS, World, through
from tests.pooler import CONNECTIONS

AT_ONCE = 3 * CONNECTIONS


@pytest.fixture
async def pooled(world: World, pooler_url: str) -> World:
    """The world, whose replicas go through the pooler."""
    world.pooled_url = through(pooler_url, world.database_url)
    return world


@pytest.fixture
async def database(pooled: World) -> AsyncIterator[Database]:
    assert pooled.pooled_url is not None
    database = Database(pooled.pooled_url, schema="leaseq", pool_size=AT_ONCE, pooled=True)
    await database.start()
    yield database
    await database.close()


async def in_every_session(pooled: World, query: str) -> list[list[tuple[Any, ...]]]:
    """Run a query as a stranger in each of the sessions that the pooler has; return the rows of each."""
    together = asyncio.Barrier(CONNECTIONS)

    async def ask() -> list[tuple[Any, ...]]:
        connection = await asyncpg.connect(pooled.pooled_url, statement_cache_size=0)
        try:
            async with connection.transaction():
                async with asyncio.timeout(10):
                    await together.wait()
                return [tuple(row) for row in await connection.fetch(query)]
        finally:
            await connection.close()

    return await asyncio.gather(*(ask() for _ in range(CONNECTIONS)))


def by_name(rows: Sequence[asyncpg.Record]) -> dict[str, str]:
    return {row["name"]: row["current_setting"] for row in rows}


async def test_verbs_and_reads_have_their_settings_and_leave_none_behind(pooled: World, database: Database):
    shown = "SELECT name, current_setting(name) FROM pg_settings WHERE name = ANY($1::text[])"
    untouched = "SELECT name, setting FROM pg_settings WHERE name <> 'application_name' ORDER BY name"
    before = await in_every_session(pooled, untouched)

    async def work(transaction: Transaction) -> dict[str, str]:
        return by_name(await transaction.query(shown, list(HOT_SETTINGS)))

    assert await database.transact(work) == HOT_SETTINGS
    async with database.hot.acquire() as connection:
        assert by_name(await connection.fetch(shown, list(HOT_SETTINGS))) == HOT_SETTINGS
    async with database.reading.connect() as reading:
        for name, value in READ_SETTINGS.items():
            assert await reading.scalar(text(f"SHOW {name}")) == value
    await asyncio.gather(*(database.fetch("stored", [uuid4()]) for _ in range(AT_ONCE)))
    assert await in_every_session(pooled, untouched) == before
    assert await in_every_session(pooled, "SELECT name FROM pg_prepared_statements") == [[]] * CONNECTIONS


async def test_an_error_leaves_a_connection_that_works(database: Database):
    for _ in range(AT_ONCE):
        async with database.hot.acquire() as connection:
            with pytest.raises(asyncpg.DivisionByZeroError):
                await connection.fetch("SELECT 1 / 0")
            assert await connection.fetchval("SELECT 1") == 1


async def test_migrations_go_through_it_where_there_is_no_other_way(pooled: World):
    assert pooled.pooled_url is not None
    database = Database(pooled.pooled_url, schema="by the pooler", pooled=True)
    try:
        await upgrade(database)
        assert await is_migrated(database)
    finally:
        await database.close()


async def test_hints_go_past_it(pooled: World):
    """Nobody polls here: the job is handed over by a hint, or not at all."""
    one, other = await pooled.replica(), await pooled.replica()
    waiting = asyncio.create_task(one.lease(wait_seconds=20))
    while one.machine.service.wakeups.waiters == 0:
        await asyncio.sleep(0.005)
    job = await other.enqueue()
    assert [leased["id"] for leased in await waiting] == [job["id"]]


async def test_without_a_way_past_it_the_poll_finds_what_others_enqueue(pooled: World):
    with capture_logs() as logs:
        one = await pooled.replica(database_listen_url=None, poll_seconds=0.1)
        other = await pooled.replica(database_listen_url=None, poll_seconds=NEVER_SECONDS)
        waiting = asyncio.create_task(one.lease(wait_seconds=20))
        while one.machine.service.wakeups.waiters == 0:
            await asyncio.sleep(0.005)
        job = await other.enqueue()
        assert [leased["id"] for leased in await waiting] == [job["id"]]
        local = await other.enqueue()
        assert (await other.lease_one())["id"] == local["id"]
    said = [line for line in logs if line["event"].startswith("hints")]
    assert [line["event"] for line in said] == ["hints_off"] * 2
    assert said[0]["log_level"] == "warning"
    assert (await one.http.get("/health")).json()["listening"] is False
    assert (await one.http.get("/health/ready")).status_code == 200
