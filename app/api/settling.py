"""Reading a list of settled jobs: each item is decoded, checked and answered by itself."""

import asyncio
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from uuid import UUID

import msgspec

from app.api.body import validated
from app.api.problems import RequestError, problem_of
from app.api.schemas import AckItem, EnqueueBody, FailItem, HeartbeatItem, Item, ReleaseItem, SettledItem
from app.api.thin import Call, job_id_of, lease_id_of
from app.engine.service import Said, Service, failed, released
from app.queue.errors import InvalidRequestError, JobNotFoundError, QueueError
from app.queue.lifecycle import State
from app.queue.model import Ack, Beat, Done, Job, JobRequest, Settled, Word

_DECODER = msgspec.json.Decoder(Item)
_JOB = msgspec.json.Decoder(EnqueueBody)
FOLLOW_UPS_IN_ALL_MAX = 10_000
FOLLOW_UPS_MAX = 300
"""A call that brings more waits for a batch's turn."""
SLICE = 100
"""So many follow-ups are read before others have their turn."""


def bounded(field: str, value: bytes, bytes_max: int) -> bytes:
    """Return `value`. Raises RequestError when it is too large."""
    if len(value) > bytes_max:
        raise RequestError("payload_too_large", f"{field} may have at most {bytes_max} bytes.")
    return value


def read_job(text: bytes, traceparent: str | None, payload_bytes_max: int) -> JobRequest:
    """Return the job that a text which `check_json` has seen asks for. Raises InvalidRequestError, RequestError."""
    wanted = validated(_JOB, text).to_request(traceparent)
    bounded("payload", wanted.payload, payload_bytes_max)
    return wanted


def traceparent_of(call: Call) -> str | None:
    """Return the request's header of that name, as it came."""
    value = call.headers.get(b"traceparent")
    return None if value is None else value.decode("latin-1")


class _Named(msgspec.Struct):
    job_id: str = ""


_NAMED = msgspec.json.Decoder(_Named)
NAME_SHOWN_MAX = 100


class Settling:
    """Answers lists of items."""

    def __init__(self, service: Service, payload_bytes_max: int) -> None:
        self._service = service
        self._payload_bytes_max = payload_bytes_max

    async def settle(
        self, call: Call, items: Sequence[msgspec.Raw], field: str = "items"
    ) -> list[SettledItem]:
        """Take all items; return what came of each, in order. Raises InvalidRequestError when two name one job.

        `field` is where the items stand in the body.
        """
        read: list[tuple[str, Item | QueueError]] = []
        for raw in items:
            try:
                item = validated(_DECODER, bytes(raw))
            except QueueError as error:
                read.append((_name_in(raw), error))
            else:
                read.append((item.job_id, item))
        _check_once(field, [job_id for job_id, _ in read])
        following = sum(len(item.then) for _, item in read if isinstance(item, AckItem))
        if following > FOLLOW_UPS_IN_ALL_MAX:
            raise InvalidRequestError(field, f"may bring at most {FOLLOW_UPS_IN_ALL_MAX} follow-ups in all")
        # So many jobs are a batch, whatever else the call says.
        async with self._service.once.turn() if following > FOLLOW_UPS_MAX else nullcontext():
            answers = await self._answers([item for _, item in read], traceparent_of(call))
        return [
            self._result(call.request_id, job_id, answer)
            for (job_id, _), answer in zip(read, answers, strict=True)
        ]

    async def _answers(
        self, items: Sequence[Item | QueueError], traceparent: str | None
    ) -> list[Said | QueueError]:
        """Say what all items say; what is an error already is passed on."""
        words: list[Word] = []
        refused: dict[UUID, QueueError] = {}
        said: list[Word | QueueError] = []
        following = 0
        for item in items:
            if isinstance(item, QueueError):
                said.append(item)
                continue
            if isinstance(item, AckItem) and (following := following + len(item.then)) >= SLICE:
                following = 0
                await asyncio.sleep(0)
            try:
                word, error = await self._word(item, traceparent)
            except QueueError as problem:
                said.append(problem)
                continue
            words.append(word)
            said.append(word)
            if error is not None:
                refused[word.job_id] = error
        answers = iter(await self._service.settle(words, refused)) if words else iter(())
        return [each if isinstance(each, QueueError) else next(answers) for each in said]

    def follow_ups(self, texts: Sequence[msgspec.Raw], traceparent: str | None) -> list[JobRequest]:
        """Return the jobs that an ack brings. Raises InvalidRequestError, RequestError for the first bad one."""
        jobs = []
        for number, text in enumerate(texts):
            try:
                jobs.append(read_job(bytes(text), traceparent, self._payload_bytes_max))
            except InvalidRequestError as error:
                place = f"then[{number}]"
                raise InvalidRequestError(
                    place if error.field == "body" else f"{place}.{error.field}", error.message
                ) from None
        return jobs

    async def _word(self, item: Item, traceparent: str | None) -> tuple[Word, QueueError | None]:
        """Return an item's word, and why it can not be taken now. Raises QueueError for what never could."""
        job_id, lease_id = job_id_of(item.job_id), lease_id_of(item.lease_id)
        match item:
            case AckItem():
                result = None if item.result is msgspec.UNSET else bytes(item.result)
                if result is not None:
                    bounded("result", result, self._payload_bytes_max)
                then, error = await self._service.follow_ups(self.follow_ups(item.then, traceparent))
                return Ack(job_id, lease_id, result, shown=False, then=then), error
            case FailItem():
                return failed(job_id, lease_id, item.to_failure()), None
            case ReleaseItem():
                return released(job_id, lease_id, item.delay_seconds), None
            case HeartbeatItem():
                heartbeat = item.to_heartbeat(job_id, lease_id)
                bounded("checkpoint", heartbeat.checkpoint or b"", self._payload_bytes_max)
                return heartbeat, None

    def _result(self, request_id: str, job_id: str, answer: Said | QueueError) -> SettledItem:
        if isinstance(answer, QueueError):
            problem = problem_of(request_id, answer)
            return SettledItem(job_id, problem.status, error=problem)
        if isinstance(answer, Beat):
            return SettledItem(
                job_id,
                200,
                state=State.ACTIVE,
                lease_expires_at=answer.lease_expires_at,
                cancel_requested=answer.cancel_requested,
                directive=self._service.workers.directive(answer.worker),
            )
        if isinstance(answer, Job | Done):
            return SettledItem(job_id, 200, state=State.COMPLETED, then=list(answer.then) or None)
        then = list(answer.then) or None if isinstance(answer, Settled) else None
        return SettledItem(job_id, 200, state=answer.state, run_at=answer.run_at, then=then)


def _check_once(field: str, job_ids: Sequence[str]) -> None:
    """Raise InvalidRequestError when two items name one job, be they good or bad."""
    named = []
    for job_id in job_ids:
        with suppress(JobNotFoundError):
            named.append(job_id_of(job_id))
    if len(set(named)) < len(named):
        raise InvalidRequestError(field, "must name each job once")


def _name_in(raw: msgspec.Raw) -> str:
    """Return the job that a refused item names, as far as that can be read."""
    try:
        return _NAMED.decode(bytes(raw)).job_id[:NAME_SHOWN_MAX]
    except msgspec.MsgspecError:
        return ""
