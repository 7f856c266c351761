"""What goes over the wire, as msgspec types: decoding, encoding and OpenAPI's schemas all come from these.

`payload`, `result` and `metadata` are passed through as the bytes they came in (msgspec.Raw): a number that no
double can hold comes back as it was sent.
"""

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Literal
from uuid import UUID

from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from app.engine.leasing import LeaseRequest
from app.queue.errors import InvalidRequestError
from app.queue.lifecycle import State
from app.queue.model import (
    NOTHING_NAMED,
    PRIORITIES,
    PRIORITY_MAX,
    PRIORITY_MIN,
    Attempt,
    BackoffRequest,
    BackoffStrategy,
    Directive,
    Failure,
    Heartbeat,
    Jitter,
    Job,
    JobRequest,
    LeasedJob,
    OnConflict,
    Outcome,
    Progress,
    Unique,
    UniqueScope,
    WorkError,
)

NAME_PATTERN = "^[A-Za-z0-9][A-Za-z0-9._:-]*$"
NAME_LENGTH_MAX = 128
WORKER_LENGTH_MAX = 256
METADATA_BYTES_MAX = 4096
TAGS_MAX = 20
MESSAGE_BYTES_MAX = 4096
STACK_BYTES_MAX = 16 * 1024
PROGRESS_BYTES_MAX = 1024
UNIQUE_KEY_LENGTH_MAX = 256
LEASE_SECONDS_MIN = 0.5
LEASE_SECONDS_MAX = 43_200
DAY_SECONDS = 86_400
YEAR_SECONDS = 366 * DAY_SECONDS
DELAY_SECONDS_MAX = 100 * YEAR_SECONDS
RUN_AT_MAX = datetime(2200, 1, 1, tzinfo=UTC)
QUEUES_MAX = 100
FOLLOW_UPS_MAX = 100
SETTLE_MAX = 1000
LINES_MAX = 1000
TRACEPARENT = re.compile("[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
# ASCII's control characters and Unicode's line and paragraph separators: a name with one can forge a log line.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_NAME = re.compile(NAME_PATTERN.removesuffix("$"))

Name = Annotated[
    str,
    Meta(
        pattern=NAME_PATTERN,
        max_length=NAME_LENGTH_MAX,
        description="letters, digits and `. _ : -`, the first a letter or digit",
    ),
]
Tag = Annotated[str, Meta(min_length=1, max_length=128)]
WorkerName = Annotated[str, Meta(min_length=1, max_length=WORKER_LENGTH_MAX)]
Priority = (
    Annotated[int, Meta(ge=PRIORITY_MIN, le=PRIORITY_MAX)]
    | Annotated[Literal["fast", "normal", "bulk"], Meta()]
)
LeaseSeconds = Annotated[float, Meta(ge=LEASE_SECONDS_MIN, le=LEASE_SECONDS_MAX)]
DelaySeconds = Annotated[float, Meta(ge=0, le=DELAY_SECONDS_MAX)]
TimeoutSeconds = Annotated[
    float,
    Meta(
        ge=LEASE_SECONDS_MIN,
        le=30 * DAY_SECONDS,
        description="hard limit for one attempt; heartbeats can not pass it",
    ),
]
MaxRetries = Annotated[int, Meta(ge=0, le=10_000, description="retries after the first attempt")]
ExpiresInSeconds = Annotated[float, Meta(gt=0, le=DELAY_SECONDS_MAX)]
Instant = Annotated[datetime, Meta(tz=True, description="RFC 3339 with a zone")]
Json = Annotated[Raw, Meta(description="any JSON; comes back value for value, numbers included")]
DirectiveShown = Annotated[
    Directive,
    Meta(
        description=(
            "what the worker as a whole should do: `quiet`: take no more jobs; `terminate`: and end when those in hand"
            " are done"
        )
    ),
]
LeaseId = Annotated[str, Meta(description="the token that the lease reply carried: new at every attempt")]


def priority_of(priority: Priority | None) -> int | None:
    """Return a priority as a number, if there is one."""
    return None if priority is None else number_of(priority)


def number_of(priority: Priority) -> int:
    """Return a priority as a number."""
    return PRIORITIES[priority] if isinstance(priority, str) else priority


class BackoffBody(Struct, forbid_unknown_fields=True):
    """How long a failed job waits; the fields that are not named come from the defaults."""

    strategy: BackoffStrategy | None = None
    initial_seconds: Annotated[float, Meta(ge=0, le=30 * DAY_SECONDS)] | None = None
    factor: Annotated[float, Meta(ge=1, le=1000)] | None = None
    max_seconds: Annotated[float, Meta(ge=0, le=YEAR_SECONDS)] | None = None
    jitter: (
        Annotated[
            Jitter,
            Meta(description="of a delay d: `none` leaves d, `equal` makes d/2 to d, `full` makes 0 to d"),
        ]
        | None
    ) = None

    def to_request(self) -> BackoffRequest:
        """Translate it for the queue."""
        return BackoffRequest(
            strategy=self.strategy,
            initial_seconds=self.initial_seconds,
            factor=self.factor,
            max_seconds=self.max_seconds,
            jitter=self.jitter,
        )


class UniqueBody(Struct, forbid_unknown_fields=True):
    """A key that only one job of the queue may hold at a time."""

    key: Annotated[str, Meta(min_length=1, max_length=UNIQUE_KEY_LENGTH_MAX)]
    scope: Annotated[
        UniqueScope,
        Meta(
            description=(
                "how long the job holds it: `queued` until its first lease, `unfinished` until it ends, `window` for"
                " `window_seconds` from its creation, whatever becomes of it"
            )
        ),
    ] = UniqueScope.UNFINISHED
    window_seconds: (
        Annotated[float, Meta(gt=0, le=DELAY_SECONDS_MAX, description="with the scope `window` only")] | None
    ) = None
    on_conflict: Annotated[
        OnConflict,
        Meta(
            description=(
                "when another job holds the key: `return` that job, `reject` this one with 409, or `replace` that"
                " one's fields by these while it waits, else return it"
            )
        ),
    ] = OnConflict.RETURN

    def to_unique(self) -> Unique:
        """Translate it for the queue. Raises InvalidRequestError for what the schema can not say."""
        check_clean("unique.key", self.key)
        if (self.window_seconds is not None) is not (self.scope is UniqueScope.WINDOW):
            raise InvalidRequestError(
                "unique.window_seconds", "goes with the scope `window`, and only with it"
            )
        return Unique(self.key, self.scope, self.window_seconds)


class EnqueueBody(Struct, forbid_unknown_fields=True):
    """A job to store."""

    queue: Name
    type: Annotated[Name, Meta(description="which handler runs it")] = "default"
    payload: Json | UnsetType = UNSET
    priority: (
        Annotated[
            Priority,
            Meta(
                description=(
                    "`fast` = 10, `normal` = 5 (the default), `bulk` = 1, or 0 to 10; higher first, equals oldest first"
                )
            ),
        ]
        | None
    ) = None
    run_at: Annotated[Instant, Meta(description="not before; the past means now")] | None = None
    delay_seconds: Annotated[DelaySeconds, Meta(description="instead of run_at")] | None = None
    lease_seconds: (
        Annotated[
            LeaseSeconds, Meta(description="how long a lease lasts without a heartbeat (visibility timeout)")
        ]
        | None
    ) = None
    timeout_seconds: TimeoutSeconds | None = None
    max_retries: MaxRetries | None = None
    backoff: BackoffBody | None = None
    unique: UniqueBody | None = None
    tags: Annotated[list[Tag], Meta(max_length=TAGS_MAX, description="labels to filter by")] = []
    metadata: Annotated[Raw, Meta(description="a free object, up to 4 KiB")] | UnsetType = UNSET

    expires_at: (
        Annotated[
            Instant,
            Meta(description="start deadline: the job is `expired` when no worker has taken it by then"),
        ]
        | None
    ) = None
    expires_in_seconds: Annotated[ExpiresInSeconds, Meta(description="instead of expires_at")] | None = None
    dead_letter_queue: (
        Annotated[Name, Meta(description="gets a copy of the job when it fails for good")] | None
    ) = None

    def to_request(self, traceparent: str | None) -> JobRequest:
        """Translate it for the queue. Raises InvalidRequestError for what the schema can not say."""
        if self.run_at is not None and self.delay_seconds is not None:
            raise InvalidRequestError("run_at", "give run_at or delay_seconds, not both")
        if self.expires_at is not None and self.expires_in_seconds is not None:
            raise InvalidRequestError("expires_at", "give expires_at or expires_in_seconds, not both")
        check_name("queue", self.queue)
        check_name("type", self.type)
        if self.dead_letter_queue is not None:
            check_name("dead_letter_queue", self.dead_letter_queue)
        return JobRequest(
            queue=self.queue,
            type=self.type,
            payload=b"null" if self.payload is UNSET else bytes(self.payload),
            priority=priority_of(self.priority),
            run_at=None if self.run_at is None else in_utc("run_at", self.run_at),
            delay_seconds=self.delay_seconds,
            lease_seconds=self.lease_seconds,
            timeout_seconds=self.timeout_seconds,
            max_retries=self.max_retries,
            backoff=NOTHING_NAMED if self.backoff is None else self.backoff.to_request(),
            unique=None if self.unique is None else self.unique.to_unique(),
            on_conflict=OnConflict.RETURN if self.unique is None else self.unique.on_conflict,
            tags=tags_of(self.tags),
            metadata=b"{}" if self.metadata is UNSET else metadata_of(self.metadata),
            # W3C Trace Context: what is malformed is ignored, never refused.
            traceparent=traceparent if traceparent and TRACEPARENT.fullmatch(traceparent) else None,
            expires_at=None if self.expires_at is None else in_utc("expires_at", self.expires_at),
            expires_in_seconds=self.expires_in_seconds,
            dead_letter_queue=self.dead_letter_queue,
        )


class ProgressBody(Struct, forbid_unknown_fields=True):
    """How far the worker is: a number, words, or both. It replaces what was told before."""

    percent: Annotated[float, Meta(ge=0, le=100)] | None = None
    message: Annotated[str, Meta(description="cut at 1 KiB")] | None = None


class HeartbeatBody(Struct, forbid_unknown_fields=True):
    """Still working."""

    lease_id: LeaseId
    extend_seconds: (
        Annotated[
            float, Meta(ge=0, le=LEASE_SECONDS_MAX, description="from now; else the lease's own length")
        ]
        | None
    ) = None
    progress: ProgressBody | None = None
    checkpoint: (
        Annotated[
            Raw,
            Meta(
                description="any JSON, kept for the next attempt to go on from; as large as a payload may be"
            ),
        ]
        | UnsetType
    ) = UNSET

    def to_heartbeat(self, job_id: UUID, lease_id: UUID) -> Heartbeat:
        """Translate it for the queue. Raises InvalidRequestError for what the schema can not say."""
        progress = None
        if self.progress is not None:
            percent, message = self.progress.percent, self.progress.message
            if percent is None and message is None:
                raise InvalidRequestError("progress", "give percent, message, or both")
            if message is not None and "\x00" in message:
                raise InvalidRequestError("progress.message", "must not contain NUL")
            progress = Progress(percent, None if message is None else _cut(message, PROGRESS_BYTES_MAX))
        return Heartbeat(
            job_id,
            lease_id,
            self.extend_seconds,
            progress,
            None if self.checkpoint is UNSET else bytes(self.checkpoint),
        )


class AckBody(Struct, forbid_unknown_fields=True):
    """Done."""

    lease_id: LeaseId
    result: Json | UnsetType = UNSET
    then: Annotated[
        list[Raw],
        Meta(
            max_length=FOLLOW_UPS_MAX,
            description="jobs to enqueue in the same transaction, each as in POST /jobs",
        ),
    ] = []


class ErrorBody(Struct, forbid_unknown_fields=True):
    """What went wrong."""

    message: Annotated[str, Meta(description="cut at 4 KiB")]
    type: (
        Annotated[str, Meta(max_length=256, description="what kind of error: failures are grouped by it")]
        | None
    ) = None
    stack: Annotated[str, Meta(description="cut at 16 KiB")] | None = None


class FailBody(Struct, forbid_unknown_fields=True):
    """Not done."""

    lease_id: LeaseId
    error: ErrorBody
    retry: Annotated[bool, Meta(description="false: dead-letter now")] = True
    retry_in_seconds: Annotated[DelaySeconds, Meta(description="instead of the backoff")] | None = None

    def to_failure(self) -> Failure:
        """Translate it for the queue. Raises InvalidRequestError for what the schema can not say."""
        error = self.error
        for field, value in (("message", error.message), ("type", error.type), ("stack", error.stack)):
            if value is not None and "\x00" in value:
                raise InvalidRequestError(f"error.{field}", "must not contain NUL")
        return Failure(
            error=WorkError(
                message=_cut(error.message, MESSAGE_BYTES_MAX),
                type=error.type,
                stack=None if error.stack is None else _cut(error.stack, STACK_BYTES_MAX),
            ),
            retry=self.retry,
            retry_in_seconds=self.retry_in_seconds,
        )


class ReleaseBody(Struct, forbid_unknown_fields=True):
    """Take it back."""

    lease_id: LeaseId
    delay_seconds: DelaySeconds = 0


class AckItem(AckBody, tag_field="outcome", tag="ack", kw_only=True):
    """Done."""

    job_id: str


class FailItem(FailBody, tag_field="outcome", tag="fail", kw_only=True):
    """Not done."""

    job_id: str


class ReleaseItem(ReleaseBody, tag_field="outcome", tag="release", kw_only=True):
    """Take it back."""

    job_id: str


class HeartbeatItem(HeartbeatBody, tag_field="outcome", tag="heartbeat", kw_only=True):
    """Still working."""

    job_id: str


Item = AckItem | FailItem | ReleaseItem | HeartbeatItem
Items = Annotated[list[Raw], Meta(max_length=SETTLE_MAX, description="each job named once")]
"""Decoded one by one: a bad item fails alone."""


class SettleBody(Struct, forbid_unknown_fields=True):
    """What came of leased jobs."""

    items: Items


class LeaseBody(Struct, forbid_unknown_fields=True):
    """What a worker would take."""

    queues: Annotated[list[Name], Meta(min_length=1, max_length=QUEUES_MAX)]
    types: (
        Annotated[list[Name], Meta(min_length=1, max_length=100, description="only these; else all")] | None
    ) = None
    worker: Annotated[WorkerName, Meta(description="who asks: shown to operators")] | None = None
    max_jobs: Annotated[int, Meta(ge=1, le=1000)] = 1
    wait_seconds: Annotated[
        float,
        Meta(
            ge=0, le=30, description="how long to wait for the first job; set your HTTP timeout 10 s higher"
        ),
    ] = 20
    lease_seconds: Annotated[LeaseSeconds, Meta(description="instead of what each job says")] | None = None
    request_id: (
        Annotated[
            str,
            Meta(
                min_length=1,
                max_length=128,
                pattern="^[ -~]*$",
                description="a name of your choice, in ASCII: the same again gets the same leases, as far as they stand",
            ),
        ]
        | None
    ) = None
    settle: (
        Annotated[Items, Meta(description="what came of earlier jobs, as in /settle: committed first")] | None
    ) = None

    def to_request(self) -> LeaseRequest:
        """Translate it for the queue. Raises InvalidRequestError for what the schema can not say."""
        for queue in self.queues:
            check_name("queues", queue)
        for type_ in self.types or ():
            check_name("types", type_)
        if self.worker is not None:
            check_clean("worker", self.worker)
        if self.request_id is not None:
            # The schema's `$` lets a line break at the end pass.
            check_clean("request_id", self.request_id)
        if len(self.queues) * len(self.types or [""]) > LINES_MAX:
            raise InvalidRequestError("types", f"queues times types may be at most {LINES_MAX}")
        return LeaseRequest(
            queues=tuple(dict.fromkeys(self.queues)),
            types=None if self.types is None else tuple(dict.fromkeys(self.types)),
            worker=self.worker,
            max_jobs=self.max_jobs,
            wait_seconds=self.wait_seconds,
            lease_seconds=self.lease_seconds,
            request_id=self.request_id,
        )


class BackoffReply(Struct):
    """How long the job waits after a failure."""

    strategy: BackoffStrategy
    initial_seconds: float
    factor: float
    max_seconds: float
    jitter: Jitter


class UniqueReply(Struct):
    """The key that only one job of a queue may hold at a time."""

    key: str
    scope: Annotated[UniqueScope, Meta(description="how long this job holds it")]
    window_seconds: float | None


class ProgressReply(Struct):
    """How far its worker says it is."""

    percent: float | None
    message: str | None


class JobReply(Struct):
    """A job as it stands."""

    id: UUID
    queue: str
    type: str
    state: State
    payload: Json
    priority: int
    attempt: Annotated[int, Meta(description="the present or last attempt; 0 before the first")]
    retry_count: Annotated[int, Meta(description="retries that have begun, of the present budget")]
    max_retries: int
    backoff: BackoffReply
    lease_seconds: float
    timeout_seconds: float | None
    tags: list[str]
    metadata: Annotated[Raw, Meta(description="the object that was sent")]
    traceparent: str | None
    created_at: datetime
    run_at: Annotated[datetime, Meta(description="not before; of a job in `retry`, the next attempt")]
    started_at: Annotated[datetime, Meta(description="of the present or last attempt")] | None
    finished_at: datetime | None
    worker: str | None
    cancel_requested: bool
    reason: (
        Annotated[
            str,
            Meta(description="why it is dead: `retries_exhausted`, `not_retryable`, `cancelled`, `expired`"),
        ]
        | None
    )
    last_error: Annotated[Raw, Meta(description="`{message, type?, stack?}`")] | None
    result: Annotated[Raw, Meta(description="what the ack brought")] | None
    expires_at: (
        Annotated[datetime, Meta(description="start deadline: past it the job becomes `expired`")] | None
    )
    unique: UniqueReply | None
    dead_letter_queue: str | None
    source: (
        Annotated[
            Raw,
            Meta(description="of a dead letter's copy: `{queue, job_id, attempts, error, failed_at, chain}`"),
        ]
        | None
    )
    progress: ProgressReply | None
    checkpoint: Annotated[Raw, Meta(description="what its worker last kept to go on from")] | None
    duplicate: (
        Annotated[Literal[True], Meta(description="of an enqueue only: the job was there before")] | UnsetType
    ) = UNSET
    replaced: (
        Annotated[Literal[True], Meta(description="of an enqueue only: that job has these fields now")]
        | UnsetType
    ) = UNSET
    then: (
        Annotated[list[UUID], Meta(description="of an ack only: the jobs that its follow-ups have come to")]
        | UnsetType
    ) = UNSET

    @classmethod
    def of(cls, job: Job, *, duplicate: bool = False, replaced: bool = False) -> "JobReply":
        """Translate a job."""
        return cls(
            id=job.id,
            queue=job.queue,
            type=job.type,
            state=job.state,
            payload=Raw(job.payload),
            priority=job.priority,
            attempt=job.attempt,
            retry_count=job.retry_count,
            max_retries=job.max_retries,
            backoff=BackoffReply(
                strategy=job.backoff.strategy,
                initial_seconds=job.backoff.initial_seconds,
                factor=job.backoff.factor,
                max_seconds=job.backoff.max_seconds,
                jitter=job.backoff.jitter,
            ),
            lease_seconds=job.lease_seconds,
            timeout_seconds=job.timeout_seconds,
            tags=list(job.tags),
            metadata=Raw(job.metadata),
            traceparent=job.traceparent,
            created_at=job.created_at,
            run_at=job.run_at,
            started_at=job.started_at,
            finished_at=job.finished_at,
            worker=job.worker,
            cancel_requested=job.cancel_requested,
            reason=job.reason,
            last_error=_raw(job.last_error),
            result=_raw(job.result),
            expires_at=job.expires_at,
            unique=None if job.unique is None else UniqueReply(*job.unique),
            dead_letter_queue=job.dead_letter_queue,
            source=_raw(job.source),
            progress=None if job.progress is None else ProgressReply(*job.progress),
            checkpoint=_raw(job.checkpoint),
            duplicate=duplicate or UNSET,
            replaced=replaced or UNSET,
            then=list(job.then) or UNSET,
        )


class LeasedJobReply(Struct):
    """A job to work on."""

    id: UUID
    queue: str
    type: str
    payload: Json
    attempt: int
    max_retries: int
    priority: int
    lease_id: LeaseId
    lease_expires_at: datetime
    created_at: datetime
    run_at: datetime
    tags: list[str]
    metadata: Annotated[Raw, Meta(description="the object that was sent")]
    traceparent: str | None
    last_error: Annotated[Raw, Meta(description="of the attempt before: `{message, type?, stack?}`")] | None
    checkpoint: Annotated[Raw, Meta(description="what an earlier attempt has kept to go on from")] | None
    source: (
        Annotated[
            Raw,
            Meta(description="of a dead letter's copy: `{queue, job_id, attempts, error, failed_at, chain}`"),
        ]
        | None
    )

    @classmethod
    def of(cls, job: LeasedJob) -> "LeasedJobReply":
        """Translate a leased job."""
        return cls(
            id=job.id,
            queue=job.queue,
            type=job.type,
            payload=Raw(job.payload),
            attempt=job.attempt,
            max_retries=job.max_retries,
            priority=job.priority,
            lease_id=str(job.lease_id),
            lease_expires_at=job.lease_expires_at,
            created_at=job.created_at,
            run_at=job.run_at,
            tags=list(job.tags),
            metadata=Raw(job.metadata),
            traceparent=job.traceparent,
            last_error=_raw(job.last_error),
            checkpoint=_raw(job.checkpoint),
            source=_raw(job.source),
        )


class SettledItem(Struct, omit_defaults=True):
    """What came of one item: its `status` is that of the verb by itself, 200 or a problem's."""

    job_id: str
    status: int
    state: State | None = None
    run_at: Annotated[datetime, Meta(description="when the job is due again")] | None = None
    lease_expires_at: datetime | None = None
    cancel_requested: bool | None = None
    directive: DirectiveShown | None = None
    then: Annotated[list[UUID], Meta(description="the jobs that an ack's follow-ups have come to")] | None = (
        None
    )
    error: "Problem | None" = None


class SettleReply(Struct):
    """What came of each item, in order."""

    results: list[SettledItem]


class LeaseReply(Struct, omit_defaults=True):
    """Jobs to work on; an empty list when there was nothing to do."""

    jobs: list[LeasedJobReply]
    directive: DirectiveShown
    settled: Annotated[list[SettledItem], Meta(description="what came of `settle`, in order")] | None = None
    retry_after_seconds: (
        Annotated[
            int, Meta(description="`settle` is done, but leasing is not possible now: when to come back")
        ]
        | None
    ) = None


class HeartbeatReply(Struct):
    """Go on, or not."""

    lease_expires_at: datetime
    cancel_requested: Annotated[
        bool, Meta(description="stop, and fail or release the job: it becomes `cancelled`")
    ]
    directive: DirectiveShown


class SettledReply(Struct, omit_defaults=True):
    """What became of the job."""

    state: State
    run_at: Annotated[datetime, Meta(description="when it is due again")] | None = None


class PageReply(Struct):
    """A page of jobs, newest first."""

    jobs: list[JobReply]
    next_cursor: Annotated[str, Meta(description="where the next page begins; null at the end")] | None


class AttemptReply(Struct):
    """One attempt; without an end while it runs."""

    attempt: int
    worker: str | None
    started_at: datetime
    ended_at: datetime | None
    outcome: Outcome | None
    error: Annotated[Raw, Meta(description="`{message, type?, stack?}`")] | None

    @classmethod
    def of(cls, attempt: Attempt) -> "AttemptReply":
        """Translate an attempt."""
        return cls(
            attempt=attempt.attempt,
            worker=attempt.worker,
            started_at=attempt.started_at,
            ended_at=attempt.ended_at,
            outcome=attempt.outcome,
            error=_raw(attempt.error),
        )


class AttemptsReply(Struct):
    """Every attempt that is kept, oldest first."""

    attempts: list[AttemptReply]


class StatsReply(Struct):
    """How many jobs are kept now: `active`, `waiting`, `delayed`, `completed`, `failed`, `cancelled`, `expired`."""

    jobs: dict[str, int]
    queues: dict[str, dict[str, int]]


class LiveReply(Struct):
    """A sign of life."""

    status: Literal["ok"] = "ok"


class WorkerSeenReply(Struct):
    """A worker that holds leases."""

    name: str | None
    active: int
    last_seen_at: datetime


class HealthReply(Struct):
    """How the parts are."""

    status: Literal["ok", "unavailable"]
    problem: str | None
    database: bool
    listening: Annotated[bool, Meta(description="whether hints from other processes are heard")]
    maintenance_seconds_ago: Annotated[float, Meta(description="since any process last reaped")] | None
    workers: Annotated[
        list[WorkerSeenReply], Meta(description="the last heartbeat of each that holds leases")
    ]
    jobs: Annotated[dict[str, int], Meta(description="as in /stats")] | None
    oldest_ready_seconds: Annotated[
        dict[str, float], Meta(description="by queue: how long its oldest job waits")
    ]


class FieldProblem(Struct):
    """What is wrong with one field."""

    field: str
    message: str


class Problem(Struct, omit_defaults=True):
    """An error, as RFC 9457 has it. Match on `code`, never on the text."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str = ""
    errors: list[FieldProblem] = []
    state: (
        Annotated[State, Meta(description="the job's state, with `lease_lost` and `wrong_state`")] | None
    ) = None


def _raw(text: bytes | None) -> Raw | None:
    return None if text is None else Raw(text)


def is_name(text: str) -> bool:
    """Whether a queue, a type or a schedule may have this name."""
    # The schema's `$` lets a line break at the end pass.
    return len(text) <= NAME_LENGTH_MAX and _NAME.fullmatch(text) is not None


def check_name(field: str, name: str) -> None:
    """Raise InvalidRequestError for what is no name."""
    if not is_name(name):
        raise InvalidRequestError(field, "must be letters, digits and . _ : -, the first a letter or digit")


def is_clean(text: str) -> bool:
    """Whether a name has no control character in it."""
    return not _CONTROL.search(text)


def check_clean(field: str, text: str) -> None:
    """Raise InvalidRequestError for control characters."""
    if not is_clean(text):
        raise InvalidRequestError(field, "must not contain control characters")


def tags_of(tags: Sequence[str]) -> tuple[str, ...]:
    """Return a job's tags, each once. Raises InvalidRequestError."""
    for tag in tags:
        check_clean("tags", tag)
    return tuple(dict.fromkeys(tags))


def metadata_of(raw: Raw) -> bytes:
    """Return a job's metadata. Raises InvalidRequestError when it is no object, or too large."""
    metadata = bytes(raw)
    if not metadata.startswith(b"{"):
        raise InvalidRequestError("metadata", "must be an object")
    if len(metadata) > METADATA_BYTES_MAX:
        raise InvalidRequestError("metadata", f"must have at most {METADATA_BYTES_MAX} bytes")
    return metadata


def in_utc(field: str, instant: datetime) -> datetime:
    """Return an instant in UTC. Raises InvalidRequestError for one that is out of reach."""
    try:
        moment = instant.astimezone(UTC)
    except OverflowError:
        raise InvalidRequestError(field, "is no instant of our calendar") from None
    if moment >= RUN_AT_MAX:
        raise InvalidRequestError(field, f"must be before {RUN_AT_MAX:%Y-%m-%d}")
    return moment


def _cut(text: str, bytes_max: int) -> str:
    encoded = text.encode()
    return text if len(encoded) <= bytes_max else encoded[:bytes_max].decode(errors="ignore")
