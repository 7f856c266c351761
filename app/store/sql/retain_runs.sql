-- Of the schedules after the name $1, $2 of them, remove runs that were decided before $3, or that have $4 newer ones;
-- at most $5 of each. Returns how many, and the last name looked at. (No fire is decided before it is due.)
WITH looked AS MATERIALIZED (
  SELECT s.name FROM {schema}.schedules AS s WHERE s.name > $1::text ORDER BY s.name LIMIT $2::int
), old AS MATERIALIZED (
  SELECT r.ctid AS tid
    FROM looked
   CROSS JOIN LATERAL (
           SELECT max(newer.fire_at) AS fire_at
             FROM (SELECT n.fire_at FROM {schema}.schedule_runs AS n WHERE n.schedule = looked.name
                    ORDER BY n.fire_at DESC OFFSET $4::int LIMIT 1) AS newer
           OFFSET 0) AS kept
   CROSS JOIN LATERAL (
           SELECT r.ctid
             FROM {schema}.schedule_runs AS r
            WHERE r.schedule = looked.name
              AND r.fire_at <= greatest(kept.fire_at, $3::timestamptz)
              AND (r.fire_at <= kept.fire_at OR r.decided_at <= $3::timestamptz)
            ORDER BY r.fire_at
            LIMIT $5::int
              FOR UPDATE SKIP LOCKED) AS r
), gone AS (
  DELETE FROM {schema}.schedule_runs WHERE ctid = ANY (ARRAY(SELECT tid FROM old))
  RETURNING 1
)
SELECT (SELECT count(*) FROM gone) AS count, (SELECT max(name) FROM looked) AS last
