"""Operators' verbs with a body: edit a job; retry, cancel, delete and update many by a filter. All thin routes."""

import hashlib
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, TypeVar
from uuid import UUID

from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from app.api import cursors
from app.api.schemas import (
    TAGS_MAX,
    BackoffBody,
    DelaySeconds,
    ExpiresInSeconds,
    Instant,
    JobReply,
    Json,
    LeaseSeconds,
    MaxRetries,
    Name,
    Priority,
    Tag,
    TimeoutSeconds,
    check_clean,
    check_name,
    in_utc,
    metadata_of,
    number_of,
    tags_of,
)
from app.api.settling import bounded
from app.api.thin import Call, Operation, Reply, encode, job_id_of
from app.engine.operating import Bulk, Position
from app.engine.service import Service
from app.queue.editing import KEPT, JobEdit
from app.queue.errors import InvalidRequestError, JobNotFoundError
from app.queue.events import BulkVerb
from app.queue.lifecycle import State
from app.queue.model import JobFilter

NAMES_MAX = 100
IDS_MAX = 1000
TEXT_LENGTH_MAX = 256

T = TypeVar("T")
Text = Annotated[str, Meta(max_length=TEXT_LENGTH_MAX)]
# An empty list is more likely a caller's slip than a wish for all.
Names = Annotated[list[Name], Meta(min_length=1, max_length=NAMES_MAX, description="any of them")]


class EditBody(Struct, forbid_unknown_fields=True):
    """What to change of a job; what is not named stays as it is. Null clears a field that may have no value."""

    type: Name | UnsetType = UNSET
    payload: Json | UnsetType = UNSET
    priority: Priority | UnsetType = UNSET
    run_at: Annotated[Instant, Meta(description="not before; the past means now")] | UnsetType = UNSET
    delay_seconds: Annotated[DelaySeconds, Meta(description="instead of run_at")] | UnsetType = UNSET
    lease_seconds: LeaseSeconds | UnsetType = UNSET
    timeout_seconds: TimeoutSeconds | UnsetType | None = UNSET
    max_retries: MaxRetries | UnsetType = UNSET
    backoff: BackoffBody | UnsetType = UNSET
    tags: Annotated[list[Tag], Meta(max_length=TAGS_MAX)] | UnsetType = UNSET
    metadata: Annotated[Raw, Meta(description="a free object, up to 4 KiB")] | UnsetType = UNSET
    expires_at: Annotated[Instant, Meta(description="start deadline")] | UnsetType | None = UNSET
    expires_in_seconds: Annotated[ExpiresInSeconds, Meta(description="instead of expires_at")] | UnsetType = (
        UNSET
    )
    dead_letter_queue: Name | UnsetType | None = UNSET

    def to_edit(self, payload_bytes_max: int) -> JobEdit:  # a field a line
        """Translate it for the queue. Raises InvalidRequestError for what the schema can not say."""
        if self.run_at is not UNSET and self.delay_seconds is not UNSET:
            raise InvalidRequestError("run_at", "give run_at or delay_seconds, not both")
        if self.expires_at is not UNSET and self.expires_in_seconds is not UNSET:
            raise InvalidRequestError("expires_at", "give expires_at or expires_in_seconds, not both")
        if isinstance(self.type, str):
            check_name("type", self.type)
        if isinstance(self.dead_letter_queue, str):
            check_name("dead_letter_queue", self.dead_letter_queue)
        edit = JobEdit(
            type=KEPT if self.type is UNSET else self.type,
            payload=KEPT
            if self.payload is UNSET
            else bounded("payload", bytes(self.payload), payload_bytes_max),
            priority=KEPT if self.priority is UNSET else number_of(self.priority),
            run_at=in_utc("run_at", self.run_at) if isinstance(self.run_at, datetime) else KEPT,
            delay_seconds=KEPT if self.delay_seconds is UNSET else self.delay_seconds,
            lease_seconds=KEPT if self.lease_seconds is UNSET else self.lease_seconds,
            timeout_seconds=KEPT if self.timeout_seconds is UNSET else self.timeout_seconds,
            max_retries=KEPT if self.max_retries is UNSET else self.max_retries,
            backoff=KEPT if self.backoff is UNSET else self.backoff.to_request(),
            tags=KEPT if self.tags is UNSET else tags_of(self.tags),
            metadata=KEPT if self.metadata is UNSET else metadata_of(self.metadata),
            expires_at=in_utc("expires_at", self.expires_at)
            if isinstance(self.expires_at, datetime)
            else (KEPT if self.expires_at is UNSET else None),
            expires_in_seconds=KEPT if self.expires_in_seconds is UNSET else self.expires_in_seconds,
            dead_letter_queue=KEPT if self.dead_letter_queue is UNSET else self.dead_letter_queue,
        )
        if edit.is_empty:
            raise InvalidRequestError("body", "names nothing to change")
        return edit


class FilterBody(Struct, forbid_unknown_fields=True):
    """Which jobs: those that match everything that is named."""

    ids: Annotated[list[str], Meta(min_length=1, max_length=IDS_MAX)] | UnsetType = UNSET
    state: Annotated[list[State], Meta(min_length=1, description="any of them")] | State | UnsetType = UNSET
    queue: Names | Name | UnsetType = UNSET
    type: Names | Name | UnsetType = UNSET
    tag: Text | None = None
    worker: Text | None = None
    error: (
        Annotated[Text, Meta(description="of the last error: its `error_group`, or its exact `type`")] | None
    ) = None
    created_after: Instant | None = None
    created_before: Instant | None = None

    def to_filter(self) -> JobFilter:
        """Translate it for the queue. Raises InvalidRequestError for what the schema can not say."""
        queues, types = _all_of(self.queue), _all_of(self.type)
        for field, names in (("queue", queues), ("type", types)):
            for name in names:
                check_name(f"filter.{field}", name)
        for field, text in (("tag", self.tag), ("worker", self.worker), ("error", self.error)):
            if text is not None:
                check_clean(f"filter.{field}", text)
        return JobFilter(
            ids=_ids_of(_all_of(self.ids)),
            states=_all_of(self.state),
            queues=queues,
            types=types,
            tag=self.tag,
            worker=self.worker,
            error=self.error,
            created_after=None
            if self.created_after is None
            else in_utc("filter.created_after", self.created_after),
            created_before=None
            if self.created_before is None
            else in_utc("filter.created_before", self.created_before),
        )


class BulkBody(Struct, forbid_unknown_fields=True):
    """Which jobs to take the verb for."""

    filter: FilterBody | None = None
    all: Annotated[bool, Meta(description="instead of a filter: really all jobs")] = False
    dry_run: Annotated[bool, Meta(description="only count")] = False
    cursor: (
        Annotated[
            str, Meta(max_length=128, description="`next_cursor` of the call before: goes on from there")
        ]
        | None
    ) = None

    def to_filter(self) -> JobFilter:
        """Translate the filter for the queue. Raises InvalidRequestError, also where it names nothing without `all`."""
        wanted = JobFilter() if self.filter is None else self.filter.to_filter()
        if (wanted == JobFilter()) is not self.all:
            raise InvalidRequestError(
                "filter", 'must name something, or "all": true stands instead of it, not both'
            )
        return wanted


class UpdateBody(BulkBody, kw_only=True):
    """Which jobs to change, and what."""

    set: EditBody


class BulkReply(Struct):
    """What a call for many has done."""

    matched: Annotated[int, Meta(description="how many jobs match whose state allows the verb")]
    changed: Annotated[
        int, Meta(description="how many it changed: not those that were moved meanwhile, or can not take it")
    ]
    next_cursor: (
        Annotated[str, Meta(description="the call has taken its time: call again with it to go on")] | None
    )


class Changing:
    """The handlers."""

    def __init__(self, service: Service, payload_bytes_max: int) -> None:
        self._service = service
        self._payload_bytes_max = payload_bytes_max

    async def edit(self, call: Call, body: EditBody) -> Reply:
        """Answer `PATCH /jobs/{job_id}`."""
        job = await self._service.operating.edit(call.job_id, body.to_edit(self._payload_bytes_max))
        return Reply(encode(JobReply.of(job)))

    async def retry(self, _call: Call, body: BulkBody) -> Reply:
        """Answer `POST /jobs/retry`."""
        return await self._bulk(BulkVerb.RETRY, body)

    async def cancel(self, _call: Call, body: BulkBody) -> Reply:
        """Answer `POST /jobs/cancel`."""
        return await self._bulk(BulkVerb.CANCEL, body)

    async def delete(self, _call: Call, body: BulkBody) -> Reply:
        """Answer `POST /jobs/delete`."""
        return await self._bulk(BulkVerb.DELETE, body)

    async def update(self, _call: Call, body: UpdateBody) -> Reply:
        """Answer `POST /jobs/update`."""
        return await self._bulk(BulkVerb.UPDATE, body, body.set.to_edit(self._payload_bytes_max))

    async def _bulk(self, verb: BulkVerb, body: BulkBody, changes: JobEdit | None = None) -> Reply:
        wanted = body.to_filter()
        mark = hashlib.blake2b(f"{verb}{wanted!r}".encode(), digest_size=4).digest()
        done = await self._service.operating.bulk(
            verb, wanted, changes=changes, dry_run=body.dry_run, position=_position(body.cursor, mark)
        )
        return Reply(encode(_reply(done, mark)))


def _reply(done: Bulk, mark: bytes) -> BulkReply:
    cursor = None
    if done.position is not None:
        raw = done.position.after.bytes + done.position.until.bytes + mark
        cursor = cursors.write(raw)
    return BulkReply(done.matched, done.changed, cursor)


def _position(cursor: str | None, mark: bytes) -> Position | None:
    """Return where a cursor points to. Raises InvalidRequestError when it is none, or of another call."""
    if cursor is None:
        return None
    raw = cursors.read(cursor)
    try:
        position = Position(UUID(bytes=raw[:16]), UUID(bytes=raw[16:32]))
    except ValueError:
        raise cursors.not_ours() from None
    if raw[32:] != mark:
        raise InvalidRequestError("cursor", "belongs to a call of another verb, or with another filter")
    return position


def _all_of(named: list[T] | T | UnsetType) -> tuple[T, ...]:
    if isinstance(named, UnsetType):
        return ()
    return tuple(named) if isinstance(named, list) else (named,)


def _ids_of(texts: Sequence[str]) -> tuple[UUID, ...]:
    try:
        return tuple(job_id_of(text) for text in texts)
    except JobNotFoundError:
        raise InvalidRequestError("filter.ids", "must be ids of jobs") from None


_BULK = (
    " Works in short steps, the oldest job first, and never on jobs that were not there when it was first called."
    " After some 20 seconds it answers what it has done so far, with `next_cursor` to go on. A filter that names"
    " nothing is refused unless `all` is true."
)


def operations(service: Service, payload_bytes_max: int) -> list[Operation]:
    """Return the thin routes."""
    changing = Changing(service, payload_bytes_max)
    bulk: dict[str, tuple[Any, type, str, str, dict[str, Any]]] = {
        "retry": (
            changing.retry,
            BulkBody,
            "Retry many jobs",
            "Those that are `failed`, `cancelled` or `expired` become ready again, as by `/jobs/{id}/retry`.",
            {"filter": {"queue": ["emails"], "error": "SmtpError"}},
        ),
        "cancel": (
            changing.cancel,
            BulkBody,
            "Cancel many jobs",
            "Those that have not ended are cancelled, as by `/jobs/{id}/cancel`.",
            {"filter": {"queue": ["emails"], "tag": "campaign-7"}},
        ),
        "delete": (
            changing.delete,
            BulkBody,
            "Delete many jobs",
            "Those that have ended are removed, with their attempts.",
            {"filter": {"queue": ["emails"], "state": ["cancelled"]}, "dry_run": True},
        ),
        "update": (
            changing.update,
            UpdateBody,
            "Change many jobs",
            "Those that no worker has, and that are not completed, are changed as by `PATCH /jobs/{id}`.",
            {"filter": {"queue": ["emails"], "state": ["failed"]}, "set": {"priority": "bulk"}},
        ),
    }
    return [
        Operation(
            path="/jobs/{job_id}",
            name="edit",
            tag="Operate",
            summary="Change a job that no worker has",
            description=(
                "A waiting job keeps its place in line unless `run_at` or `delay_seconds` is given. A failed, cancelled"
                " or expired one is changed where it is kept: retry it then. `backoff` may name a part. The queue and"
                " the unique key can not be changed, nor the deadline of a job that has been started."
            ),
            request=EditBody,
            reply=JobReply,
            statuses={200: "The job as it stands now."},
            problems=("not_found", "wrong_state", "payload_too_large"),
            example={"priority": "fast", "payload": {"to": "b@example.com"}},
            handle=changing.edit,
            method="PATCH",
        ),
        *(
            Operation(
                path=f"/jobs/{verb}",
                name=f"{verb}_many",
                tag="Operate",
                summary=summary,
                description=description + _BULK,
                request=request,
                reply=BulkReply,
                statuses={200: "What has been done."},
                problems=("payload_too_large",) if verb == "update" else (),
                example=example,
                handle=handle,
            )
            for verb, (handle, request, summary, description, example) in bulk.items()
        ),
    ]
