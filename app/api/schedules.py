"""Schedules over HTTP: put, show, list, delete, pause, resume, trigger, and their runs."""

import struct
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Path, Query, Response
from msgspec import UNSET, Meta, Raw, Struct
from pydantic import BaseModel, ConfigDict, Field

from app.api import cursors
from app.api.answers import answers, json_response
from app.api.operate import LIMIT_DEFAULT, LIMIT_MAX
from app.api.schemas import DELAY_SECONDS_MAX, BackoffBody, EnqueueBody, JobReply, UniqueBody, is_name
from app.api.settling import bounded
from app.api.thin import Call, Operation, Reply, encode
from app.engine.service import Service
from app.queue.errors import InvalidRequestError, ScheduleNotFoundError
from app.queue.model import NOTHING_NAMED, JobRequest
from app.queue.scheduling import Missed, Overlap, Plan, Run, RunOutcome, RunPosition, Schedule

CRON_LENGTH_MAX = 256
ZONE_LENGTH_MAX = 64

Name = Annotated[str, Path(description="the schedule's name")]
Cron = Annotated[
    str,
    Meta(
        max_length=CRON_LENGTH_MAX,
        description="minute, hour, day of the month, month, weekday; names and steps too",
        examples=["0 3 * * MON-FRI"],
    ),
]
Seconds = Annotated[
    float, Meta(ge=1, le=DELAY_SECONDS_MAX, description="instead of `cron`; counted from the creation")
]
Zone = Annotated[
    str, Meta(max_length=ZONE_LENGTH_MAX, description="IANA name; the local time that `cron` means")
]


class BackoffTemplate(BackoffBody, omit_defaults=True):
    """How long a failed job waits; the fields that are not named come from the defaults."""


class UniqueTemplate(UniqueBody, omit_defaults=True):
    """A key that only one job of the queue may hold at a time."""


class JobTemplate(EnqueueBody, omit_defaults=True):
    """What a schedule enqueues: a job as in POST /jobs, without `run_at` and `expires_at`."""

    backoff: BackoffTemplate | None = None
    unique: UniqueTemplate | None = None

    @classmethod
    def of(cls, job: JobRequest) -> "JobTemplate":
        """Translate a job as it was asked for."""
        return cls(
            queue=job.queue,
            type=job.type,
            payload=Raw(job.payload),
            priority=job.priority,
            delay_seconds=job.delay_seconds,
            lease_seconds=job.lease_seconds,
            timeout_seconds=job.timeout_seconds,
            max_retries=job.max_retries,
            backoff=None if job.backoff == NOTHING_NAMED else BackoffTemplate(**asdict(job.backoff)),
            expires_in_seconds=job.expires_in_seconds,
            dead_letter_queue=job.dead_letter_queue,
            unique=None if job.unique is None else UniqueTemplate(*job.unique, on_conflict=job.on_conflict),
            tags=list(job.tags),
            metadata=UNSET if job.metadata == b"{}" else Raw(job.metadata),
        )


class ScheduleBody(Struct, forbid_unknown_fields=True):
    """When to enqueue a job, again and again: give `cron` or `every_seconds`."""

    job: JobTemplate
    cron: Cron | None = None
    every_seconds: Seconds | None = None
    timezone: Zone = "UTC"
    overlap: Annotated[
        Overlap, Meta(description="`skip`: not while a job of this schedule has not ended")
    ] = Overlap.ALLOW
    missed: Annotated[
        Missed,
        Meta(description="of fires over 60 s late: `skip` lets them be, `once` enqueues one job for all"),
    ] = Missed.SKIP
    paused: Annotated[bool, Meta(description="else as it is; a new one is not")] | None = None

    def to_plan(self) -> Plan:
        """Translate it for the queue. Raises InvalidRequestError for what the schema can not say."""
        if (self.cron is None) is (self.every_seconds is None):
            raise InvalidRequestError("cron", "give cron or every_seconds, one of both")
        for field in ("run_at", "expires_at"):
            if getattr(self.job, field) is not None:
                raise InvalidRequestError(
                    f"job.{field}", "a schedule's jobs come again and again: name no instant"
                )
        try:
            job = self.job.to_request(None)
        except InvalidRequestError as error:
            raise InvalidRequestError(f"job.{error.field}", error.message) from None
        return Plan(job, self.cron, self.every_seconds, self.timezone, self.overlap, self.missed)


class RunReply(Struct):
    """What became of a fire."""

    fire_at: Annotated[datetime, Meta(description="when it was to fire; of several the first")]
    decided_at: datetime
    outcome: Annotated[
        RunOutcome,
        Meta(
            description="`failed`: it was to fire, but the queue refuses its job, or the next fire can not be told"
        ),
    ]
    reason: (
        Annotated[
            str,
            Meta(
                description="why there is no job: `overlap`, `missed`, `paused`, `duplicate`, `rhythm` (the next fire can"
                " not be told: nothing fires until it is put anew), or the code of a refusal;"
                " `missed` with `fired`: one job for all that was missed"
            ),
        ]
        | None
    )
    fires: Annotated[int, Meta(description="for how many fires it stands; of more than 1,000 so many")]
    job_id: UUID | None

    @classmethod
    def of(cls, run: Run) -> "RunReply":
        """Translate a run."""
        return cls(run.fire_at, run.decided_at, run.outcome, run.reason, run.fires, run.job_id)


class ScheduleReply(Struct):
    """A schedule as it stands."""

    name: str
    cron: str | None
    every_seconds: float | None
    timezone: str
    job: JobTemplate
    overlap: Overlap
    missed: Missed
    paused: bool
    created_at: datetime
    next_fires_at: Annotated[
        list[datetime],
        Meta(description="the next five; none while it is paused, or where they can not be told"),
    ]
    last_run: RunReply | None

    @classmethod
    def of(cls, schedule: Schedule, next_fires_at: list[datetime]) -> "ScheduleReply":
        """Translate a schedule."""
        plan = schedule.plan
        return cls(
            name=schedule.name,
            cron=plan.cron,
            every_seconds=plan.every_seconds,
            timezone=plan.timezone,
            job=JobTemplate.of(plan.job),
            overlap=plan.overlap,
            missed=plan.missed,
            paused=schedule.paused,
            created_at=schedule.created_at,
            next_fires_at=next_fires_at,
            last_run=None if schedule.last_run is None else RunReply.of(schedule.last_run),
        )


class SchedulesReply(Struct):
    """A page of schedules, by name."""

    schedules: list[ScheduleReply]
    next_cursor: Annotated[str, Meta(description="where the next page begins; null at the end")] | None


class RunsReply(Struct):
    """A page of runs, newest first."""

    runs: list[RunReply]
    next_cursor: Annotated[str, Meta(description="where the next page begins; null at the end")] | None


class PageQuery(BaseModel):
    """Which page to show."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(default=LIMIT_DEFAULT, ge=1, le=LIMIT_MAX)
    cursor: str | None = Field(default=None, max_length=256, description="`next_cursor` of the page before")


def operations(service: Service, payload_bytes_max: int) -> list[Operation]:
    """Return the route with a body."""

    async def put(call: Call, body: ScheduleBody) -> Reply:
        name = call.path("name")
        if not is_name(name):
            raise InvalidRequestError("name", "must be up to 128 letters, digits and . _ : -")
        plan = body.to_plan()
        bounded("job.payload", plan.job.payload, payload_bytes_max)
        _, created = await service.schedules.put(name, plan, paused=body.paused)
        [reply] = await _replies(service, [await service.schedules.schedule(name)])
        if created:
            return Reply(encode(reply), 201, ((b"location", f"/schedules/{name}".encode()),))
        return Reply(encode(reply))

    return [
        Operation(
            path="/schedules/{name}",
            name="put_schedule",
            tag="Schedule",
            summary="Create or replace a schedule",
            description=(
                "Where `cron`, `every_seconds` or `timezone` change it begins anew, now; otherwise it keeps its rhythm,"
                " and the next fire enqueues the new job. What a job does not name it gets when it is enqueued."
            ),
            request=ScheduleBody,
            reply=ScheduleReply,
            statuses={200: "It is replaced.", 201: "It is created; `Location` names it."},
            problems=("payload_too_large",),
            example={
                "cron": "0 3 * * *",
                "timezone": "Europe/Berlin",
                "job": {"queue": "reports", "type": "daily"},
                "overlap": "skip",
            },
            handle=put,
            method="PUT",
        )
    ]


def router(service: Service) -> APIRouter:
    """Return the routes without a body."""
    routes = APIRouter(default_response_class=Response, tags=["Schedule"])

    @routes.get(
        "/schedules",
        summary="List schedules, by name",
        openapi_extra=answers(
            SchedulesReply, "A page; a page may be shorter than `limit` before the end.", "invalid"
        ),
    )
    async def list_schedules(query: Annotated[PageQuery, Query()]) -> Response:
        page, last = await service.schedules.page(query.limit, cursors.read_name(query.cursor, is_name))
        replies = await _replies(service, page)
        return json_response(SchedulesReply(replies, None if last is None else cursors.write(last.encode())))

    @routes.get(
        "/schedules/{name}",
        summary="Show a schedule",
        openapi_extra=answers(ScheduleReply, "The schedule as it stands.", "not_found"),
    )
    async def show_schedule(name: Name) -> Response:
        return await _shown(service, await service.schedules.schedule(_known(name)))

    @routes.delete(
        "/schedules/{name}",
        summary="Delete a schedule",
        status_code=204,
        openapi_extra=answers(None, "It is gone, with its runs; its jobs stay.", "not_found"),
    )
    async def delete_schedule(name: Name) -> Response:
        await service.schedules.delete(_known(name))
        return Response(status_code=204)

    @routes.post(
        "/schedules/{name}/pause",
        summary="Let a schedule fire no more",
        openapi_extra=answers(ScheduleReply, "It is paused.", "not_found", "invalid"),
    )
    async def pause_schedule(name: Name) -> Response:
        await service.schedules.pause(_known(name))
        return await _shown(service, await service.schedules.schedule(name))

    @routes.post(
        "/schedules/{name}/resume",
        summary="Let a paused schedule fire again",
        description="What was due while it was paused does not fire: one run says how many fires that were.",
        openapi_extra=answers(ScheduleReply, "It fires again.", "not_found", "invalid"),
    )
    async def resume_schedule(name: Name) -> Response:
        await service.schedules.resume(_known(name))
        return await _shown(service, await service.schedules.schedule(name))

    @routes.post(
        "/schedules/{name}/trigger",
        summary="Enqueue a schedule's job now",
        description="Also when it is paused. Its rhythm goes on as if nothing had been.",
        status_code=201,
        openapi_extra={
            **answers(
                JobReply,
                "The job is stored; `Location` names it.",
                "not_found",
                "duplicate",
                "invalid",
            ),
            "x-also": {200: "Another job holds its unique key: that one."},
        },
    )
    async def trigger_schedule(name: Name) -> Response:
        job, duplicate, replaced = await service.schedules.trigger(_known(name))
        reply = JobReply.of(job, duplicate=duplicate, replaced=replaced)
        answer = json_response(reply, 200 if duplicate else 201)
        answer.headers["Location"] = f"/jobs/{job.id}"
        return answer

    @routes.get(
        "/schedules/{name}/runs",
        summary="List what became of a schedule's fires",
        description="Newest first; the newest 1,000 are kept, for 30 days.",
        openapi_extra=answers(RunsReply, "A page.", "not_found", "invalid"),
    )
    async def list_runs(name: Name, query: Annotated[PageQuery, Query()]) -> Response:
        runs, last = await service.schedules.runs(_known(name), query.limit, _position(query.cursor))
        cursor = None if last is None else cursors.write(_POSITION.pack(*_parts(last)))
        return json_response(RunsReply([RunReply.of(run) for run in runs], cursor))

    return routes


async def _replies(service: Service, schedules: Sequence[Schedule]) -> list[ScheduleReply]:
    previews = await service.schedules.previews(schedules)
    return [
        ScheduleReply.of(schedule, next_fires_at)
        for schedule, next_fires_at in zip(schedules, previews, strict=True)
    ]


async def _shown(service: Service, schedule: Schedule) -> Response:
    [reply] = await _replies(service, [schedule])
    return json_response(reply)


def _known(name: str) -> str:
    """Return the name. Raises ScheduleNotFoundError for what is none: there can be no such schedule."""
    if not is_name(name):
        raise ScheduleNotFoundError
    return name


_POSITION = struct.Struct(">q?")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def _parts(position: RunPosition) -> tuple[int, bool]:
    fire_at, triggered = position
    return (fire_at - _EPOCH) // timedelta.resolution, triggered


def _position(cursor: str | None) -> RunPosition | None:
    """Return the run that a cursor goes on after. Raises InvalidRequestError when it is none."""
    if cursor is None:
        return None
    try:
        microseconds, triggered = _POSITION.unpack(cursors.read(cursor))
        return RunPosition(_EPOCH + timedelta(microseconds=microseconds), triggered)
    except (struct.error, OverflowError):
        raise cursors.not_ours() from None
