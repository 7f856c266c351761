"""What must hold of the tables at every instant, whatever a test has done."""

from typing import Any

_CHECKS = {
    "a job is in exactly one place": """
        WITH place AS (
          SELECT id, 'ready' AS name FROM leaseq.ready
          UNION ALL SELECT id, 'scheduled' FROM leaseq.scheduled
          UNION ALL SELECT id, 'held' FROM leaseq.held
          UNION ALL SELECT id, 'leases' FROM leaseq.leases
          UNION ALL SELECT id, 'dead' FROM leaseq.dead
          UNION ALL SELECT id, 'history' FROM leaseq.history)
        SELECT id, array_agg(name) FROM place GROUP BY id HAVING count(*) <> 1""",
    "a living job has a body, and only a living job has": """
        WITH living AS (
          SELECT id FROM leaseq.ready UNION ALL SELECT id FROM leaseq.scheduled
          UNION ALL SELECT id FROM leaseq.held UNION ALL SELECT id FROM leaseq.leases)
        SELECT coalesce(l.id, b.id), l.id IS NULL AS body_without_place
          FROM living AS l FULL JOIN leaseq.jobs AS b ON b.id = l.id
         WHERE l.id IS NULL OR b.id IS NULL""",
    "a place says of its job what the body says": """
        SELECT p.id
          FROM (SELECT id, queue, type, priority FROM leaseq.ready
                UNION ALL SELECT id, queue, type, priority FROM leaseq.scheduled
                UNION ALL SELECT id, queue, type, priority FROM leaseq.leases) AS p
          JOIN leaseq.jobs AS b ON b.id = p.id
         WHERE (p.queue, p.type, p.priority) <> (b.queue, b.type, b.priority)""",
    "notes belong to living jobs that say so": """
        SELECT n.job_id
          FROM leaseq.notes AS n
          LEFT JOIN (SELECT id, noted FROM leaseq.ready UNION ALL SELECT id, noted FROM leaseq.scheduled
                     UNION ALL SELECT id, noted FROM leaseq.held UNION ALL SELECT id, noted FROM leaseq.leases) AS p
            ON p.id = n.job_id
         WHERE p.noted IS NOT TRUE""",
    "no two living jobs hold one unique key": """
        SELECT b.queue, b.unique_key
          FROM leaseq.jobs AS b
          LEFT JOIN leaseq.ready AS r ON r.id = b.id
          LEFT JOIN leaseq.scheduled AS s ON s.id = b.id
          LEFT JOIN leaseq.held AS h ON h.id = b.id
         WHERE b.unique_scope = 'unfinished'
            OR b.unique_scope = 'queued' AND coalesce(r.attempt, s.attempt, h.attempt) = 0
               AND NOT EXISTS (SELECT FROM leaseq.attempts AS a WHERE a.job_id = b.id)
         GROUP BY b.queue, b.unique_key HAVING count(*) > 1""",
    "a living job that holds its unique key is named in its row": """
        SELECT b.id, u.job_id, b.unique_scope, u.scope
          FROM leaseq.jobs AS b
          LEFT JOIN leaseq.ready AS r ON r.id = b.id
          LEFT JOIN leaseq.scheduled AS s ON s.id = b.id
          LEFT JOIN leaseq.held AS h ON h.id = b.id
          LEFT JOIN leaseq.unique_keys AS u ON (u.queue, u.key) = (b.queue, b.unique_key)
         WHERE (b.unique_scope = 'unfinished'
                OR b.unique_scope = 'queued' AND coalesce(r.attempt, s.attempt, h.attempt) = 0
                   AND NOT EXISTS (SELECT FROM leaseq.attempts AS a WHERE a.job_id = b.id))
           AND (u.job_id, u.scope) IS DISTINCT FROM (b.id, b.unique_scope)""",
    "every lease has a token of its own": """
        SELECT lease_id FROM leaseq.leases GROUP BY lease_id HAVING count(*) > 1""",
    "no lease outlives its time limit": """
        SELECT id FROM leaseq.leases WHERE expires_at > deadline_at""",
    "a run belongs to a schedule, and has a job where it fired": """
        SELECT r.schedule, r.fire_at
          FROM leaseq.schedule_runs AS r
          LEFT JOIN leaseq.schedules AS s ON s.name = r.schedule
         WHERE s.name IS NULL OR (r.job_id IS NULL AND r.outcome IN ('fired', 'triggered'))
            OR (r.triggered AND r.outcome NOT IN ('triggered', 'skipped', 'failed')) OR r.fires < 1
            OR (r.fire_at > r.decided_at AND NOT r.triggered)""",
    "no job comes of two fires": """
        SELECT job_id FROM leaseq.schedule_runs AS r
         WHERE r.outcome IN ('fired', 'triggered')
           AND NOT EXISTS (SELECT FROM leaseq.jobs AS j WHERE j.id = r.job_id AND j.unique_key IS NOT NULL)
         GROUP BY job_id HAVING count(*) > 1""",
    "what a schedule is to fire next is not decided yet": """
        SELECT s.name
          FROM leaseq.schedules AS s
          JOIN leaseq.schedule_runs AS r ON (r.schedule, r.fire_at) = (s.name, s.next_fire_at)
         WHERE NOT r.triggered""",
    "the counts are those of the rows": """
        WITH counted AS (
          SELECT queue, state, sum(n) AS n
            FROM (SELECT * FROM leaseq.counts
                  UNION ALL
                  SELECT queue, scheduled, ready, held, active, retry, completed, failed, cancelled, expired
                    FROM leaseq.deltas) AS c
           CROSS JOIN LATERAL (VALUES ('scheduled', scheduled), ('ready', ready), ('held', held), ('active', active),
                  ('retry', retry), ('completed', completed), ('failed', failed), ('cancelled', cancelled),
                  ('expired', expired)) AS s(state, n)
           GROUP BY queue, state
        ), actual AS (
          SELECT queue, state, count(*) AS n
            FROM (SELECT queue, 'ready' AS state FROM leaseq.ready
                  UNION ALL SELECT queue, CASE WHEN is_retry THEN 'retry' ELSE 'scheduled' END FROM leaseq.scheduled
                  UNION ALL SELECT queue, 'held' FROM leaseq.held
                  UNION ALL SELECT queue, 'active' FROM leaseq.leases
                  UNION ALL SELECT queue, state FROM leaseq.dead
                  UNION ALL SELECT queue, 'completed' FROM leaseq.history) AS a
           GROUP BY queue, state)
        SELECT coalesce(c.queue, a.queue), coalesce(c.state, a.state), c.n AS counted, a.n AS actual
          FROM counted AS c FULL JOIN actual AS a ON (a.queue, a.state) = (c.queue, c.state)
         WHERE coalesce(c.n, 0) <> coalesce(a.n, 0)""",
}


async def broken_invariants(connection: Any) -> list[str]:
    """Return a line for each row that breaks an invariant; none when all hold."""
    broken = []
    for name, query in _CHECKS.items():
        broken += [f"{name}: {dict(row)}" for row in await connection.fetch(query)]
    return broken
