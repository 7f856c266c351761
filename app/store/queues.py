"""Queues as operators make them: their policies, and the numbers that tell every process of a change.

All methods answer after COMMIT, and raise UnavailableError when the database is away.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Generic, NamedTuple, TypeVar
from uuid import UUID

import msgspec
import structlog
from sqlalchemy import BigInteger, ColumnElement, Text, cast, func, or_, select, union_all

from app.queue.errors import QueueNotEmptyError
from app.queue.lifecycle import State, summed_up
from app.queue.model import JobDefaults, Queue, QueuePolicy
from app.store.database import STRANGERS_LOCK_SECONDS, Database, Transaction, rows_of
from app.store.schema import changes, counts, deltas, held, queues, ready, scheduled

TOPIC = "queues"
"""Under this name `changes` counts the changes of policies."""

_MAPPINGS = frozenset({"backoff", "types"})
BY_ID = (scheduled.name, held.name)
"""The places of waiting jobs that have no index by queue."""

Position = TypeVar("Position")

# The state of a job by its place.
_STATES = {
    ready.name: "'ready'",
    held.name: "'held'",
    scheduled.name: "CASE WHEN is_retry THEN 'retry' ELSE 'scheduled' END",
}

_DECODER = msgspec.json.Decoder(QueuePolicy)

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Put:
    """What a change of a queue made of it."""

    queue: Queue
    created: bool


@dataclass(frozen=True, slots=True)
class QueueSeen:
    """A queue that has a policy or jobs, and how many jobs it has in each state."""

    queue: Queue
    counts: Mapping[State, int]


class PurgeStep(NamedTuple, Generic[Position]):
    """What a step of a purge did."""

    changed: int
    missed: int
    """Jobs that it saw, but that others have moved before it could have them."""
    next: Position | None
    """Where the next step begins; None at the end."""


class StoredQueues:
    """The table `queues`. `clock` moves the database's clock in tests: an instant instead of now, or None."""

    def __init__(self, database: Database, clock: Callable[[], datetime | None] = lambda: None) -> None:
        self._database = database
        self._clock = clock

    async def change_numbers(self) -> dict[str, int]:
        """Return the number of each topic that has ever been changed."""
        rows = await rows_of(self._database.looking, select(changes.c.topic, changes.c.number))
        return {row["topic"]: row["number"] for row in rows}

    async def all(self) -> list[Queue]:
        """Return all that have a policy or are paused."""
        policy = cast(queues.c.policy, Text).label("policy")
        rows = await rows_of(self._database.looking, select(queues.c.name, policy, queues.c.paused))
        return [_queue(row["name"], row["policy"], row["paused"]) for row in rows]

    async def put(self, name: str, policy: QueuePolicy, paused: bool | None) -> Put:
        """Give a queue a policy, in the place of the one before; None leaves it paused or not."""

        async def work(transaction: Transaction) -> Put:
            [row] = await transaction.fetch("put_queue", self._clock(), name, policy_text(policy), paused)
            await transaction.fetch("changed", TOPIC)
            return Put(Queue(name, policy, row["paused"]), row["created"])

        return await self._database.transact(work)

    async def pause(self, name: str, *, paused: bool) -> Queue:
        """Pause a queue or let it go on; make it where there is none."""

        async def work(transaction: Transaction) -> Queue:
            [row] = await transaction.fetch("pause_queue", self._clock(), name, paused)
            await transaction.fetch("changed", TOPIC)
            return _queue(name, row["policy"], paused)

        return await self._database.transact(work)

    async def delete(self, name: str) -> bool:
        """Forget a queue's policy; return whether it had one. Raises QueueNotEmptyError when jobs of it are kept."""

        async def work(transaction: Transaction) -> bool:
            found = await transaction.fetch("lock_queue", name)
            [row] = await transaction.fetch("count_queue", name)
            kept = {State(state): count for state, count in row.items() if count}
            if kept:
                raise QueueNotEmptyError(summed_up(kept))
            if found:
                await transaction.fetch("delete_queue", name)
                await transaction.fetch("changed", TOPIC)
            return bool(found)

        return await self._database.transact(work)

    async def purge_ready(
        self, name: str, priority: int, since: datetime, until: datetime, limit: int
    ) -> PurgeStep[datetime]:
        """Remove up to `limit` jobs that became ready in this time, the first ones."""

        async def work(transaction: Transaction) -> PurgeStep[datetime]:
            rows = await transaction.fetch("next_ready", name, priority, since, until, limit)
            return await _purge(transaction, name, ready.name, rows, full=rows[0]["seen"] == limit)

        return await self._database.transact(work, lock_seconds=STRANGERS_LOCK_SECONDS)

    async def purge_by_id(
        self, name: str, place: str, after: UUID, until: UUID, limit: int
    ) -> PurgeStep[UUID]:
        """Look at the next `limit` jobs that are scheduled or held, by their ids, and remove those of the queue."""

        async def work(transaction: Transaction) -> PurgeStep[UUID]:
            rows = await transaction.fetch("next_by_id", name, after, until, limit, place=place)
            return await _purge(transaction, name, place, rows, full=rows[0]["seen"] == limit)

        return await self._database.transact(work, lock_seconds=STRANGERS_LOCK_SECONDS)

    async def last_id(self, place: str) -> UUID | None:
        """Return the greatest id of those that are scheduled or held now."""
        rows = await self._database.fetch("last_id", place=place)
        return rows[0]["id"] if rows else None

    async def page(self, limit: int, after: str) -> tuple[list[QueueSeen], str | None]:
        """Return up to `limit` queues by their names, and the name after which the next page begins."""
        seen = await self._seen(limit + 1, lambda name: name > after)
        more = len(seen) > limit
        return seen[:limit], seen[limit - 1].queue.name if more else None

    async def one(self, name: str) -> QueueSeen | None:
        """Return a queue; None when it has neither a policy nor jobs."""
        seen = await self._seen(1, lambda column: column == name)
        return seen[0] if seen else None

    async def _seen(
        self, limit: int, wanted: Callable[[ColumnElement[str]], ColumnElement[bool]]
    ) -> list[QueueSeen]:
        both = union_all(
            *(
                select(table.c.queue, *(table.c[state.value] for state in State)).where(wanted(table.c.queue))
                for table in (counts, deltas)
            )
        ).subquery()
        sums = [
            cast(func.coalesce(func.sum(both.c[state.value]), 0), BigInteger).label(state.value)
            for state in State
        ]
        counted = (
            select(both.c.queue, *sums)
            .group_by(both.c.queue)
            .having(or_(*(func.sum(both.c[state.value]) > 0 for state in State)))
            .subquery()
        )
        made = (
            select(queues.c.name, cast(queues.c.policy, Text).label("policy"), queues.c.paused)
            .where(wanted(queues.c.name))
            .subquery()
        )
        name = func.coalesce(made.c.name, counted.c.queue).label("name")
        rows = await rows_of(
            self._database.reading,
            select(name, made.c.policy, made.c.paused, *(counted.c[state.value] for state in State))
            .select_from(made.join(counted, counted.c.queue == made.c.name, full=True))
            .order_by(name)
            .limit(limit),
        )
        return [
            QueueSeen(
                _queue(row["name"], row["policy"] or "{}", row["paused"] or False),
                {state: row[state.value] or 0 for state in State},
            )
            for row in rows
        ]


async def _purge(
    transaction: Transaction, name: str, place: str, rows: Sequence[Any], *, full: bool
) -> PurgeStep[Any]:
    wanted = [row["id"] for row in rows if row["id"] is not None]
    mine: list[UUID] = []
    if wanted:
        await transaction.fetch("lock_keys_of", name, wanted)
        locked = await transaction.fetch("lock_place", name, wanted, place=place)
        mine = [row["id"] for row in locked]
    if mine:
        await transaction.fetch("purge", name, mine, place=place, state=_STATES[place])
    return PurgeStep(len(mine), len(wanted) - len(mine), rows[0]["next"] if full else None)


async def publish_defaults(
    database: Database, defaults: JobDefaults, *, max_payload_bytes: int, create_queues: bool
) -> None:
    """Tell the function enqueue() what only the environment knows. Raises UnavailableError."""
    limits = {"max_payload_bytes": max_payload_bytes, "create_queues": create_queues}
    value = msgspec.json.encode(_named(asdict(defaults)) | limits).decode()
    await database.fetch("publish_defaults", value)


def policy_text(policy: QueuePolicy) -> str:
    """Return a policy as it is stored: what it names, as JSON, under the names of the HTTP API."""
    text: str = msgspec.json.encode(_named(asdict(policy))).decode()
    return text


def _named(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what is not named, so that the database's own functions need not look for nulls."""
    kept = {
        name: _named(value) if isinstance(value, Mapping) else value
        for name, value in fields.items()
        if value is not None
    }
    return {name: value for name, value in kept.items() if value != {} or name not in _MAPPINGS}


def _queue(name: str, policy: str, paused: bool) -> Queue:
    try:
        return Queue(name, _DECODER.decode(policy), paused)
    except msgspec.ValidationError as error:
        # Somebody's hand, or a later version: no reason to serve nobody.
        log.warning("policy_not_understood", queue=name, error=str(error))
        return Queue(name, QueuePolicy(), paused)
