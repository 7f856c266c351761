"""Looking without touching: one job, lists, attempts, counts, ages, health. SQLAlchemy Core on the reading pool.

A read is one statement, so its snapshot shows every job in exactly one place. All methods raise UnavailableError
when the database is away or the read takes longer than READ_TIMEOUT_SECONDS.
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    CompoundSelect,
    FromClause,
    LargeBinary,
    RowMapping,
    Select,
    Table,
    Text,
    and_,
    bindparam,
    case,
    cast,
    false,
    func,
    literal,
    literal_column,
    null,
    or_,
    select,
    text,
    true,
    union_all,
)
from sqlalchemy.dialects.postgresql import TIMESTAMP
from sqlalchemy.types import TypeEngine

from app.queue.errors import JobNotFoundError
from app.queue.groups import is_error_group
from app.queue.lifecycle import State
from app.queue.model import Attempt, FailureGroup, Job, JobFilter, Outcome
from app.store.database import Database, rows_of
from app.store.jobs import job_of
from app.store.schema import (
    attempts,
    counts,
    dead,
    deltas,
    held,
    history,
    jobs,
    leases,
    maintenance,
    notes,
    ready,
    scheduled,
)

PAGE_BYTES_MAX = 8 * 1024 * 1024
"""A page stops at this much payload, result and checkpoint; the cursor goes on from there."""

WORKERS_MAX = 100
ATTEMPTS_MAX = 1000
GROUPS_MAX = 1000

_BODY = (
    "payload",
    "budget_start",
    "max_retries",
    "backoff",
    "lease_seconds",
    "timeout_seconds",
    "tags",
    "metadata",
    "traceparent",
    "created_at",
    "expires_at",
    "unique_key",
    "unique_scope",
    "unique_window_seconds",
    "dead_letter_queue",
    "source",
)
_NOTED = ("error_group", "progress_percent", "progress_message", "checkpoint")
"""What the side table has of a living job, and `dead` of a dead one."""
_INSTANT = TIMESTAMP(timezone=True)


# Where a job in a state stands.
_TABLES = {
    State.READY: ready,
    State.HELD: held,
    State.SCHEDULED: scheduled,
    State.RETRY: scheduled,
    State.ACTIVE: leases,
    State.FAILED: dead,
    State.CANCELLED: dead,
    State.EXPIRED: dead,
    State.COMPLETED: history,
}


class Looked(NamedTuple):
    """What a look at some jobs found: the ids of those that match, the oldest first."""

    ids: list[UUID]
    last: UUID | None
    """Behind this one it goes on; None at the end."""


@dataclass(frozen=True, slots=True)
class WorkerSeen:
    """A worker that holds leases, and when it was last heard of."""

    name: str | None
    active: int
    last_seen_at: datetime


class Reads:
    """The questions that the API, the metrics and the health checks ask."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def job(self, job_id: UUID) -> Job | None:
        """Return the job, wherever it stands."""
        rows = await self._look(_job(), job_id=job_id)
        return job_of(rows[0]) if rows else None

    async def require(self, job_id: UUID) -> Job:
        """Return the job, wherever it stands. Raises JobNotFoundError."""
        job = await self.job(job_id)
        if job is None:
            raise JobNotFoundError
        return job

    async def states(self, job_ids: Sequence[UUID]) -> dict[UUID, State]:
        """Return the states of those of the jobs that there are."""
        places = [place.subquery() for place in _places(frozenset(State))]
        found = union_all(
            *(select(place.c.id, place.c.state).where(place.c.id.in_(job_ids)) for place in places)
        )
        return {row["id"]: State(row["state"]) for row in await self._look(found)}

    async def page(self, wanted: JobFilter, limit: int, before: UUID | None) -> tuple[list[Job], UUID | None]:
        """Return up to `limit` jobs, newest first, beginning after the id `before`, and the id to go on from."""
        # A job does not end before it is created: that spares looking at older days.
        places = _places(frozenset(wanted.states) or frozenset(State), ended_after=wanted.created_after)
        heads = [
            _filtered(place, wanted, before).order_by(text("id DESC")).limit(limit + 1).subquery()
            for place in places
        ]
        merged = union_all(*(select(head) for head in heads)).subquery()
        newest = select(merged).order_by(merged.c.id.desc()).limit(limit + 1).subquery()
        size = func.octet_length(newest.c.payload) + sum(
            func.coalesce(func.octet_length(kept), 0) for kept in (newest.c.result, newest.c.checkpoint)
        )
        sized = select(
            newest,
            func.sum(size).over(order_by=newest.c.id.desc()).label("bytes"),
            func.row_number().over(order_by=newest.c.id.desc()).label("place"),
            func.count().over().label("found"),
        ).subquery()
        rows = await self._all(
            select(*_shown(sized))
            .where(or_(sized.c.place == 1, sized.c.bytes <= PAGE_BYTES_MAX), sized.c.place <= limit)
            .order_by(sized.c.id.desc())
        )
        page = [job_of(row) for row in rows]
        more = bool(rows) and rows[0]["found"] > len(rows)
        return page, page[-1].id if more else None

    async def look(self, wanted: JobFilter, limit: int, *, after: UUID, until: UUID) -> Looked:
        """Look at up to `limit` jobs of each place behind the id `after` and up to `until`, matching or not.

        So it is soon over, however rare those are that match.
        """
        states = frozenset(wanted.states)
        found, full = [], []
        for table in dict.fromkeys(_TABLES[state] for state in sorted(states)):
            looked_at = select(table.c.id).where(table.c.id > after, table.c.id <= until)
            if wanted.ids:
                looked_at = looked_at.where(table.c.id.in_(wanted.ids))
            if table is history and wanted.created_after is not None:
                looked_at = looked_at.where(history.c.finished_at >= wanted.created_after)
            # Materialized, so that the planner knows how few they are.
            head = looked_at.order_by(table.c.id).limit(limit).cte(table.name + "_head")
            head = head.prefix_with("MATERIALIZED")
            full.append(select(head.c.id).order_by(head.c.id).offset(limit - 1).limit(1).subquery())
            of_table = frozenset(state for state in states if _TABLES[state] is table)
            for job in (place.subquery() for place in _places(of_table, ended_after=wanted.created_after)):
                joined = head.join(job, job.c.id == head.c.id)
                found.append(select(job.c.id).select_from(joined).where(*_conditions(job, wanted)))
        ends = union_all(*(select(end) for end in full)).subquery()
        end = select(ends.c.id).order_by(ends.c.id).limit(1).cte("look_end").prefix_with("MATERIALIZED")
        matching = union_all(*found).subquery()
        up_to = func.coalesce(select(end.c.id).scalar_subquery(), until)
        rows = await self._all(
            union_all(
                select(matching.c.id, false().label("is_end")).where(matching.c.id <= up_to),
                select(end.c.id, true()),
            )
        )
        last = next((row["id"] for row in rows if row["is_end"]), None)
        return Looked(sorted(row["id"] for row in rows if not row["is_end"]), last)

    async def last_id(self, states: Collection[State]) -> UUID | None:
        """Return the greatest id in the places where jobs in these states stand; None when there are none."""
        tables = dict.fromkeys(_TABLES[state] for state in sorted(states))
        last = [select(table.c.id).order_by(table.c.id.desc()).limit(1).subquery() for table in tables]
        merged = union_all(*(select(each) for each in last)).subquery()
        rows = await self._all(select(merged).order_by(merged.c.id.desc()).limit(1))
        return rows[0]["id"] if rows else None

    async def ids(
        self, wanted: JobFilter, limit: int, *, after: UUID | None = None, until: UUID | None = None
    ) -> list[UUID]:
        """Return the ids of up to `limit` jobs, the oldest first, behind `after` and up to `until`.

        For filters that an index answers: it goes on until it has so many.
        """
        heads = self._ids(wanted, after, until)
        first = [head.order_by(text("id")).limit(limit).subquery() for head in heads]
        merged = union_all(*(select(head) for head in first)).subquery()
        rows = await self._all(select(merged).order_by(merged.c.id).limit(limit))
        return [row["id"] for row in rows]

    async def newest_id(self, wanted: JobFilter, after: UUID | None = None) -> UUID | None:
        """Return the id of the newest job behind `after`; None when there is none."""
        heads = self._ids(wanted, after, None)
        last = [head.order_by(text("id DESC")).limit(1).subquery() for head in heads]
        merged = union_all(*(select(head) for head in last)).subquery()
        rows = await self._all(select(merged).order_by(merged.c.id.desc()).limit(1))
        return rows[0]["id"] if rows else None

    def _ids(self, wanted: JobFilter, after: UUID | None, until: UUID | None) -> list[Select[Any]]:
        places = _places(frozenset(wanted.states), ended_after=wanted.created_after)
        found = []
        for job in (place.subquery() for place in places):
            conditions = _conditions(job, wanted)
            if after is not None:
                conditions.append(job.c.id > after)
            if until is not None:
                conditions.append(job.c.id <= until)
            found.append(select(job.c.id).where(*conditions))
        return found

    async def attempts(self, job_id: UUID) -> list[Attempt]:
        """Return the attempts of the job that are still kept, the running one included, oldest first.

        Releases are not counted, so there is no end to them: the newest ATTEMPTS_MAX are returned.
        """
        rows = reversed(await self._look(_newest_attempts(), job_id=job_id))
        return [
            Attempt(
                attempt=row["attempt"],
                worker=row["worker"],
                started_at=row["started_at"],
                ended_at=row["ended_at"],
                outcome=None if row["outcome"] is None else Outcome(row["outcome"]),
                error=row["error"],
            )
            for row in rows
        ]

    async def failures(self, queue: str) -> list[FailureGroup]:
        """Return the groups of the queue's failed jobs, the largest first, at most GROUPS_MAX."""
        # Written out, so that the index of failed jobs is known to have all that is asked for.
        failed = and_(dead.c.queue == queue, dead.c.state == literal_column("'failed'"))
        count, last_at = func.count().label("count"), func.max(dead.c.finished_at).label("last_at")
        groups = (
            select(dead.c.error_group, count, func.min(dead.c.finished_at).label("first_at"), last_at)
            .where(failed)
            .group_by(dead.c.error_group)
            .order_by(count.desc(), last_at.desc())
            .limit(GROUPS_MAX)
            .subquery()
        )
        sample = (
            select(dead.c.id, dead.c.last_error)
            .where(failed, dead.c.error_group == groups.c.error_group)
            .order_by(dead.c.id.desc())
            .limit(1)
            .lateral()
        )
        rows = await self._all(
            select(groups, sample).order_by(groups.c.count.desc(), groups.c.last_at.desc())
        )
        return [_failure_group(row) for row in rows]

    async def counts(self) -> dict[str, dict[State, int]]:
        """Return how many jobs of each queue are in each state now: exact, in one snapshot."""
        both = union_all(
            select(counts.c.queue, *(counts.c[state.value] for state in State)),
            select(deltas.c.queue, *(deltas.c[state.value] for state in State)),
        ).subquery()
        rows = await self._all(
            select(
                both.c.queue,
                *(
                    cast(func.coalesce(func.sum(both.c[state.value]), 0), BigInteger).label(state.value)
                    for state in State
                ),
            )
            .group_by(both.c.queue)
            .order_by(both.c.queue)
        )
        return {row["queue"]: {state: row[state.value] for state in State} for row in rows}

    async def workers(self) -> list[WorkerSeen]:
        """Return the workers that hold leases, the most recently seen first, at most WORKERS_MAX."""
        seen = func.max(func.coalesce(leases.c.heartbeat_at, leases.c.leased_at))
        rows = await self._all(
            select(leases.c.worker, func.count().label("active"), seen.label("seen"))
            .group_by(leases.c.worker)
            .order_by(seen.desc())
            .limit(WORKERS_MAX)
        )
        return [
            WorkerSeen(name=row["worker"], active=row["active"], last_seen_at=row["seen"]) for row in rows
        ]

    async def reaped_seconds_ago(self) -> float | None:
        """Return how long ago any process last looked for expired leases; None when none ever has."""
        rows = await self._all(
            select(func.extract("epoch", func.now() - maintenance.c.ran_at).label("seconds")).where(
                maintenance.c.task == "reap"
            )
        )
        return float(rows[0]["seconds"]) if rows else None

    async def ping(self) -> None:
        """Ask the database for a sign of life, in our own schema."""
        await self._look(select(maintenance.c.task).limit(1))

    async def _look(self, statement: Any, **parameters: Any) -> Sequence[RowMapping]:
        return await rows_of(self._database.looking, statement, parameters)

    async def _all(self, statement: Any) -> Sequence[RowMapping]:
        return await rows_of(self._database.reading, statement)


def _failure_group(row: RowMapping) -> FailureGroup:
    error = json.loads(row["last_error"])
    return FailureGroup(
        error_group=row["error_group"],
        type=error.get("type"),
        message=error["message"],
        count=row["count"],
        first_at=row["first_at"],
        last_at=row["last_at"],
        sample_job_id=row["id"],
    )


@cache
def _job() -> Select[Any]:
    # Made once: it takes many times as long to build as to run.
    places = [place.subquery() for place in _places(frozenset(State))]
    wanted = bindparam("job_id", type_=jobs.c.id.type)
    found = union_all(*(select(place).where(place.c.id == wanted) for place in places)).subquery()
    return select(*_shown(found))


@cache
def _newest_attempts() -> CompoundSelect[Any]:
    wanted = bindparam("job_id", type_=jobs.c.id.type)
    ended = select(
        attempts.c.attempt,
        attempts.c.worker,
        attempts.c.started_at,
        attempts.c.ended_at,
        attempts.c.outcome,
        attempts.c.error,
    ).where(attempts.c.job_id == wanted)
    acked = select(
        history.c.attempt,
        history.c.worker,
        history.c.started_at,
        history.c.finished_at,
        literal(Outcome.ACKED.value),
        null(),
    ).where(history.c.id == wanted)
    running = select(
        leases.c.attempt, leases.c.worker, leases.c.leased_at, cast(null(), _INSTANT), null(), null()
    ).where(leases.c.id == wanted)
    return (
        union_all(ended, acked, running).order_by(text("started_at DESC, attempt DESC")).limit(ATTEMPTS_MAX)
    )


def _places(states: frozenset[State], ended_after: datetime | None = None) -> list[Select[Any]]:
    """Return a SELECT for each table that may hold a job in one of the states, all with the same columns."""
    places: list[Select[Any]] = []
    if State.READY in states:
        places.append(_live(ready, literal(State.READY.value)))
    if State.HELD in states:
        places.append(_live(held, literal(State.HELD.value)))
    if states & {State.SCHEDULED, State.RETRY}:
        state = case((scheduled.c.is_retry, State.RETRY.value), else_=State.SCHEDULED.value)
        delayed = _live(scheduled, state, run_at=scheduled.c.run_at)
        if not states >= {State.SCHEDULED, State.RETRY}:
            delayed = delayed.where(scheduled.c.is_retry if State.RETRY in states else ~scheduled.c.is_retry)
        places.append(delayed)
    if State.ACTIVE in states:
        places.append(
            _live(
                leases,
                literal(State.ACTIVE.value),
                started_at=leases.c.leased_at,
                worker=leases.c.worker,
                cancel_requested=leases.c.cancel_requested,
            )
        )
    dead_states = states & {State.FAILED, State.CANCELLED, State.EXPIRED}
    if dead_states:
        places.append(
            _ended(
                dead,
                state=dead.c.state,
                reason=dead.c.reason,
                error_type=dead.c.error_type,
                result=_nothing(LargeBinary()),
            ).where(dead.c.state.in_([literal_column(f"'{state}'") for state in sorted(dead_states)]))
        )
    if State.COMPLETED in states:
        done = _ended(
            history,
            state=literal(State.COMPLETED.value),
            reason=_nothing(Text()),
            error_type=_nothing(Text()),
            result=history.c.result,
        )
        places.append(done if ended_after is None else done.where(history.c.finished_at >= ended_after))
    return places


def _live(
    place: Table,
    state: ColumnElement[Any],
    *,
    run_at: ColumnElement[Any] = jobs.c.run_at,
    started_at: ColumnElement[Any] | None = None,
    worker: ColumnElement[Any] | None = None,
    cancel_requested: ColumnElement[Any] | None = None,
) -> Select[Any]:
    note = and_(place.c.noted, notes.c.job_id == place.c.id)
    return select(
        place.c.id,
        place.c.queue,
        place.c.type,
        place.c.priority,
        place.c.attempt,
        *(jobs.c[name] for name in _BODY),
        state.label("state"),
        run_at.label("run_at"),
        (_nothing(_INSTANT) if started_at is None else started_at).label("started_at"),
        _nothing(_INSTANT).label("finished_at"),
        (_nothing(Text()) if worker is None else worker).label("worker"),
        (false() if cancel_requested is None else cancel_requested).label("cancel_requested"),
        _nothing(Text()).label("reason"),
        notes.c.last_error,
        notes.c.error_type,
        _nothing(LargeBinary()).label("result"),
        *(notes.c[name] for name in _NOTED),
    ).select_from(place.join(jobs, jobs.c.id == place.c.id).outerjoin(notes, note))


def _ended(
    place: Table,
    *,
    state: ColumnElement[Any],
    reason: ColumnElement[Any],
    error_type: ColumnElement[Any],
    result: ColumnElement[Any],
) -> Select[Any]:
    return select(
        place.c.id,
        place.c.queue,
        place.c.type,
        place.c.priority,
        place.c.attempt,
        *(place.c[name] for name in _BODY),
        state.label("state"),
        place.c.run_at,
        place.c.started_at,
        place.c.finished_at,
        place.c.worker,
        false().label("cancel_requested"),
        reason.label("reason"),
        place.c.last_error,
        error_type.label("error_type"),
        result.label("result"),
        *(place.c[name] if name in place.c else _nothing(notes.c[name].type).label(name) for name in _NOTED),
    )


def _nothing(kind: TypeEngine[Any]) -> ColumnElement[Any]:
    return cast(null(), kind)


def _shown(found: FromClause) -> list[ColumnElement[Any]]:
    # `job_of` parses jsonb itself, as it comes from the verbs' statements: as text.
    return [
        cast(column, Text).label(column.key) if column.key in {"backoff", "tags"} else column
        for column in found.c
    ]


def _filtered(place: Select[Any], wanted: JobFilter, before: UUID | None) -> Select[Any]:
    job = place.subquery()
    conditions = _conditions(job, wanted)
    if before is not None:
        conditions.append(job.c.id < before)
    return select(job).where(*conditions)


def _conditions(job: FromClause, wanted: JobFilter) -> list[ColumnElement[bool]]:
    conditions: list[ColumnElement[bool]] = []
    if wanted.ids:
        conditions.append(job.c.id.in_(wanted.ids))
    if wanted.queues:
        conditions.append(job.c.queue.in_(wanted.queues))
    if wanted.types:
        conditions.append(job.c.type.in_(wanted.types))
    if wanted.tag is not None:
        conditions.append(job.c.tags.op("?")(wanted.tag))
    if wanted.worker is not None:
        conditions.append(job.c.worker == wanted.worker)
    if wanted.error is not None:
        column = job.c.error_group if is_error_group(wanted.error) else job.c.error_type
        conditions.append(column == wanted.error)
    if wanted.created_after is not None:
        conditions.append(job.c.created_at > wanted.created_after)
    if wanted.created_before is not None:
        conditions.append(job.c.created_at < wanted.created_before)
    return conditions
