"""What operators and monitors ask: jobs, counts, health, metrics. FastAPI's own routes."""

import asyncio
import hashlib
from datetime import UTC, datetime
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Path, Query, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field

from app.api import cursors
from app.api.answers import answers, json_response
from app.api.schemas import (
    NAME_LENGTH_MAX,
    NAME_PATTERN,
    AttemptReply,
    AttemptsReply,
    HealthReply,
    JobReply,
    LiveReply,
    PageReply,
    StatsReply,
    WorkerSeenReply,
)
from app.api.thin import job_id_of
from app.engine.service import Service
from app.queue.errors import InvalidRequestError, UnavailableError
from app.queue.lifecycle import State
from app.queue.model import JobFilter
from app.telemetry import Metrics

LIMIT_DEFAULT = 50
LIMIT_MAX = 500

JobId = Annotated[str, Path(description="the job's id, a UUIDv7")]
Name = Annotated[str, Field(pattern=NAME_PATTERN, max_length=NAME_LENGTH_MAX)]
Text = Annotated[str, Field(pattern="^[^\\x00]*$", max_length=NAME_LENGTH_MAX * 2)]


def _in_utc(instant: datetime) -> datetime:
    try:
        return instant.astimezone(UTC)
    except OverflowError:
        message = "is no instant of our calendar"
        raise ValueError(message) from None


Instant = Annotated[AwareDatetime, AfterValidator(_in_utc)]


class ListQuery(BaseModel):
    """Which jobs to list; what is repeated means any of them."""

    model_config = ConfigDict(extra="forbid")

    state: list[State] = Field(default=[], description="repeatable")
    queue: list[Name] = Field(default=[], max_length=100, description="repeatable")
    type: list[Name] = Field(default=[], max_length=100, description="repeatable")
    tag: Text | None = None
    worker: Text | None = None
    error: Text | None = Field(
        default=None, description="of the last error: its `error_group`, or its exact `type`"
    )
    created_after: Instant | None = None
    created_before: Instant | None = None
    limit: int = Field(default=LIMIT_DEFAULT, ge=1, le=LIMIT_MAX)
    cursor: str | None = Field(default=None, max_length=64, description="`next_cursor` of the page before")

    def to_filter(self) -> JobFilter:
        """Translate it for the queue."""
        return JobFilter(
            states=tuple(self.state),
            queues=tuple(self.queue),
            types=tuple(self.type),
            tag=self.tag,
            worker=self.worker,
            error=self.error,
            created_after=self.created_after,
            created_before=self.created_before,
        )


def router(service: Service, metrics: Metrics) -> APIRouter:  # noqa: C901  # a list of routes, each one line deep
    """Return the routes."""
    routes = APIRouter(default_response_class=Response)

    @routes.get(
        "/jobs",
        tags=["Inspect"],
        summary="List jobs, newest first",
        openapi_extra=answers(
            PageReply, "A page; a page may be shorter than `limit` before the end.", "invalid"
        ),
    )
    async def list_jobs(query: Annotated[ListQuery, Query()]) -> Response:
        wanted = query.to_filter()
        jobs, last = await service.page(wanted, query.limit, _position(query.cursor, wanted))
        return json_response(
            PageReply([JobReply.of(job) for job in jobs], None if last is None else _cursor(last, wanted))
        )

    @routes.get(
        "/jobs/{job_id}/attempts",
        tags=["Inspect"],
        summary="List a job's attempts",
        openapi_extra=answers(AttemptsReply, "Every attempt that is kept, oldest first.", "not_found"),
    )
    async def list_attempts(job_id: JobId) -> Response:
        attempts = await service.attempts(job_id_of(job_id))
        return json_response(AttemptsReply([AttemptReply.of(attempt) for attempt in attempts]))

    @routes.post(
        "/jobs/{job_id}/cancel",
        tags=["Operate"],
        summary="Cancel a job",
        description=(
            "A waiting job is cancelled at once. An active one is asked to end: its worker's next heartbeat says so;"
            " then an ack completes it, and a fail, a release or the end of its lease cancels it."
        ),
        openapi_extra=answers(JobReply, "The job as it stands now.", "not_found", "wrong_state"),
    )
    async def cancel_job(job_id: JobId) -> Response:
        return json_response(JobReply.of(await service.operating.cancel(job_id_of(job_id))))

    @routes.post(
        "/jobs/{job_id}/retry",
        tags=["Operate"],
        summary="Retry a failed, cancelled or expired job",
        description="It is ready again with a fresh budget of `max_retries`; `attempt` goes on counting.",
        openapi_extra=answers(JobReply, "The job as it stands now.", "not_found", "wrong_state", "duplicate"),
    )
    async def retry_job(job_id: JobId) -> Response:
        return json_response(JobReply.of(await service.operating.retry(job_id_of(job_id))))

    @routes.delete(
        "/jobs/{job_id}",
        tags=["Operate"],
        summary="Delete a job that has ended",
        status_code=204,
        openapi_extra=answers(None, "It is gone, with its attempts.", "not_found", "wrong_state"),
    )
    async def delete_job(job_id: JobId) -> Response:
        await service.operating.delete(job_id_of(job_id))
        return Response(status_code=204)

    @routes.get(
        "/stats",
        tags=["Inspect"],
        summary="Count the jobs that are kept",
        openapi_extra=answers(StatsReply, "In all, and by queue."),
    )
    async def show_stats() -> Response:
        stats = await service.stats()
        return json_response(StatsReply(stats.jobs, stats.queues))

    @routes.get(
        "/health/live",
        tags=["Health"],
        summary="Whether the process is alive",
        openapi_extra=answers(LiveReply, "It is."),
    )
    async def is_live() -> Response:
        return json_response(LiveReply())

    @routes.get(
        "/health/ready",
        tags=["Health"],
        summary="Whether this process should get requests",
        openapi_extra=answers(LiveReply, "It should.", "unavailable"),
    )
    async def is_ready() -> Response:
        problem = await service.readiness()
        if problem is not None:
            raise UnavailableError(problem)
        return json_response(LiveReply())

    @routes.get(
        "/health",
        tags=["Health"],
        summary="How the parts are",
        openapi_extra={
            **answers(HealthReply, "All is well."),
            "x-also": {503: "Something is not; `problem` says what."},
        },
    )
    async def show_health() -> Response:
        health = await service.health()
        reply = HealthReply(
            status="ok" if health.problem is None else "unavailable",
            problem=health.problem,
            database=health.database,
            listening=health.listening,
            maintenance_seconds_ago=health.maintenance_seconds_ago,
            workers=[WorkerSeenReply(each.name, each.active, each.last_seen_at) for each in health.workers],
            jobs=None if health.stats is None else health.stats.jobs,
            oldest_ready_seconds=health.oldest_ready_seconds,
        )
        return json_response(reply, 200 if health.problem is None else 503)

    @routes.get(
        "/metrics", tags=["Health"], summary="Metrics for Prometheus", openapi_extra=answers(str, "Text.")
    )
    async def show_metrics() -> Response:
        await _read_gauges(service, metrics)
        # Hundreds of queues make a page that takes a while to write.
        page = await asyncio.to_thread(generate_latest, metrics.registry)
        return Response(page, media_type=CONTENT_TYPE_LATEST)

    return routes


async def _read_gauges(service: Service, metrics: Metrics) -> None:
    if metrics.gauges_due():
        await _read_database_gauges(service, metrics)
    metrics.show_queues(service.policies.pauses)
    show_process(service, metrics)


def show_process(service: Service, metrics: Metrics) -> None:
    """Set the gauges that this process knows by itself."""
    size, idle = service.pool_usage()
    metrics.show_process(
        waiters=service.wakeups.waiters,
        watchers=service.watching.watchers,
        streams=service.streams.count,
        listening=service.wakeups.listening.is_set(),
        pool_size=size,
        pool_idle=idle,
    )


async def _read_database_gauges(service: Service, metrics: Metrics) -> None:
    try:
        counts = await service.counts()
        metrics.show_database(
            counts, await service.oldest_ready_seconds(counts), await service.maintenance_seconds_ago()
        )
    except UnavailableError:
        metrics.show_database(None, {}, None)


def _cursor(last: UUID, wanted: JobFilter) -> str:
    return cursors.write(last.bytes + _fingerprint(wanted))


def _position(cursor: str | None, wanted: JobFilter) -> UUID | None:
    """Return the id that a cursor names. Raises InvalidRequestError when it is none, or of another list."""
    if cursor is None:
        return None
    raw = cursors.read(cursor)
    try:
        position = UUID(bytes=raw[:16])
    except ValueError:
        raise cursors.not_ours() from None
    if raw[16:] != _fingerprint(wanted):
        raise InvalidRequestError("cursor", "belongs to a list with other filters")
    return position


def _fingerprint(wanted: JobFilter) -> bytes:
    return hashlib.blake2b(repr(wanted).encode(), digest_size=4).digest()
