"""Many jobs at once: `POST /jobs/batch`, as JSON or as a job a line."""

import asyncio
import re
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal
from urllib.parse import parse_qs
from uuid import UUID

from msgspec import Meta, Raw, Struct

from app.api.body import check_json
from app.api.idempotency import idempotency_key
from app.api.problems import problem_of
from app.api.schemas import EnqueueBody, Problem
from app.api.settling import read_job, traceparent_of
from app.api.thin import Call, Operation, Reply, encode
from app.engine.once import Item
from app.engine.service import Service
from app.queue.errors import InvalidRequestError, QueueError
from app.queue.lifecycle import State
from app.queue.model import JobRequest

JOBS_MAX = 10_000
SLICE = 100
"""So many jobs are read before others have their turn: a few milliseconds' work."""

# Blank lines are passed over by whole stretches: a body may be nothing but line breaks.
_LINE = re.compile(rb"[ \t\r\n]*+([^\n]++)")


class BatchBody(Struct, forbid_unknown_fields=True):
    """Jobs to store."""

    jobs: Annotated[list[Raw], Meta(min_length=1, max_length=JOBS_MAX, description="each as in POST /jobs")]
    """Decoded one by one: a bad one fails alone."""
    atomic: Annotated[bool, Meta(description="all of them or none")] = False


class BatchItem(Struct, omit_defaults=True):
    """What came of one job: its `status` is that of POST /jobs by itself."""

    status: int
    id: UUID | None = None
    state: State | None = None
    duplicate: Annotated[Literal[True], Meta(description="the job was there before")] | None = None
    replaced: Annotated[Literal[True], Meta(description="that job has these fields now")] | None = None
    error: Problem | None = None


class BatchReply(Struct):
    """What came of each job, in order."""

    results: list[BatchItem]


class Batches:
    """The handler."""

    def __init__(self, service: Service, payload_bytes_max: int) -> None:
        self._once = service.once
        self._payload_bytes_max = payload_bytes_max

    async def enqueue(self, call: Call, body: BatchBody | bytes) -> Reply:
        """Answer `POST /jobs/batch`; `body` is bytes where it has a job a line."""
        key = idempotency_key(call, "/jobs/batch")
        atomic = _atomic(call)
        async with self._once.turn():
            if isinstance(body, bytes):
                texts: Sequence[bytes | Raw] = _lines(body)
            else:
                texts, atomic = body.jobs, atomic or body.atomic
            wanted = await self._read(texts, traceparent_of(call), are_lines=isinstance(body, bytes))
            items = await self._once.batch(wanted, key, atomic=atomic)
        return Reply(encode(BatchReply([_result(call.request_id, item) for item in items])))

    async def _read(
        self, texts: Iterable[bytes | Raw], traceparent: str | None, *, are_lines: bool
    ) -> list[JobRequest | QueueError]:
        wanted: list[JobRequest | QueueError] = []
        for number, text in enumerate(texts):
            if number % SLICE == SLICE - 1:
                await asyncio.sleep(0)
            try:
                if are_lines:
                    check_json(bytes(text))
                wanted.append(read_job(bytes(text), traceparent, self._payload_bytes_max))
            except QueueError as error:
                wanted.append(error)
        return wanted


def _lines(body: bytes) -> list[bytes]:
    lines: list[bytes] = []
    for line in _LINE.finditer(body):
        if len(lines) == JOBS_MAX:
            raise InvalidRequestError("jobs", f"may be at most {JOBS_MAX}")
        lines.append(line[1])
    if not lines:
        raise InvalidRequestError("jobs", "must be at least 1")
    return lines


def _atomic(call: Call) -> bool:
    match parse_qs(call.query, keep_blank_values=True).get("atomic"):
        case None | ["false"]:
            return False
        case ["true"]:
            return True
        case _:
            raise InvalidRequestError("atomic", "must be true or false")


def _result(request_id: str, item: Item | QueueError) -> BatchItem:
    if isinstance(item, QueueError):
        problem = problem_of(request_id, item)
        return BatchItem(problem.status, error=problem)
    return BatchItem(
        200 if item.duplicate else 201,
        item.job_id,
        item.state,
        duplicate=True if item.duplicate else None,
        replaced=True if item.replaced else None,
    )


def operations(service: Service, payload_bytes_max: int) -> list[Operation]:
    """Return the thin routes."""
    return [
        Operation(
            path="/jobs/batch",
            name="enqueue_batch",
            tag="Produce",
            summary="Enqueue many jobs",
            description=(
                "Up to 10,000 jobs in one transaction; the results keep their order. A bad one fails alone, or with"
                " `atomic` all do: then nothing is stored, and the answer is 422 with what is wrong with each. As"
                " `application/x-ndjson` the body has a job a line. `Idempotency-Key` covers the whole call: a repeat"
                " gets the same ids. Too many batches at once are answered with 503."
            ),
            request=BatchBody,
            reply=BatchReply,
            statuses={200: "What came of each job."},
            problems=("idempotency_conflict",),
            example={"jobs": [{"queue": "emails", "payload": {"to": "a@example.com"}}, {"queue": "emails"}]},
            handle=Batches(service, payload_bytes_max).enqueue,
            headers=("traceparent", "idempotency-key"),
            takes_many=True,
            line=EnqueueBody,
            query={"atomic": bool},
        )
    ]
