"""The workers that have been heard of, by their names, and what operators want of them.

Leases without a worker's name are kept under what they ask for, so that it is known that somebody asks; lists leave
them out. All methods answer after COMMIT, and raise UnavailableError when the database is away.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Text, and_, cast, func, literal, or_, select
from sqlalchemy.dialects.postgresql import TIMESTAMP

from app.queue.model import Directive, Worker
from app.store.database import Database, Transaction, rows_of
from app.store.schema import leases, workers

TOPIC = "workers"
"""Under this name `changes` counts the changes of directives."""

POLLED_SECONDS = 60.0
"""Longer than any lease waits: who was not heard of since asks no more."""

POLLERS_MAX = 100
FORGET_BATCH = 1000

_NAMELESS = "\x01"
"""No worker's name begins with it."""


class Sighting(NamedTuple):
    """A worker that was heard of, and what its leases ask for; no queues where only heartbeats came."""

    name: str | None
    queues: tuple[str, ...] = ()
    types: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Poller:
    """A worker that asks for jobs; `name` is None when it does not tell."""

    name: str | None
    directive: Directive
    last_seen_at: datetime


class StoredWorkers:
    """The table `workers`. `clock` moves the database's clock in tests: an instant instead of now, or None."""

    def __init__(self, database: Database, clock: Callable[[], datetime | None] = lambda: None) -> None:
        self._database = database
        self._clock = clock

    async def saw(self, sightings: Sequence[Sighting]) -> int:
        """Note who has been heard of; return how many of them are new."""
        # Each once: those without a name are the same when they ask for the same, in whatever order. And all in one
        # order, so that processes that have heard of the same ones do not wait for each other in a circle.
        by_name = sorted({_key(sighting): sighting for sighting in sightings}.items())
        rows = await self._database.fetch(
            "saw_workers",
            self._clock(),
            [name for name, _ in by_name],
            [json.dumps(sighting.queues) for _, sighting in by_name],
            [None if sighting.types is None else json.dumps(sighting.types) for _, sighting in by_name],
        )
        return sum(row["is_new"] for row in rows)

    async def forget(self, unseen_seconds: float, most: int) -> int:
        """Forget who was not heard of for so long, and whoever is one too many; return how many, in a bounded step."""

        async def work(transaction: Transaction) -> int:
            now = self._clock() or (await transaction.fetch("now"))[0]["now"]
            before = now - timedelta(seconds=unseen_seconds)
            [row] = await transaction.fetch("forget_workers", before, most, FORGET_BATCH)
            if row["directed"]:
                await transaction.fetch("changed", TOPIC)
            forgotten: int = row["forgotten"]
            return forgotten

        return await self._database.transact(work)

    async def direct(self, name: str, directive: Directive) -> bool:
        """Tell a worker what to do; False when there is none of this name."""

        async def work(transaction: Transaction) -> bool:
            found = await transaction.fetch("direct", name, directive)
            if found:
                await transaction.fetch("changed", TOPIC)
            return bool(found)

        return await self._database.transact(work)

    async def directives(self) -> dict[str, Directive]:
        """Return what workers are told, but for those that are to go on."""
        told = select(workers.c.name, workers.c.directive).where(
            workers.c.directive != Directive.CONTINUE.value
        )
        rows = await rows_of(self._database.looking, told)
        return {row["name"]: Directive(row["directive"]) for row in rows}

    async def page(self, limit: int, after: str) -> tuple[list[Worker], str | None]:
        """Return up to `limit` workers by their names, and the name after which the next page begins."""
        found = await self._workers(limit + 1, workers.c.name > after)
        more = len(found) > limit
        return found[:limit], found[limit - 1].name if more else None

    async def one(self, name: str) -> Worker | None:
        """Return the worker of this name."""
        found = await self._workers(1, workers.c.name == name)
        return found[0] if found else None

    async def polling(self, queue: str, type_: str) -> list[Poller]:
        """Return whose leases ask for such jobs, the last heard of first: at most POLLERS_MAX.

        Somebody who was heard of in the last POLLED_SECONDS, be it that all his hands are full at this moment.
        """
        asks = and_(
            workers.c.last_seen_at > self._now() - timedelta(seconds=POLLED_SECONDS),
            workers.c.queues.op("?")(queue),
            or_(workers.c.types.is_(None), workers.c.types.op("?")(type_)),
        )
        rows = await rows_of(
            self._database.looking,
            select(workers.c.name, workers.c.directive, workers.c.last_seen_at)
            .where(asks)
            .order_by(workers.c.last_seen_at.desc(), workers.c.name)
            .limit(POLLERS_MAX),
        )
        return [
            Poller(
                name_of(row["name"]),
                Directive(row["directive"]),
                row["last_seen_at"],
            )
            for row in rows
        ]

    async def _workers(self, limit: int, wanted: ColumnElement[bool]) -> list[Worker]:
        page = (
            select(
                workers.c.name,
                cast(workers.c.queues, Text).label("queues"),
                cast(workers.c.types, Text).label("types"),
                workers.c.directive,
                workers.c.first_seen_at,
                workers.c.last_seen_at,
            )
            .where(wanted, ~workers.c.name.startswith(_NAMELESS))
            .order_by(workers.c.name)
            .limit(limit)
            .cte("page")
        )
        held = (
            select(leases.c.worker, func.count().label("active"))
            .where(leases.c.worker.in_(select(page.c.name)))
            .group_by(leases.c.worker)
            .subquery()
        )
        rows = await rows_of(
            self._database.reading,
            select(page, func.coalesce(held.c.active, 0).label("active"))
            .select_from(page.outerjoin(held, held.c.worker == page.c.name))
            .order_by(page.c.name),
        )
        return [
            Worker(
                name=row["name"],
                queues=tuple(json.loads(row["queues"])),
                types=None if row["types"] is None else tuple(json.loads(row["types"])),
                active=row["active"],
                first_seen_at=row["first_seen_at"],
                last_seen_at=row["last_seen_at"],
                directive=Directive(row["directive"]),
            )
            for row in rows
        ]

    def _now(self) -> ColumnElement[Any]:
        moved = self._clock()
        return func.now() if moved is None else literal(moved, TIMESTAMP(timezone=True))


def name_of(key: str) -> str | None:
    """Return the name of the worker that is kept under `key`; None when it does not tell."""
    return None if key.startswith(_NAMELESS) else key


def _key(sighting: Sighting) -> str:
    if sighting.name is not None:
        return sighting.name
    asked = json.dumps([sorted(sighting.queues), sighting.types and sorted(sighting.types)])
    return _NAMELESS + hashlib.blake2b(asked.encode(), digest_size=16).hexdigest()
