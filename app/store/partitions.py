"""The days of `history` and `attempts`: made ahead, dropped whole when their retention has ended.

Dropping a day costs the same whatever it holds; deleting its rows would not.
"""

from datetime import UTC, date, datetime, time, timedelta
from functools import partial

import asyncpg

from app.queue.errors import UnavailableError
from app.queue.lifecycle import State
from app.store.database import Database, Transaction
from app.store.schema import PARTITIONED, history

DAYS_AHEAD = 14
LOCK_TIMEOUT = "200ms"
"""A partition waits this long for its table, and no longer: the verbs would queue up behind it."""

_LISTED = """
SELECT child.relname
  FROM pg_inherits AS i
  JOIN pg_class AS child ON child.oid = i.inhrelid
 WHERE i.inhparent = ($1 || '.' || $2)::regclass
"""


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

        What the dropped days of `history` held is taken off the counts in the same transaction. A day whose table
        is busy stays for the next time.
        """
        oldest = (now - timedelta(seconds=retention_seconds)).date()
        dropped = 0
        for name in await self._listed(table_name):
            if name >= _partition(table_name, oldest):
                continue
            try:
                await self._database.transact(partial(self._drop, name, table_name))
            except asyncpg.UndefinedTableError:
                continue  # another process was faster
            except UnavailableError as error:
                if not isinstance(error.__cause__, asyncpg.LockNotAvailableError):
                    raise
                continue
            dropped += 1
        return dropped

    async def _complete(self, days: list[date]) -> bool:
        for table in PARTITIONED:
            present = set(await self._listed(table.name))
            if any(_partition(table.name, day) not in present for day in days):
                return False
        return True

    async def _listed(self, table_name: str) -> list[str]:
        async def look(transaction: Transaction) -> list[str]:
            return await self._present(transaction, table_name)

        return sorted(await self._database.transact(look))

    async def _present(self, transaction: Transaction, table_name: str) -> list[str]:
        return [row["relname"] for row in await transaction.query(_LISTED, self._quoted, table_name)]

    async def _alone(self, transaction: Transaction) -> None:
        await transaction.query(
            "SELECT pg_advisory_xact_lock(hashtextextended('leaseq partitions ' || $1, 0))",
            self._database.schema,
        )
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

    async def _drop(self, name: str, table_name: str, transaction: Transaction) -> None:
        if table_name == history.name:
            await transaction.query(
                f"INSERT INTO {self._quoted}.deltas (queue, {State.COMPLETED})"
                f" SELECT queue, -count(*) FROM {self._quoted}.{name} GROUP BY queue"
            )
        await transaction.query(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'")
        await transaction.query(f"DROP TABLE {self._quoted}.{name}")


def _partition(table_name: str, day: date) -> str:
    return f"{table_name}_{day:%Y%m%d}"
