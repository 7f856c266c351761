"""Schedules and their runs. What a schedule does is the caller's decision; it is asked with the schedule's row locked.

All methods raise UnavailableError when the database is away.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, NamedTuple, get_type_hints

import msgspec
from sqlalchemy import ColumnElement, Text, cast, func, select, true, tuple_

from app.queue.errors import DuplicateJobError, QueueError, ScheduleNotFoundError, UnavailableError
from app.queue.model import JobRequest, NewJob
from app.queue.scheduling import Decision, Missed, Overlap, Plan, Run, RunOutcome, RunPosition, Schedule
from app.store.database import Database, Transaction, rows_of
from app.store.jobs import BEGINNING, Jobs
from app.store.once import Duplicate, Outcome, Refused, store
from app.store.reads import PAGE_BYTES_MAX
from app.store.schema import schedule_runs, schedules

JOBS_REMEMBERED = 20
"""So many of a schedule's newest jobs are asked whether they have ended, where no two may overlap."""

RUNS_KEPT = 1000
RUN_RETENTION_SECONDS = 30 * 86_400
SCHEDULES_SWEPT = 50
RUNS_SWEPT = 1000

_CREATE_TRIES = 3

LOCK_SECONDS = 0.5
"""How long a trigger waits for the unique key of its job that somebody else holds at that moment."""
FIRE_LOCK_SECONDS = 0.05
"""How long a fire waits for it: it is tried again."""

_SCHEDULE = (
    "s.name, s.definition, s.payload, s.paused, s.created_at, s.anchored_at, s.next_fire_at, s.job_ids"
)

_PLAIN = "s.definition -> 'job' -> 'unique' IS NULL"
_KEYED = "s.definition -> 'job' -> 'unique' IS NOT NULL"
_ONE = "s.name = $3::text"

_HINTS = get_type_hints(JobRequest)
# A job as it is kept: the fields that its operator named, by their names, so that they may become more.
_Template = msgspec.defstruct(
    "_Template",
    [
        (name, _HINTS[name], JobRequest._field_defaults[name])
        if name in JobRequest._field_defaults
        else (name, _HINTS[name])
        for name in JobRequest._fields
        if name != "payload"
    ],
    omit_defaults=True,
    kw_only=True,
)


Decide = Callable[[Schedule, datetime, bool], Decision | None]
"""What becomes of a schedule's first fire, now, and whether one of its jobs has not ended."""


class Edit(NamedTuple):
    """A schedule as it is to be, and the run that the change brings with it."""

    schedule: Schedule
    run: Run | None = None


class DuePosition(NamedTuple):
    """Where a schedule stands among those that are due."""

    next_fire_at: datetime
    name: str


FIRST = DuePosition(BEGINNING, "")


class Decided(NamedTuple):
    """A fire that was decided, or a trigger, and what came of its job; None where there was none to store."""

    schedule: str
    run: Run
    outcome: Outcome | None


class ScheduleStore:
    """The schedules, on the clock of `jobs`."""

    def __init__(self, database: Database, jobs: Jobs) -> None:
        self._database = database
        self._jobs = jobs
        self._clock = jobs.clock

    async def edit(
        self, name: str, edit: Callable[[Schedule | None, datetime], Edit]
    ) -> tuple[Edit, datetime]:
        """Change the schedule, or create it, as `edit` says of the present one; return what it said, and now."""

        async def work(transaction: Transaction) -> tuple[Edit, datetime]:
            for _ in range(_CREATE_TRIES):
                now = await self._now(transaction)
                present = await self._lock(transaction, name)
                edited = edit(present, now)
                verb = "create_schedule" if present is None else "change_schedule"
                created = await transaction.fetch(verb, *_values(edited.schedule))
                if present is not None or created:
                    if edited.run is not None:
                        await _note(transaction, [(edited.schedule, edited.run)], now)
                    return edited, now
                # Another has created it meanwhile.
            message = "The schedule is being created and deleted by others again and again; try later."
            raise UnavailableError(message)

        return await self._database.transact(work)

    async def delete(self, name: str) -> None:
        """Remove the schedule and its runs; its jobs stay. Raises ScheduleNotFoundError."""

        async def work(transaction: Transaction) -> None:
            if await self._lock(transaction, name) is None:
                raise ScheduleNotFoundError
            await transaction.fetch("delete_schedule", name)

        await self._database.transact(work)

    async def trigger(
        self, name: str, check: Callable[[Schedule], object], make: Callable[[JobRequest], NewJob]
    ) -> Decided:
        """Enqueue a job of the schedule now, and note what came of it.

        Raises ScheduleNotFoundError, and what `check` and `make` raise.
        """

        async def work(transaction: Transaction) -> Decided:
            schedule = await self._lock(transaction, name)
            if schedule is None:
                raise ScheduleNotFoundError
            check(schedule)
            job = make(schedule.plan.job)
            now = await self._now(transaction)
            [outcome] = await store(transaction, self._clock(), [job])
            run = Run(fire_at=now, decided_at=now, outcome=RunOutcome.TRIGGERED, job_id=job.id)
            run = _settled(run, outcome)
            await transaction.fetch("note_trigger", self._clock(), name, run.outcome, run.reason, run.job_id)
            await _advance(transaction, [(schedule, run)])
            return Decided(name, run, outcome)

        return await self._database.transact(work, lock_seconds=LOCK_SECONDS)

    async def fire(self, limit: int, decide: Decide, make: Callable[[JobRequest], NewJob]) -> list[Decided]:
        """Decide the first fire of up to `limit` schedules that are due, and enqueue the jobs, in one transaction.

        Schedules whose jobs have a unique key are left to `fire_one`.
        """
        return await self._fire(decide, make, None, self._clock(), limit, which=_PLAIN)

    async def fire_one(
        self, name: str, decide: Decide, make: Callable[[JobRequest], NewJob]
    ) -> list[Decided]:
        """Decide the first fire of this schedule, if it is due. Raises UnavailableError where its key is held."""
        return await self._fire(decide, make, FIRE_LOCK_SECONDS, self._clock(), 1, name, which=_ONE)

    async def due_with_key(self, limit: int, after: DuePosition) -> list[DuePosition]:
        """Return up to `limit` schedules that are due whose jobs have a unique key, in order, behind a position."""
        rows = await self._database.fetch("due_keyed_schedules", self._clock(), limit, *after, keyed=_KEYED)
        return [DuePosition(row["next_fire_at"], row["name"]) for row in rows]

    async def _fire(
        self,
        decide: Decide,
        make: Callable[[JobRequest], NewJob],
        lock_seconds: float | None,
        *values: object,
        which: str,
    ) -> list[Decided]:
        async def work(transaction: Transaction) -> list[Decided]:
            rows = await transaction.fetch("lock_due_schedules", *values, schedule=_SCHEDULE, which=which)
            if not rows:
                return []
            now: datetime = rows[0]["now"]
            due = [_schedule(row) for row in rows]
            busy = await _busy(transaction, due)
            # Fires that were missed are counted: that may take a while.
            decisions = await asyncio.to_thread(
                lambda: [decide(schedule, now, schedule.name in busy) for schedule in due]
            )
            decided = [
                (replace(schedule, next_fire_at=decision.next_fire_at), decision)
                for schedule, decision in zip(due, decisions, strict=True)
                if decision is not None
            ]
            return await self._carry_out(transaction, decided, now, make)

        return await self._database.transact(work, lock_seconds=lock_seconds)

    async def _carry_out(
        self,
        transaction: Transaction,
        decided: Sequence[tuple[Schedule, Decision]],
        now: datetime,
        make: Callable[[JobRequest], NewJob],
    ) -> list[Decided]:
        made: dict[str, NewJob] = {}
        runs: list[tuple[Schedule, Run]] = []
        for schedule, decision in decided:
            run = decision.run(now)
            if decision.fire:
                try:
                    made[schedule.name] = make(schedule.plan.job)
                    run = replace(run, job_id=made[schedule.name].id)
                except QueueError as error:
                    run = replace(run, outcome=RunOutcome.FAILED, reason=error.code)
            runs.append((schedule, run))
        fresh = await _note(transaction, runs, now)
        new = [(name, job) for name, job in made.items() if name in fresh]
        outcomes: dict[str, Outcome] = {}
        if new:
            stored = await store(transaction, self._clock(), [job for _, job in new])
            outcomes = {name: outcome for (name, _), outcome in zip(new, stored, strict=True)}
        settled = [(schedule, _settled(run, outcomes.get(schedule.name))) for schedule, run in runs]
        await _amend(
            transaction, [pair for before, pair in zip(runs, settled, strict=True) if pair != before]
        )
        await _advance(transaction, settled)
        return [
            Decided(schedule.name, run, outcomes.get(schedule.name))
            for schedule, run in settled
            if schedule.name in fresh
        ]

    async def next_due_seconds(self, *, keyed: bool) -> float | None:
        """Return in how many seconds a schedule is due next; None when none will be.

        Those due already count only where they are of this kind, with a unique key for their jobs or without: the
        others are dealt with by themselves.
        """
        rows = await self._database.fetch("next_fire", self._clock(), kind=_KEYED if keyed else _PLAIN)
        return float(rows[0]["seconds"]) if rows else None

    async def retain_runs(self, after: str) -> tuple[int, str]:
        """Remove old runs of some schedules after a name; return how many, and the name to go on after."""
        now = await self._jobs.now()
        [row] = await self._database.fetch(
            "retain_runs",
            after,
            SCHEDULES_SWEPT,
            now - timedelta(seconds=RUN_RETENTION_SECONDS),
            RUNS_KEPT,
            RUNS_SWEPT,
        )
        return row["count"], row["last"] or ""

    async def schedule(self, name: str) -> Schedule:
        """Return the schedule. Raises ScheduleNotFoundError."""
        rows = await rows_of(
            self._database.looking,
            select(*_shown).select_from(_with_last_run).where(schedules.c.name == name),
        )
        if not rows:
            raise ScheduleNotFoundError
        return _schedule(rows[0])

    async def page(self, limit: int, after: str) -> tuple[list[Schedule], str | None]:
        """Return up to `limit` schedules by name, and the name after which the next page begins."""
        some = (
            select(
                *_shown,
                func.sum(func.octet_length(schedules.c.payload))
                .over(order_by=schedules.c.name)
                .label("bytes"),
            )
            .select_from(_with_last_run)
            .where(schedules.c.name > after)
            .order_by(schedules.c.name)
            .limit(limit + 1)
        )
        rows = await rows_of(self._database.reading, some)
        fit = [row for place, row in enumerate(rows[:limit]) if place == 0 or row["bytes"] <= PAGE_BYTES_MAX]
        return [_schedule(row) for row in fit], fit[-1]["name"] if len(fit) < len(rows) else None

    async def runs(
        self, name: str, limit: int, before: RunPosition | None
    ) -> tuple[list[Run], RunPosition | None]:
        """Return up to `limit` runs, newest first, and where the next page begins. Raises ScheduleNotFoundError."""
        position = tuple_(schedule_runs.c.fire_at, schedule_runs.c.triggered)
        wanted = (
            select(schedule_runs)
            .where(schedule_runs.c.schedule == name)
            .order_by(schedule_runs.c.fire_at.desc(), schedule_runs.c.triggered.desc())
            .limit(limit + 1)
        )
        rows = await rows_of(
            self._database.reading, wanted if before is None else wanted.where(position < before)
        )
        if not rows:
            await self.schedule(name)
        page = rows[:limit]
        more = len(rows) > limit
        return [_run_of(row) for row in page], RunPosition(
            page[-1]["fire_at"], page[-1]["triggered"]
        ) if more else None

    async def _now(self, transaction: Transaction) -> datetime:
        now: datetime = self._clock() or (await transaction.fetch("now"))[0]["now"]
        return now

    async def _lock(self, transaction: Transaction, name: str) -> Schedule | None:
        rows = await transaction.fetch("lock_schedule", name, schedule=_SCHEDULE)
        return _schedule(rows[0]) if rows else None


async def _busy(transaction: Transaction, due: Sequence[Schedule]) -> set[str]:
    """Return the names of those that must not overlap and have a job that has not ended."""
    asked = [schedule for schedule in due if schedule.plan.overlap is Overlap.SKIP and schedule.job_ids]
    if not asked:
        return set()
    ids = [job_id for schedule in asked for job_id in schedule.job_ids]
    unfinished = {row["id"] for row in await transaction.fetch("unfinished", ids)}
    return {schedule.name for schedule in asked if not unfinished.isdisjoint(schedule.job_ids)}


async def _note(transaction: Transaction, runs: Sequence[tuple[Schedule, Run]], now: datetime) -> set[str]:
    """Note runs, one a schedule; return the names of those whose fire had not been decided before."""
    rows = await transaction.fetch(
        "note_runs",
        now,
        [schedule.name for schedule, _ in runs],
        [run.fire_at for _, run in runs],
        [run.outcome for _, run in runs],
        [run.reason for _, run in runs],
        [run.fires for _, run in runs],
        [run.job_id for _, run in runs],
    )
    return {row["schedule"] for row in rows}


async def _amend(transaction: Transaction, runs: Sequence[tuple[Schedule, Run]]) -> None:
    if runs:
        await transaction.fetch(
            "amend_runs",
            [schedule.name for schedule, _ in runs],
            [run.fire_at for _, run in runs],
            [run.outcome for _, run in runs],
            [run.reason for _, run in runs],
            [run.job_id for _, run in runs],
        )


async def _advance(transaction: Transaction, runs: Sequence[tuple[Schedule, Run]]) -> None:
    """Let schedules go on to their next fires, and remember their jobs."""
    await transaction.fetch(
        "advance_schedules",
        [schedule.name for schedule, _ in runs],
        [schedule.next_fire_at for schedule, _ in runs],
        [run.job_id for _, run in runs],
        JOBS_REMEMBERED,
    )


def _settled(run: Run, outcome: Outcome | None) -> Run:
    """Return the run as it is once the queue has taken its job, or not."""
    match outcome:
        case Duplicate(job_id, replaced=True):
            return replace(run, job_id=job_id)
        case Duplicate(job_id):
            return replace(run, outcome=RunOutcome.SKIPPED, reason=DuplicateJobError.code, job_id=job_id)
        case Refused(error):
            return replace(run, outcome=RunOutcome.FAILED, reason=error.code, job_id=None)
        case _:
            return run


def _values(schedule: Schedule) -> list[object]:
    return [
        schedule.name,
        _definition(schedule.plan),
        schedule.plan.job.payload,
        schedule.paused,
        schedule.created_at,
        schedule.anchored_at,
        schedule.next_fire_at,
        list(schedule.job_ids),
    ]


def _definition(plan: Plan) -> str:
    template = {name: value for name, value in plan.job._asdict().items() if name != "payload"}
    return msgspec.json.encode({**plan._asdict(), "job": _Template(**template)}).decode()


def _plan(definition: str, payload: bytes) -> Plan:
    fields = msgspec.json.decode(definition)
    template = msgspec.structs.asdict(msgspec.convert(fields["job"], _Template))
    return Plan(
        job=JobRequest(**template, payload=payload),
        cron=fields["cron"],
        every_seconds=fields["every_seconds"],
        timezone=fields["timezone"],
        overlap=Overlap(fields["overlap"]),
        missed=Missed(fields["missed"]),
    )


def _schedule(row: Any) -> Schedule:
    last_run_at = row.get("last_fire_at")
    try:
        plan = _plan(row["definition"], row["payload"])
    except (KeyError, TypeError, ValueError):  # msgspec's errors are values' too
        # Other rules wrote it. It must not keep the others from firing, nor from being shown.
        plan = Plan(JobRequest(""))
    return Schedule(
        name=row["name"],
        plan=plan,
        paused=row["paused"],
        created_at=row["created_at"],
        anchored_at=row["anchored_at"],
        next_fire_at=row["next_fire_at"],
        job_ids=tuple(row["job_ids"]),
        last_run=None if last_run_at is None else _run_of(row, "last_"),
    )


def _run_of(row: Any, prefix: str = "") -> Run:
    return Run(
        fire_at=row[f"{prefix}fire_at"],
        decided_at=row[f"{prefix}decided_at"],
        outcome=RunOutcome(row[f"{prefix}outcome"]),
        reason=row[f"{prefix}reason"],
        fires=row[f"{prefix}fires"],
        job_id=row[f"{prefix}job_id"],
    )


_newest_run = (
    select(schedule_runs)
    .where(schedule_runs.c.schedule == schedules.c.name)
    .order_by(schedule_runs.c.fire_at.desc(), schedule_runs.c.triggered.desc())
    .limit(1)
    .correlate(schedules)
    .lateral("run")
)
_with_last_run = schedules.outerjoin(_newest_run, true())
_shown: tuple[ColumnElement[Any], ...] = (
    *(column for column in schedules.c if column is not schedules.c.definition),
    # As the statements of the verbs bring it: as text.
    cast(schedules.c.definition, Text).label("definition"),
    *(
        _newest_run.c[name].label(f"last_{name}")
        for name in ("fire_at", "decided_at", "outcome", "reason", "fires", "job_id")
    ),
)
