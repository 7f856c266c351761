"""Queues as a whole: their policies, and what operators do with them."""

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Response
from msgspec import Meta, Struct
from pydantic import BaseModel, ConfigDict, Field

from app.api import cursors
from app.api.answers import answers, json_response
from app.api.operate import LIMIT_DEFAULT, LIMIT_MAX
from app.api.schemas import (
    YEAR_SECONDS,
    BackoffBody,
    DelaySeconds,
    ExpiresInSeconds,
    LeaseSeconds,
    MaxRetries,
    Name,
    Priority,
    TimeoutSeconds,
    check_name,
    is_name,
    priority_of,
)
from app.api.thin import Call, Operation, Reply, encode
from app.engine.queues import QueueShown
from app.engine.service import Service
from app.queue.errors import QueueNotFoundError
from app.queue.model import NOTHING_NAMED, JobPolicy, QueuePolicy

TYPES_MAX = 200
RETENTION_SECONDS_MIN = 60
"""So long a worker may repeat an ack whose answer was lost, and be told that the job is done."""

Retention = Annotated[float, Meta(ge=RETENTION_SECONDS_MIN, le=YEAR_SECONDS)]


class JobPolicyBody(Struct, forbid_unknown_fields=True):
    """What jobs get that name nothing themselves; null leaves it to the next layer."""

    priority: Priority | None = None
    delay_seconds: (
        Annotated[DelaySeconds, Meta(description="of jobs that name neither run_at nor delay_seconds")] | None
    ) = None
    lease_seconds: LeaseSeconds | None = None
    timeout_seconds: TimeoutSeconds | None = None
    max_retries: MaxRetries | None = None
    backoff: BackoffBody | None = None
    expires_in_seconds: (
        Annotated[ExpiresInSeconds, Meta(description="start deadline, counted from when the job may start")]
        | None
    ) = None
    dead_letter_queue: Name | None = None

    def to_policy(self, field: str = "") -> JobPolicy:
        """Translate it for the queue. Raises InvalidRequestError for what the schema can not say."""
        if self.dead_letter_queue is not None:
            check_name(f"{field}dead_letter_queue", self.dead_letter_queue)
        return JobPolicy(**self._named())

    def _named(self) -> dict[str, Any]:
        return {
            "priority": priority_of(self.priority),
            "delay_seconds": self.delay_seconds,
            "lease_seconds": self.lease_seconds,
            "timeout_seconds": self.timeout_seconds,
            "max_retries": self.max_retries,
            "backoff": NOTHING_NAMED if self.backoff is None else self.backoff.to_request(),
            "expires_in_seconds": self.expires_in_seconds,
            "dead_letter_queue": self.dead_letter_queue,
        }


class PolicyBody(JobPolicyBody):
    """A queue's whole policy: what is not named, or null, is the default."""

    types: (
        Annotated[
            dict[Name, JobPolicyBody],
            Meta(
                max_length=TYPES_MAX, description="the same for the jobs of one type: goes before the queue's"
            ),
        ]
        | None
    ) = None
    retention_seconds: Annotated[Retention, Meta(description="how long completed jobs are kept")] | None = (
        None
    )
    dead_retention_seconds: (
        Annotated[Retention, Meta(description="how long failed, cancelled and expired jobs are kept")] | None
    ) = None
    keep_payload: (
        Annotated[bool, Meta(description="whether completed jobs keep payload, tags and metadata; else true")]
        | None
    ) = None

    def to_queue_policy(self) -> QueuePolicy:
        """Translate it for the queue. Raises InvalidRequestError for what the schema can not say."""
        self.to_policy()
        for name in self.types or ():
            check_name("types", name)
        return QueuePolicy(
            **self._named(),
            types={name: each.to_policy(f"types.{name}.") for name, each in (self.types or {}).items()},
            retention_seconds=self.retention_seconds,
            dead_retention_seconds=self.dead_retention_seconds,
            keep_payload=self.keep_payload is not False,
        )

    @classmethod
    def of(cls, policy: QueuePolicy) -> "PolicyBody":
        """Translate a queue's policy: into what PUT takes."""
        return cls(
            **_named_by(policy),
            types={name: JobPolicyBody(**_named_by(each)) for name, each in policy.types.items()},
            retention_seconds=policy.retention_seconds,
            dead_retention_seconds=policy.dead_retention_seconds,
            keep_payload=policy.keep_payload,
        )


class QueueBody(PolicyBody):
    """A queue's whole policy, and whether it is paused."""

    paused: Annotated[bool, Meta(description="whether leases pass it over; else as it is")] | None = None


class QueueReply(Struct):
    """A queue as it stands."""

    name: str
    paused: Annotated[bool, Meta(description="whether leases pass it over")]
    policy: Annotated[PolicyBody, Meta(description="in the form that PUT takes; null is the default")]
    jobs: Annotated[dict[str, int], Meta(description="how many are kept, as in /stats")]
    oldest_ready_seconds: Annotated[float, Meta(description="how long its oldest ready job waits")] | None

    @classmethod
    def of(cls, shown: QueueShown) -> "QueueReply":
        """Translate a queue."""
        return cls(
            name=shown.queue.name,
            paused=shown.queue.paused,
            policy=PolicyBody.of(shown.queue.policy),
            jobs=shown.jobs,
            oldest_ready_seconds=shown.oldest_ready_seconds,
        )


class QueuesReply(Struct):
    """A page of queues, by their names."""

    queues: list[QueueReply]
    next_cursor: Annotated[str, Meta(description="where the next page begins; null at the end")] | None


class PurgeReply(Struct):
    """What a purge did."""

    matched: int
    changed: int
    more: Annotated[bool, Meta(description="it has taken its time, some 20 seconds: call again to go on")]


class QueuesQuery(BaseModel):
    """Which queues to list."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(default=LIMIT_DEFAULT, ge=1, le=LIMIT_MAX)
    cursor: str | None = Field(default=None, max_length=256, description="`next_cursor` of the page before")


QueueName = Annotated[str, Path(description="the queue's name")]


def operations(service: Service) -> list[Operation]:
    """Return the routes with a body."""

    async def put(call: Call, body: QueueBody) -> Reply:
        name = call.path("name")
        check_name("name", name)
        shown, created = await service.queues.put(name, body.to_queue_policy(), paused=body.paused)
        headers = ((b"location", f"/queues/{name}".encode()),) if created else ()
        return Reply(encode(QueueReply.of(shown)), 201 if created else 200, headers)

    return [
        Operation(
            path="/queues/{name}",
            name="put_queue",
            tag="Operate",
            summary="Give a queue its policy",
            description=(
                "Replaces the policy as a whole, and makes the queue where there is none. In force in all processes"
                " within a second, for jobs enqueued from then on: what a job has got at its enqueue stays."
            ),
            request=QueueBody,
            reply=QueueReply,
            statuses={200: "The queue as it stands now.", 201: "The queue is made; `Location` names it."},
            problems=(),
            example={
                "max_retries": 5,
                "backoff": {"initial_seconds": 10},
                "types": {"fix": {"priority": "fast"}},
            },
            handle=put,
            method="PUT",
        )
    ]


def router(service: Service) -> APIRouter:
    """Return the routes without one."""
    routes = APIRouter(default_response_class=Response)

    @routes.get(
        "/queues",
        tags=["Inspect"],
        summary="List queues by name",
        description="All that have a policy, or a job of any state.",
        openapi_extra=answers(QueuesReply, "A page.", "invalid"),
    )
    async def list_queues(query: Annotated[QueuesQuery, Query()]) -> Response:
        shown, last = await service.queues.page(query.limit, cursors.read_name(query.cursor, is_name))
        return json_response(
            QueuesReply(
                [QueueReply.of(each) for each in shown],
                None if last is None else cursors.write(last.encode()),
            )
        )

    @routes.get(
        "/queues/{name}",
        tags=["Inspect"],
        summary="Show a queue",
        openapi_extra=answers(QueueReply, "The queue as it stands.", "not_found"),
    )
    async def show_queue(name: QueueName) -> Response:
        return json_response(QueueReply.of(await service.queues.queue(known(name))))

    @routes.delete(
        "/queues/{name}",
        tags=["Operate"],
        summary="Delete a queue that has no jobs",
        description="Its policy goes. Where queues appear on first use, its next job makes it anew, with no policy.",
        status_code=204,
        openapi_extra=answers(None, "It is gone.", "not_found", "queue_not_empty"),
    )
    async def delete_queue(name: QueueName) -> Response:
        await service.queues.delete(known(name))
        return Response(status_code=204)

    @routes.post(
        "/queues/{name}/pause",
        tags=["Operate"],
        summary="Pause a queue",
        description=(
            "Leases pass it over; jobs still come in, and what is leased goes on. Makes the queue where there is none."
        ),
        openapi_extra=answers(QueueReply, "The queue as it stands now.", "invalid"),
    )
    async def pause_queue(name: QueueName) -> Response:
        check_name("name", name)
        return json_response(QueueReply.of(await service.queues.pause(name)))

    @routes.post(
        "/queues/{name}/resume",
        tags=["Operate"],
        summary="Resume a queue",
        description="Leases that wait get its jobs at once, in all processes. Makes the queue where there is none.",
        openapi_extra=answers(QueueReply, "The queue as it stands now.", "invalid"),
    )
    async def resume_queue(name: QueueName) -> Response:
        check_name("name", name)
        return json_response(QueueReply.of(await service.queues.resume(name)))

    @routes.post(
        "/queues/{name}/purge",
        tags=["Operate"],
        summary="Remove all that waits or is delayed in a queue",
        description=(
            "Jobs that are `ready`, `held`, `scheduled` or in `retry` go, with their attempts and unique keys; active"
            " ones and those that have ended stay. In steps: what is removed when the call ends early stays removed."
            " After some 20 seconds it answers what it has done so far, with `more`."
        ),
        openapi_extra=answers(PurgeReply, "How many jobs were there, and are removed.", "not_found"),
    )
    async def purge_queue(name: QueueName) -> Response:
        purged = await service.queues.purge(known(name))
        return json_response(PurgeReply(purged.removed, purged.removed, purged.more))

    return routes


def known(name: str) -> str:
    """Return the name if a queue can have it. Raises QueueNotFoundError."""
    if not is_name(name):
        raise QueueNotFoundError
    return name


def _named_by(policy: JobPolicy) -> dict[str, Any]:
    backoff = policy.backoff
    return {
        "priority": policy.priority,
        "delay_seconds": policy.delay_seconds,
        "lease_seconds": policy.lease_seconds,
        "timeout_seconds": policy.timeout_seconds,
        "max_retries": policy.max_retries,
        "backoff": None if backoff == NOTHING_NAMED else BackoffBody(**asdict(backoff)),
        "expires_in_seconds": policy.expires_in_seconds,
        "dead_letter_queue": policy.dead_letter_queue,
    }
