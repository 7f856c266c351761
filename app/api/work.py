"""The producers' and workers' verbs: enqueue, lease, heartbeat, ack, fail, release. All thin routes."""

from http import HTTPStatus
from uuid import UUID

from msgspec import UNSET

from app.api import problems
from app.api.idempotency import idempotency_key
from app.api.schemas import (
    AckBody,
    EnqueueBody,
    FailBody,
    HeartbeatBody,
    HeartbeatReply,
    JobReply,
    LeaseBody,
    LeasedJobReply,
    LeaseReply,
    ReleaseBody,
    SettleBody,
    SettledReply,
    SettleReply,
)
from app.api.settling import Settling, bounded, traceparent_of
from app.api.thin import Call, Operation, Reply, encode, lease_id_of
from app.engine.service import Service
from app.queue.errors import UnavailableError
from app.queue.model import Directive

_EXAMPLE_LEASE_ID = "7f3d2c52-7a4e-4a2b-9d6e-0d8b2a2f6c11"
_EXAMPLE_JOB_ID = "0198f2c1-9a4e-7c3d-8f21-5b6a7c8d9e0f"
_NOTHING_CHANGES = (
    " A lease that does not stand any more is answered with 409 `lease_lost`, and nothing changes."
)
_REPEATABLE = " The same call again gets the answer that was recorded."


class Work:
    """The handlers of the thin routes."""

    def __init__(self, service: Service, payload_bytes_max: int) -> None:
        self._service = service
        self._settling = Settling(service, payload_bytes_max)
        self._payload_bytes_max = payload_bytes_max

    async def enqueue(self, call: Call, body: EnqueueBody) -> Reply:
        """Answer `POST /jobs`."""
        wanted = body.to_request(traceparent_of(call))
        bounded("payload", wanted.payload, self._payload_bytes_max)
        key = idempotency_key(call, "/jobs")
        if key is None and wanted.unique is None:
            job = await self._service.enqueue(wanted)
            return Reply(encode(JobReply.of(job)), 201, (_location(job.id),))
        job, duplicate, replaced = await self._service.once.enqueue(wanted, key)
        reply = JobReply.of(job, duplicate=duplicate, replaced=replaced)
        return Reply(encode(reply), 200 if duplicate else 201, (_location(job.id),))

    async def lease(self, call: Call, body: LeaseBody) -> Reply:
        """Answer `POST /lease`: first settle, then lease."""
        wanted = body.to_request()
        settled = None

        def directive() -> Directive:
            return self._service.workers.directive(wanted.worker)

        if body.settle:
            settled = await self._settling.settle(call, body.settle, "settle")
        if settled is not None and any(item.status != HTTPStatus.OK for item in settled):
            wanted = wanted._replace(wait_seconds=0)
        try:
            leased = await self._service.lease(wanted, call.gone)
        except Exception as error:
            if settled is None:
                raise
            # What is settled is committed: the worker must learn of it.
            again = 1
            if isinstance(error, UnavailableError):
                again = error.retry_after_seconds
            else:
                problems.unexpected(call.request_id, "/lease", error)
            return Reply(encode(LeaseReply([], directive(), settled, again)))
        return Reply(encode(LeaseReply([LeasedJobReply.of(job) for job in leased], directive(), settled)))

    async def settle(self, call: Call, body: SettleBody) -> Reply:
        """Answer `POST /settle`."""
        return Reply(encode(SettleReply(await self._settling.settle(call, body.items))))

    async def heartbeat(self, call: Call, body: HeartbeatBody) -> Reply:
        """Answer a job's `heartbeat`."""
        heartbeat = body.to_heartbeat(call.job_id, lease_id_of(body.lease_id))
        bounded("checkpoint", heartbeat.checkpoint or b"", self._payload_bytes_max)
        beat = await self._service.heartbeat(heartbeat)
        return Reply(
            encode(
                HeartbeatReply(
                    beat.lease_expires_at,
                    beat.cancel_requested,
                    self._service.workers.directive(beat.worker),
                )
            )
        )

    async def ack(self, call: Call, body: AckBody) -> Reply:
        """Answer a job's `ack`."""
        result = (
            None if body.result is UNSET else bounded("result", bytes(body.result), self._payload_bytes_max)
        )
        then = self._settling.follow_ups(body.then, traceparent_of(call))
        job = await self._service.ack(call.job_id, lease_id_of(body.lease_id), result, then)
        return Reply(encode(JobReply.of(job)))

    async def fail(self, call: Call, body: FailBody) -> Reply:
        """Answer a job's `fail`."""
        settled = await self._service.fail(call.job_id, lease_id_of(body.lease_id), body.to_failure())
        return Reply(encode(SettledReply(settled.state, settled.run_at)))

    async def release(self, call: Call, body: ReleaseBody) -> Reply:
        """Answer a job's `release`."""
        settled = await self._service.release(call.job_id, lease_id_of(body.lease_id), body.delay_seconds)
        return Reply(encode(SettledReply(settled.state, settled.run_at)))


def _location(job_id: UUID) -> tuple[bytes, bytes]:
    return b"location", f"/jobs/{job_id}".encode()


def operations(service: Service, payload_bytes_max: int) -> list[Operation]:
    """Return the thin routes."""
    work = Work(service, payload_bytes_max)
    by_lease = ("not_found", "lease_lost")
    return [
        Operation(
            path="/jobs",
            name="enqueue",
            tag="Produce",
            summary="Enqueue a job",
            description=(
                "The job is in the database, committed, before the answer is sent. With `unique`, or with the header"
                " `Idempotency-Key` (kept for 24 hours), a job that is there already is answered instead."
            ),
            request=EnqueueBody,
            reply=JobReply,
            statuses={
                200: "Another job stands for this one, and has `duplicate`; `Location` names it.",
                201: "The job is stored; `Location` names it.",
            },
            problems=("not_found", "duplicate", "idempotency_conflict", "payload_too_large"),
            example={"queue": "emails", "type": "welcome", "payload": {"to": "a@example.com"}},
            handle=work.enqueue,
            busy=True,
            headers=("traceparent", "idempotency-key"),
        ),
        Operation(
            path="/lease",
            name="lease",
            tag="Work",
            summary="Lease jobs",
            description=(
                "Waits up to `wait_seconds` for the first job, then answers at once with what there is: at most"
                " `max_jobs`, higher priority first, then those that became ready first. Nobody else gets these jobs"
                " until their leases end. When the caller goes away before its answer, nothing is leased. Asked again with"
                " the same `request_id` it answers the same leases, as far as they stand."
            ),
            request=LeaseBody,
            reply=LeaseReply,
            statuses={200: "Jobs to work on, or an empty list."},
            problems=(),
            example={"queues": ["emails"], "worker": "mailer-1"},
            handle=work.lease,
            busy=True,
            takes_many=True,
        ),
        Operation(
            path="/settle",
            name="settle",
            tag="Work",
            summary="Settle many jobs",
            description=(
                "Acks, failures, releases and heartbeats of up to 1,000 jobs in one transaction, each job named once."
                " A bad item fails alone; the results keep the order of the items. `lease` takes the same list as"
                " `settle`, and answers both in one round trip."
            ),
            request=SettleBody,
            reply=SettleReply,
            statuses={200: "What came of each item."},
            problems=(),
            example={"items": [{"job_id": _EXAMPLE_JOB_ID, "lease_id": _EXAMPLE_LEASE_ID, "outcome": "ack"}]},
            handle=work.settle,
            busy=True,
            takes_many=True,
        ),
        Operation(
            path="/jobs/{job_id}/ack",
            name="ack",
            tag="Work",
            summary="Finish a job",
            description=(
                "The job is done. The jobs in `then` (up to 100) are enqueued in the same transaction: all of it happens"
                " or nothing." + _REPEATABLE + _NOTHING_CHANGES
            ),
            request=AckBody,
            reply=JobReply,
            statuses={200: "The job is `completed`."},
            problems=(*by_lease, "duplicate", "payload_too_large"),
            takes_many=True,
            example={"lease_id": _EXAMPLE_LEASE_ID, "result": {"sent": True}},
            handle=work.ack,
            busy=True,
        ),
        Operation(
            path="/jobs/{job_id}/heartbeat",
            name="heartbeat",
            tag="Work",
            summary="Extend a lease",
            description=(
                "Sets the lease's end to the later of the present one and now plus `extend_seconds`, never past the"
                " job's `timeout_seconds`. Tells whether someone wants the job cancelled. `progress` is shown with the"
                " job; `checkpoint` is handed to the attempt after this one, should there be any."
                + _NOTHING_CHANGES
            ),
            request=HeartbeatBody,
            reply=HeartbeatReply,
            statuses={200: "The lease stands."},
            problems=(*by_lease, "payload_too_large"),
            example={"lease_id": _EXAMPLE_LEASE_ID},
            handle=work.heartbeat,
            busy=True,
        ),
        Operation(
            path="/jobs/{job_id}/fail",
            name="fail",
            tag="Work",
            summary="Report a failed attempt",
            description=(
                "The job is retried after its backoff (`retry`), or is a dead letter (`failed`) when its retries are"
                " used up or `retry` is false." + _REPEATABLE + _NOTHING_CHANGES
            ),
            request=FailBody,
            reply=SettledReply,
            statuses={200: "What became of the job."},
            problems=by_lease,
            example={
                "lease_id": _EXAMPLE_LEASE_ID,
                "error": {"type": "SmtpError", "message": "connection refused"},
            },
            handle=work.fail,
            busy=True,
        ),
        Operation(
            path="/jobs/{job_id}/release",
            name="release",
            tag="Work",
            summary="Give a job back",
            description=(
                "The job is `ready` again at its old place in line, or `scheduled` after `delay_seconds`; the attempt"
                " is not counted." + _REPEATABLE + _NOTHING_CHANGES
            ),
            request=ReleaseBody,
            reply=SettledReply,
            statuses={200: "What became of the job."},
            problems=by_lease,
            example={"lease_id": _EXAMPLE_LEASE_ID},
            handle=work.release,
            busy=True,
        ),
    ]
