"""How a job stands, with all that may keep it from running: one statement, one snapshot."""

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from app.queue.explain import Facts
from app.queue.lifecycle import State
from app.store.database import Database
from app.store.jobs import Stretch, columns
from app.store.workers import POLLED_SECONDS, name_of

AHEAD_MAX = 1000
"""How many jobs before another are counted."""


class Standing:
    """Reads facts. `clock` moves the database's clock in tests: an instant instead of now, or None."""

    def __init__(self, database: Database, clock: Callable[[], datetime | None]) -> None:
        self._database = database
        self._clock = clock

    async def of(self, job_id: UUID, stretches: Sequence[Stretch]) -> Facts | None:
        """Return what is known of a job; `stretches` are those in which jobs of its queue stand ready.

        None when there is no such job. Raises UnavailableError.
        """
        rows = await self._database.fetch(
            "explain", self._clock(), job_id, *columns(stretches), AHEAD_MAX, POLLED_SECONDS
        )
        return _facts(rows[0]) if rows else None


def _facts(row: Any) -> Facts:
    retries_left = 0
    if row["max_retries"] is not None:
        retries_left = max(row["max_retries"] - (row["attempt"] - row["budget_start"]) + 1, 0)
    return Facts(
        now=row["now"],
        state=State(row["state"]),
        queue=row["queue"],
        type=row["type"],
        priority=row["priority"],
        attempt=row["attempt"],
        retries_left=retries_left,
        error_type=row["error_type"] or row["noted_error_type"],
        since=row["since"],
        run_at=row["run_at"],
        expires_at=row["expires_at"],
        ahead=row["ahead"],
        ahead_max=AHEAD_MAX,
        paused=row["paused"],
        workers=row["workers"],
        willing=row["willing"],
        last_worker=None if row["last_worker"] is None else name_of(row["last_worker"]),
        last_seen_at=row["last_seen_at"],
        worker=row["worker"],
        leased_at=row["leased_at"],
        heartbeat_at=row["heartbeat_at"],
        lease_expires_at=row["lease_expires_at"],
        deadline_at=row["deadline_at"],
        cancel_requested=row["cancel_requested"],
        reason=row["reason"],
        finished_at=row["finished_at"],
        maintained_seconds_ago=row["maintained_seconds_ago"],
    )
