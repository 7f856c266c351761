"""What is kept of jobs that have ended, and for how long: row by row where queues have retentions of their own.

All methods answer after COMMIT, and raise UnavailableError when the database is away.
"""

from collections.abc import Mapping
from datetime import UTC, datetime, time, timedelta
from typing import NamedTuple
from uuid import UUID

from app.store.database import Database

_RANDOM_BITS = 80
"""The rest of a UUIDv7 after its milliseconds."""


class Swept(NamedTuple):
    """What a step over completed jobs did."""

    removed: int
    next: dict[str, UUID]
    """After which id the next step begins, of each queue that it has not come to the end of."""


class Retained:
    """Removes what is past its queue's retention."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def queues(self, after: str, limit: int) -> list[str]:
        """Return the next queues by name that keep jobs that have ended."""
        return [row["queue"] for row in await self._database.fetch("ended_queues", after, limit)]

    async def remove_dead(self, before: Mapping[str, datetime], limit: int) -> int:
        """Remove dead jobs that ended before the instant given for their queue, up to `limit` of each; return how many."""
        rows = await self._database.fetch("retain_dead_of", list(before), list(before.values()), limit)
        removed: int = rows[0]["count"]
        return removed

    async def remove_completed(
        self, before: Mapping[str, datetime], after: Mapping[str, UUID], limit: int
    ) -> Swept:
        """Look at up to `limit` completed jobs of each queue after an id; remove those that ended before its instant."""
        rows = await self._database.fetch(
            "retain_completed_of",
            list(before),
            list(before.values()),
            [after[name] for name in before],
            [_last_id(instant) for instant in before.values()],
            [_day_end(instant) for instant in before.values()],
            limit,
        )
        removed = rows[0]["removed"] if rows else 0
        return Swept(removed, {row["name"]: row["last"] for row in rows if row["seen"] == limit})


def _last_id(instant: datetime) -> UUID:
    """Return the greatest UUIDv7 of an instant. A job whose id comes from a clock that was ahead goes that much later."""
    milliseconds = int(instant.timestamp() * 1000)
    return UUID(int=(milliseconds + 1 << _RANDOM_BITS) - 1)


def _day_end(instant: datetime) -> datetime:
    return datetime.combine(instant.astimezone(UTC).date() + timedelta(days=1), time(), UTC)
