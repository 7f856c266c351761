"""`enqueue()`: an application in the same database enqueues in its own transaction."""

from alembic import op

revision = "0003"
down_revision = "0002"

# What POST /jobs does, in one function: the rules of app/api/schemas.py, app/queue/policy.py and app/queue/unique.py,
# the writes of enqueue.sql and replace.sql, and a hint such as app/engine/wakeup.py sends. A test runs the same cases
# through both.
#
# SECURITY DEFINER, so that a role needs no more than EXECUTE; the search path is fixed, and pg_temp comes last in it,
# so that nobody's temporary table is taken for ours.
ENQUEUE = r"""
CREATE FUNCTION enqueue(
  queue text,
  type text DEFAULT 'default',
  payload text DEFAULT 'null',
  priority text DEFAULT NULL,
  run_at timestamptz DEFAULT NULL,
  delay_seconds float8 DEFAULT NULL,
  lease_seconds float8 DEFAULT NULL,
  timeout_seconds float8 DEFAULT NULL,
  max_retries integer DEFAULT NULL,
  backoff jsonb DEFAULT NULL,
  expires_at timestamptz DEFAULT NULL,
  expires_in_seconds float8 DEFAULT NULL,
  unique_key text DEFAULT NULL,
  unique_scope text DEFAULT NULL,
  unique_window_seconds float8 DEFAULT NULL,
  on_conflict text DEFAULT NULL,
  dead_letter_queue text DEFAULT NULL,
  tags text[] DEFAULT NULL,
  metadata text DEFAULT '{}',
  traceparent text DEFAULT NULL)
RETURNS uuid
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = {schema}, pg_temp
SET enable_seqscan = off
AS $function$
#variable_conflict use_column
DECLARE
  -- Not now(), which is the start of the application's transaction: of two jobs in one the first is the older.
  moment CONSTANT timestamptz := clock_timestamp();
  a_second CONSTANT interval := interval '1 second';
  a_name CONSTANT text := '^[A-Za-z0-9][A-Za-z0-9._:-]*$';
  a_control CONSTANT text COLLATE "C" := '[\u0001-\u001f\u007f-\u009f\u2028\u2029]';
  a_trace CONSTANT text := '^[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$';
  a_day CONSTANT integer := 86400;
  problem text;
  environment jsonb;
  policy jsonb;
  known boolean;
  own jsonb;
  settings jsonb;
  new_id uuid;
  new_payload text := coalesce(btrim(enqueue.payload, E' \t\n\r'), 'null');
  new_metadata text := coalesce(btrim(enqueue.metadata, E' \t\n\r'), '{}');
  new_tags jsonb;
  new_backoff jsonb;
  new_priority integer;
  new_delay float8;
  new_lease float8;
  new_timeout float8;
  new_retries integer;
  new_traceparent text := CASE WHEN enqueue.traceparent ~ a_trace THEN enqueue.traceparent END;
  new_state text;
  new_dead_letter_queue text;
  new_scope text := CASE WHEN enqueue.unique_key IS NOT NULL THEN coalesce(enqueue.unique_scope, 'unfinished') END;
  window_ends_at timestamptz;
  due_at timestamptz;
  deadline_at timestamptz;
  since timestamptz := moment;
  each text;
  holder record;
  old_state text;
  old_attempt integer := 0;
  old_noted boolean := false;
  old_since timestamptz;
  told integer;
BEGIN
  SELECT d.value INTO environment FROM defaults AS d WHERE d.name = 'environment';
  IF NOT FOUND THEN
    RAISE EXCEPTION 'leaseq has not run on this schema yet: its start brings the defaults of jobs'
      USING ERRCODE = 'object_not_in_prerequisite_state';
  END IF;

  problem := CASE
    WHEN enqueue.queue IS NULL OR char_length(enqueue.queue) > 128 OR (enqueue.queue COLLATE "C") !~ a_name
    THEN 'queue must be 1 to 128 letters, digits and . _ : -, the first a letter or digit'
    WHEN enqueue.type IS NULL OR char_length(enqueue.type) > 128 OR (enqueue.type COLLATE "C") !~ a_name
    THEN 'type must be 1 to 128 letters, digits and . _ : -, the first a letter or digit'
    WHEN char_length(enqueue.dead_letter_queue) > 128 OR (enqueue.dead_letter_queue COLLATE "C") !~ a_name
    THEN 'dead_letter_queue must be 1 to 128 letters, digits and . _ : -, the first a letter or digit'
    WHEN enqueue.priority !~ '^(fast|normal|bulk|[0-9]|10)$'
    THEN 'priority must be fast, normal, bulk or 0 to 10'
    WHEN enqueue.run_at IS NOT NULL AND enqueue.delay_seconds IS NOT NULL
    THEN 'give run_at or delay_seconds, not both'
    WHEN enqueue.expires_at IS NOT NULL AND enqueue.expires_in_seconds IS NOT NULL
    THEN 'give expires_at or expires_in_seconds, not both'
    WHEN enqueue.run_at >= '2200-01-01Z' THEN 'run_at must be before 2200-01-01'
    WHEN enqueue.expires_at >= '2200-01-01Z' THEN 'expires_at must be before 2200-01-01'
    WHEN enqueue.delay_seconds NOT BETWEEN 0 AND 100 * 366 * a_day::float8
    THEN 'delay_seconds must be 0 to 3162240000'
    WHEN enqueue.lease_seconds NOT BETWEEN 0.5 AND 43200 THEN 'lease_seconds must be 0.5 to 43200'
    WHEN enqueue.timeout_seconds NOT BETWEEN 0.5 AND 30 * a_day THEN 'timeout_seconds must be 0.5 to 2592000'
    WHEN enqueue.max_retries NOT BETWEEN 0 AND 10000 THEN 'max_retries must be 0 to 10000'
    WHEN enqueue.expires_in_seconds <= 0 OR enqueue.expires_in_seconds > 100 * 366 * a_day::float8
    THEN 'expires_in_seconds must be more than 0 and at most 3162240000'
    WHEN enqueue.unique_key IS NULL
         AND coalesce(enqueue.unique_scope, enqueue.on_conflict, enqueue.unique_window_seconds::text) IS NOT NULL
    THEN 'unique_scope, unique_window_seconds and on_conflict go with a unique_key'
    WHEN char_length(enqueue.unique_key) NOT BETWEEN 1 AND 256 THEN 'unique_key must have 1 to 256 characters'
    WHEN enqueue.unique_key ~ a_control THEN 'unique_key must not contain control characters'
    WHEN new_scope NOT IN ('queued', 'unfinished', 'window')
    THEN 'unique_scope must be queued, unfinished or window'
    WHEN (new_scope = 'window') <> (enqueue.unique_window_seconds IS NOT NULL)
    THEN 'unique_window_seconds goes with the scope window, and only with it'
    WHEN enqueue.unique_window_seconds <= 0 OR enqueue.unique_window_seconds > 100 * 366 * a_day::float8
    THEN 'unique_window_seconds must be more than 0 and at most 3162240000'
    WHEN enqueue.on_conflict NOT IN ('return', 'reject', 'replace')
    THEN 'on_conflict must be return, reject or replace'
    WHEN cardinality(enqueue.tags) > 20 THEN 'tags may be at most 20'
    WHEN octet_length(convert_to(new_payload, 'UTF8')) > (environment ->> 'max_payload_bytes')::bigint
    THEN format('payload may have at most %s bytes', environment ->> 'max_payload_bytes')
    WHEN octet_length(convert_to(new_metadata, 'UTF8')) > 4096 THEN 'metadata must have at most 4096 bytes'
    WHEN json_typeof(new_metadata::json) <> 'object' THEN 'metadata must be an object'
    WHEN json_typeof(new_payload::json) IS NULL THEN 'payload must be JSON'
    WHEN jsonb_typeof(enqueue.backoff) <> 'object' THEN 'backoff must be an object'
  END;
  FOREACH each IN ARRAY coalesce(enqueue.tags, '{}') LOOP
    problem := coalesce(problem, CASE
      WHEN each IS NULL OR char_length(each) NOT BETWEEN 1 AND 128 THEN 'each of the tags must have 1 to 128 characters'
      WHEN each ~ a_control THEN 'tags must not contain control characters'
    END);
  END LOOP;
  -- PostgreSQL's json takes half of a surrogate pair, and any depth that its stack bears; readers elsewhere may not.
  FOREACH each IN ARRAY ARRAY[new_payload, new_metadata] LOOP
    IF position('\u' IN each) > 0 AND regexp_replace(
         replace(each, '\\', ' '), '\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}', ' ', 'g'
       ) ~ '\\u[dD][89a-fA-F]' THEN
      problem := coalesce(problem, 'payload and metadata must not escape half of a surrogate pair');
    END IF;
    -- 500 levels in a request's body, which is one of them.
    IF char_length(each) - char_length(translate(each, '[{', '')) > 499 AND 499 < (
         SELECT max(depth)
           FROM (SELECT sum(CASE WHEN b.bracket IN ('[', '{') THEN 1 ELSE -1 END) OVER (ORDER BY b.place) AS depth
                   FROM unnest(string_to_array(regexp_replace(
                          regexp_replace(each, '"([^"\\]|\\.)*"', '', 'g'), '[^][{}]', '', 'g'), NULL))
                        WITH ORDINALITY AS b(bracket, place)) AS depths) THEN
      problem := coalesce(problem, 'payload and metadata must not be nested deeper than 499');
    END IF;
  END LOOP;
  IF problem IS NULL AND enqueue.backoff IS NOT NULL THEN
    new_backoff := jsonb_strip_nulls(enqueue.backoff);
    problem := CASE
      WHEN new_backoff - ARRAY['strategy', 'initial_seconds', 'factor', 'max_seconds', 'jitter'] <> '{}'
      THEN 'backoff has strategy, initial_seconds, factor, max_seconds and jitter, and nothing else'
      WHEN new_backoff ->> 'strategy' NOT IN ('exponential', 'linear', 'fixed')
      THEN 'backoff: strategy must be exponential, linear or fixed'
      WHEN new_backoff ->> 'jitter' NOT IN ('none', 'equal', 'full')
      THEN 'backoff: jitter must be none, equal or full'
      WHEN 'number' <> ANY (ARRAY[jsonb_typeof(new_backoff -> 'initial_seconds'), jsonb_typeof(new_backoff -> 'factor'),
                                  jsonb_typeof(new_backoff -> 'max_seconds')])
      THEN 'backoff: initial_seconds, factor and max_seconds must be numbers'
      WHEN (new_backoff ->> 'initial_seconds')::numeric NOT BETWEEN 0 AND 30 * a_day
      THEN 'backoff: initial_seconds must be 0 to 2592000'
      WHEN (new_backoff ->> 'factor')::numeric NOT BETWEEN 1 AND 1000 THEN 'backoff: factor must be 1 to 1000'
      WHEN (new_backoff ->> 'max_seconds')::numeric NOT BETWEEN 0 AND 366 * a_day
      THEN 'backoff: max_seconds must be 0 to 31622400'
    END;
  END IF;
  IF problem IS NOT NULL THEN
    RAISE EXCEPTION '%', problem USING ERRCODE = 'invalid_parameter_value';
  END IF;

  -- By the job's own words, else its type's, its queue's, the environment's.
  SELECT q.policy INTO policy FROM queues AS q WHERE q.name = enqueue.queue;
  known := FOUND;
  policy := coalesce(policy, '{}');
  own := coalesce(policy -> 'types' -> enqueue.type, '{}');
  settings := environment || (policy - 'types') || own;
  new_backoff := coalesce(environment -> 'backoff', '{}') || coalesce(policy -> 'backoff', '{}')
                 || coalesce(own -> 'backoff', '{}') || coalesce(new_backoff, '{}');
  new_priority := CASE enqueue.priority
    WHEN 'fast' THEN 10 WHEN 'normal' THEN 5 WHEN 'bulk' THEN 1
    ELSE coalesce(enqueue.priority::integer, (settings ->> 'priority')::integer, 5)
  END;
  new_lease := coalesce(enqueue.lease_seconds, (settings ->> 'lease_seconds')::float8);
  new_timeout := coalesce(enqueue.timeout_seconds, (settings ->> 'timeout_seconds')::float8);
  new_retries := coalesce(enqueue.max_retries, (settings ->> 'max_retries')::integer);
  new_dead_letter_queue := coalesce(enqueue.dead_letter_queue, settings ->> 'dead_letter_queue');
  new_delay := enqueue.delay_seconds;
  IF new_delay IS NULL AND enqueue.run_at IS NULL THEN
    new_delay := (settings ->> 'delay_seconds')::float8;
  END IF;
  due_at := greatest(moment, enqueue.run_at, moment + new_delay * a_second);
  deadline_at := coalesce(enqueue.expires_at, moment + enqueue.expires_in_seconds * a_second);
  problem := CASE
    WHEN deadline_at < due_at THEN 'the start deadline must not be before the job is due'
    WHEN new_dead_letter_queue = enqueue.queue THEN 'dead_letter_queue can not be the queue itself'
    WHEN NOT (environment ->> 'create_queues')::boolean AND NOT known
    THEN format('there is no queue %s, and this service makes none by itself', enqueue.queue)
    WHEN NOT (environment ->> 'create_queues')::boolean AND new_dead_letter_queue IS NOT NULL
         AND NOT EXISTS (SELECT FROM queues AS q WHERE q.name = new_dead_letter_queue)
    THEN format('there is no queue %s, and this service makes none by itself', new_dead_letter_queue)
  END;
  IF problem IS NOT NULL THEN
    RAISE EXCEPTION '%', problem USING ERRCODE = 'invalid_parameter_value';
  END IF;
  IF deadline_at IS NULL AND settings ? 'expires_in_seconds' THEN
    deadline_at := greatest(
      enqueue.run_at + (settings ->> 'expires_in_seconds')::float8 * a_second,
      moment + ((settings ->> 'expires_in_seconds')::float8 + coalesce(new_delay, 0)) * a_second);
  END IF;
  SELECT coalesce(jsonb_agg(t.tag ORDER BY t.place), '[]') INTO new_tags
    FROM (SELECT u.tag, min(u.place) AS place
            FROM unnest(enqueue.tags) WITH ORDINALITY AS u(tag, place) GROUP BY u.tag) AS t;

  -- An id of version 7: milliseconds, then 12 bits of what is left of the microseconds, then chance.
  new_id := encode(
    set_byte(set_byte(
      overlay(uuid_send(gen_random_uuid())
              PLACING substring(int8send((floor(extract(epoch FROM moment) * 1000))::bigint) FROM 3) FROM 1 FOR 6),
      6, 112 + (extract(microseconds FROM moment)::bigint % 1000 * 4096 / 1000 / 256)::integer),
      7, (extract(microseconds FROM moment)::bigint % 1000 * 4096 / 1000 % 256)::integer),
    'hex')::uuid;

  IF enqueue.unique_key IS NOT NULL THEN
    window_ends_at := moment + enqueue.unique_window_seconds * a_second;
    -- Each of these is a statement of its own, so that it sees what the lock before it has waited for.
    INSERT INTO unique_keys AS u (queue, key, job_id, scope, until)
    VALUES (enqueue.queue, enqueue.unique_key, new_id, new_scope, window_ends_at)
    ON CONFLICT (queue, key) DO UPDATE SET job_id = excluded.job_id WHERE false;
    IF NOT FOUND THEN
      SELECT u.job_id, u.scope, u.until, p.state,
             coalesce(p.attempt, 0) > 0 OR EXISTS (SELECT FROM attempts AS a WHERE a.job_id = u.job_id) AS started
        INTO holder
        FROM unique_keys AS u
        LEFT JOIN LATERAL (
             SELECT 'waiting' AS state, r.attempt FROM ready AS r WHERE r.id = u.job_id
             UNION ALL SELECT 'waiting', s.attempt FROM scheduled AS s WHERE s.id = u.job_id
             UNION ALL SELECT 'waiting', h.attempt FROM held AS h WHERE h.id = u.job_id
             UNION ALL SELECT 'active', l.attempt FROM leases AS l WHERE l.id = u.job_id) AS p ON true
       WHERE u.queue = enqueue.queue AND u.key = enqueue.unique_key;
      IF (CASE holder.scope
            WHEN 'queued' THEN coalesce(holder.state = 'waiting' AND NOT holder.started, false)
            WHEN 'unfinished' THEN holder.state IS NOT NULL
            ELSE coalesce(holder.until > moment, false)
          END) THEN
        IF enqueue.on_conflict = 'reject' THEN
          RAISE EXCEPTION 'another job holds the unique key' USING ERRCODE = 'unique_violation',
            DETAIL = format('the job %s', holder.job_id);
        END IF;
        IF enqueue.on_conflict IS DISTINCT FROM 'replace' THEN
          RETURN holder.job_id;
        END IF;
        new_id := holder.job_id;
        -- It may move from one place of the waiting to the other meanwhile.
        FOR look IN 1..10 LOOP
          DELETE FROM ready AS r WHERE r.id = new_id
          RETURNING r.attempt, r.noted, r.since, 'ready' INTO old_attempt, old_noted, old_since, old_state;
          EXIT WHEN FOUND;
          DELETE FROM scheduled AS s WHERE s.id = new_id
          RETURNING s.attempt, s.noted, CASE WHEN s.is_retry THEN 'retry' ELSE 'scheduled' END
               INTO old_attempt, old_noted, old_state;
          EXIT WHEN FOUND;
        END LOOP;
        IF old_state IS NULL THEN
          RETURN new_id;  -- a worker has it
        END IF;
        since := coalesce(old_since, moment);
      END IF;
      UPDATE unique_keys AS u SET job_id = new_id, scope = new_scope, until = window_ends_at
       WHERE u.queue = enqueue.queue AND u.key = enqueue.unique_key;
    END IF;
  END IF;

  IF old_state IS NULL THEN
    INSERT INTO jobs (id, created_at, queue, type, priority, run_at, lease_seconds, timeout_seconds, max_retries, backoff,
                      budget_start, expires_at, unique_key, unique_scope, unique_window_seconds, dead_letter_queue,
                      traceparent, tags, metadata, payload)
    VALUES (new_id, moment, enqueue.queue, enqueue.type, new_priority, due_at, new_lease, new_timeout, new_retries,
            new_backoff, 0, deadline_at, enqueue.unique_key, new_scope, enqueue.unique_window_seconds,
            new_dead_letter_queue, new_traceparent, new_tags, convert_to(new_metadata, 'UTF8'),
            convert_to(new_payload, 'UTF8'));
  ELSE
    UPDATE jobs AS b
       SET type = enqueue.type, priority = new_priority, run_at = due_at, lease_seconds = new_lease,
           timeout_seconds = new_timeout, max_retries = new_retries, backoff = new_backoff, expires_at = deadline_at,
           unique_scope = new_scope, unique_window_seconds = enqueue.unique_window_seconds,
           dead_letter_queue = new_dead_letter_queue, traceparent = new_traceparent, tags = new_tags,
           metadata = convert_to(new_metadata, 'UTF8'), payload = convert_to(new_payload, 'UTF8')
     WHERE b.id = new_id
    RETURNING b.created_at + enqueue.unique_window_seconds * a_second INTO window_ends_at;
    UPDATE unique_keys AS u SET until = window_ends_at
     WHERE u.queue = enqueue.queue AND u.key = enqueue.unique_key;
  END IF;
  new_state := CASE WHEN due_at <= moment THEN 'ready' WHEN old_state = 'retry' THEN 'retry' ELSE 'scheduled' END;
  IF new_state = 'ready' THEN
    INSERT INTO ready (id, queue, type, priority, attempt, noted, since, expires_at)
    VALUES (new_id, enqueue.queue, enqueue.type, new_priority, old_attempt, old_noted,
            since, CASE WHEN old_attempt = 0 THEN deadline_at END);
  ELSE
    INSERT INTO scheduled (id, queue, type, priority, attempt, noted, run_at, is_retry, expires_at)
    VALUES (new_id, enqueue.queue, enqueue.type, new_priority, old_attempt, old_noted,
            due_at, new_state = 'retry', CASE WHEN old_attempt = 0 THEN deadline_at END);
  END IF;
  IF new_state IS DISTINCT FROM old_state THEN
    INSERT INTO deltas (queue, ready, scheduled, retry)
    VALUES (enqueue.queue,
            nullif((new_state = 'ready')::integer - coalesce(old_state = 'ready', false)::integer, 0),
            nullif((new_state = 'scheduled')::integer - coalesce(old_state = 'scheduled', false)::integer, 0),
            nullif((new_state = 'retry')::integer - coalesce(old_state = 'retry', false)::integer, 0));
  END IF;

  IF new_state = 'ready' THEN
    -- Delivered at the COMMIT, which may be long after `since`: the place takes the cursors back. Beyond some places a
    -- transaction the processes are asked to look for themselves, in one message: PostgreSQL sends equal ones once.
    told := 1 + coalesce(substring(current_setting('leaseq.told', true) FROM '^[0-9]{1,9}$')::integer, 0);
    PERFORM set_config('leaseq.told', told::text, true);
    PERFORM pg_notify('leaseq ' || current_schema(), CASE
      WHEN told > 50 THEN '{"from": "sql", "look": true, "everywhere": true}'
      ELSE json_build_object(
             'from', 'sql',
             'ready', json_build_array(json_build_array(enqueue.queue, enqueue.type, 1)),
             'places', json_build_array(json_build_array(
               enqueue.queue, enqueue.type, new_priority,
               to_char(since AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"+00:00"'))))::text
    END);
  END IF;
  RETURN new_id;
END
$function$
"""


# The same for payload and metadata of a JSON type: such a value is no text to PostgreSQL. Neither has a default for the
# payload, so that a call without one has one form to go to; and one with a plain literal goes to the form for text.
TYPED = r"""
CREATE FUNCTION enqueue(
  queue text,
  payload {json},
  type text DEFAULT 'default',
  priority text DEFAULT NULL,
  run_at timestamptz DEFAULT NULL,
  delay_seconds float8 DEFAULT NULL,
  lease_seconds float8 DEFAULT NULL,
  timeout_seconds float8 DEFAULT NULL,
  max_retries integer DEFAULT NULL,
  backoff jsonb DEFAULT NULL,
  expires_at timestamptz DEFAULT NULL,
  expires_in_seconds float8 DEFAULT NULL,
  unique_key text DEFAULT NULL,
  unique_scope text DEFAULT NULL,
  unique_window_seconds float8 DEFAULT NULL,
  on_conflict text DEFAULT NULL,
  dead_letter_queue text DEFAULT NULL,
  tags text[] DEFAULT NULL,
  metadata {json} DEFAULT '{}',
  traceparent text DEFAULT NULL)
RETURNS uuid
LANGUAGE sql VOLATILE SECURITY DEFINER
SET search_path = {schema}, pg_temp
AS $function$
  SELECT enqueue(queue, type, payload::text, priority, run_at, delay_seconds, lease_seconds, timeout_seconds, max_retries,
                 backoff, expires_at, expires_in_seconds, unique_key, unique_scope, unique_window_seconds, on_conflict,
                 dead_letter_queue, tags, metadata::text, traceparent)
$function$
"""

_SIGNATURES = """
SELECT p.oid::regprocedure::text
  FROM pg_proc AS p
  JOIN pg_namespace AS n ON n.oid = p.pronamespace
 WHERE p.proname = 'enqueue' AND n.nspname = current_schema()
"""


def upgrade() -> None:
    """Add the function in its three forms, for nobody but the owner until somebody grants more."""
    connection = op.get_bind()
    schema = str(connection.exec_driver_sql("SELECT quote_ident(current_schema())").scalar())
    forms = [ENQUEUE, *(TYPED.replace("{json}", name) for name in ("json", "jsonb"))]
    for form in forms:
        connection.exec_driver_sql(form.replace("{schema}", schema))
    for signature in connection.exec_driver_sql(_SIGNATURES).scalars().all():
        connection.exec_driver_sql(f"REVOKE ALL ON FUNCTION {signature} FROM PUBLIC")


def downgrade() -> None:
    """Take it away."""
    connection = op.get_bind()
    for signature in connection.exec_driver_sql(_SIGNATURES).scalars().all():
        connection.exec_driver_sql(f"DROP FUNCTION {signature}")
