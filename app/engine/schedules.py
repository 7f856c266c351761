"""Schedules: what operators ask of them, and their firing, which maintenance calls for when one is due."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from datetime import datetime
from typing import NamedTuple
from uuid import UUID

from app.engine.cron import check, rhythm_of
from app.queue.errors import InvalidRequestError, ScheduleNotFoundError, UnavailableError
from app.queue.events import Observer, ScheduleRan
from app.queue.model import Job, JobRequest, NewJob
from app.queue.scheduling import (
    Decision,
    Plan,
    Run,
    RunPosition,
    Schedule,
    decide_fire,
    decide_resume,
    preview,
    set_aside,
)
from app.store.database import is_blocked
from app.store.once import Duplicate, Outcome, Refused, Stored
from app.store.schedules import FIRST, Decided, Edit, ScheduleStore

KEYED_MAX = 20
"""Schedules whose jobs have a unique key are decided one by one, for somebody else may hold it: so many in one go."""
BLOCKED_MAX = 5
"""So many keys that somebody holds end a go: each has kept it waiting."""
KEYED_FIRES_MAX = 40
"""So many fires of one of them in one go."""


class Triggered(NamedTuple):
    """The job that a trigger has come to."""

    job: Job
    duplicate: bool = False
    """Whether it was there before, and has the unique key."""
    replaced: bool = False
    """Whether it has taken the schedule's fields."""


class Schedules:
    """The schedules of the queue, as one process offers them.

    `make` resolves a job's defaults, `job` looks one up; `stored` is told what came of jobs that were committed, `expect`
    of the seconds until the next fire.
    """

    def __init__(
        self,
        store: ScheduleStore,
        observer: Observer,
        *,
        make: Callable[[JobRequest], NewJob],
        job: Callable[[UUID], Awaitable[Job]],
        stored: Callable[[Sequence[Outcome]], None],
        expect: Callable[[float], None],
    ) -> None:
        self._store = store
        self._observer = observer
        self._make = make
        self._job = job
        self._stored = stored
        self._expect = expect
        self._keyed_after = FIRST

    async def put(self, name: str, plan: Plan, *, paused: bool | None) -> tuple[Schedule, bool]:
        """Create or replace a schedule; `paused` None leaves that as it is. Returns it, and whether it is new.

        Where the rhythm changes it begins anew, now, and where it was set aside. Raises InvalidRequestError.
        """
        check(plan)
        self._make_job(plan.job)
        created = False

        def edit(present: Schedule | None, now: datetime) -> Edit:
            nonlocal created
            created = present is None
            if present is None:
                return Edit(
                    _begun(
                        Schedule(name=name, plan=plan, paused=bool(paused), created_at=now, anchored_at=now),
                        now,
                    )
                )
            schedule, run = _resumed(present, now) if present.paused and paused is False else Edit(present)
            schedule = replace(schedule, plan=plan, paused=schedule.paused if paused is None else paused)
            goes_on = plan.keeps_time_with(present.plan) and schedule.next_fire_at is not None
            return Edit(schedule if goes_on else _begun(schedule, now), run)

        return await self._edit(name, edit), created

    async def pause(self, name: str) -> Schedule:
        """Let nothing fire until it is resumed. Raises ScheduleNotFoundError, InvalidRequestError."""
        return await self._edit(name, lambda present, _: Edit(replace(_there(present), paused=True)))

    async def resume(self, name: str) -> Schedule:
        """Let it fire again, but for what was due while it was paused.

        Raises ScheduleNotFoundError, InvalidRequestError.
        """

        def edit(present: Schedule | None, now: datetime) -> Edit:
            schedule = _there(present)
            return _resumed(schedule, now) if schedule.paused else Edit(schedule)

        return await self._edit(name, edit)

    async def delete(self, name: str) -> None:
        """Remove a schedule and its runs; its jobs stay. Raises ScheduleNotFoundError."""
        await self._store.delete(name)

    async def trigger(self, name: str) -> Triggered:
        """Enqueue a job of the schedule now, also when it is paused.

        Raises ScheduleNotFoundError; InvalidRequestError where the queue takes such a job no more; DuplicateJobError,
        or JobNotFoundError when the one that held its key has been deleted since.
        """
        decided = await self._store.trigger(name, _there, self._make_job)
        self._tell([decided])
        assert decided.outcome is not None  # noqa: S101  # a trigger has a job
        match decided.outcome:
            case Stored(job):
                return Triggered(job)
            case Duplicate(job_id, replaced):
                return Triggered(await self._job(job_id), duplicate=True, replaced=replaced)
            case Refused(error):
                raise error

    async def schedule(self, name: str) -> Schedule:
        """Return a schedule. Raises ScheduleNotFoundError."""
        return await self._store.schedule(name)

    async def page(self, limit: int, after: str) -> tuple[list[Schedule], str | None]:
        """Return a page of schedules, by name, and the name after which the next one begins."""
        return await self._store.page(limit, after)

    async def runs(
        self, name: str, limit: int, before: RunPosition | None
    ) -> tuple[list[Run], RunPosition | None]:
        """Return a page of runs, newest first, and where the next one begins. Raises ScheduleNotFoundError."""
        return await self._store.runs(name, limit, before)

    async def previews(self, schedules: Sequence[Schedule]) -> list[list[datetime]]:
        """Return the next fires of each; none where its rhythm can not be told."""
        return await asyncio.to_thread(lambda: [_preview(schedule) for schedule in schedules])

    async def fire(self, limit: int) -> int:
        """Decide the first fire of up to `limit` schedules that are due; return how many there were.

        Those whose jobs have a unique key are left to `fire_keyed`.
        """
        decided = await self._store.fire(limit, _decide, self._make_job)
        self._tell(decided)
        return len(decided)

    async def fire_keyed(self) -> int:
        """Decide the fires of some schedules that are due whose jobs have a unique key; return how many there were.

        A key that somebody holds is tried once; the next call begins behind the last schedule that this one has tried.
        Raises UnavailableError when nothing could be decided because of such keys.
        """
        due = await self._store.due_with_key(KEYED_MAX, self._keyed_after)
        count, blocked = 0, list[UnavailableError]()
        for position in due:
            self._keyed_after = position
            try:
                count += await self._fire_one(position.name)
            except UnavailableError as error:
                if not is_blocked(error):
                    raise
                blocked.append(error)
                if len(blocked) == BLOCKED_MAX:
                    break
        else:
            if len(due) < KEYED_MAX:
                self._keyed_after = FIRST
        if blocked and not count:
            raise blocked[0]
        return count

    async def _fire_one(self, name: str) -> int:
        count = 0
        # One that is late is due again at once.
        while count < KEYED_FIRES_MAX and (
            decided := await self._store.fire_one(name, _decide, self._make_job)
        ):
            self._tell(decided)
            count += len(decided)
        return count

    async def next_due_seconds(self) -> float | None:
        """Return in how many seconds `fire` may have something to do; None when it will not."""
        return await self._store.next_due_seconds(keyed=False)

    async def next_keyed_due_seconds(self) -> float | None:
        """Return in how many seconds `fire_keyed` may have something to do; None when it will not."""
        return await self._store.next_due_seconds(keyed=True)

    async def retain_runs(self, after: str) -> tuple[int, str]:
        """Remove old runs of some schedules after a name; return how many, and the name to go on after."""
        return await self._store.retain_runs(after)

    async def _edit(self, name: str, edit: Callable[[Schedule | None, datetime], Edit]) -> Schedule:
        edited, now = await self._store.edit(name, edit)
        if edited.run is not None:
            self._note(name, edited.run)
        if not edited.schedule.paused and edited.schedule.next_fire_at is not None:
            self._expect((edited.schedule.next_fire_at - now).total_seconds())
        return edited.schedule

    def _make_job(self, request: JobRequest) -> NewJob:
        try:
            return self._make(request)
        except InvalidRequestError as error:
            raise InvalidRequestError(f"job.{error.field}", error.message) from None

    def _tell(self, decided: Sequence[Decided]) -> None:
        self._stored([each.outcome for each in decided if each.outcome is not None])
        for each in decided:
            self._note(each.schedule, each.run)

    def _note(self, schedule: str, run: Run) -> None:
        self._observer.on(
            ScheduleRan(
                schedule=schedule,
                outcome=run.outcome,
                reason=run.reason,
                fires=run.fires,
                job_id=run.job_id,
            )
        )


# A rhythm may have been put where it could be told: by a replica with another database of time zones, or other rules. Such
# a schedule must not keep the others from firing, nor from being shown, whatever is wrong with it.


def _decide(schedule: Schedule, now: datetime, busy: bool) -> Decision | None:
    try:
        return decide_fire(schedule, rhythm_of(schedule), now, busy=busy)
    except Exception:  # noqa: BLE001  # see above
        return set_aside(schedule, now)


def _preview(schedule: Schedule) -> list[datetime]:
    try:
        return preview(schedule, rhythm_of(schedule))
    except Exception:  # noqa: BLE001  # see above
        return []


def _there(schedule: Schedule | None) -> Schedule:
    if schedule is None:
        raise ScheduleNotFoundError
    if not schedule.plan.is_readable:
        raise InvalidRequestError("name", "what is stored of this schedule can not be read: put it anew")
    return schedule


def _begun(schedule: Schedule, now: datetime) -> Schedule:
    """Let the rhythm begin now. Raises InvalidRequestError where it never fires."""
    anchored = replace(schedule, anchored_at=now)
    first = next(rhythm_of(anchored)(now), None)
    if first is None:
        raise InvalidRequestError("cron", "would never fire")
    return replace(anchored, next_fire_at=first)


def _resumed(schedule: Schedule, now: datetime) -> Edit:
    resumed = replace(schedule, paused=False)
    try:
        if schedule.next_fire_at is None:
            return Edit(_begun(resumed, now))
        decision = decide_resume(schedule, rhythm_of(schedule), now)
    except Exception:  # noqa: BLE001  # see above
        decision = set_aside(schedule, now)
    if decision is None:
        return Edit(resumed)
    return Edit(replace(resumed, next_fire_at=decision.next_fire_at), decision.run(now))
