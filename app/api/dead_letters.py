"""What operators ask of jobs that have failed: why, in groups, and to go back where they came from."""

from datetime import datetime
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Response
from msgspec import Meta, Struct

from app.api.answers import answers, json_response
from app.api.queues import QueueName, known
from app.api.schemas import Name, check_name
from app.api.thin import Call, Operation, Reply, encode
from app.engine.redriving import Redrive
from app.engine.service import Service
from app.queue.errors import InvalidRequestError
from app.queue.groups import is_error_group
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


class RedriveBody(Struct, forbid_unknown_fields=True):
    """Which dead letters to send back, and where."""

    error_group: Annotated[str, Meta(description="only those of this group, of `failures`")] | None = None
    limit: Annotated[int, Meta(ge=1, le=1_000_000, description="at most so many")] | None = None
    to: Annotated[Name, Meta(description="another queue, instead of where each comes from")] | None = None

    def to_redrive(self, queue: str) -> Redrive:
        """Translate it for the queue. Raises InvalidRequestError for what the schema can not say."""
        if self.to is not None:
            check_name("to", self.to)
        if self.error_group is not None and not is_error_group(self.error_group):
            raise InvalidRequestError("error_group", "is not the name of a group")
        return Redrive(queue, self.error_group, self.limit, self.to)


class RedriveReply(Struct):
    """What a redrive has done."""

    matched: Annotated[int, Meta(description="how many dead letters it found")]
    changed: Annotated[
        int, Meta(description="how many went back: not those whose unique key another job has taken")
    ]
    more: Annotated[
        bool, Meta(description="whether it ended at `limit`, or after some 20 seconds: there may be more")
    ]


def operations(service: Service) -> list[Operation]:
    """Return the thin routes."""

    async def redrive(call: Call, body: RedriveBody) -> Reply:
        done = await service.redriving.redrive(body.to_redrive(known(call.path("name"))))
        return Reply(encode(RedriveReply(*done)))

    return [
        Operation(
            path="/queues/{name}/redrive",
            name="redrive",
            tag="Operate",
            summary="Send dead letters back",
            description=(
                "The queue's failed jobs are retried. Copies that are ready in it go home: their originals are retried"
                " and the copies removed, each in one transaction; where an original is gone, its copy becomes a new job"
                " in the queue that it came from. With `to` all of them go to another queue instead, keeping id and"
                " history. Works in short steps; what comes in meanwhile is left."
            ),
            request=RedriveBody,
            reply=RedriveReply,
            statuses={200: "What has been done."},
            problems=("not_found",),
            example={"limit": 100},
            handle=redrive,
            body_is_optional=True,
        ),
    ]


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
