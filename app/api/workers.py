"""Workers as a whole: who they are, and what operators tell them."""

from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Path, Query, Response
from msgspec import Meta, Struct
from pydantic import BaseModel, ConfigDict, Field

from app.api import cursors
from app.api.answers import answers, json_response
from app.api.operate import LIMIT_DEFAULT, LIMIT_MAX
from app.api.schemas import WORKER_LENGTH_MAX, DirectiveShown, is_clean
from app.engine.service import Service
from app.queue.errors import WorkerNotFoundError
from app.queue.model import Directive, Worker


class WorkerReply(Struct):
    """A worker, as known from its leases and heartbeats."""

    name: str
    queues: Annotated[list[str], Meta(description="what its leases ask for")]
    types: Annotated[list[str], Meta(description="null: all")] | None
    active: Annotated[int, Meta(description="how many leases it holds")]
    first_seen_at: datetime
    last_seen_at: datetime
    directive: DirectiveShown

    @classmethod
    def of(cls, worker: Worker) -> "WorkerReply":
        """Translate a worker."""
        return cls(
            name=worker.name,
            queues=list(worker.queues),
            types=None if worker.types is None else list(worker.types),
            active=worker.active,
            first_seen_at=worker.first_seen_at,
            last_seen_at=worker.last_seen_at,
            directive=worker.directive,
        )


class WorkersReply(Struct):
    """A page of workers, by their names."""

    workers: list[WorkerReply]
    next_cursor: Annotated[str, Meta(description="where the next page begins; null at the end")] | None


class WorkersQuery(BaseModel):
    """Which workers to list."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(default=LIMIT_DEFAULT, ge=1, le=LIMIT_MAX)
    cursor: str | None = Field(default=None, max_length=2048, description="`next_cursor` of the page before")


Name = Annotated[str, Path(description="the worker's name, as its leases tell it")]

_KNOWN = " Only workers that were heard of in the last day are known."


def router(service: Service) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(default_response_class=Response)

    @routes.get(
        "/workers",
        tags=["Inspect"],
        summary="List workers by name",
        description=(
            "Who was heard of in the last day, by a lease that names its `worker` or by a heartbeat; written down"
            " every two seconds."
        ),
        openapi_extra=answers(WorkersReply, "A page.", "invalid"),
    )
    async def list_workers(query: Annotated[WorkersQuery, Query()]) -> Response:
        workers, last = await service.workers.page(query.limit, cursors.read_name(query.cursor, _may_be))
        shown = [WorkerReply.of(worker) for worker in workers]
        return json_response(WorkersReply(shown, None if last is None else cursors.write(last.encode())))

    async def direct(name: str, directive: Directive) -> Response:
        if not is_clean(name):
            raise WorkerNotFoundError
        return json_response(WorkerReply.of(await service.workers.direct(name, directive)))

    # A worker's name may have a slash in it.
    @routes.post(
        "/workers/{name:path}/quiet",
        tags=["Operate"],
        summary="Let a worker take no more jobs",
        description=(
            "Its leases are answered empty, the waiting ones at once; what it holds it may finish. Its lease replies and"
            " heartbeats carry the directive." + _KNOWN
        ),
        openapi_extra=answers(WorkerReply, "The worker as it stands now.", "not_found"),
    )
    async def quiet_worker(name: Name) -> Response:
        return await direct(name, Directive.QUIET)

    @routes.post(
        "/workers/{name:path}/terminate",
        tags=["Operate"],
        summary="Let a worker end",
        description="As `quiet`, and its lease replies and heartbeats ask it to end when its jobs are done."
        + _KNOWN,
        openapi_extra=answers(WorkerReply, "The worker as it stands now.", "not_found"),
    )
    async def terminate_worker(name: Name) -> Response:
        return await direct(name, Directive.TERMINATE)

    @routes.post(
        "/workers/{name:path}/resume",
        tags=["Operate"],
        summary="Let a worker go on",
        openapi_extra=answers(WorkerReply, "The worker as it stands now.", "not_found"),
    )
    async def resume_worker(name: Name) -> Response:
        return await direct(name, Directive.CONTINUE)

    return routes


def _may_be(name: str) -> bool:
    return bool(name) and is_clean(name) and len(name) <= WORKER_LENGTH_MAX
