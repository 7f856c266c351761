"""The foundation: bodies, places, history, counts.

Frozen: this file says what the first release created, whatever `app/store/schema.py` says today.
"""

from alembic.util import CommandError
from sqlalchemy import text

from alembic import op

revision = "0001"
down_revision = None

TABLES = """
CREATE TABLE attempts (
    job_id UUID NOT NULL,
    lease_id UUID NOT NULL,
    queue TEXT COLLATE "C" NOT NULL,
    attempt INTEGER NOT NULL,
    worker TEXT,
    started_at TIMESTAMP WITH TIME ZONE NOT NULL,
    ended_at TIMESTAMP WITH TIME ZONE NOT NULL,
    outcome TEXT NOT NULL,
    verb TEXT,
    state TEXT NOT NULL,
    run_at TIMESTAMP WITH TIME ZONE,
    error BYTEA
)
 PARTITION BY RANGE (ended_at);
CREATE INDEX attempts_by_job ON attempts (job_id);

CREATE TABLE counts (
    queue TEXT COLLATE "C" NOT NULL,
    scheduled BIGINT,
    ready BIGINT,
    held BIGINT,
    active BIGINT,
    retry BIGINT,
    completed BIGINT,
    failed BIGINT,
    cancelled BIGINT,
    expired BIGINT,
    PRIMARY KEY (queue)
);

CREATE TABLE dead (
    id UUID NOT NULL,
    created_at TIMESTAMP WITH TIME ZONE NOT NULL,
    queue TEXT COLLATE "C" NOT NULL,
    type TEXT COLLATE "C" NOT NULL,
    priority SMALLINT NOT NULL,
    run_at TIMESTAMP WITH TIME ZONE NOT NULL,
    lease_seconds double precision NOT NULL,
    timeout_seconds double precision,
    max_retries INTEGER NOT NULL,
    backoff JSONB NOT NULL,
    budget_start INTEGER NOT NULL,
    expires_at TIMESTAMP WITH TIME ZONE,
    concurrency_key TEXT COLLATE "C",
    unique_key TEXT COLLATE "C",
    dead_letter_queue TEXT COLLATE "C",
    traceparent TEXT,
    tags JSONB NOT NULL,
    metadata BYTEA NOT NULL,
    source BYTEA,
    payload BYTEA NOT NULL,
    state TEXT NOT NULL,
    attempt INTEGER NOT NULL,
    reason TEXT NOT NULL,
    last_error BYTEA,
    error_type TEXT,
    checkpoint BYTEA,
    worker TEXT,
    started_at TIMESTAMP WITH TIME ZONE,
    finished_at TIMESTAMP WITH TIME ZONE NOT NULL,
    PRIMARY KEY (id)
);
CREATE INDEX dead_by_age ON dead (finished_at);
CREATE INDEX dead_by_queue ON dead (queue, state, id);

CREATE TABLE deltas (
    seq BIGINT GENERATED ALWAYS AS IDENTITY,
    queue TEXT COLLATE "C" NOT NULL,
    scheduled BIGINT,
    ready BIGINT,
    held BIGINT,
    active BIGINT,
    retry BIGINT,
    completed BIGINT,
    failed BIGINT,
    cancelled BIGINT,
    expired BIGINT,
    PRIMARY KEY (seq)
)
 WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_cost_delay = 0, autovacuum_analyze_scale_factor = 0, autovacuum_analyze_threshold = 50000, vacuum_truncate = off, autovacuum_vacuum_threshold = 2000);

CREATE TABLE held (
    id UUID NOT NULL,
    queue TEXT COLLATE "C" NOT NULL,
    type TEXT COLLATE "C" NOT NULL,
    priority SMALLINT NOT NULL,
    attempt INTEGER NOT NULL,
    noted BOOLEAN NOT NULL,
    concurrency_key TEXT COLLATE "C" NOT NULL,
    since TIMESTAMP WITH TIME ZONE NOT NULL,
    PRIMARY KEY (id)
)
 WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_cost_delay = 0, autovacuum_analyze_scale_factor = 0, autovacuum_analyze_threshold = 50000, vacuum_truncate = off, autovacuum_vacuum_threshold = 2000);
CREATE INDEX held_by_key ON held (queue, concurrency_key, priority, since);

CREATE TABLE history (
    id UUID NOT NULL,
    created_at TIMESTAMP WITH TIME ZONE NOT NULL,
    queue TEXT COLLATE "C" NOT NULL,
    type TEXT COLLATE "C" NOT NULL,
    priority SMALLINT NOT NULL,
    run_at TIMESTAMP WITH TIME ZONE NOT NULL,
    lease_seconds double precision NOT NULL,
    timeout_seconds double precision,
    max_retries INTEGER NOT NULL,
    backoff JSONB NOT NULL,
    budget_start INTEGER NOT NULL,
    expires_at TIMESTAMP WITH TIME ZONE,
    concurrency_key TEXT COLLATE "C",
    unique_key TEXT COLLATE "C",
    dead_letter_queue TEXT COLLATE "C",
    traceparent TEXT,
    tags JSONB NOT NULL,
    metadata BYTEA NOT NULL,
    source BYTEA,
    payload BYTEA NOT NULL,
    lease_id UUID NOT NULL,
    attempt INTEGER NOT NULL,
    last_error BYTEA,
    worker TEXT,
    started_at TIMESTAMP WITH TIME ZONE NOT NULL,
    finished_at TIMESTAMP WITH TIME ZONE NOT NULL,
    result BYTEA
)
 PARTITION BY RANGE (finished_at);
CREATE INDEX history_by_id ON history (id);
CREATE INDEX history_by_queue ON history (queue, id);

CREATE TABLE jobs (
    id UUID NOT NULL,
    created_at TIMESTAMP WITH TIME ZONE NOT NULL,
    queue TEXT COLLATE "C" NOT NULL,
    type TEXT COLLATE "C" NOT NULL,
    priority SMALLINT NOT NULL,
    run_at TIMESTAMP WITH TIME ZONE NOT NULL,
    lease_seconds double precision NOT NULL,
    timeout_seconds double precision,
    max_retries INTEGER NOT NULL,
    backoff JSONB NOT NULL,
    budget_start INTEGER NOT NULL,
    expires_at TIMESTAMP WITH TIME ZONE,
    concurrency_key TEXT COLLATE "C",
    unique_key TEXT COLLATE "C",
    dead_letter_queue TEXT COLLATE "C",
    traceparent TEXT,
    tags JSONB NOT NULL,
    metadata BYTEA NOT NULL,
    source BYTEA,
    payload BYTEA NOT NULL,
    PRIMARY KEY (id)
)
 WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_cost_delay = 0, autovacuum_analyze_scale_factor = 0, autovacuum_analyze_threshold = 50000, vacuum_truncate = off, autovacuum_vacuum_threshold = 5000);

CREATE TABLE leases (
    id UUID NOT NULL,
    queue TEXT COLLATE "C" NOT NULL,
    type TEXT COLLATE "C" NOT NULL,
    priority SMALLINT NOT NULL,
    attempt INTEGER NOT NULL,
    noted BOOLEAN NOT NULL,
    lease_id UUID NOT NULL,
    since TIMESTAMP WITH TIME ZONE NOT NULL,
    leased_at TIMESTAMP WITH TIME ZONE NOT NULL,
    heartbeat_at TIMESTAMP WITH TIME ZONE,
    expires_at TIMESTAMP WITH TIME ZONE NOT NULL,
    deadline_at TIMESTAMP WITH TIME ZONE,
    lease_seconds double precision NOT NULL,
    worker TEXT,
    cancel_requested BOOLEAN NOT NULL,
    PRIMARY KEY (id)
)
 WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_cost_delay = 0, autovacuum_analyze_scale_factor = 0, autovacuum_analyze_threshold = 50000, vacuum_truncate = off, autovacuum_vacuum_threshold = 2000, vacuum_index_cleanup = on);
CREATE INDEX leases_expiry ON leases (expires_at);

CREATE TABLE maintenance (
    task TEXT NOT NULL,
    ran_at TIMESTAMP WITH TIME ZONE NOT NULL,
    PRIMARY KEY (task)
);

CREATE TABLE notes (
    job_id UUID NOT NULL,
    last_error BYTEA,
    error_type TEXT,
    checkpoint BYTEA,
    progress_percent REAL,
    progress_message TEXT,
    PRIMARY KEY (job_id)
)
 WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_cost_delay = 0, autovacuum_analyze_scale_factor = 0, autovacuum_analyze_threshold = 50000, vacuum_truncate = off, autovacuum_vacuum_threshold = 2000);

CREATE TABLE queues (
    name TEXT COLLATE "C" NOT NULL,
    policy JSONB DEFAULT '{}'::jsonb NOT NULL,
    paused BOOLEAN DEFAULT false NOT NULL,
    created_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
    PRIMARY KEY (name)
);

CREATE TABLE ready (
    id UUID NOT NULL,
    queue TEXT COLLATE "C" NOT NULL,
    type TEXT COLLATE "C" NOT NULL,
    priority SMALLINT NOT NULL,
    attempt INTEGER NOT NULL,
    noted BOOLEAN NOT NULL,
    since TIMESTAMP WITH TIME ZONE NOT NULL,
    PRIMARY KEY (id)
)
 WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_cost_delay = 0, autovacuum_analyze_scale_factor = 0, autovacuum_analyze_threshold = 50000, vacuum_truncate = off, autovacuum_vacuum_threshold = 2000, vacuum_index_cleanup = on);
CREATE INDEX ready_by_queue ON ready (queue, priority, since);
CREATE INDEX ready_by_type ON ready ((queue || '/' || type), priority, since);

CREATE TABLE scheduled (
    id UUID NOT NULL,
    queue TEXT COLLATE "C" NOT NULL,
    type TEXT COLLATE "C" NOT NULL,
    priority SMALLINT NOT NULL,
    attempt INTEGER NOT NULL,
    noted BOOLEAN NOT NULL,
    run_at TIMESTAMP WITH TIME ZONE NOT NULL,
    is_retry BOOLEAN NOT NULL,
    PRIMARY KEY (id)
)
 WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_cost_delay = 0, autovacuum_analyze_scale_factor = 0, autovacuum_analyze_threshold = 50000, vacuum_truncate = off, autovacuum_vacuum_threshold = 2000);
CREATE INDEX scheduled_due ON scheduled (run_at);

CREATE TABLE unique_keys (
    queue TEXT COLLATE "C" NOT NULL,
    key TEXT COLLATE "C" NOT NULL,
    job_id UUID NOT NULL,
    scope TEXT NOT NULL,
    until TIMESTAMP WITH TIME ZONE,
    PRIMARY KEY (queue, key)
);
"""


def upgrade() -> None:
    """Create everything, in an empty schema."""
    for statement in TABLES.split(";\n"):
        if statement.strip():
            op.execute(statement)


def downgrade() -> None:
    """Drop everything, unless there are unfinished jobs or dead letters. Raises CommandError then."""
    connection = op.get_bind()
    # Nobody may enqueue between the look and the drop.
    connection.execute(text("LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE"))
    if connection.execute(text("SELECT EXISTS (SELECT FROM jobs) OR EXISTS (SELECT FROM dead)")).scalar():
        message = "There are unfinished jobs or dead letters: finish or delete them before going below revision 0001."
        raise CommandError(message)
    for table in (
        "jobs",
        "ready",
        "scheduled",
        "held",
        "leases",
        "notes",
        "dead",
        "history",
        "attempts",
        "unique_keys",
        "queues",
        "counts",
        "deltas",
        "maintenance",
    ):
        op.execute(f"DROP TABLE {table}")
