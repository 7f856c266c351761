"""What happens without a request: each task alone, all of them in a round, round after round, in several processes."""

import asyncio
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest
from uuid_utils.compat import uuid7

from app.engine import maintenance
from app.engine.maintenance import (
    BATCH,
    EVERYTHING_EVERY_SECONDS,
    OUTAGE_SECONDS_MAX,
    STEPS_PER_ROUND,
    UNDER_WAY,
    Reach,
)
from app.queue.events import AttemptEnded, JobPromoted, MaintenanceFailed, MaintenanceRan
from app.queue.lifecycle import State
from app.queue.model import JobRequest, Outcome
from app.queue.policy import resolve
from app.store.jobs import BEGINNING
from tests.conftest import NEVER_SECONDS, Replica, World

TASKS = {"days", "reap", "expire", "schedules", "keyed_schedules", "promote", "fold", "retain", "sweep"}

MANY_SCHEDULED = """
WITH many AS (
  SELECT gen_random_uuid() AS id, now() + n * interval '1 microsecond' AS run_at FROM generate_series(1, $1) AS n
), bodies AS (
  INSERT INTO jobs (id, queue, type, priority, payload, max_retries, budget_start, backoff, lease_seconds, tags,
                    metadata, created_at, run_at)
  SELECT many.id, b.queue, b.type, b.priority, b.payload, b.max_retries, b.budget_start, b.backoff, b.lease_seconds,
         b.tags, b.metadata, b.created_at, many.run_at
    FROM many CROSS JOIN (SELECT * FROM jobs LIMIT 1) AS b
), places AS (
  INSERT INTO scheduled (id, queue, type, priority, attempt, noted, run_at, is_retry)
  SELECT many.id, s.queue, s.type, s.priority, s.attempt, s.noted, many.run_at, s.is_retry
    FROM many CROSS JOIN (SELECT * FROM scheduled LIMIT 1) AS s
)
INSERT INTO deltas (queue, scheduled) SELECT queue, $1 FROM scheduled LIMIT 1
"""
"""Copies the only delayed job."""


def instant(text: str) -> datetime:
    return datetime.fromisoformat(text)


@pytest.fixture
async def settled(queue: Replica) -> Replica:
    """A replica that has done its first round."""
    await queue.events.wait_for(MaintenanceRan, len(TASKS))
    return queue


@pytest.fixture
def looks_at_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each turn of a task look at everything, as it does each minute."""
    monkeypatch.setattr(maintenance, "EVERYTHING_EVERY_SECONDS", 0.0)


async def test_round_with_nothing_to_do_changes_nothing_and_tells_of_every_task(settled: Replica):
    before = len(settled.events.of(MaintenanceRan))
    assert await settled.maintain() == dict.fromkeys(TASKS, 0)
    ran = settled.events.of(MaintenanceRan)[before:]
    assert sorted((event.task, event.changed) for event in ran) == [(task, 0) for task in sorted(TASKS)]


async def test_due_jobs_become_ready_at_their_time_and_not_before(settled: Replica):
    job = await settled.enqueue(delay_seconds=60)
    due_at = instant(job["run_at"])
    settled.clock.set(due_at - timedelta(microseconds=1))
    assert (await settled.maintain())["promote"] == 0
    settled.clock.set(due_at)
    assert (await settled.maintain())["promote"] == 1
    assert (await settled.job(job["id"]))["state"] == "ready"
    [event] = settled.events.of(JobPromoted)
    assert (str(event.job_id), event.queue, event.type) == (job["id"], "q", "default")


async def test_leases_end_at_their_time_and_not_before(settled: Replica):
    await settled.enqueue()
    leased = await settled.lease_one()
    expires_at = instant(leased["lease_expires_at"])
    settled.clock.set(expires_at - timedelta(microseconds=1))
    assert (await settled.maintain())["reap"] == 0
    settled.clock.set(expires_at)
    assert (await settled.maintain())["reap"] == 1
    [event] = settled.events.of(AttemptEnded)
    assert (event.outcome, event.state) == (Outcome.LEASE_EXPIRED, State.RETRY)


async def test_dead_jobs_go_after_their_retention_and_not_before(world: World):
    queue = await world.replica(dead_retention_seconds=100)
    await queue.enqueue(max_retries=0)
    leased = await queue.lease_one()
    await queue.fail(leased)
    ended_at = instant((await queue.job(leased["id"]))["finished_at"])
    queue.clock.set(ended_at + timedelta(seconds=100))
    assert (await queue.maintain())["retain"] == 0
    queue.clock.move(0.000_001)
    assert (await queue.maintain())["retain"] == 1
    assert (await queue.http.get(f"/jobs/{leased['id']}")).status_code == 404
    assert (await queue.stats())["failed"] == 0


async def test_folded_counts_are_what_they_were(settled: Replica, world: World):
    for _ in range(3):
        await settled.enqueue()
    await settled.verb("ack", await settled.lease_one())
    before = await settled.stats()
    assert (await settled.maintain())["fold"] == 5
    assert await settled.stats() == before
    connection = await world.connect()
    assert await connection.fetchval("SELECT count(*) FROM deltas") == 0


async def test_days_are_looked_after_now_and_then_only(world: World):
    connection = await world.connect()
    tomorrow = await connection.fetchval("SELECT 'history_' || to_char(now() + interval '1 day', 'YYYYMMDD')")
    queue = await world.replica()
    await queue.events.wait_for(MaintenanceRan, len(TASKS))
    await connection.execute(f"DROP TABLE {tomorrow}")
    assert (await queue.maintain())["days"] == 0
    another = await world.replica()
    ran = await another.events.wait_for(MaintenanceRan, len(TASKS))
    # A process that starts makes what is missing before it does anything else.
    assert [event.changed for event in ran if event.task == "days"] == [0]
    assert await connection.fetchval("SELECT to_regclass($1) IS NOT NULL", tomorrow)


@pytest.mark.parametrize("count", [BATCH - 1, BATCH, BATCH + 1, 2 * BATCH + 1])
async def test_task_takes_step_after_step_until_nothing_is_left(count: int, settled: Replica, world: World):
    await delayed(settled, world, count)
    assert (await settled.maintain())["promote"] == count
    assert (await settled.stats())["waiting"] == count


@pytest.mark.slow
async def test_task_with_too_much_to_do_lets_the_others_have_their_turn(settled: Replica, world: World):
    most = BATCH * STEPS_PER_ROUND
    await delayed(settled, world, most + 1)
    assert (await settled.maintain())["promote"] == most
    assert (await settled.maintain())["promote"] == 1


async def test_leases_beyond_one_step_end_in_the_same_round(settled: Replica):
    defaults = settled.machine.settings.defaults
    requests = [resolve(JobRequest("q", max_retries=0), defaults, uuid7()) for _ in range(BATCH + 1)]
    await settled.machine.jobs.enqueue(requests)
    assert len(await settled.lease(max_jobs=BATCH + 1)) == BATCH + 1
    settled.clock.move(31)
    assert (await settled.maintain())["reap"] == BATCH + 1
    assert (await settled.stats())["failed"] == BATCH + 1


@pytest.mark.parametrize(
    ("table", "tasks"),
    [
        ("scheduled", {"expire", "promote"}),
        ("leases", {"reap"}),
        ("counts", {"fold"}),
        ("dead", {"expire", "retain"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(sorted(value)),
)
async def test_task_that_fails_does_not_stop_the_others_and_is_tried_again(
    table: str, tasks: set[str], settled: Replica, world: World
):
    job = await settled.enqueue()
    connection = await world.connect()
    await connection.execute(f"ALTER TABLE {table} RENAME TO away")
    changed = await settled.machine.service.maintenance.run_once()
    assert changed.keys() == TASKS - tasks
    failures = settled.events.of(MaintenanceFailed)
    assert {failed.task for failed in failures} == tasks
    assert all("UndefinedTableError" in failed.error for failed in failures)
    await connection.execute(f"ALTER TABLE away RENAME TO {table}")
    assert await settled.maintain()
    assert (await settled.job(job["id"]))["state"] == "ready"


@pytest.mark.usefixtures("looks_at_everything")
async def test_rows_that_another_process_holds_are_left_to_it(settled: Replica, world: World):
    await settled.enqueue(delay_seconds=30)
    await settled.enqueue("busy")
    await settled.lease("busy")
    settled.clock.move(60)
    connection = await world.connect()
    async with connection.transaction():
        await connection.execute("SELECT FROM scheduled FOR UPDATE")
        await connection.execute("SELECT FROM leases FOR UPDATE")
        await connection.execute("SELECT FROM deltas FOR UPDATE")
        changed = await settled.maintain()
        assert (changed["reap"], changed["promote"], changed["fold"]) == (0, 0, 0)
    changed = await settled.maintain()
    assert (changed["reap"], changed["promote"]) == (1, 1)


async def test_rounds_of_several_processes_at_once_do_everything_once(world: World):
    replicas = [await world.replica() for _ in range(3)]
    a = replicas[0]
    for replica in replicas:
        await replica.events.wait_for(MaintenanceRan, len(TASKS))
    await asyncio.gather(*(a.enqueue(delay_seconds=30) for _ in range(50)))
    await asyncio.gather(*(a.enqueue("busy", max_retries=0) for _ in range(50)))
    await a.lease("busy", max_jobs=50)
    a.clock.move(60)
    rounds = await asyncio.gather(*(replica.maintain() for replica in replicas))
    assert sum(changed["promote"] for changed in rounds) == 50
    assert sum(changed["reap"] for changed in rounds) == 50
    for replica in replicas:
        await replica.maintain()
    stats = await a.stats()
    assert (stats["waiting"], stats["failed"], stats["delayed"], stats["active"]) == (50, 50, 0, 0)


async def test_round_comes_after_round_without_being_asked(world: World):
    queue = await world.replica(maintenance_seconds=0.01)
    ran = await queue.events.wait_for(MaintenanceRan, 3 * len(TASKS))
    tasks = [event.task for event in ran[: 3 * len(TASKS)]]
    assert {task: tasks.count(task) for task in TASKS} == dict.fromkeys(TASKS, 3)
    assert set(tasks[: len(TASKS)]) == TASKS


async def test_rounds_go_on_after_a_round_that_failed(world: World):
    queue = await world.replica(maintenance_seconds=0.01)
    connection = await world.connect()
    await connection.execute("ALTER TABLE dead RENAME TO away")
    await queue.events.wait_for(MaintenanceFailed, 2)
    await connection.execute("ALTER TABLE away RENAME TO dead")
    before = len([event for event in queue.events.of(MaintenanceRan) if event.task == "retain"])
    async with asyncio.timeout(10):
        while len([event for event in queue.events.of(MaintenanceRan) if event.task == "retain"]) == before:
            await asyncio.sleep(0.002)


async def test_promoted_job_goes_to_a_lease_that_waits_here(settled: Replica):
    await settled.enqueue(delay_seconds=60)
    leasing = await waiting(settled)
    settled.clock.move(61)
    await settled.maintain()
    assert len(await leasing) == 1


async def test_promoted_jobs_go_to_leases_that_wait_at_another_process(world: World):
    a, b = await world.replica(), await world.replica()
    for _ in range(2):
        await a.enqueue(delay_seconds=60)
    leasing = [await waiting(b) for _ in range(2)]
    world.clock.move(61)
    await a.maintain()
    assert [len(jobs) for jobs in await asyncio.gather(*leasing)] == [1, 1]


async def test_job_whose_lease_expired_goes_to_a_waiting_lease_after_its_backoff(settled: Replica):
    await settled.enqueue(backoff={"jitter": "none"})
    await settled.lease_one()
    leasing = await waiting(settled)
    settled.clock.move(30)
    # One round both ends the lease and, no backoff being over yet, leaves the job where it is.
    assert (await settled.maintain())["reap"] == 1
    assert not leasing.done()
    settled.clock.move(1)
    await settled.maintain()
    assert [job["attempt"] for job in await leasing] == [2]


# ---------------------------------------------------------------------------------------------------------------------
# Nobody could do maintenance, nor heartbeat, for a while

AN_OUTAGE = timedelta(seconds=3 * NEVER_SECONDS + 1)
"""Longer than three rounds."""


async def test_leases_get_back_what_an_outage_took_up_to_a_limit(settled: Replica, world: World):
    leased = await lease_of(settled)
    await nobody_was_there(world, AN_OUTAGE)
    await settled.maintain()
    assert await expiry(world) == instant(leased["lease_expires_at"]) + timedelta(seconds=OUTAGE_SECONDS_MAX)
    assert (await settled.job(leased["id"]))["state"] == "active"


async def test_outage_does_not_stretch_an_attempt_past_its_time_limit(settled: Replica, world: World):
    leased = await lease_of(settled, timeout_seconds=60)
    await nobody_was_there(world, AN_OUTAGE)
    await settled.maintain()
    assert await expiry(world) == instant(leased["lease_expires_at"]) + timedelta(seconds=30)


@pytest.mark.usefixtures("looks_at_everything")
async def test_lease_that_had_expired_before_an_outage_gets_nothing_back(settled: Replica, world: World):
    leased = await lease_of(settled)
    connection = await world.connect()
    await nobody_was_there(world, AN_OUTAGE)
    await connection.execute(
        "UPDATE leases SET expires_at = (SELECT ran_at FROM maintenance), leased_at = leased_at - interval '1 d'"
    )
    assert (await settled.maintain())["reap"] == 1
    assert (await settled.job(leased["id"]))["state"] == "retry"


async def test_silence_of_a_few_rounds_is_no_outage(settled: Replica, world: World):
    leased = await lease_of(settled)
    await nobody_was_there(world, AN_OUTAGE - timedelta(seconds=60))
    await settled.maintain()
    assert await expiry(world) == instant(leased["lease_expires_at"])


async def test_time_is_given_back_once(settled: Replica, world: World):
    await lease_of(settled)
    await nobody_was_there(world, AN_OUTAGE)
    await settled.maintain()
    given = await expiry(world)
    await settled.maintain()
    assert await expiry(world) == given


async def delayed(queue: Replica, world: World, count: int) -> None:
    """Store so many jobs that are due."""
    await queue.enqueue(delay_seconds=30)
    connection = await world.connect()
    await connection.execute(MANY_SCHEDULED.replace("$1", str(count - 1)))
    queue.clock.move(60)


async def waiting(queue: Replica) -> "asyncio.Task[list[dict[str, Any]]]":
    """Begin a lease, and return when it waits."""
    wakeups = queue.machine.service.wakeups
    before = wakeups.waiters
    leasing = asyncio.create_task(queue.lease(wait_seconds=30))
    async with asyncio.timeout(10):
        while wakeups.waiters == before:
            await asyncio.sleep(0.002)
    return leasing


async def lease_of(queue: Replica, **fields: Any) -> dict[str, Any]:
    await queue.enqueue(**fields)
    return await queue.lease_one()


async def nobody_was_there(world: World, silence: timedelta) -> None:
    connection: asyncpg.Connection[asyncpg.Record] = await world.connect()
    await connection.execute("UPDATE maintenance SET ran_at = clock_timestamp() - $1::interval", silence)


async def expiry(world: World) -> datetime:
    connection = await world.connect()
    expires_at: datetime = await connection.fetchval("SELECT expires_at FROM leases")
    return expires_at


class TestReach:
    """How far back a task looks."""

    NOW = datetime(2026, 1, 1, tzinfo=UTC)

    def test_looks_at_everything_at_first_then_at_what_came_lately(self):
        reach = Reach()
        assert reach.since() == BEGINNING
        reach.looked(BEGINNING, self.NOW, at_all=True)
        assert reach.since() == self.NOW - UNDER_WAY

    def test_looks_at_everything_again_now_and_then(self, monkeypatch: pytest.MonkeyPatch):
        reach = Reach()
        reach.looked(BEGINNING, self.NOW, at_all=True)
        later = time.monotonic() + EVERYTHING_EVERY_SECONDS
        monkeypatch.setattr(time, "monotonic", lambda: later)
        assert reach.since() == BEGINNING

    def test_goes_on_where_it_was_while_there_is_too_much_for_a_turn(self):
        reach = Reach()
        reach.looked(BEGINNING, self.NOW, at_all=False)
        assert reach.since() == BEGINNING


async def test_a_delayed_job_is_ready_when_its_time_comes_and_not_a_round_later(world: World):
    """The rounds of this replica are never; without its own look at the next due job the lease would wait in vain."""
    world.on_time = True
    queue = await world.replica()
    await queue.events.wait_for(MaintenanceRan, len(TASKS))
    waiting = asyncio.create_task(queue.lease(wait_seconds=30))
    job = await queue.enqueue(delay_seconds=0.05)
    assert [leased["id"] for leased in await waiting] == [job["id"]]


async def test_a_retry_is_ready_when_its_backoff_is_over(world: World):
    world.on_time = True
    queue = await world.replica()
    await queue.events.wait_for(MaintenanceRan, len(TASKS))
    job = await queue.enqueue(backoff={"strategy": "fixed", "initial_seconds": 0.05, "jitter": "none"})
    await queue.fail(await queue.lease_one())
    assert [leased["id"] for leased in await queue.lease(wait_seconds=30)] == [job["id"]]


async def test_a_job_that_another_process_has_delayed_is_ready_on_time(world: World):
    one, two = await world.replica(), await world.replica(maintenance_seconds=0.05)
    await one.machine.service.maintenance.stop()
    job = await one.enqueue(delay_seconds=0.2)
    assert [leased["id"] for leased in await two.lease(wait_seconds=30)] == [job["id"]]


async def test_a_promotion_that_fails_leaves_the_other_tasks_their_turns(world: World):
    queue = await world.replica(maintenance_seconds=0.05)
    connection = await world.connect()
    await connection.execute("ALTER TABLE scheduled RENAME TO away")
    try:
        before = len(queue.events.of(MaintenanceRan))
        await queue.events.wait_for(MaintenanceFailed, 5)
        await queue.events.wait_for(MaintenanceRan, before + 20)
        assert {event.task for event in queue.events.of(MaintenanceFailed)} == {"expire", "promote"}
    finally:
        await connection.execute("ALTER TABLE away RENAME TO scheduled")


async def test_a_retry_of_an_expired_lease_is_ready_when_its_backoff_is_over(world: World):
    world.on_time = True
    queue = await world.replica()
    await queue.events.wait_for(MaintenanceRan, len(TASKS))
    job = await queue.enqueue(backoff={"strategy": "fixed", "initial_seconds": 0.05, "jitter": "none"})
    await queue.lease_one(lease_seconds=0.5)
    connection = await world.connect()
    await connection.execute("UPDATE leases SET expires_at = now()")
    await queue.machine.service.maintenance.reap()
    assert [leased["id"] for leased in await queue.lease(wait_seconds=30)] == [job["id"]]
