-- Remove a schedule that is locked, and its runs: none can come any more.
WITH runs AS (DELETE FROM {schema}.schedule_runs WHERE schedule = $1::text)
DELETE FROM {schema}.schedules WHERE name = $1::text
