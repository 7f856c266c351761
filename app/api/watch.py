"""What people ask who watch jobs: how one stands, or what becomes of it."""

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from app.api.answers import answers, json_response
from app.api.operate import JobId
from app.api.protocol import GONE
from app.api.schemas import JobReply
from app.api.thin import job_id_of
from app.engine.service import Service

WAIT_SECONDS_MAX = 30


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


def waits(request: Request) -> bool:
    """Whether a request lasts as long as it chooses to wait, and so says nothing of our speed."""
    return "wait_seconds" in request.query_params


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

    return routes
