"""What operators ask of jobs that have failed: why, in groups. FastAPI's own routes."""

from datetime import datetime
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Response
from msgspec import Meta, Struct

from app.api.answers import answers, json_response
from app.api.queues import QueueName, known
from app.engine.service import Service
from app.queue.model import FailureGroup


class FailureGroupReply(Struct):
    """Failed jobs whose last errors are alike."""

    error_group: Annotated[str, Meta(description="names them in filters and for a redrive")]
    type: Annotated[str, Meta(description="of the errors")] | None
    message: Annotated[str, Meta(description="of the sample's error: numbers, ids and the like differ")]
    count: int
    first_at: Annotated[datetime, Meta(description="when the first of those that are kept failed")]
    last_at: datetime
    sample_job_id: Annotated[UUID, Meta(description="the youngest of them")]

    @classmethod
    def of(cls, group: FailureGroup) -> "FailureGroupReply":
        """Translate a group."""
        return cls(
            error_group=group.error_group,
            type=group.type,
            message=group.message,
            count=group.count,
            first_at=group.first_at,
            last_at=group.last_at,
            sample_job_id=group.sample_job_id,
        )


class FailuresReply(Struct):
    """A queue's failed jobs by what went wrong, the largest group first."""

    groups: list[FailureGroupReply]


def router(service: Service) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(default_response_class=Response)

    @routes.get(
        "/queues/{name}/failures",
        tags=["Inspect"],
        summary="Group a queue's failed jobs by error",
        description=(
            "A group has the errors of one type whose messages differ in numbers, ids and quoted text only. At most"
            " 1,000 groups; none for a queue that nobody knows."
        ),
        openapi_extra=answers(FailuresReply, "The groups, the largest first.", "not_found"),
    )
    async def list_failures(name: QueueName) -> Response:
        groups = await service.failures(known(name))
        return json_response(FailuresReply([FailureGroupReply.of(group) for group in groups]))

    return routes
