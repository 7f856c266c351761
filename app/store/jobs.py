"""A method a verb, each the statement of the same name in `sql/`.

Every method answers after COMMIT. Decisions are the caller's: `fail`, `release` and `reap` lock the leases, ask the
given rule what becomes of each job, and write its verdicts in the same transaction.

All methods raise UnavailableError when the database is away; what they had begun is rolled back, or, where the
connection died at the COMMIT itself, of unknown outcome.
"""

import json
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar
from uuid import UUID

import asyncpg
from uuid_utils.compat import uuid7

from app.queue.dead_letters import Copy, copy_of
from app.queue.editing import Editable, Edited
from app.queue.errors import DuplicateJobError, IdempotencyConflictError, UnavailableError
from app.queue.groups import error_group
from app.queue.lifecycle import CANCELLABLE, RETRIABLE, TERMINAL, State
from app.queue.model import (
    Ack,
    Backoff,
    BackoffStrategy,
    Beat,
    Copied,
    Decide,
    Done,
    Ending,
    Heartbeat,
    IdempotencyKey,
    Jitter,
    Job,
    Lease,
    LeasedJob,
    NewJob,
    Progress,
    Settled,
    Unique,
    UniqueScope,
    Verb,
    Verdict,
    Word,
    WorkError,
)
from app.store.database import STRANGERS_LOCK_SECONDS, Database, Transaction
from app.store.once import (
    IDEMPOTENCY_SECONDS,
    Answered,
    Call,
    Duplicate,
    Outcome,
    Refused,
    Repeat,
    Stored,
    array_text,
    backoff_text,
    earlier,
    id_of,
    insert,
    reclaim,
    store,
    store_calls,
    stored_job,
    sweep_keys,
)
from app.store.partitions import Partitions
from app.store.schema import BODY_COLUMNS

REPLY_BYTES_MAX = 8 * 1024 * 1024
"""A lease reply stops at this much payload, so that its reader and ours need not hold more at once."""

CLAIM_SLACKS = (32, 256, 2048, 16_384)
"""How many jobs a claim looks at beyond those it takes, to pass over what other claims hold at that moment: first a
few, and more and more while others hold all that it saw."""

BEGINNING = datetime(1970, 1, 1, tzinfo=UTC)
END = datetime(9999, 1, 1, tzinfo=UTC)

FOLLOWING_MAX = 5
"""How often words are taken anew without the acks of which a follow-up was refused."""

RECOVERIES_MAX = 3
"""How often an enqueue of unknown outcome looks and tries again, before it says that it does not know."""

LOOK_STRETCHES = 2000
"""A look goes over so many stretches in one statement."""

# Each of the two indexes of `ready` answers one question only, and a line is named as its index names it.
_LINE = {True: "r.queue", False: "(r.queue || '/' || r.type)"}

# What an ack returns: the job, or as much of it as events tell of.
_WHOLE = "done.*, 'completed' AS state, NULL AS reason"
_DONE = "id, queue, type, worker, attempt, started_at, finished_at"

# What an ack puts into the history: the body, less what its queue does not keep.
_LEFT_BEHIND = {"payload": "'null'::bytea", "tags": "'[]'::jsonb", "metadata": "'{}'::bytea"}
_KEPT = ", ".join(
    f"CASE WHEN body.queue = ANY ($5::text[]) THEN {_LEFT_BEHIND[column]} ELSE body.{column} END"
    if column in _LEFT_BEHIND
    else f"body.{column}"
    for column in BODY_COLUMNS
)

T = TypeVar("T")


class Slot(NamedTuple):
    """Room for one job in a claim: its lease's id, its length (None: as the job says), and whose it will be."""

    lease_id: UUID
    lease_seconds: float | None
    worker: str | None


class RequestName(NamedTuple):
    """The name that a worker gave a request for a lease, and whose names these are."""

    request_id: str
    owner: str = ""


class Delivery(NamedTuple):
    """Which handing out of a named request's leases this is."""

    name: RequestName
    number: int
    is_replay: bool
    """Whether they were handed out before."""


class Claim(NamedTuple):
    """What a lease statement took."""

    jobs: list[LeasedJob]
    contended: bool
    """More is ready than it took, or was when it looked: who got nothing should look again."""
    claimed_at: datetime
    passed: Sequence[tuple[int, datetime]] = ()
    """The priority, and the instant since when it is ready, of the first job at each priority seen but not taken."""
    delivery: Delivery | None = None
    """Of a named request's leases."""


NOTHING = Claim([], contended=False, claimed_at=BEGINNING)


class _NothingLeasedError(Exception):
    """Takes a transaction back in which nothing was leased."""

    def __init__(self, claim: Claim) -> None:
        super().__init__()
        self.claim = claim


class Line(NamedTuple):
    """A queue, or one type of it, that ready jobs stand in and leases wait at."""

    queue: str
    type: str | None = None


class Place(NamedTuple):
    """Where a ready job stands: in its line, by its priority, then by the instant at which it became ready."""

    line: Line
    priority: int
    since: datetime


class Stretch(NamedTuple):
    """A piece of a line to look for jobs in: one priority, from one instant to another, both included."""

    line: Line
    priority: int
    since: datetime
    until: datetime


@dataclass(frozen=True, slots=True)
class Promoted:
    """A job whose time has come, and where it stands now."""

    job_id: UUID
    place: Place


class Expired(NamedTuple):
    """A job whose start deadline has passed."""

    job_id: UUID
    queue: str
    type: str


class Moved(NamedTuple):
    """A job that an operator's verb moved, the state that it left, and where it stands if that is ready now."""

    job_id: UUID
    queue: str
    type: str
    state: State
    place: Place | None = None
    due_in_seconds: float | None = None
    """In how many seconds it is to be ready, if it is delayed now."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """The verb that ended an attempt, and the answer that it got."""

    verb: Verb | None
    settled: Settled


class Jobs:
    """The verbs. `clock` moves the database's clock in tests: an instant instead of now, or None."""

    def __init__(self, database: Database, clock: Callable[[], datetime | None] = lambda: None) -> None:
        self._database = database
        self._partitions = Partitions(database)
        self._clock = clock
        self.keeping_no_payload: Sequence[str] = ()
        """The queues whose completed jobs leave payload, tags and metadata behind."""

    @property
    def clock(self) -> Callable[[], datetime | None]:
        """The clock, for the other tables."""
        return self._clock

    async def prepare(self) -> None:
        """Make the days that jobs are about to be written to."""
        await self._partitions.ensure(await self.now())

    async def enqueue(self, new: Sequence[NewJob]) -> list[Job]:
        """Store jobs, in order: all or none. Where the connection dies at the COMMIT, looks whether they are."""
        try:
            return await self._insert(self._database, new)
        except UnavailableError as error:
            if not error.outcome_unknown:
                raise
        stored = await self._stored(new)
        if stored is None:
            try:
                return await self._insert(self._database, new)
            except asyncpg.UniqueViolationError:
                # The first try was still under way at the server, and has come through meanwhile.
                stored = await self._stored(new)
                if stored is None:
                    raise
        return stored

    async def _stored(self, new: Sequence[NewJob]) -> list[Job] | None:
        rows = await self._database.fetch("stored", [job.id for job in new])
        if not rows:
            return None
        found = {row["id"]: row for row in rows}
        # One that is missing among the others has been deleted since: it must not come back.
        stored = [(job, found.get(job.id, rows[0])) for job in new]
        return [stored_job(job, row) for job, row in stored]

    async def store(self, calls: Sequence[Call], *, lock_seconds: float) -> list[Answered]:
        """Store what calls bring, in one transaction, each job once only where its call or itself has a key.

        Where the connection dies at the COMMIT, looks what has come of it before it does anything again. Raises
        UndoneError when an atomic call can not be stored whole: then nothing is.
        """

        async def work(transaction: Transaction, calls: Sequence[Call]) -> list[Answered]:
            return await store_calls(transaction, self._clock(), calls)

        async def attempt(calls: Sequence[Call]) -> list[Answered]:
            return await self._database.transact(
                lambda transaction: work(transaction, calls), lock_seconds=lock_seconds
            )

        try:
            return await attempt(calls)
        except UnavailableError as error:
            if not error.outcome_unknown:
                raise
        for _ in range(RECOVERIES_MAX):
            found = await self._found(calls)
            try:
                again = await attempt([_not_stored(call, found) for call in calls])
            except asyncpg.UniqueViolationError:
                # The first try was still under way at the server, and has come through meanwhile: look again.
                continue
            answers = [_with_stored(*each, found) for each in zip(calls, again, strict=True)]
            if None not in answers:
                return [answer for answer in answers if answer is not None]
        message = "Whether these jobs are stored is not known; ask again with the same keys."
        raise UnavailableError(message)

    async def earlier(self, key: IdempotencyKey) -> Repeat | IdempotencyConflictError | None:
        """Return what an earlier call with this key brought; None when there is none."""
        return (await earlier(self._database, self._clock(), [key])).get(key)

    async def _found(self, calls: Sequence[Call]) -> dict[UUID, Job]:
        """Return those jobs of the calls that are stored, as they were stored."""
        ids = [job.id for call in calls for job in call.jobs if job is not None]
        rows = {row["id"]: row for row in await self._database.fetch("stored", ids)}
        # Where any is stored all have been decided: one without a key that is missing has been deleted since.
        some = next(iter(rows.values()), None)
        return {
            job.id: stored_job(job, row)
            for call in calls
            for job in call.jobs
            if job is not None
            for row in [rows.get(job.id, some if job.unique is None and call.key is None else None)]
            if row is not None
        }

    async def _insert(self, runner: Database | Transaction, new: Sequence[NewJob]) -> list[Job]:
        return await insert(runner, self._clock(), new)

    async def lease(self, stretches: Sequence[Stretch], slots: Sequence[Slot]) -> Claim:
        """Take ready jobs in these stretches, all of whole queues or all of types; one a slot, the first the first.

        Where the connection dies at the COMMIT, looks for what was leased; the claim itself is never repeated.
        """
        try:
            return await self._lease(self._database, stretches, slots)
        except UnavailableError as error:
            if not error.outcome_unknown:
                raise
            rows = await self._database.fetch("leased", [slot.lease_id for slot in slots])
            if not rows:
                raise
            return Claim([_leased(row) for row in rows], contended=True, claimed_at=await self.now())

    async def lease_named(
        self, name: RequestName, stretches: Sequence[Stretch], slots: Sequence[Slot]
    ) -> Claim:
        """Take jobs as `lease` does, under a name: the same name again gets the same leases, as far as they stand.

        Where none does it takes new ones; without slots, none. Nothing is kept of a name that got nothing, and nothing
        is written where nothing is to be seen. Where the connection dies at the COMMIT it asks again: what was taken
        is found under the name.
        """
        foreseen = await self._foresee(name, stretches)
        if foreseen is not None:
            return foreseen
        try:
            return await self._lease_named(name, stretches, slots)
        except UnavailableError as error:
            if not error.outcome_unknown:
                raise
        return await self._lease_named(name, stretches, slots)

    async def _lease_named(
        self, name: RequestName, stretches: Sequence[Stretch], slots: Sequence[Slot]
    ) -> Claim:
        async def work(transaction: Transaction) -> Claim:
            [request] = await transaction.fetch("lease_request", self._clock(), name.owner, name.request_id)
            delivery = Delivery(name, request["delivery"], is_replay=bool(request["job_ids"]))
            if delivery.is_replay:
                rows = await transaction.fetch("standing", request["job_ids"], request["lease_ids"])
                if rows:
                    leased = [_leased(row) for row in rows]
                    return Claim(leased, contended=False, claimed_at=BEGINNING, delivery=delivery)
            claim = NOTHING
            if stretches and slots:
                claim = await self._lease(transaction, stretches, slots)
            if not claim.jobs:
                raise _NothingLeasedError(claim)
            await transaction.fetch(
                "keep_leases",
                self._clock(),
                name.owner,
                name.request_id,
                [job.id for job in claim.jobs],
                [job.lease_id for job in claim.jobs],
            )
            return claim._replace(delivery=delivery._replace(is_replay=False))

        try:
            return await self._database.transact(work)
        except _NothingLeasedError as nothing:
            return nothing.claim

    async def _foresee(self, name: RequestName, stretches: Sequence[Stretch]) -> Claim | None:
        """Return the empty claim that this will be; None when there is something to be seen."""
        [seen] = await self._database.fetch(
            "foresee",
            self._clock(),
            name.owner,
            name.request_id,
            *columns(stretches),
            line=_LINE[not stretches or stretches[0].line.type is None],
        )
        return None if seen["anything"] else NOTHING._replace(claimed_at=seen["now"])

    async def take_back(self, delivery: Delivery, endings: Sequence[Ending]) -> dict[UUID, Verdict]:
        """End the attempts of a named request, as `conclude` does, unless they were handed out once more meanwhile."""

        async def work(transaction: Transaction) -> dict[UUID, Verdict]:
            last = await transaction.fetch("last_delivery", delivery.name.owner, delivery.name.request_id)
            if [row["delivery"] for row in last] != [delivery.number]:
                return {}
            return await self._conclude(transaction, endings)

        return await self._keeping(lambda: self._database.transact(work))

    async def _lease(
        self, runner: Database | Transaction, stretches: Sequence[Stretch], slots: Sequence[Slot]
    ) -> Claim:
        leased: list[LeasedJob] = []
        for slack in CLAIM_SLACKS:
            rows = await runner.fetch(
                "lease",
                self._clock(),
                *columns(stretches),
                len(slots),
                slack,
                [slot.lease_id for slot in slots],
                [slot.lease_seconds for slot in slots],
                [slot.worker for slot in slots],
                REPLY_BYTES_MAX,
                line=_LINE[stretches[0].line.type is None],
            )
            leased = [_leased(row) for row in rows if row["id"] is not None]
            seen: int = rows[0]["seen"]
            if leased or seen < len(slots) + slack:
                break  # it took some, or saw all there is
        passed = list(zip(rows[0]["passed_priorities"], rows[0]["passed_since"], strict=True))
        return Claim(leased, contended=seen > len(leased), claimed_at=rows[0]["now"], passed=passed)

    async def look(self, stretches: Sequence[Stretch], most: Sequence[int]) -> list[Place]:
        """Return the first ready jobs of these stretches, as many of each as `most` says, on the lines asked for."""
        found: list[Place] = []
        for whole in (True, False):
            asked = [
                (stretch, limit)
                for stretch, limit in zip(stretches, most, strict=True)
                if (stretch.line.type is None) is whole
            ]
            for part in range(0, len(asked), LOOK_STRETCHES):
                several = asked[part : part + LOOK_STRETCHES]
                rows = await self._database.fetch(
                    "look",
                    *columns([stretch for stretch, _ in several]),
                    [limit for _, limit in several],
                    self._clock(),
                    line=_LINE[whole],
                )
                found += [
                    Place(stretch.line, stretch.priority, row["since"])
                    for row in rows
                    for stretch, _ in [several[row["stretch"] - 1]]
                ]
        return found

    async def ack(self, acks: Sequence[Ack], *, wait: bool = True) -> dict[UUID, Job | Done]:
        """Finish jobs; return those whose lease still stood, by id.

        Here and below: without `wait`, a lease that others hold at that moment is passed over.
        """
        done = await self._keeping(lambda: self._ack(self._database, acks, wait=wait))
        if wait and (left := [ack for ack in acks if ack.job_id not in done]):
            done |= await self._keeping(
                lambda: self._database.transact(lambda transaction: self._ack_surely(transaction, left))
            )
        return done

    async def conclude(self, endings: Sequence[Ending], *, wait: bool = True) -> dict[UUID, Verdict]:
        """End attempts, each as its rule says; return the verdicts on leases that still stood, by job id."""
        return await self._keeping(
            lambda: self._database.transact(
                lambda transaction: self._conclude(transaction, endings, wait=wait)
            )
        )

    async def heartbeat(self, heartbeats: Sequence[Heartbeat], *, wait: bool = True) -> dict[UUID, Beat]:
        """Extend leases; return those that still stand, by job id."""
        return await self._keeping(lambda: self._heartbeat(self._database, heartbeats, wait=wait))

    async def settle(
        self, words: Sequence[Word], told: Callable[[Sequence[Outcome]], Awaitable[None]]
    ) -> dict[UUID, Job | Done | Verdict | Beat | DuplicateJobError]:
        """Take all words in one transaction; return what each did whose lease still stood, by job id.

        An ack of which a follow-up is refused does not happen, and gets that error. `told` hears of the follow-ups.
        """
        refused: dict[UUID, DuplicateJobError] = {}
        for _ in range(FOLLOWING_MAX):
            left = [word for word in words if word.job_id not in refused]
            try:
                return {**await self._settle(left, told), **refused} if left else dict(refused)
            except _NotFollowedError as error:
                # Nothing is committed: the others go without those whose follow-ups can not be stored.
                refused |= error.refused
        message = "Others take the unique keys of these follow-ups again and again; try later."
        raise UnavailableError(message)

    async def _settle(
        self, words: Sequence[Word], told: Callable[[Sequence[Outcome]], Awaitable[None]]
    ) -> dict[UUID, Job | Done | Verdict | Beat]:
        acks = [word for word in words if isinstance(word, Ack)]
        following = [ack for ack in acks if ack.then]
        plain = [ack for ack in acks if not ack.then]
        if len(plain) == len(words):
            return dict(await self.ack(plain))
        followed: list[Outcome] = []

        async def work(transaction: Transaction) -> dict[UUID, Job | Done | Verdict | Beat]:
            done: dict[UUID, Job | Done | Verdict | Beat] = {}
            if following:
                acked, followed[:] = await self._ack_and_follow(transaction, following)
                done |= acked
            if plain:
                done |= await self._ack_surely(transaction, plain)
            if endings := [word for word in words if isinstance(word, Ending)]:
                done |= await self._conclude(transaction, endings)
            if heartbeats := [word for word in words if isinstance(word, Heartbeat)]:
                done |= await self._heartbeat(transaction, heartbeats)
            return done

        # Strangers may hold the follow-ups' unique keys.
        lock_seconds = STRANGERS_LOCK_SECONDS if following else None
        done = await self._keeping(lambda: self._database.transact(work, lock_seconds=lock_seconds))
        await told(followed)
        return done

    async def reap(
        self, limit: int, decide: Decide, since: datetime = BEGINNING
    ) -> tuple[list[Verdict], datetime]:
        """End up to `limit` leases that have run out since then, as `decide` says; return the verdicts, and now."""

        async def work(transaction: Transaction) -> tuple[list[Verdict], datetime]:
            rows = await transaction.fetch("lock_expired", self._clock(), limit, since)
            verdicts = [decide(_lease(row), row["now"]) for row in rows if row["id"] is not None]
            written = await self._write(transaction, verdicts, [None] * len(verdicts))
            return written, rows[0]["now"]

        return await self._keeping(lambda: self._database.transact(work))

    async def living(self, job_ids: Sequence[UUID]) -> set[UUID]:
        """Return those of the jobs that have not ended."""
        return {row["id"] for row in await self._database.fetch("living", job_ids)}

    async def stands(self, job_id: UUID, lease_id: UUID) -> bool:
        """Whether the lease stands, in whoever's hands it is at this moment."""
        return bool(await self._database.fetch("stands", job_id, lease_id))

    async def recorded(self, leases: Mapping[UUID, UUID]) -> dict[UUID, Recorded]:
        """Return how the attempts under these leases (by job id) ended; those that have not are left out."""
        rows = await self._database.fetch("recorded", list(leases), list(leases.values()))
        return {
            row["job_id"]: Recorded(
                verb=None if row["verb"] is None else Verb(row["verb"]),
                settled=Settled(
                    state=State(row["state"]), run_at=row["run_at"], then=row["follow_ups"] or ()
                ),
            )
            for row in rows
        }

    async def promote(self, limit: int, since: datetime = BEGINNING) -> tuple[list[Promoted], datetime]:
        """Make up to `limit` delayed jobs ready whose time has come since then; return them, and now."""
        rows = await self._database.fetch("promote", self._clock(), limit, since)
        promoted = [
            Promoted(row["id"], Place(Line(row["queue"], row["type"]), row["priority"], row["since"]))
            for row in rows
            if row["id"] is not None
        ]
        return promoted, rows[0]["now"]

    async def expire(self, limit: int, since: datetime = BEGINNING) -> tuple[list[Expired], datetime]:
        """Bury jobs whose start deadline has passed since then, up to `limit` of each place; return them, and now."""
        rows = await self._database.fetch("expire", self._clock(), limit, since)
        expired = [Expired(row["id"], row["queue"], row["type"]) for row in rows if row["id"] is not None]
        return expired, rows[0]["now"]

    async def cancel(self, job_ids: Sequence[UUID], states: Collection[State] = CANCELLABLE) -> list[Moved]:
        """Cancel waiting jobs in these states, or ask for the end of active ones (then the state left is ACTIVE).

        Here and below: returns those that it has moved.
        """
        return _moved(await self._fetch_aside("cancel", self._clock(), job_ids, list(states)))

    async def retry(
        self, job_ids: Sequence[UUID], states: Collection[State] = RETRIABLE
    ) -> tuple[list[Moved], dict[UUID, UUID]]:
        """Make dead jobs in these states ready again, the first the first, each with a fresh retry budget.

        Returns also those that stay where they are because another job has their unique key, each with that job.
        """
        return await self._database.transact(
            lambda transaction: self.retry_within(transaction, job_ids, states),
            lock_seconds=STRANGERS_LOCK_SECONDS,
        )

    async def retry_within(
        self, transaction: Transaction, job_ids: Sequence[UUID], states: Collection[State]
    ) -> tuple[list[Moved], dict[UUID, UUID]]:
        """Do what `retry` does within a transaction that does something else too."""
        now = self._clock()
        taken = await reclaim(transaction, now, job_ids, states)
        free = [job_id for job_id in job_ids if job_id not in taken]
        rows = await transaction.fetch("retry", now, free, list(states)) if free else []
        moved = [
            moved._replace(place=Place(Line(moved.queue, moved.type), row["priority"], row["since"]))
            for moved, row in zip(_moved(rows), rows, strict=True)
        ]
        return moved, taken

    async def edit(
        self, job_ids: Sequence[UUID], decide: Callable[[Editable, datetime], Edited | None]
    ) -> list[Moved]:
        """Change jobs that no worker has, each as `decide` says (None: not at all). Raises what it raises.

        Returns those changed, with the states they had and where they stand.
        """

        async def work(transaction: Transaction) -> list[Moved]:
            places = {row["id"]: row for row in await transaction.fetch("lock_places", sorted(job_ids))}
            if not places:
                return []
            rows = await transaction.fetch("editable", self._clock(), list(places))
            decided = [decide(_editable(row, places[row["id"]]), row["now"]) for row in rows]
            edited = [each for each in decided if each is not None]
            if not edited:
                return []
            return _edited(await transaction.fetch("edit", self._clock(), *_edit_columns(edited)))

        return await self._database.transact(work, lock_seconds=STRANGERS_LOCK_SECONDS)

    async def delete(self, job_ids: Sequence[UUID], states: Collection[State] = TERMINAL) -> list[Moved]:
        """Remove terminal jobs in these states, and their attempts."""
        return _moved(await self._fetch_aside("delete", job_ids, list(states)))

    async def _fetch_aside(self, name: str, *values: object) -> Sequence[asyncpg.Record]:
        return await self._database.transact(
            lambda transaction: transaction.fetch(name, *values), lock_seconds=STRANGERS_LOCK_SECONDS
        )

    async def sweep_keys(self, after: tuple[str, str], limit: int) -> tuple[int, int, tuple[str, str]]:
        """Remove unique keys that nobody holds; return how many were looked at and removed, and the last one."""
        return await self._database.transact(
            lambda transaction: sweep_keys(transaction, self._clock(), after, limit)
        )

    async def sweep_requests(self, limit: int) -> int:
        """Forget up to `limit` requests of each kind whose repeats nobody expects any more; return how many."""
        rows = await self._database.fetch("sweep_requests", self._clock(), limit, IDEMPOTENCY_SECONDS)
        swept: int = rows[0]["count"]
        return swept

    async def survive_outage(self, longer_than_seconds: float, at_most_seconds: float) -> int:
        """Note that the reaper is at work, and first give leases back what an outage took; return how many."""
        rows = await self._database.fetch("survive_outage", longer_than_seconds, at_most_seconds)
        given: int = rows[0]["count"]
        return given

    async def fold(self, limit: int, begin: int = 0) -> tuple[int, int | None]:
        """Add up to `limit` deltas from the number `begin` on to the counts; return how many, and the last one's number."""
        [row] = await self._database.fetch("fold", limit, begin)
        if row["count"]:
            await self._database.fetch("forget_queues")
        return row["count"], row["last"]

    async def retain_dead(self, retention_seconds: float, limit: int) -> int:
        """Remove up to `limit` dead jobs whose retention has ended; return how many."""
        before = await self.now() - timedelta(seconds=retention_seconds)
        removed: int = (await self._database.fetch("retain_dead", before, limit))[0]["count"]
        return removed

    async def retain_days(self, history_seconds: float, attempts_seconds: float) -> int:
        """Make the days ahead and drop those whose retention has ended; return how many days were touched."""
        now = await self.now()
        made = await self._partitions.ensure(now)
        return (
            made
            + await self._partitions.drop_before(now, history_seconds, "history")
            + await self._partitions.drop_before(now, attempts_seconds, "attempts")
        )

    async def next_due_seconds(self, since: datetime = BEGINNING) -> float | None:
        """Return in how many seconds the next delayed job is due, or was since then; None when there is none."""
        rows = await self._database.fetch("next_due", self._clock(), since)
        return float(rows[0]["seconds"]) if rows else None

    async def now(self) -> datetime:
        """Return the database's clock."""
        moved = self._clock()
        if moved is not None:
            return moved
        now: datetime = (await self._database.fetch("now"))[0]["now"]
        return now

    async def _ack_and_follow(
        self, transaction: Transaction, acks: Sequence[Ack]
    ) -> tuple[dict[UUID, Job | Done], list[Outcome]]:
        """Store the follow-ups of those whose leases stand, and finish these. Raises _NotFollowedError."""
        ordered = sorted(acks, key=lambda ack: ack.job_id.int)
        rows = await transaction.fetch(
            "lock_leases",
            self._clock(),
            [ack.job_id for ack in ordered],
            [ack.lease_id for ack in ordered],
            or_pass="",
        )
        standing = {row["id"] for row in rows}
        acks = [ack for ack in ordered if ack.job_id in standing]
        if not acks:
            return {}, []
        outcomes = await store(transaction, self._clock(), [job for ack in acks for job in ack.then])
        each = iter(outcomes)
        of = {ack.job_id: [next(each) for _ in ack.then] for ack in acks}
        refused = {
            job_id: outcome.error
            for job_id, its in of.items()
            for outcome in its
            if isinstance(outcome, Refused)
        }
        if refused:
            raise _NotFollowedError(refused)
        then = {job_id: [id_ for id_ in map(id_of, its) if id_ is not None] for job_id, its in of.items()}
        done = await self._ack(transaction, acks, then=then)
        return {job_id: job._replace(then=then[job_id]) for job_id, job in done.items()}, outcomes

    async def _ack(
        self,
        runner: Database | Transaction,
        acks: Sequence[Ack],
        *,
        wait: bool = True,
        then: Mapping[UUID, Sequence[UUID]] | None = None,
    ) -> dict[UUID, Job | Done]:
        whole = any(ack.shown for ack in acks)
        # Batches lock their rows in one order, so that none waits for another in a circle.
        ordered = sorted(acks, key=lambda ack: ack.job_id.int)
        rows = await runner.fetch(
            "ack",
            self._clock(),
            [ack.job_id for ack in ordered],
            [ack.lease_id for ack in ordered],
            [ack.result for ack in ordered],
            self.keeping_no_payload,
            *([] if then is None else [[array_text(then[ack.job_id]) for ack in ordered]]),
            then="" if then is None else ", follow_ups",
            then_value="" if then is None else ", ($6::text[])[lease.place]::uuid[]",
            kept=_KEPT,
            or_pass=_or_pass(wait),
            shown=_WHOLE if whole else _DONE,
        )
        made: Callable[[Any], Job | Done] = job_of if whole else _done
        return {row["id"]: made(row) for row in rows}

    async def _ack_surely(self, transaction: Transaction, acks: Sequence[Ack]) -> dict[UUID, Job | Done]:
        """Finish jobs, also those that got their first note while the first look was under way.

        Their leases are locked by then, so the second look sees all there is.
        """
        done = await self._ack(transaction, acks)
        if left := [ack for ack in acks if ack.job_id not in done]:
            done |= await self._ack(transaction, left)
        return done

    async def _heartbeat(
        self, runner: Database | Transaction, heartbeats: Sequence[Heartbeat], *, wait: bool = True
    ) -> dict[UUID, Beat]:
        ordered = sorted(heartbeats, key=lambda heartbeat: heartbeat.job_id.int)
        rows = await runner.fetch(
            "heartbeat",
            self._clock(),
            [heartbeat.job_id for heartbeat in ordered],
            [heartbeat.lease_id for heartbeat in ordered],
            [heartbeat.extend_seconds for heartbeat in ordered],
            [progress and progress.percent for progress in (heartbeat.progress for heartbeat in ordered)],
            [progress and progress.message for progress in (heartbeat.progress for heartbeat in ordered)],
            [heartbeat.checkpoint for heartbeat in ordered],
            or_pass=_or_pass(wait),
        )
        progressed = {heartbeat.job_id for heartbeat in ordered if heartbeat.progress is not None}
        return {
            row["id"]: Beat(
                job_id=row["id"],
                queue=row["queue"],
                type=row["type"],
                worker=row["worker"],
                lease_expires_at=row["expires_at"],
                cancel_requested=row["cancel_requested"],
                progressed=row["id"] in progressed,
            )
            for row in rows
        }

    async def _conclude(
        self, transaction: Transaction, endings: Sequence[Ending], *, wait: bool = True
    ) -> dict[UUID, Verdict]:
        ordered = sorted(endings, key=lambda ending: ending.job_id.int)
        by_id = {ending.job_id: ending for ending in ordered}
        rows = await transaction.fetch(
            "lock_leases",
            self._clock(),
            [ending.job_id for ending in ordered],
            [ending.lease_id for ending in ordered],
            or_pass=_or_pass(wait),
        )
        verdicts = [by_id[row["id"]].decide(_lease(row), row["now"]) for row in rows]
        written = await self._write(transaction, verdicts, [by_id[row["id"]].verb for row in rows])
        return {verdict.lease.job_id: verdict for verdict in written}

    async def _write(
        self, transaction: Transaction, verdicts: Sequence[Verdict], verbs: Sequence[Verb | None]
    ) -> list[Verdict]:
        if verdicts:
            await transaction.fetch(
                "conclude",
                self._clock(),
                [verdict.lease.job_id for verdict in verdicts],
                [verdict.state for verdict in verdicts],
                [verdict.attempt for verdict in verdicts],
                [verdict.run_at for verdict in verdicts],
                [verdict.reason for verdict in verdicts],
                [None if verdict.error is None else _error_text(verdict.error) for verdict in verdicts],
                [None if verdict.error is None else verdict.error.type for verdict in verdicts],
                [_group(verdict.error) for verdict in verdicts],
                [verdict.outcome for verdict in verdicts],
                verbs,
            )

        copies = [copy for verdict in verdicts if (copy := copy_of(verdict)) is not None]
        return list(verdicts) if not copies else await self._copy(transaction, verdicts, copies)

    async def _copy(
        self, transaction: Transaction, verdicts: Sequence[Verdict], copies: Sequence[Copy]
    ) -> list[Verdict]:
        """Enqueue the copies of what the verdicts have buried; return the verdicts with what became of them."""
        minted = {uuid7(): copy for copy in copies}
        rows = await transaction.fetch(
            "copy",
            self._clock(),
            [copy.of for copy in copies],
            list(minted),
            [copy.queue for copy in copies],
            [copy.source for copy in copies],
        )
        copied = {minted[row["id"]].of: Copied(*row) for row in rows}
        return [replace(verdict, copied=copied.get(verdict.lease.job_id)) for verdict in verdicts]

    async def _keeping(self, write: Callable[[], Awaitable[T]]) -> T:
        """Run a write of workers' words: make its day when that is missing, repeat it when its outcome is unknown.

        What the first try has ended, the second does not find: the service answers from the record then.
        """
        try:
            return await write()
        except asyncpg.CheckViolationError:
            await self._partitions.ensure(await self.now())
        except UnavailableError as error:
            if not error.outcome_unknown:
                raise
        return await write()


class _NotFollowedError(Exception):
    """Follow-ups of acks were refused: the errors, by the acked job's id."""

    def __init__(self, refused: dict[UUID, DuplicateJobError]) -> None:
        super().__init__("not all follow-ups can be stored")
        self.refused = refused


def _not_stored(call: Call, found: Mapping[UUID, Job]) -> Call:
    """Return what is to be asked again of a call: all where its key guards it, else what has not been stored."""
    if call.key is not None:
        return call
    left = [None if job is None or job.id in found else job for job in call.jobs]
    return Call(left, atomic=call.atomic and left == call.jobs)


def _with_stored(call: Call, again: Answered, found: Mapping[UUID, Job]) -> Answered | None:
    """Return what came of a call, of both tries; None when the first one has come through since it was looked for."""
    match again:
        case Repeat(ids):
            own = {job.id for job in call.jobs if job is not None and job.id in ids}
            if not own:
                return again
            outcomes: list[Outcome | None] = [None if id_ is None else Duplicate(id_) for id_ in ids]
        case list():
            own = {
                job.id
                for job, outcome in zip(call.jobs, again, strict=True)
                if job is not None and isinstance(outcome, Duplicate) and outcome.job_id == job.id
            }
            outcomes = again
        case _:
            return again
    if not own <= found.keys():
        return None
    return [
        Stored(found[job.id]) if job is not None and job.id in found else outcome
        for job, outcome in zip(call.jobs, outcomes, strict=True)
    ]


def columns(stretches: Sequence[Stretch]) -> tuple[list[str], list[int], list[datetime], list[datetime]]:
    """Return stretches as statements take them: lines, priorities, from when and until when."""
    return (
        [
            stretch.line.queue if stretch.line.type is None else f"{stretch.line.queue}/{stretch.line.type}"
            for stretch in stretches
        ],
        [stretch.priority for stretch in stretches],
        [stretch.since for stretch in stretches],
        [stretch.until for stretch in stretches],
    )


def _or_pass(wait: bool) -> str:
    return "" if wait else "SKIP LOCKED"


def job_of(row: Any) -> Job:
    """Make a Job of a row of either library that has its columns; jsonb columns come as text."""
    return Job(
        id=row["id"],
        queue=row["queue"],
        type=row["type"],
        state=State(row["state"]),
        payload=row["payload"],
        priority=row["priority"],
        attempt=row["attempt"],
        budget_start=row["budget_start"],
        max_retries=row["max_retries"],
        backoff=_backoff(row["backoff"]),
        lease_seconds=row["lease_seconds"],
        timeout_seconds=row["timeout_seconds"],
        tags=_tags(row["tags"]),
        metadata=row["metadata"],
        traceparent=row["traceparent"],
        created_at=row["created_at"],
        run_at=row["run_at"],
        started_at=row["started_at"],
        finished_at=row["finished_at"],
        worker=row["worker"],
        cancel_requested=row.get("cancel_requested") or False,
        reason=row.get("reason"),
        last_error=row["last_error"],
        result=row["result"],
        expires_at=row["expires_at"],
        unique=_unique(row),
        dead_letter_queue=row["dead_letter_queue"],
        source=row["source"],
        progress=_progress(row),
        checkpoint=row.get("checkpoint"),
    )


def _leased(row: asyncpg.Record) -> LeasedJob:
    return LeasedJob(
        id=row["id"],
        queue=row["queue"],
        type=row["type"],
        payload=row["payload"],
        attempt=row["attempt"],
        max_retries=row["max_retries"],
        priority=row["priority"],
        lease_id=row["lease_id"],
        leased_at=row["leased_at"],
        lease_expires_at=row["expires_at"],
        ready_at=row["since"],
        created_at=row["created_at"],
        run_at=row["run_at"],
        tags=_tags(row["tags"]),
        metadata=row["metadata"],
        traceparent=row["traceparent"],
        last_error=row["last_error"],
        checkpoint=row["checkpoint"],
        source=row["source"],
    )


def _lease(row: asyncpg.Record) -> Lease:
    return Lease(
        job_id=row["id"],
        lease_id=row["lease_id"],
        queue=row["queue"],
        type=row["type"],
        worker=row["worker"],
        attempt=row["attempt"],
        leased_at=row["leased_at"],
        expires_at=row["expires_at"],
        deadline_at=row["deadline_at"],
        cancel_requested=row["cancel_requested"],
        priority=row["priority"],
        ready_at=row["since"],
        max_retries=row["max_retries"],
        budget_start=row["budget_start"],
        backoff=_backoff(row["backoff"]),
        dead_letter_queue=row["dead_letter_queue"],
        source=row["source"],
    )


def _moved(rows: Sequence[asyncpg.Record]) -> list[Moved]:
    return [Moved(row["id"], row["queue"], row["type"], State(row["state"])) for row in rows]


def _editable(row: asyncpg.Record, place: asyncpg.Record) -> Editable:
    return Editable(
        id=row["id"],
        queue=row["queue"],
        state=State(place["state"]),
        attempt=place["attempt"],
        type=row["type"],
        priority=row["priority"],
        run_at=row["run_at"],
        lease_seconds=row["lease_seconds"],
        timeout_seconds=row["timeout_seconds"],
        max_retries=row["max_retries"],
        backoff=_backoff(row["backoff"]),
        expires_at=row["expires_at"],
        dead_letter_queue=row["dead_letter_queue"],
    )


def _edit_columns(edited: Sequence[Edited]) -> list[list[Any]]:
    return [
        [job.id for job in edited],
        [job.type for job in edited],
        [job.priority for job in edited],
        [job.due_at for job in edited],
        [job.lease_seconds for job in edited],
        [job.timeout_seconds for job in edited],
        [job.max_retries for job in edited],
        [backoff_text(job.backoff) for job in edited],
        [None if job.tags is None else json.dumps(job.tags) for job in edited],
        [job.metadata for job in edited],
        [job.payload for job in edited],
        [job.expires_at for job in edited],
        [job.dead_letter_queue for job in edited],
    ]


def _edited(rows: Sequence[asyncpg.Record]) -> list[Moved]:
    return [
        moved._replace(
            place=Place(Line(moved.queue, moved.type), row["priority"], row["since"])
            if row["state_now"] == State.READY
            else None,
            due_in_seconds=row["due_in_seconds"],
        )
        for moved, row in zip(_moved(rows), rows, strict=True)
    ]


def _error_text(error: WorkError) -> bytes:
    return json.dumps({name: value for name, value in asdict(error).items() if value is not None}).encode()


def _group(error: WorkError | None) -> str | None:
    return None if error is None else error_group(error.type, error.message)


def _done(row: asyncpg.Record) -> Done:
    return Done(*row)


def _unique(row: Any) -> Unique | None:
    if row["unique_key"] is None:
        return None
    return Unique(row["unique_key"], UniqueScope(row["unique_scope"]), row["unique_window_seconds"])


def _progress(row: Any) -> Progress | None:
    percent, message = row.get("progress_percent"), row.get("progress_message")
    return None if percent is None and message is None else Progress(percent, message)


def _tags(text: str) -> tuple[str, ...]:
    return () if text == "[]" else tuple(json.loads(text))


@lru_cache(maxsize=256)
def _backoff(text: str) -> Backoff:
    fields = json.loads(text)
    return Backoff(
        strategy=BackoffStrategy(fields["strategy"]),
        initial_seconds=fields["initial_seconds"],
        factor=fields["factor"],
        max_seconds=fields["max_seconds"],
        jitter=Jitter(fields["jitter"]),
    )
