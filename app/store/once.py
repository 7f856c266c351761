"""Storing new jobs, and once only where they have a unique key.

`store` is the one way to put many jobs into a transaction that does something else too. Who holds a key is found out
in three steps, each a statement of its own, so that it sees what the locks before it have waited for: lock the keys
(in one order, so that nobody waits in a circle), look at their holders, write.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any, NamedTuple
from uuid import UUID

from app.queue.errors import DuplicateJobError, IdempotencyConflictError
from app.queue.lifecycle import State
from app.queue.model import Backoff, IdempotencyKey, Job, NewJob, OnConflict, UniqueScope
from app.queue.unique import REPLACEABLE, Holder, holds, needs_key, to_replace_with, to_store
from app.store.database import Database, Transaction

IDEMPOTENCY_SECONDS = 86_400.0
"""So long an `Idempotency-Key` stands for its first call."""

INSERT_MAX = 1000
"""How many jobs one statement stores."""

LOOKS_MAX = 10
"""How often a holder that others move at that moment is looked for again before it keeps its fields."""

Key = tuple[str, str]
"""A queue, and a unique key of it."""


class Stored(NamedTuple):
    """The job is stored: as it stands now."""

    job: Job


class Replacement(NamedTuple):
    """Where a job stands that has taken the fields of another one."""

    queue: str
    type: str
    priority: int
    state: State
    since: datetime
    """Of a ready one: its place in line."""
    kept_place: bool
    """Whether it had that place before."""
    run_at: datetime
    now: datetime
    created_at: datetime


class Duplicate(NamedTuple):
    """Another job holds the unique key: nothing was stored."""

    job_id: UUID
    replaced: bool = False
    """Whether that job has taken the new one's fields, or those of a later one that replaced these."""
    replacement: Replacement | None = None
    """Where it stands since: told once of several that replace one job."""


class Refused(NamedTuple):
    """Nothing was stored, and nothing is to be."""

    error: DuplicateJobError


Outcome = Stored | Duplicate | Refused


class Call(NamedTuple):
    """The new jobs of one request; None for an item that was refused before it came here."""

    jobs: Sequence[NewJob | None]
    key: IdempotencyKey | None = None
    atomic: bool = False
    """Whether all are to be stored or none."""


class Repeat(NamedTuple):
    """An earlier call had the same `Idempotency-Key` and body: these jobs came of its items. None: refused."""

    job_ids: Sequence[UUID | None]


Answered = list[Outcome | None] | Repeat | IdempotencyConflictError
"""What came of a call: of each item, or an earlier call's answer again, or that its key stands for another one."""


class UndoneError(Exception):
    """Not all items of an atomic call can be stored, so none is."""

    def __init__(self, outcomes: Sequence[Outcome | None]) -> None:
        super().__init__("not all items can be stored")
        self.outcomes = outcomes


async def insert(runner: Database | Transaction, now: datetime | None, new: Sequence[NewJob]) -> list[Job]:
    """Store jobs, in order, without a look at their unique keys. `now` is the database's clock, or None for its own."""
    rows = await runner.fetch(
        "enqueue",
        now,
        [job.id for job in new],
        [job.queue for job in new],
        [job.type for job in new],
        [job.priority for job in new],
        [job.run_at for job in new],
        [job.delay_seconds for job in new],
        [job.lease_seconds for job in new],
        [job.timeout_seconds for job in new],
        [job.max_retries for job in new],
        [backoff_text(job.backoff) for job in new],
        [job.traceparent for job in new],
        [_tags_text(job.tags) for job in new],
        [job.metadata for job in new],
        [job.payload for job in new],
        [job.expires_at for job in new],
        [job.expires_in_seconds for job in new],
        [None if job.unique is None else job.unique.key for job in new],
        [None if job.unique is None else job.unique.scope for job in new],
        [None if job.unique is None else job.unique.window_seconds for job in new],
        [job.dead_letter_queue for job in new],
        [job.source for job in new],
    )
    return [stored_job(job, row) for job, row in zip(new, rows, strict=True)]


async def store(transaction: Transaction, now: datetime | None, new: Sequence[NewJob]) -> list[Outcome]:
    """Store jobs, once only where they have a unique key; return what came of each, in order.

    Several with one key count as if each came after the one before it: the first decides, and of those that replace
    the last one's fields stay. Waits for whoever else wants one of the keys. The caller tells, after the COMMIT, who
    waits for what became ready.
    """
    rivals: dict[Key, list[NewJob]] = {}
    for job in new:
        if job.unique is not None:
            rivals.setdefault(_key(job), []).append(job)
    wanted = {key: to_store(jobs) for key, jobs in rivals.items()}
    holders = await _holders(transaction, now, wanted)
    replacing = {
        key: last
        for key, holder in holders.items()
        if holder.state in REPLACEABLE and (last := to_replace_with(rivals[key])) is not None
    }
    replaced = await _replace(
        transaction, now, {key: job._replace(id=holders[key].job_id) for key, job in replacing.items()}
    )
    free = {job.id: job for key, job in wanted.items() if key not in holders}
    storing = [free.get(job.id, job) for job in new if job.unique is None or job.id in free]
    stored = {job.id: job for job in await _insert_many(transaction, now, storing)}

    def beside(job: NewJob) -> Outcome:
        key = _key(job)
        holder = holders[key].job_id if key in holders else wanted[key].id
        match job.on_conflict:
            case OnConflict.REJECT:
                return Refused(DuplicateJobError(holder))
            case OnConflict.REPLACE:
                replacement = replaced.get(holder) if job is replacing.get(key) else None
                return Duplicate(holder, holder in replaced or holder in stored, replacement)
            case OnConflict.RETURN:
                return Duplicate(holder)

    return [Stored(stored[job.id]) if job.id in stored else beside(job) for job in new]


async def _insert_many(transaction: Transaction, now: datetime | None, new: Sequence[NewJob]) -> list[Job]:
    """Store jobs, in order, in statements of bounded size: each is an event loop's work for some milliseconds."""
    if len(new) > INSERT_MAX and now is None:
        now = (await transaction.fetch("now"))[0]["now"]
    stored: list[Job] = []
    for begin in range(0, len(new), INSERT_MAX):
        # A statement gives its jobs places in line by the microsecond; the next one goes on there.
        at = None if now is None else now + timedelta(microseconds=begin)
        stored += await insert(transaction, at, new[begin : begin + INSERT_MAX])
    return stored


async def reclaim(
    transaction: Transaction, now: datetime | None, job_ids: Sequence[UUID], states: Collection[State]
) -> dict[UUID, UUID]:
    """Lock these dead jobs, if they are in one of these states, and give those that are about to come back the keys that they held as living ones.

    Returns those that may not, each with the job that has its key. Of several with one key the first may.
    """
    rows = await transaction.fetch("dead_keys", now, sorted(job_ids), list(states))
    rivals: dict[Key, list[Any]] = {}
    for row in rows:
        scope, window_ends_at = UniqueScope(row["unique_scope"]), row["window_ends_at"]
        if needs_key(scope, window_ends_at, row["now"], started=row["started"]):
            rivals.setdefault((row["queue"], row["unique_key"]), []).append(row)
    if not rivals:
        return {}
    keys = sorted(rivals)
    await transaction.fetch("claim_keys", now, *_dead_columns(keys, [rivals[key][0] for key in keys]))
    winners = {
        key: holder.job_id if holds(holder, at) else rivals[key][0]["id"]
        for key, (holder, at) in (await _look(transaction, now, keys)).items()
    }
    won = [(key, row) for key in keys for row in rivals[key] if row["id"] == winners[key]]
    if won:
        columns = _dead_columns([key for key, _ in won], [row for _, row in won])
        await transaction.fetch("give_keys", now, *columns, [row["created_at"] for _, row in won])
    return {
        row["id"]: winners[key] for key, dead in rivals.items() for row in dead if row["id"] != winners[key]
    }


async def sweep_keys(
    transaction: Transaction, now: datetime | None, after: Key, limit: int
) -> tuple[int, int, Key]:
    """Remove rows of unique keys that nobody holds, of up to `limit` behind the key `after`.

    Returns how many were looked at and removed, and the last key. What others hold at that moment is passed over.
    """
    rows = await transaction.fetch("lock_keys", *after, limit)
    keys = [(row["queue"], row["key"]) for row in rows]
    if not keys:
        return 0, 0, after
    looks = await _look(transaction, now, keys)
    stale = [key for key, (holder, at) in looks.items() if not holds(holder, at)]
    if stale:
        await transaction.fetch("drop_keys", [queue for queue, _ in stale], [key for _, key in stale])
    return len(keys), len(stale), keys[-1]


async def _holders(
    transaction: Transaction, now: datetime | None, wanted: Mapping[Key, NewJob]
) -> dict[Key, Holder]:
    """Lock the keys; return the holders of those that are taken, and give the others to the jobs that want them."""
    if not wanted:
        return {}
    keys = sorted(wanted)
    rows = await transaction.fetch("claim_keys", now, *_columns([wanted[key] for key in keys]))
    made = {(row["queue"], row["key"]) for row in rows}
    found = [key for key in keys if key not in made]
    if not found:
        return {}
    holders = {
        key: holder
        for key, (holder, at) in (await _look(transaction, now, found)).items()
        if holds(holder, at)
    }
    if free := [wanted[key] for key in found if key not in holders]:
        await transaction.fetch("give_keys", now, *_columns(free), [None] * len(free))
    return holders


async def _look(
    transaction: Transaction, now: datetime | None, keys: Sequence[Key]
) -> dict[Key, tuple[Holder, datetime]]:
    """Return who took these keys last, and the instant at which that was asked."""
    rows = await transaction.fetch("key_holders", now, [queue for queue, _ in keys], [key for _, key in keys])
    return {
        (row["queue"], row["key"]): (
            Holder(
                job_id=row["job_id"],
                scope=UniqueScope(row["scope"]),
                until=row["until"],
                state=None if row["state"] is None else State(row["state"]),
                started=row["started"],
            ),
            row["now"],
        )
        for row in rows
    }


async def _replace(
    transaction: Transaction, now: datetime | None, replacing: Mapping[Key, NewJob]
) -> dict[UUID, Replacement]:
    """Let the jobs of these ids take these fields, as far as they wait; return where they stand now."""
    replaced: dict[UUID, Replacement] = {}
    left = [replacing[key] for key in sorted(replacing)]
    for _ in range(LOOKS_MAX):
        if not left:
            break
        ordered = sorted(left, key=lambda job: job.id)
        rows = await transaction.fetch("replace", now, *_fields(ordered))
        replaced |= {row["id"]: _replacement(row) for row in rows}
        # Of those that were not there some may only have moved from one place of the waiting to another.
        left = [job for job in left if job.id not in replaced]
        if left:
            looks = await _look(transaction, now, [_key(job) for job in left])
            left = [job for job in left if looks[_key(job)][0].state in REPLACEABLE]
    written = [job for job in replacing.values() if job.id in replaced]
    if written:
        begins_at = [replaced[job.id].created_at for job in written]
        await transaction.fetch("give_keys", now, *_columns(written), begins_at)
    return replaced


async def store_calls(
    transaction: Transaction, now: datetime | None, calls: Sequence[Call]
) -> list[Answered]:
    """Store what calls bring, each once only where it has an `Idempotency-Key`; return what came of each, in order.

    No two calls have the same key. Raises UndoneError for an atomic call of which an item was refused: its transaction
    must not be committed.
    """
    known, made = await _known(transaction, now, [call for call in calls if call.key is not None])
    new = [job for call in calls if call.key not in known for job in call.jobs if job is not None]
    outcomes = iter(await store(transaction, now, new) if new else ())
    answers: list[Answered] = [
        known[call.key]
        if call.key is not None and call.key in known
        else [None if job is None else next(outcomes) for job in call.jobs]
        for call in calls
    ]
    for call, answer in zip(calls, answers, strict=True):
        if call.atomic and isinstance(answer, list) and any(isinstance(each, Refused) for each in answer):
            raise UndoneError(answer)
    kept = [
        (call.key, ids)
        for call, answer in zip(calls, answers, strict=True)
        if call.key is not None and isinstance(answer, list)
        for ids in [[None if each is None else id_of(each) for each in answer]]
        if call.key not in made or ids != _minted(call)
    ]
    if kept:
        await transaction.fetch("keep_calls", now, *_call_columns(kept))
    return answers


async def _known(
    transaction: Transaction, now: datetime | None, calls: Sequence[Call]
) -> tuple[dict[IdempotencyKey, Repeat | IdempotencyConflictError], set[IdempotencyKey]]:
    """Lock the calls' keys; return those that stand for an earlier call, with what it brought, and those made just now."""
    if not calls:
        return {}, set()
    keys = {call.key[:3]: (call.key, _minted(call)) for call in calls if call.key is not None}
    ordered = [keys[key] for key in sorted(keys)]
    rows = await transaction.fetch("claim_calls", now, *_call_columns(ordered))
    made = {keys[row["owner"], row["path"], row["key"]][0] for row in rows}
    found = [(key, ids) for key, ids in ordered if key not in made]
    if not found:
        return {}, made
    return await earlier(transaction, now, [key for key, _ in found]), made


async def earlier(
    runner: Database | Transaction, now: datetime | None, keys: Sequence[IdempotencyKey]
) -> dict[IdempotencyKey, Repeat | IdempotencyConflictError]:
    """Return what earlier calls with these keys brought; those that stand for none are left out."""
    columns = _call_columns([(key, ()) for key in keys])[:3]
    rows = await runner.fetch("earlier_calls", now, *columns, IDEMPOTENCY_SECONDS)
    asked = {key[:3]: key for key in keys}
    known: dict[IdempotencyKey, Repeat | IdempotencyConflictError] = {}
    for row in rows:
        key = asked[row["owner"], row["path"], row["key"]]
        same = row["body_hash"] == key.body_hash
        known[key] = Repeat(row["job_ids"]) if same else IdempotencyConflictError()
    return known


def _minted(call: Call) -> list[UUID | None]:
    """Return what comes of a call where nothing is in its way."""
    return [None if job is None else job.id for job in call.jobs]


def id_of(outcome: Outcome) -> UUID | None:
    """Return the job that an item of a call has come to; None for a refused one."""
    match outcome:
        case Stored():
            return outcome.job.id
        case Duplicate():
            return outcome.job_id
        case Refused():
            return None


def stored_job(job: NewJob, row: Any) -> Job:
    """Return a new job as it stands right after it was stored, with the instants that the database gave it."""
    created_at, run_at = row["created_at"], row["run_at"]
    return Job(
        id=job.id,
        queue=job.queue,
        type=job.type,
        state=State.READY if run_at <= created_at else State.SCHEDULED,
        payload=job.payload,
        priority=job.priority,
        attempt=0,
        budget_start=0,
        max_retries=job.max_retries,
        backoff=job.backoff,
        lease_seconds=job.lease_seconds,
        timeout_seconds=job.timeout_seconds,
        tags=job.tags,
        metadata=job.metadata,
        traceparent=job.traceparent,
        created_at=created_at,
        run_at=run_at,
        expires_at=row["expires_at"],
        unique=job.unique,
        dead_letter_queue=job.dead_letter_queue,
        source=job.source,
    )


def _key(job: NewJob) -> Key:
    assert job.unique is not None  # noqa: S101  # asked of jobs with a key only
    return job.queue, job.unique.key


def _columns(jobs: Sequence[NewJob]) -> list[list[Any]]:
    """Return what their keys' rows say of these jobs, a list a column."""
    named = [(job, job.unique) for job in jobs if job.unique is not None]
    return [
        [job.queue for job, _ in named],
        [unique.key for _, unique in named],
        [job.id for job, _ in named],
        [unique.scope for _, unique in named],
        [unique.window_seconds for _, unique in named],
    ]


def _dead_columns(keys: Sequence[Key], rows: Sequence[Any]) -> list[list[Any]]:
    """Return what their keys' rows are to say of dead jobs, a list a column."""
    return [
        [queue for queue, _ in keys],
        [key for _, key in keys],
        [row["id"] for row in rows],
        [row["unique_scope"] for row in rows],
        [row["unique_window_seconds"] for row in rows],
    ]


def _fields(jobs: Sequence[NewJob]) -> list[list[Any]]:
    """Return what a job may take from another one, a list a field, the ids first."""
    return [
        [job.id for job in jobs],
        [job.type for job in jobs],
        [job.priority for job in jobs],
        [job.run_at for job in jobs],
        [job.delay_seconds for job in jobs],
        [job.lease_seconds for job in jobs],
        [job.timeout_seconds for job in jobs],
        [job.max_retries for job in jobs],
        [backoff_text(job.backoff) for job in jobs],
        [job.traceparent for job in jobs],
        [_tags_text(job.tags) for job in jobs],
        [job.metadata for job in jobs],
        [job.payload for job in jobs],
        [job.expires_at for job in jobs],
        [job.expires_in_seconds for job in jobs],
        [None if job.unique is None else job.unique.scope for job in jobs],
        [None if job.unique is None else job.unique.window_seconds for job in jobs],
        [job.dead_letter_queue for job in jobs],
    ]


def _replacement(row: Any) -> Replacement:
    return Replacement(
        queue=row["queue"],
        type=row["type"],
        priority=row["priority"],
        state=State(row["state"]),
        since=row["since"],
        kept_place=row["kept_place"],
        run_at=row["due_at"],
        now=row["now"],
        created_at=row["created_at"],
    )


def _call_columns(calls: Sequence[tuple[IdempotencyKey, Sequence[UUID | None]]]) -> list[list[Any]]:
    return [
        [key.owner for key, _ in calls],
        [key.path for key, _ in calls],
        [key.key for key, _ in calls],
        [key.body_hash for key, _ in calls],
        [array_text(ids) for _, ids in calls],
    ]


def array_text(ids: Sequence[UUID | None]) -> str:
    """Return ids as PostgreSQL writes an array: rows of different lengths make no array of arrays."""
    return "{" + ",".join("NULL" if id_ is None else str(id_) for id_ in ids) + "}"


def _tags_text(tags: tuple[str, ...]) -> str:
    return json.dumps(tags) if tags else "[]"


@lru_cache(maxsize=256)
def backoff_text(backoff: Backoff) -> str:
    """Return a backoff as it is stored."""
    return json.dumps(asdict(backoff))
