"""Holding rows and tables, so that races happen in a chosen order."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

from app.engine.cursors import Cursors
from app.store.database import SQL_DIRECTORY
from app.store.jobs import Claim, Jobs, Line, Slot
from tests.conftest import Replica, World


async def claim(
    jobs: Jobs, count: int = 1, queues: Sequence[str] = ("q",), types: Sequence[str] | None = None
) -> Claim:
    """Take up to `count` jobs for worker w."""
    lines = [Line(queue, type_) for queue in queues for type_ in types or (None,)]
    return await jobs.lease(Cursors().ahead(lines), [Slot(uuid4(), None, "w") for _ in range(count)])


@asynccontextmanager
async def holding(
    world: World, statement: str, *values: object
) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    """Run `statement` in a transaction of the test's own, rolled back at the end of the block."""
    connection = await world.connect()
    transaction = connection.transaction()
    await transaction.start()
    await connection.execute(statement, *values)
    try:
        yield connection
    finally:
        await transaction.rollback()


async def in_turn(world: World, statement: str, job_id: str, *calls: Coroutine[Any, Any, Any]) -> list[Any]:
    """Let `calls` queue up, in order, for the row that `statement` locks; return their results."""
    tasks = []
    async with holding(world, statement, job_id):
        for call in calls:
            tasks.append(asyncio.create_task(call))
            await world.blocked(len(tasks))
    return await asyncio.gather(*tasks)


_NAMES = {path.read_text().splitlines()[0]: path.stem for path in SQL_DIRECTORY.glob("*.sql")}


@asynccontextmanager
async def logged(queue: Replica) -> AsyncIterator[list[str]]:
    """Yield what the verbs' only connection runs, in order: a statement of ours by its name, any other by its text.

    Wants `db_pool_size=1`.
    """
    names: list[str] = []

    def note(record: Any) -> None:
        names.append(_NAMES.get(record.query.splitlines()[0], record.query))

    pool = queue.machine.database.hot
    async with pool.acquire() as connection:
        connection.add_query_logger(note)
    # The logger is called a turn of the loop after the answer.
    await asyncio.sleep(0)
    names.clear()
    try:
        yield names
    finally:
        await asyncio.sleep(0)


async def idle_replica(world: World, **overrides: Any) -> Replica:
    """Start a replica whose first round of maintenance is over: from now on only the test makes one."""
    replica = await world.replica(**overrides)
    await replica.first_round()
    return replica


@pytest.fixture
async def queue(world: World) -> Replica:
    """One replica of leaseq, idle."""
    return await idle_replica(world)
