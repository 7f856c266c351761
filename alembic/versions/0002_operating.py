"""Once only, deadlines, error groups, schedules, workers: what operators and careful clients ask of a queue."""

from alembic.util import CommandError
from sqlalchemy import text

from alembic import op

revision = "0002"
down_revision = "0001"

STATEMENTS = """
ALTER TABLE jobs ADD COLUMN unique_scope TEXT, ADD COLUMN unique_window_seconds double precision;
ALTER TABLE ready ADD COLUMN expires_at TIMESTAMP WITH TIME ZONE;
CREATE INDEX ready_expiry ON ready (expires_at) WHERE expires_at IS NOT NULL;
ALTER TABLE scheduled ADD COLUMN expires_at TIMESTAMP WITH TIME ZONE;
CREATE INDEX scheduled_expiry ON scheduled (expires_at) WHERE expires_at IS NOT NULL;
ALTER TABLE held ADD COLUMN expires_at TIMESTAMP WITH TIME ZONE;
CREATE INDEX held_expiry ON held (expires_at) WHERE expires_at IS NOT NULL;
ALTER TABLE notes ADD COLUMN error_group TEXT COLLATE "C";
ALTER TABLE dead ADD COLUMN unique_scope TEXT, ADD COLUMN unique_window_seconds double precision,
    ADD COLUMN error_group TEXT COLLATE "C", ADD COLUMN progress_percent REAL, ADD COLUMN progress_message TEXT;
CREATE INDEX dead_by_queue_and_age ON dead (queue, finished_at);
-- Jobs that have failed before are grouped by the type of their error alone.
UPDATE dead SET error_group = left(md5(coalesce(error_type, '')), 16) WHERE state = 'failed';
CREATE INDEX dead_by_group ON dead (queue, error_group, id) INCLUDE (finished_at) WHERE state = 'failed';
ALTER TABLE history ADD COLUMN unique_scope TEXT, ADD COLUMN unique_window_seconds double precision,
    ADD COLUMN follow_ups UUID[];

CREATE TABLE idempotency_keys (
    owner TEXT NOT NULL,
    path TEXT NOT NULL,
    key TEXT NOT NULL,
    body_hash BYTEA NOT NULL,
    job_ids UUID[] NOT NULL,
    created_at TIMESTAMP WITH TIME ZONE NOT NULL,
    PRIMARY KEY (owner, path, key)
);
CREATE INDEX idempotency_keys_by_age ON idempotency_keys (created_at);

CREATE TABLE lease_requests (
    owner TEXT NOT NULL,
    request_id TEXT NOT NULL,
    job_ids UUID[] NOT NULL,
    lease_ids UUID[] NOT NULL,
    delivery INTEGER NOT NULL,
    created_at TIMESTAMP WITH TIME ZONE NOT NULL,
    PRIMARY KEY (owner, request_id)
);
CREATE INDEX lease_requests_by_age ON lease_requests (created_at);

CREATE TABLE workers (
    name TEXT NOT NULL,
    queues JSONB NOT NULL,
    types JSONB,
    directive TEXT NOT NULL,
    first_seen_at TIMESTAMP WITH TIME ZONE NOT NULL,
    last_seen_at TIMESTAMP WITH TIME ZONE NOT NULL,
    PRIMARY KEY (name)
);

CREATE TABLE schedules (
    name TEXT COLLATE "C" NOT NULL,
    definition JSONB NOT NULL,
    payload BYTEA NOT NULL,
    paused BOOLEAN NOT NULL,
    created_at TIMESTAMP WITH TIME ZONE NOT NULL,
    anchored_at TIMESTAMP WITH TIME ZONE NOT NULL,
    next_fire_at TIMESTAMP WITH TIME ZONE,
    job_ids UUID[] NOT NULL,
    PRIMARY KEY (name)
);
CREATE INDEX schedules_due ON schedules (next_fire_at) WHERE NOT paused;

CREATE TABLE schedule_runs (
    schedule TEXT COLLATE "C" NOT NULL,
    fire_at TIMESTAMP WITH TIME ZONE NOT NULL,
    triggered BOOLEAN NOT NULL,
    decided_at TIMESTAMP WITH TIME ZONE NOT NULL,
    outcome TEXT NOT NULL,
    reason TEXT,
    fires INTEGER NOT NULL,
    job_id UUID,
    PRIMARY KEY (schedule, fire_at, triggered)
);

CREATE TABLE changes (
    topic TEXT NOT NULL,
    number BIGINT NOT NULL,
    PRIMARY KEY (topic)
);

CREATE TABLE defaults (
    name TEXT NOT NULL,
    value JSONB NOT NULL,
    PRIMARY KEY (name)
);
"""


def upgrade() -> None:
    """Add what the new verbs need; the version before works on with it."""
    for statement in STATEMENTS.split(";\n"):
        if statement.strip():
            op.execute(statement)


def downgrade() -> None:
    """Take it away again, unless schedules or held unique keys would be lost. Raises CommandError then."""
    connection = op.get_bind()
    connection.execute(text("LOCK TABLE jobs, schedules IN ACCESS EXCLUSIVE MODE"))
    if connection.execute(
        text(
            "SELECT EXISTS (SELECT FROM schedules) OR EXISTS (SELECT FROM jobs WHERE unique_key IS NOT NULL)"
        )
    ).scalar():
        message = (
            "There are schedules, or unfinished jobs with unique keys: delete or finish them before going below"
            " revision 0002."
        )
        raise CommandError(message)
    for table in (
        "idempotency_keys",
        "lease_requests",
        "workers",
        "schedules",
        "schedule_runs",
        "changes",
        "defaults",
    ):
        op.execute(f"DROP TABLE {table}")
    op.execute(
        "ALTER TABLE history DROP COLUMN unique_scope, DROP COLUMN unique_window_seconds, DROP COLUMN follow_ups"
    )
    op.execute(
        "ALTER TABLE dead DROP COLUMN unique_scope, DROP COLUMN unique_window_seconds, DROP COLUMN error_group,"
        " DROP COLUMN progress_percent, DROP COLUMN progress_message"
    )
    op.execute("DROP INDEX dead_by_queue_and_age")
    op.execute("ALTER TABLE notes DROP COLUMN error_group")
    for table in ("held", "scheduled", "ready"):
        op.execute(f"ALTER TABLE {table} DROP COLUMN expires_at")
    op.execute("ALTER TABLE jobs DROP COLUMN unique_scope, DROP COLUMN unique_window_seconds")
