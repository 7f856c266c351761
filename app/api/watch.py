"""What people ask who watch jobs: how one stands, what becomes of it, what happens to all."""

import asyncio
from datetime import UTC, datetime
from typing import Annotated
from uuid import UUID

import msgspec
from fastapi import APIRouter, Header, Query, Request, Response
from msgspec import UNSET, UnsetType
from pydantic import BaseModel, ConfigDict, Field
from starlette.types import Receive, Scope, Send

from app.api.answers import EventText, answers, json_response
from app.api.operate import JobId, Name
from app.api.protocol import CUT, GONE
from app.api.schemas import JobReply
from app.api.thin import encode, job_id_of
from app.engine.service import Service
from app.engine.streams import Entry, Reset, Streams, Wanted
from app.queue.explain import Code
from app.queue.lifecycle import State

WAIT_SECONDS_MAX = 30

EVENTS_PATH = "/events"
KEEP_ALIVE_SECONDS = 15.0
"""How often a silent stream says something: proxies end connections that are silent for a minute."""
RETRY_MILLISECONDS = 2000
"""How long a client should wait before it comes again."""
NAMES_MAX = 100

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream"),
    (b"cache-control", b"no-store"),
    # nginx would hold events back to send more at once.
    (b"x-accel-buffering", b"no"),
]


class ShowQuery(BaseModel):
    """How to show a job."""

    model_config = ConfigDict(extra="forbid")

    wait_seconds: float = Field(
        default=0,
        ge=0,
        le=WAIT_SECONDS_MAX,
        allow_inf_nan=False,
        description="wait at most so long for the job's end",
    )


class EventsQuery(BaseModel):
    """Which events to tell of; what is repeated means any of them, different names mean all of them."""

    model_config = ConfigDict(extra="forbid")

    queue: list[Name] = Field(default=[], max_length=NAMES_MAX, description="repeatable")
    type: list[Name] = Field(default=[], max_length=NAMES_MAX, description="repeatable")
    id: list[UUID] = Field(default=[], max_length=NAMES_MAX, description="a job's id; repeatable")

    def to_wanted(self) -> Wanted:
        """Translate it for the queue."""
        return Wanted(frozenset(self.queue), frozenset(self.type), frozenset(self.id))


class ReasonReply(msgspec.Struct, omit_defaults=True):
    """One reason, with the facts that go with its code; others are left out."""

    code: Code
    message: str
    queue: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
    priority: int | UnsetType = UNSET
    run_at: datetime | UnsetType = UNSET
    in_seconds: float | UnsetType = UNSET
    attempt: int | UnsetType = UNSET
    retries_left: int | UnsetType = UNSET
    error_type: str | UnsetType | None = UNSET
    """The type of the last error, as its worker named it; null when it named none."""
    due_at: datetime | UnsetType = UNSET
    late_seconds: float | UnsetType = UNSET
    maintained_seconds_ago: float | UnsetType | None = UNSET
    workers: int | UnsetType = UNSET
    last_worker: str | UnsetType | None = UNSET
    last_seen_at: datetime | UnsetType | None = UNSET
    ahead: int | UnsetType = UNSET
    ahead_is_capped: bool | UnsetType = UNSET
    """Whether so many or more are before it: no more were counted."""
    since: datetime | UnsetType | None = UNSET
    """Since when it is ready, or active."""
    expires_at: datetime | UnsetType | None = UNSET
    left_seconds: float | UnsetType = UNSET
    worker: str | UnsetType | None = UNSET
    heartbeat_at: datetime | UnsetType | None = UNSET
    lease_expires_at: datetime | UnsetType = UNSET
    overdue_seconds: float | UnsetType = UNSET
    deadline_at: datetime | UnsetType | None = UNSET
    """Where `timeout_seconds` ends the attempt."""
    finished_at: datetime | UnsetType | None = UNSET
    reason: str | UnsetType | None = UNSET


class ExplainReply(msgspec.Struct):
    """Why a job is not running."""

    job_id: UUID
    state: State
    reasons: list[ReasonReply]


class EventData(msgspec.Struct):
    """What an event says of its job."""

    id: UUID
    queue: str
    type: str
    state: State
    at: datetime


class EventStream(Response):
    """Server-sent events, for as long as their reader is there and the service does not stop."""

    def __init__(self, streams: Streams, wanted: Wanted, last_id: str | None) -> None:
        super().__init__()
        self._streams = streams
        self._wanted = wanted
        self._last_id = last_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002  # ASGI's form
        """Serve one listener. Raises UnavailableError before the answer begins when there are too many."""
        gone: asyncio.Future[object] = scope[GONE]
        with self._streams.stream(self._wanted, self._last_id, scope[CUT]) as stream:

            def leave(_gone: "asyncio.Future[object]") -> None:
                stream.leave()

            gone.add_done_callback(leave)
            try:
                await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
                # An id without data is no event, but where to resume from.
                text = f"retry: {RETRY_MILLISECONDS}\nid: {stream.id}\n\n".encode()
                while True:
                    await send({"type": "http.response.body", "body": text, "more_body": True})
                    # Sending waits while the reader is slow: what happens meanwhile waits in the ring, for a while.
                    if self._streams.draining:
                        break
                    entries = await stream.read(KEEP_ALIVE_SECONDS)
                    if entries is None:
                        break
                    text = b"".join(map(_event, entries)) or f": keep-alive\nid: {stream.id}\n\n".encode()
                await send({"type": "http.response.body", "body": b""})
            finally:
                gone.remove_done_callback(leave)


def _event(entry: Entry) -> bytes:
    what = entry.what
    if isinstance(what, Reset):
        name, data = "reset", encode({"reason": what.reason})
    else:
        name = what.name
        at = datetime.fromtimestamp(what.at, UTC)
        data = encode(EventData(what.job_id, what.queue, what.type, what.state, at))
    return b"id: %b\nevent: %b\ndata: %b\n\n" % (entry.id.encode(), name.encode(), data)


def waits(request: Request) -> bool:
    """Whether a request lasts as long as it chooses to wait, and so says nothing of our speed."""
    return "wait_seconds" in request.query_params or request.url.path == EVENTS_PATH


def router(service: Service) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(default_response_class=Response)

    @routes.get(
        "/jobs/{job_id}",
        tags=["Inspect"],
        summary="Show a job",
        description=(
            "With `wait_seconds` the answer waits until the job has ended (`completed`, `failed`, `cancelled` or"
            " `expired`), or until the time is up: look at `state`."
        ),
        openapi_extra=answers(JobReply, "The job as it stands.", "not_found", "invalid"),
    )
    async def show_job(job_id: JobId, query: Annotated[ShowQuery, Query()], request: Request) -> Response:
        asked = job_id_of(job_id)
        if query.wait_seconds == 0:
            return json_response(JobReply.of(await service.job(asked)))
        job = await service.watching.ended(asked, query.wait_seconds, request.scope[GONE])
        return json_response(JobReply.of(job))

    @routes.get(
        "/jobs/{job_id}/explain",
        tags=["Inspect"],
        summary="Explain why a job is not running",
        description=(
            "In words, for people, and in data: each reason has a `code`, and the facts that go with it. The first one is"
            " what holds the job now, the others would hold it then. An active job's reason says who has it, one that"
            " has ended how."
        ),
        openapi_extra=answers(ExplainReply, "Why it is not running.", "not_found"),
    )
    async def explain_job(job_id: JobId) -> Response:
        asked = job_id_of(job_id)
        state, reasons = await service.explaining.explain(asked)
        return json_response(
            ExplainReply(
                asked, state, [ReasonReply(each.code, each.message, **each.facts) for each in reasons]
            )
        )

    @routes.get(
        EVENTS_PATH,
        tags=["Inspect"],
        summary="Listen to what happens to jobs",
        description=(
            "Server-sent events: `job.enqueued`, `job.leased`, `job.progress`, `job.completed`, `job.retry`,"
            " `job.released`, `job.failed`, `job.cancelled`, `job.expired`, `job.replaced`, each with `id`, `queue`, `type`, `state`"
            " and `at` as JSON. They are hints, not a log: where something is missing an event `reset` says so, and"
            " whoever needs to know looks for himself. A comment comes every 15 seconds when nothing else does."
        ),
        openapi_extra=answers(EventText, "Events, as they happen.", "invalid"),
    )
    async def listen(
        query: Annotated[EventsQuery, Query()],
        last_event_id: Annotated[
            str | None, Header(description="the id of the last event that was received, to go on from there")
        ] = None,
    ) -> Response:
        return EventStream(service.streams, query.to_wanted(), last_event_id)

    return routes
