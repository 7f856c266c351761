"""The days of `history` and `attempts`: made ahead, dropped whole when their retention has ended.

Dropping a day costs the same whatever it holds; deleting its rows would not.
"""

from datetime import UTC, date, datetime, time, timedelta

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from app.queue.lifecycle import State
from app.store.database import Database, Transaction, unavailable_when_away
from app.store.schema import PARTITIONED, history

DAYS_AHEAD = 14
LOCK_NOT_AVAILABLE = "55P03"
LOCK_TIMEOUT = "200ms"
"""A partition waits this long for its table, and no longer: the verbs would queue up behind it."""

_LISTED = """
SELECT child.relname
  FROM pg_inherits AS i
  JOIN pg_class AS child ON child.oid = i.inhrelid
 WHERE i.inhparent = ($1 || '.' || $2)::regclass
"""

_DAYS = """
SELECT c.relname
  FROM pg_class AS c
  JOIN pg_namespace AS n ON n.oid = c.relnamespace
 WHERE n.nspname = $1 AND c.relkind = 'r' AND c.relname ~ ('^' || $2 || '$')
"""
_ATTACHED = "SELECT relispartition FROM pg_class WHERE oid = to_regclass(:day)"
_ONE_AT_A_TIME = "SELECT pg_advisory_xact_lock(hashtextextended('leaseq partitions ' || :schema, 0))"


class Partitions:
    """Makes and drops the days of the partitioned tables. Any number of processes may do so at once."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._quoted = '"' + database.schema.replace('"', '""') + '"'

    async def ensure(self, now: datetime) -> int:
        """Make the days from yesterday to two weeks ahead that are missing; return how many were."""
        days = [now.date() + timedelta(days=ahead) for ahead in range(-1, DAYS_AHEAD + 1)]

        async def make(transaction: Transaction) -> int:
            await self._alone(transaction)
            made = 0
            for table in PARTITIONED:
                present = set(await self._present(transaction, table.name))
                for day in days:
                    if _partition(table.name, day) not in present:
                        await self._make(transaction, table.name, day)
                        made += 1
            return made

        if await self._complete(days):
            return 0
        return await self._database.transact(make)

    async def drop_before(self, now: datetime, retention_seconds: float, table_name: str) -> int:
        """Drop the days of one table that ended longer ago than the retention; return how many.

        A day is taken off its table first, which needs a moment's lock: a busy one stays for the next time. Then
        nobody else can reach it, and what it held is counted and taken off the counts as it is dropped. A process
        that dies in between leaves a day by itself, which the next one drops.
        """
        oldest = _partition(table_name, (now - timedelta(seconds=retention_seconds)).date())
        past = [name for name in await self._tables(table_name) if name < oldest]
        dropped = 0
        if past:
            async with self._database.patient() as connection:
                for name in past:
                    dropped += await self._drop(connection, name, table_name)
        return dropped

    async def _drop(self, connection: AsyncConnection, name: str, table_name: str) -> bool:
        day = f"{self._quoted}.{name}"
        with unavailable_when_away():
            try:
                await self._exclusively(connection)
                await connection.execute(text(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'"))
                attached = await connection.scalar(text(_ATTACHED), {"day": day})
                if attached is None:
                    return False  # another process was faster
                if attached:
                    await connection.execute(
                        text(f"ALTER TABLE {self._quoted}.{table_name} DETACH PARTITION {day}")
                    )
                    await connection.commit()
                    await self._exclusively(connection)
                    if await connection.scalar(text(_ATTACHED), {"day": day}) is None:
                        return False
                if table_name == history.name:
                    await connection.execute(
                        text(
                            f"INSERT INTO {self._quoted}.deltas (queue, {State.COMPLETED})"
                            f" SELECT queue, -count(*) FROM {day} GROUP BY queue"
                        )
                    )
                await connection.execute(text(f"DROP TABLE {day}"))
                await connection.commit()
            except DBAPIError as error:
                await connection.rollback()
                if getattr(error.orig, "sqlstate", None) != LOCK_NOT_AVAILABLE:
                    raise
                return False
        return True

    async def _exclusively(self, connection: AsyncConnection) -> None:
        await connection.execute(text(_ONE_AT_A_TIME), {"schema": self._database.schema})

    async def _complete(self, days: list[date]) -> bool:
        for table in PARTITIONED:
            present = set(await self._listed(table.name))
            if any(_partition(table.name, day) not in present for day in days):
                return False
        return True

    async def _tables(self, table_name: str) -> list[str]:
        """Return the days of a table, those too that have been taken off it and not been dropped yet."""

        async def look(transaction: Transaction) -> list[str]:
            rows = await transaction.query(_DAYS, self._database.schema, f"{table_name}_\\d{{8}}")
            return [row["relname"] for row in rows]

        return sorted(await self._database.transact(look))

    async def _listed(self, table_name: str) -> list[str]:
        async def look(transaction: Transaction) -> list[str]:
            return await self._present(transaction, table_name)

        return sorted(await self._database.transact(look))

    async def _present(self, transaction: Transaction, table_name: str) -> list[str]:
        return [row["relname"] for row in await transaction.query(_LISTED, self._quoted, table_name)]

    async def _alone(self, transaction: Transaction) -> None:
        await transaction.query(_ONE_AT_A_TIME.replace(":schema", "$1"), self._database.schema)
        await transaction.query(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'")

    async def _make(self, transaction: Transaction, table_name: str, day: date) -> None:
        # Made beside its table and attached: CREATE … PARTITION OF would lock all readers and writers out. The
        # CHECK spares ATTACH the look at every row.
        key = "finished_at" if table_name == history.name else "ended_at"
        begin, end = (datetime.combine(day + timedelta(days=n), time(), UTC).isoformat() for n in (0, 1))
        name = f"{self._quoted}.{_partition(table_name, day)}"
        parent = f"{self._quoted}.{table_name}"
        await transaction.query(
            f"CREATE TABLE {name} (LIKE {parent} INCLUDING ALL,"
            f" CONSTRAINT day CHECK ({key} >= '{begin}' AND {key} < '{end}'))"
        )
        await transaction.query(
            f"ALTER TABLE {parent} ATTACH PARTITION {name} FOR VALUES FROM ('{begin}') TO ('{end}')"
        )
        await transaction.query(f"ALTER TABLE {name} DROP CONSTRAINT day")


def _partition(table_name: str, day: date) -> str:
    return f"{table_name}_{day:%Y%m%d}"
