"""The migrations: they make what schema.py says, in any schema, by any number of processes, and lose no job."""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from sqlalchemy import text

from app.main import NotMigratedError, build, running
from app.queue.errors import UnavailableError
from app.settings import Settings
from app.store import database as database_module
from app.store.database import Database
from app.store.migrate import MigrationError, downgrade, is_migrated, upgrade
from app.store.schema import metadata
from tests.conftest import Replica, World
from tests.store.conftest import holding, idle_replica

ROOT = Path(__file__).parents[2]

CATALOG = {
    "columns": """
        SELECT c.relname, a.attnum, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity,
               a.attgenerated, l.collname, pg_get_expr(d.adbin, d.adrelid)
          FROM mine AS c
          JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
          LEFT JOIN pg_collation AS l ON l.oid = a.attcollation
          LEFT JOIN pg_attrdef AS d ON (d.adrelid, d.adnum) = (a.attrelid, a.attnum)
         WHERE c.relkind IN ('r', 'p')""",
    "tables": """
        SELECT relname, relkind, relpersistence, (SELECT array_agg(o ORDER BY o) FROM unnest(reloptions) AS o),
               pg_get_partkeydef(oid)
          FROM mine WHERE relkind IN ('r', 'p', 'S')""",
    "indexes": """
        SELECT replace(pg_get_indexdef(oid), quote_ident($1), 'SCHEMA') FROM mine WHERE relkind IN ('i', 'I')""",
    "constraints": """
        SELECT c.relname, k.conname, k.contype::text, pg_get_constraintdef(k.oid)
          FROM mine AS c JOIN pg_constraint AS k ON k.conrelid = c.oid""",
}


async def catalog(connection: Any, schema: str) -> dict[str, list[tuple[object, ...]]]:
    """Describe everything in a schema but the days and Alembic's own table."""
    mine = """
        WITH mine AS (
          SELECT c.* FROM pg_class AS c
           WHERE c.relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = $1)
             AND NOT c.relispartition AND c.relname NOT LIKE 'alembic_version%')"""
    return {
        name: sorted((tuple(row) for row in await connection.fetch(mine + query, schema)), key=repr)
        for name, query in CATALOG.items()
    }


@asynccontextmanager
async def database(url: str, schema: str) -> AsyncIterator[Database]:
    opened = Database(url, schema=schema)
    try:
        yield opened
    finally:
        await opened.close()


def environment(url: str, **variables: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("QUEUE_")}
    return {**inherited, "DATABASE_URL": url, **variables}


async def run(url: str, *arguments: str, **variables: str) -> tuple[int, str]:
    """Run a Python module in a process of its own; return its exit code and what it said."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        *arguments,
        cwd=ROOT,
        env=environment(url, **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    said, _ = await process.communicate()
    return process.returncode or 0, said.decode()


async def test_the_migrated_schema_is_what_schema_py_says(world: World):
    connection = await world.connect()
    await connection.execute("CREATE SCHEMA declared")
    async with database(world.database_url, "declared") as declared, declared.reading.begin() as link:
        await link.run_sync(metadata.create_all)
    migrated = await catalog(connection, "leaseq")
    assert migrated == await catalog(connection, "declared")
    assert {row[0] for row in migrated["tables"] if row[1] in {b"r", b"p"}} == set(metadata.tables)


async def test_down_and_up_again_leads_to_the_same_schema(world: World):
    connection = await world.connect()
    before = await catalog(connection, "leaseq")
    async with database(world.database_url, "leaseq") as migrated:
        await downgrade(migrated, "base")
        assert not any((await catalog(connection, "leaseq")).values())
        assert not await is_migrated(migrated)
        await upgrade(migrated)
        assert await is_migrated(migrated)
    assert await catalog(connection, "leaseq") == before


async def test_an_upgrade_of_what_is_up_to_date_changes_nothing(world: World, queue: Replica):
    job = await queue.enqueue()
    async with database(world.database_url, "leaseq") as migrated:
        await upgrade(migrated)
    assert (await queue.lease_one())["id"] == job["id"]


@pytest.mark.parametrize("state", ["ready", "scheduled", "active", "failed"])
async def test_a_downgrade_with_a_job_to_keep_refuses_with_a_sentence_and_changes_nothing(
    world: World, queue: Replica, state: str
):
    job = await queue.enqueue(delay_seconds=60 if state == "scheduled" else 0)
    if state in {"active", "failed"}:
        leased = await queue.lease_one()
    if state == "failed":
        await queue.fail(leased, retry=False)
    connection = await world.connect()
    before = await catalog(connection, "leaseq")
    async with database(world.database_url, "leaseq") as migrated:
        with pytest.raises(MigrationError, match="There are unfinished jobs"):
            await downgrade(migrated, "base")
        assert await is_migrated(migrated)
    assert await catalog(connection, "leaseq") == before
    assert (await queue.job(job["id"]))["state"] == state


async def test_the_command_line_goes_down_and_up_and_refuses_to_lose_a_job(world: World, queue: Replica):
    await queue.enqueue()
    code, said = await run(world.database_url, "app", "migrate", "--down", "--to", "base")
    assert code == 1
    assert "There are unfinished jobs" in said
    assert "Traceback" not in said
    job = await queue.lease_one()
    await queue.verb("ack", job)
    code, said = await run(world.database_url, "app", "migrate", "--down", "--to", "base")
    assert (code, said.strip().splitlines()[-1]) == (0, "The schema leaseq is at base.")
    code, said = await run(world.database_url, "app", "migrate")
    assert (code, said.strip().splitlines()[-1]) == (0, "The schema leaseq is at head.")


async def test_alembics_own_command_line_works(world: World):
    url = world.database_url
    for arguments, words in (
        (["upgrade", "head"], ""),
        (["current"], "0003 (head)"),
        (["history"], "The foundation"),
        (["downgrade", "base"], ""),
        (["upgrade", "head"], ""),
        (["current"], "0003 (head)"),
    ):
        code, said = await run(url, "alembic", *arguments, QUEUE_SCHEMA="by alembic")
        assert code == 0, said
        assert words in said
    connection = await world.connect()
    assert await catalog(connection, "by alembic") == await catalog(connection, "leaseq")


async def test_several_processes_that_migrate_at_once_all_succeed(world: World):
    lock = "SELECT pg_advisory_xact_lock(hashtextextended('leaseq migrate fresh', 0))"
    async with holding(world, lock):
        migrating = [
            asyncio.create_task(run(world.database_url, "app", "migrate", QUEUE_SCHEMA="fresh"))
            for _ in range(3)
        ]
        async with asyncio.timeout(60):
            await blocked_for_long(world, 3)
    for code, said in await asyncio.gather(*migrating):
        assert code == 0, said
    connection = await world.connect()
    assert await catalog(connection, "fresh") == await catalog(connection, "leaseq")


async def blocked_for_long(world: World, count: int) -> None:
    """Wait as `world.blocked` does, for processes that take their time to start."""
    connection = await world.connect()
    while count > await connection.fetchval(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        " AND application_name = 'leaseq' AND wait_event_type = 'Lock'"
    ):
        await asyncio.sleep(0.02)


async def test_a_migration_that_waits_for_another_is_not_cut_off_like_a_verb(
    world: World, monkeypatch: pytest.MonkeyPatch
):
    """Another process's migration may take longer than any verb: the time limits of verbs are not for it."""
    monkeypatch.setattr(database_module, "COMMAND_TIMEOUT_SECONDS", 0.2)
    lock = "SELECT pg_advisory_xact_lock(hashtextextended('leaseq migrate slow', 0))"
    async with database(world.database_url, "slow") as fresh:
        async with holding(world, lock) as connection:
            migrating = asyncio.create_task(upgrade(fresh))
            await world.blocked(1)
            await connection.execute("SELECT pg_sleep(0.5)")
            assert not migrating.done(), migrating.exception()
        await migrating
        assert await is_migrated(fresh)


async def test_a_migration_that_a_lock_blocks_gives_up_whole(world: World):
    async with database(world.database_url, "leaseq") as migrated:
        async with holding(world, "LOCK TABLE jobs IN ACCESS SHARE MODE"):
            with pytest.raises(UnavailableError):
                await downgrade(migrated, "base")
        assert await is_migrated(migrated)


NAMES = [
    "with space",
    "Capitals",
    "grün-очередь",
    "名前",
    "quo'te",
    "semi;colon",
    "per%cent%s",
    "a:name",
    "dotted.name",
    "back\\slash",
    "$$",
    "select",
    "x" * 48,
]


@pytest.mark.parametrize("name", NAMES)
async def test_a_schema_of_any_name_carries_a_jobs_whole_life(world: World, name: str):
    queue = await idle_replica(world, schema_name=name, migrate=True)
    job = await queue.enqueue(max_retries=1, backoff={"strategy": "fixed", "initial_seconds": 0})
    queue.clock.move(0)
    assert (await queue.fail(await queue.lease_one()))["state"] == "retry"
    queue.clock.move(1)
    await queue.maintain()
    assert await queue.fail(await queue.lease_one()) == {"state": "failed"}
    assert (await queue.http.post(f"/jobs/{job['id']}/retry")).status_code == 200
    leased = await queue.lease_one(types=["default"])
    await queue.verb("heartbeat", leased)
    assert (await queue.verb("ack", leased)).json()["state"] == "completed"
    assert [each["id"] for each in (await queue.http.get("/jobs")).json()["jobs"]] == [job["id"]]
    assert len(await queue.attempts(job["id"])) == 3
    assert (await queue.stats())["completed"] == 1
    assert (await queue.http.delete(f"/jobs/{job['id']}")).status_code == 204
    # A second start finds what the first one made.
    await world.replica(schema_name=name, migrate=True)


async def test_two_schemas_in_one_database_know_nothing_of_each_other(world: World, queue: Replica):
    other = await world.replica(schema_name="other", migrate=True)
    job = await other.enqueue()
    assert await queue.lease() == []
    assert (await queue.http.get(f"/jobs/{job['id']}")).status_code == 404
    assert (await queue.stats())["waiting"] == 0
    assert (await other.stats())["waiting"] == 1


@pytest.mark.parametrize("name", ["ü" * 40, "名" * 20, "x" * 57, "[bracket]", 'quo"te', "{brace}", ""])
async def test_a_schema_name_that_would_not_work_is_refused(name: str):
    """PostgreSQL cuts names off at 63 bytes, and the channel of the hints carries ours behind a prefix of 7."""
    with pytest.raises(ValueError, match="schema_name"):
        Settings(_env_file=None, database_url="postgresql://", schema_name=name)


async def test_without_leave_to_migrate_an_unmigrated_database_is_refused(world: World):
    settings = world.settings(schema_name="unmade", migrate=False)
    with pytest.raises(NotMigratedError, match="python -m app migrate"):
        async with running(build(settings)):
            pass
    connection = await world.connect()
    assert not await connection.fetchval("SELECT EXISTS (SELECT FROM pg_namespace WHERE nspname = 'unmade')")


async def test_a_schema_that_somebody_else_made_without_our_tables_is_not_migrated(world: World):
    connection = await world.connect()
    await connection.execute("CREATE SCHEMA theirs; CREATE TABLE theirs.jobs (id int)")
    async with database(world.database_url, "theirs") as unmigrated:
        assert not await is_migrated(unmigrated)


@pytest.mark.parametrize("migrate", [False, True])
async def test_an_older_replica_starts_on_a_newer_schema(world: World, migrate: bool):
    """A replica that restarts in the middle of a rolling update meets the migrations of the next version."""
    connection = await world.connect()
    await connection.execute("UPDATE alembic_version SET version_num = '9999'")
    queue = await world.replica(migrate=migrate)
    await queue.enqueue()
    assert await connection.fetchval("SELECT version_num FROM alembic_version") == "9999"


async def test_a_role_that_owns_the_schema_needs_no_right_to_make_schemas(world: World):
    connection = await world.connect()
    role = f"leaseq_narrow_{os.getpid()}"
    await connection.execute(f"DROP ROLE IF EXISTS {role}")
    await connection.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'narrow'")
    try:
        await connection.execute(f"CREATE SCHEMA narrow AUTHORIZATION {role}")
        async with database(world.database_url, "narrow") as narrow:
            # As `ALTER ROLE … SET role` would: the connections of this database act as the narrow role.
            name = await connection.fetchval("SELECT current_database()")
            await connection.execute(f"GRANT {role} TO CURRENT_USER")
            await connection.execute(f"ALTER ROLE CURRENT_USER IN DATABASE {name} SET role = '{role}'")
            await upgrade(narrow)
            assert await is_migrated(narrow)
            async with narrow.reading.connect() as link:
                owner = await link.scalar(
                    text(
                        "SELECT tableowner FROM pg_tables WHERE schemaname = 'narrow' AND tablename = 'jobs'"
                    )
                )
        assert owner == role
    finally:
        fresh = await asyncpg.connect(world.database_url, server_settings={"role": "none"})
        try:
            name = await fresh.fetchval("SELECT current_database()")
            await fresh.execute(f"ALTER ROLE CURRENT_USER IN DATABASE {name} RESET role")
            await fresh.execute(f"DROP OWNED BY {role} CASCADE")
            await fresh.execute(f"DROP ROLE {role}")
        finally:
            await fresh.close()
