"""The tables: a body (`jobs`) and narrow places (`ready`, `scheduled`, `held`, `leases`) that say where it stands.

A dead job (`dead`: failed, cancelled, expired) and a completed one (`history`) take the whole body with them, so
`jobs` holds exactly the jobs that still live. A move is a DELETE … RETURNING into an INSERT within one statement:
a job is in exactly one place at every instant.

Rules that keep this fast under load, measured on PostgreSQL 18 (docs/architecture.md, Storage):
- `jobs`, `ready`, `scheduled` are inserted and deleted, never updated: the claim may delete by `ctid`, and
  indexes grow at one end.
- No foreign keys: their FOR KEY SHARE locks deadlock and make MultiXacts.
- No secondary index of a hot table ends in `id`: with stale statistics the planner would take it for a look-up.
- Text is compared by its bytes (COLLATE "C"): queue and type names are ASCII, and this order never changes.

The tables carry no schema name here; `QUEUE_SCHEMA` is put in when they are used (schema_translate_map).
"""

from typing import Any

from sqlalchemy import (
    REAL,
    BigInteger,
    Boolean,
    Column,
    Double,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    Table,
    Text,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, TIMESTAMP

from app.queue.lifecycle import State

metadata = MetaData()

BODY_COLUMNS = (
    "id",
    "created_at",
    "queue",
    "type",
    "priority",
    "run_at",
    "lease_seconds",
    "timeout_seconds",
    "max_retries",
    "backoff",
    "budget_start",
    "expires_at",
    "concurrency_key",
    "unique_key",
    "dead_letter_queue",
    "traceparent",
    "tags",
    "metadata",
    "source",
    "payload",
    "unique_scope",
    "unique_window_seconds",
)
"""What a job brings along wherever it goes; the statements in `sql/` name them as `{body}`."""

NOTE_COLUMNS = (
    "last_error",
    "error_type",
    "error_group",
    "checkpoint",
    "progress_percent",
    "progress_message",
)
"""What is noted of a living job, and kept with a dead one; the statements name them as `{note}`."""


def _name() -> Text:
    return Text(collation="C")


def _instant() -> TIMESTAMP:
    return TIMESTAMP(timezone=True)


def _body(*, id_is_key: bool) -> list[Column[Any]]:
    return [
        Column("id", Uuid, primary_key=id_is_key, nullable=False),
        Column("created_at", _instant(), nullable=False),
        Column("queue", _name(), nullable=False),
        Column("type", _name(), nullable=False),
        Column("priority", SmallInteger, nullable=False),
        Column("run_at", _instant(), nullable=False),
        Column("lease_seconds", Double, nullable=False),
        Column("timeout_seconds", Double),
        Column("max_retries", Integer, nullable=False),
        Column("backoff", JSONB, nullable=False),
        Column("budget_start", Integer, nullable=False),
        Column("expires_at", _instant()),
        Column("concurrency_key", _name()),
        Column("unique_key", _name()),
        Column("dead_letter_queue", _name()),
        Column("traceparent", Text),
        Column("tags", JSONB, nullable=False),
        Column("metadata", LargeBinary, nullable=False),
        Column("source", LargeBinary),
        Column("payload", LargeBinary, nullable=False),
    ]


def _unique() -> list[Column[Any]]:
    # How long `unique_key` is held; they came after the other columns of the body.
    return [Column("unique_scope", Text), Column("unique_window_seconds", Double)]


def _start_deadline(table: str) -> list[Any]:
    """Return the column for the start deadline of a job that waits in `table`, and the index that finds it."""
    return [
        # Null where the job has none, or has been started: a deadline holds until the first lease.
        Column("expires_at", _instant()),
        Index(f"{table}_expiry", "expires_at", postgresql_where=text("expires_at IS NOT NULL")),
    ]


def _place(*, id_is_key: bool = True) -> list[Column[Any]]:
    return [
        Column("id", Uuid, primary_key=id_is_key, nullable=False),
        Column("queue", _name(), nullable=False),
        Column("type", _name(), nullable=False),
        Column("priority", SmallInteger, nullable=False),
        # The attempts that count so far; a lease adds one.
        Column("attempt", Integer, nullable=False),
        # Whether `notes` has a row, so that a claim looks there only when it must.
        Column("noted", Boolean, nullable=False),
    ]


_BUSY = {
    # Fixed thresholds: a fraction of a large table would let dead entries pile up in front of the claim.
    "autovacuum_vacuum_scale_factor": "0",
    "autovacuum_vacuum_cost_delay": "0",
    "autovacuum_analyze_scale_factor": "0",
    "autovacuum_analyze_threshold": "50000",
    # Giving the table's end back takes an exclusive lock, and the next burst needs the pages again.
    "vacuum_truncate": "off",
}

jobs = Table(
    "jobs",
    metadata,
    *_body(id_is_key=True),
    *_unique(),
    postgresql_with=_BUSY | {"autovacuum_vacuum_threshold": "5000"},
)

ready = Table(
    "ready",
    metadata,
    *_place(),
    # When it became ready: the place in line among equal priorities. A released job keeps it.
    Column("since", _instant(), nullable=False),
    *_start_deadline("ready"),
    Index("ready_by_queue", "queue", "priority", "since"),
    # An expression, so that neither index can answer the other's question: where the statistics know one type only,
    # the planner would read a whole queue to find another. No name has a slash in it.
    Index("ready_by_type", text("(queue || '/' || type)"), "priority", "since"),
    postgresql_with=_BUSY | {"autovacuum_vacuum_threshold": "2000", "vacuum_index_cleanup": "on"},
)

scheduled = Table(
    "scheduled",
    metadata,
    *_place(),
    Column("run_at", _instant(), nullable=False),
    # Waits for its backoff (state `retry`), not for its producer's run_at.
    Column("is_retry", Boolean, nullable=False),
    *_start_deadline("scheduled"),
    Index("scheduled_due", "run_at"),
    postgresql_with=_BUSY | {"autovacuum_vacuum_threshold": "2000"},
)

held = Table(
    "held",
    metadata,
    *_place(),
    Column("concurrency_key", _name(), nullable=False),
    Column("since", _instant(), nullable=False),
    *_start_deadline("held"),
    Index("held_by_key", "queue", "concurrency_key", "priority", "since"),
    postgresql_with=_BUSY | {"autovacuum_vacuum_threshold": "2000"},
)

leases = Table(
    "leases",
    metadata,
    *_place(),
    # The fence: random, new at every attempt, known to its worker only.
    Column("lease_id", Uuid, nullable=False),
    Column("since", _instant(), nullable=False),
    Column("leased_at", _instant(), nullable=False),
    Column("heartbeat_at", _instant()),
    Column("expires_at", _instant(), nullable=False),
    Column("deadline_at", _instant()),
    Column("lease_seconds", Double, nullable=False),
    Column("worker", Text),
    Column("cancel_requested", Boolean, nullable=False),
    Index("leases_expiry", "expires_at"),
    postgresql_with=_BUSY | {"autovacuum_vacuum_threshold": "2000", "vacuum_index_cleanup": "on"},
)

notes = Table(
    "notes",
    metadata,
    Column("job_id", Uuid, primary_key=True),
    Column("last_error", LargeBinary),
    Column("error_type", Text),
    Column("checkpoint", LargeBinary),
    Column("progress_percent", REAL),
    Column("progress_message", Text),
    # Of type and normalised message: alike failures have the same.
    Column("error_group", _name()),
    postgresql_with=_BUSY | {"autovacuum_vacuum_threshold": "2000"},
)

dead = Table(
    "dead",
    metadata,
    *_body(id_is_key=True),
    Column("state", Text, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("reason", Text, nullable=False),
    Column("last_error", LargeBinary),
    Column("error_type", Text),
    Column("checkpoint", LargeBinary),
    Column("worker", Text),
    Column("started_at", _instant()),
    Column("finished_at", _instant(), nullable=False),
    *_unique(),
    Column("error_group", _name()),
    Column("progress_percent", REAL),
    Column("progress_message", Text),
    Index("dead_by_queue", "queue", "state", "id"),
    Index("dead_by_queue_and_age", "queue", "finished_at"),
    Index(
        "dead_by_group",
        "queue",
        "error_group",
        "id",
        # Groups are counted in the index alone.
        postgresql_include=["finished_at"],
        postgresql_where=text("state = 'failed'"),
    ),
    Index("dead_by_age", "finished_at"),
)

history = Table(
    "history",
    metadata,
    *_body(id_is_key=False),
    Column("lease_id", Uuid, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("last_error", LargeBinary),
    Column("worker", Text),
    Column("started_at", _instant(), nullable=False),
    Column("finished_at", _instant(), nullable=False),
    Column("result", LargeBinary),
    *_unique(),
    # The jobs that its ack has enqueued, for the repeat of a lost answer.
    Column("follow_ups", ARRAY(Uuid)),
    Index("history_by_id", "id"),
    Index("history_by_queue", "queue", "id"),
    postgresql_partition_by="RANGE (finished_at)",
)

attempts = Table(
    "attempts",
    metadata,
    Column("job_id", Uuid, nullable=False),
    Column("lease_id", Uuid, nullable=False),
    Column("queue", _name(), nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("worker", Text),
    Column("started_at", _instant(), nullable=False),
    Column("ended_at", _instant(), nullable=False),
    Column("outcome", Text, nullable=False),
    # The recorded answer, for a repeat of the verb that ended the attempt; no verb where the maintenance did.
    Column("verb", Text),
    Column("state", Text, nullable=False),
    Column("run_at", _instant()),
    Column("error", LargeBinary),
    Index("attempts_by_job", "job_id"),
    postgresql_partition_by="RANGE (ended_at)",
)

unique_keys = Table(
    "unique_keys",
    metadata,
    Column("queue", _name(), primary_key=True),
    Column("key", _name(), primary_key=True),
    Column("job_id", Uuid, nullable=False),
    Column("scope", Text, nullable=False),
    Column("until", _instant()),
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    # Whose key it is: keys of different API keys, and of different paths, do not meet.
    Column("owner", Text, primary_key=True),
    Column("path", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("body_hash", LargeBinary, nullable=False),
    # The jobs that the call made or found, in the order of its items; null for an item that was refused.
    Column("job_ids", ARRAY(Uuid), nullable=False),
    Column("created_at", _instant(), nullable=False),
    Index("idempotency_keys_by_age", "created_at"),
)

lease_requests = Table(
    "lease_requests",
    metadata,
    Column("owner", Text, primary_key=True),
    Column("request_id", Text, primary_key=True),
    Column("job_ids", ARRAY(Uuid), nullable=False),
    Column("lease_ids", ARRAY(Uuid), nullable=False),
    # How often the leases were handed out: who would take them back must know of the last time.
    Column("delivery", Integer, nullable=False),
    Column("created_at", _instant(), nullable=False),
    Index("lease_requests_by_age", "created_at"),
)

queues = Table(
    "queues",
    metadata,
    Column("name", _name(), primary_key=True),
    Column("policy", JSONB, nullable=False, server_default=text("'{}'::jsonb")),
    Column("paused", Boolean, nullable=False, server_default=text("false")),
    Column("created_at", _instant(), nullable=False, server_default=text("now()")),
)


def _counted() -> list[Column[Any]]:
    return [Column(state.value, BigInteger) for state in State]


counts = Table(
    "counts",
    metadata,
    Column("queue", _name(), primary_key=True),
    *_counted(),
)

deltas = Table(
    "deltas",
    metadata,
    # Appended by every move and folded into `counts`: one hot counter row would serialise all writers.
    Column("seq", BigInteger, Identity(always=True), primary_key=True),
    Column("queue", _name(), nullable=False),
    *_counted(),
    postgresql_with=_BUSY | {"autovacuum_vacuum_threshold": "2000"},
)

workers = Table(
    "workers",
    metadata,
    Column("name", Text, primary_key=True),
    # What it last asked for: a list of queues, and one of types or null for all.
    Column("queues", JSONB, nullable=False),
    Column("types", JSONB),
    # What an operator wants of it: `continue`, `quiet` or `terminate`.
    Column("directive", Text, nullable=False),
    Column("first_seen_at", _instant(), nullable=False),
    Column("last_seen_at", _instant(), nullable=False),
)

schedules = Table(
    "schedules",
    metadata,
    Column("name", _name(), primary_key=True),
    Column("definition", JSONB, nullable=False),
    # The payload of its jobs, value for value as it was sent.
    Column("payload", LargeBinary, nullable=False),
    Column("paused", Boolean, nullable=False),
    Column("created_at", _instant(), nullable=False),
    # From when on an interval counts: its creation, or the last change of its rhythm.
    Column("anchored_at", _instant(), nullable=False),
    # The first fire that nobody has decided yet; null when it will not fire again.
    Column("next_fire_at", _instant()),
    # Its newest jobs, the last one last: who does not want them to overlap asks whether any of them still lives.
    Column("job_ids", ARRAY(Uuid), nullable=False),
    Index("schedules_due", "next_fire_at", postgresql_where=text("NOT paused")),
)

schedule_runs = Table(
    "schedule_runs",
    metadata,
    Column("schedule", _name(), primary_key=True),
    # When it was to fire: the key is what lets it fire once only.
    Column("fire_at", _instant(), primary_key=True),
    # By hand: that takes nothing away from what the schedule itself does at the same instant.
    Column("triggered", Boolean, primary_key=True),
    Column("decided_at", _instant(), nullable=False),
    Column("outcome", Text, nullable=False),
    Column("reason", Text),
    # How many fires, from fire_at on, it stands for: those that were missed together are one run.
    Column("fires", Integer, nullable=False),
    Column("job_id", Uuid),
)

changes = Table(
    "changes",
    metadata,
    # What processes keep a copy of (queue policies, workers' directives) has a number here that every change raises.
    Column("topic", Text, primary_key=True),
    Column("number", BigInteger, nullable=False),
)

defaults = Table(
    "defaults",
    metadata,
    # What the environment says of jobs that name nothing, for the function enqueue(): it can not see the environment.
    Column("name", Text, primary_key=True),
    Column("value", JSONB, nullable=False),
)

maintenance = Table(
    "maintenance",
    metadata,
    Column("task", Text, primary_key=True),
    Column("ran_at", _instant(), nullable=False),
)

PARTITIONED = (history, attempts)
