"""The ways back for dead letters: into another queue, and home for their copies.

All methods answer after COMMIT, and raise UnavailableError when the database is away.
"""

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

from uuid_utils.compat import uuid7

from app.queue.lifecycle import State
from app.store.database import STRANGERS_LOCK_SECONDS, Database, Transaction
from app.store.jobs import BEGINNING, Jobs, Line, Moved, Place
from app.store.once import reclaim

_FIRST = UUID(int=0)


class Standing(NamedTuple):
    """Where a copy stands in its queue's line."""

    priority: int
    since: datetime
    id: UUID


AT_THE_HEAD = Standing(0, BEGINNING, _FIRST)


class Copy(NamedTuple):
    """A dead letter's copy that waits, and where it comes from."""

    standing: Standing
    queue: str
    job_id: UUID


class New(NamedTuple):
    """A job that was made of a copy whose original is gone."""

    job_id: UUID
    place: Place


class TakenHome(NamedTuple):
    """What became of copies: the originals that were retried, the new jobs, and the copies that were removed."""

    retried: Sequence[Moved]
    new: Sequence[New]
    removed: Sequence[Moved]


class StoredDeadLetters:
    """The statements. A copy is found where it is ready; what is delayed is so for a reason, and what is active too."""

    def __init__(self, database: Database, jobs: Jobs) -> None:
        self._database = database
        self._jobs = jobs

    async def copies(
        self, queue: str, error_group: str | None, after: Standing, until: datetime, looked_at: int
    ) -> tuple[list[Copy], Standing | None]:
        """Look at so many jobs that are ready in the queue since no later than `until`, behind `after`.

        Returns the copies among them, and behind which job it goes on; None at the end.
        """
        of_group = "" if error_group is None else "AND note.error_group = $7::text"
        group = [] if error_group is None else [error_group]
        values = [queue, after.priority, after.since, after.id, until, looked_at, *group]
        rows = await self._database.fetch("copies", *values, of_group=of_group)
        last = _standing(rows[-1]) if rows and rows[-1]["is_last"] else None
        return [_copy(row) for row in rows if row["wanted"]], last

    async def take_home(self, copies: Sequence[Copy]) -> TakenHome:
        """Retry the originals of copies, or where those are gone make new jobs, and remove the copies.

        One whose original has not failed, or whose unique key is taken, is left where it is.
        """

        async def work(transaction: Transaction) -> TakenHome:
            rows = await transaction.fetch("lock_copies", sorted(copy.standing.id for copy in copies))
            locked = {row["id"] for row in rows}
            mine = [copy for copy in copies if copy.standing.id in locked]
            originals = list(dict.fromkeys(copy.job_id for copy in mine))
            if not originals:
                return TakenHome([], [], [])
            retried, _ = await self._jobs.retry_within(transaction, originals, [State.FAILED])
            home = {moved.job_id for moved in retried}
            left = [job_id for job_id in originals if job_id not in home]
            known = {row["id"] for row in await transaction.fetch("stored", left)} if left else set()
            done = [copy for copy in mine if copy.job_id in home or copy.job_id not in known]
            if not done:
                return TakenHome(retried, [], [])
            rows = await transaction.fetch(
                "take_home",
                self._jobs.clock(),
                [copy.standing.id for copy in done],
                [None if copy.job_id in home else uuid7() for copy in done],
                [copy.queue for copy in done],
            )
            return TakenHome(
                retried, [_new(row) for row in rows if row["new_id"] is not None], _removed(rows)
            )

        return await self._database.transact(work, lock_seconds=STRANGERS_LOCK_SECONDS)

    async def move_copies(self, copies: Sequence[Copy], to: str) -> list[Moved]:
        """Let copies that wait do so in another queue; return those moved."""
        ids = sorted(copy.standing.id for copy in copies)
        rows = await self._database.transact(
            lambda transaction: transaction.fetch("move_ready", ids, to), lock_seconds=STRANGERS_LOCK_SECONDS
        )
        return [
            Moved(
                row["id"],
                to,
                row["type"],
                State.READY,
                Place(Line(to, row["type"]), row["priority"], row["since"]),
            )
            for row in rows
        ]

    async def retry_failed(self, job_ids: Sequence[UUID], queue: str, to: str | None) -> list[Moved]:
        """Retry failed jobs of a queue, there or in another one; return those retried.

        They take their unique keys along; one whose key another job has stays where it is.
        """
        if to is None:
            moved, _ = await self._jobs.retry(job_ids, [State.FAILED])
            return moved
        return await self._move_failed(job_ids, queue, to)

    async def _move_failed(self, job_ids: Sequence[UUID], queue: str, to: str) -> list[Moved]:
        async def work(transaction: Transaction) -> list[Moved]:
            rows = await transaction.fetch("move_dead", sorted(job_ids), queue, to)
            keys = {row["id"]: row["unique_key"] for row in rows}
            ids = [job_id for job_id in job_ids if job_id in keys]
            if not ids:
                return []
            taken = await reclaim(transaction, self._jobs.clock(), ids, [State.FAILED])
            if taken:
                await transaction.fetch("move_dead", sorted(taken), to, queue)
            free = [job_id for job_id in ids if job_id not in taken]
            if not free:
                return []
            named = [keys[job_id] for job_id in free if keys[job_id] is not None]
            if named:
                await transaction.fetch("let_go", queue, named, free)
            moved, _ = await self._jobs.retry_within(transaction, free, [State.FAILED])
            return moved

        return await self._database.transact(work, lock_seconds=STRANGERS_LOCK_SECONDS)


def _copy(row: Any) -> Copy:
    source = json.loads(row["source"])
    return Copy(_standing(row), source["queue"], UUID(source["job_id"]))


def _standing(row: Any) -> Standing:
    return Standing(row["priority"], row["since"], row["id"])


def _new(row: Any) -> New:
    return New(row["new_id"], Place(Line(row["home"], row["type"]), row["priority"], row["since"]))


def _removed(rows: Sequence[Any]) -> list[Moved]:
    return [Moved(row["id"], row["queue"], row["type"], State.READY) for row in rows]
