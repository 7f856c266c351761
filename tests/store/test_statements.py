"""How often a verb talks to the database: the number of statements is what a verb costs under load."""

import pytest
from uuid_utils.compat import uuid7

from app.engine.service import released
from app.queue.model import Ack, JobDefaults, JobRequest, NewJob
from app.queue.policy import decide_expiry, resolve
from tests.conftest import Replica, World
from tests.store.conftest import claim, idle_replica, logged

TRANSACTION = ["BEGIN;", "lock_leases", "conclude", "COMMIT;"]


@pytest.fixture
async def queue(world: World) -> Replica:
    """A replica with one connection for the verbs, whose statements can be told apart from nobody else's."""
    queue = await idle_replica(world, db_pool_size=1)
    # At its first use a new connection asks what the types of the parameters are.
    await queue.enqueue("first")
    await queue.verb("ack", await queue.lease_one("first"))
    return queue


def new_jobs(count: int) -> list[NewJob]:
    return [resolve(JobRequest(queue="q"), JobDefaults(), uuid7()) for _ in range(count)]


async def test_an_enqueue_is_one_statement_that_commits_itself(queue: Replica):
    async with logged(queue) as statements:
        await queue.enqueue()
    assert statements == ["enqueue"]


@pytest.mark.parametrize("types", [None, ["default"]])
async def test_a_lease_is_one_statement_that_commits_itself(queue: Replica, types: list[str] | None):
    await queue.enqueue()
    async with logged(queue) as statements:
        await queue.lease_one(types=types)
    assert statements == ["lease"]


async def test_a_lease_that_finds_nothing_is_one_statement(queue: Replica):
    async with logged(queue) as statements:
        assert await queue.lease("q", "other", max_jobs=10) == []
    assert statements == ["lease"]


@pytest.mark.parametrize("wait_seconds", [0, 0.05])
async def test_a_named_lease_that_finds_nothing_writes_nothing(queue: Replica, wait_seconds: float):
    async with logged(queue) as statements:
        assert await queue.lease(request_id="r", wait_seconds=wait_seconds) == []
    # After a wait it looks once more: a twin may have got something elsewhere.
    assert statements == ["foresee"] * (2 if wait_seconds else 1)


async def test_a_named_lease_looks_and_then_is_one_transaction(queue: Replica):
    await queue.enqueue()
    async with logged(queue) as statements:
        await queue.lease_one(request_id="r")
    assert statements == ["foresee", "BEGIN;", "lease_request", "lease", "keep_leases", "COMMIT;"]
    async with logged(queue) as statements:
        await queue.lease_one(request_id="r")
    assert statements == ["foresee", "BEGIN;", "lease_request", "standing", "COMMIT;"]


@pytest.mark.parametrize("verb", ["heartbeat", "ack"])
async def test_heartbeat_and_ack_are_one_statement_that_commits_itself(queue: Replica, verb: str):
    await queue.enqueue()
    leased = await queue.lease_one()
    async with logged(queue) as statements:
        assert (await queue.verb(verb, leased)).status_code == 200
    assert statements == [verb]


@pytest.mark.parametrize(("verb", "fields"), [("fail", {"error": {"message": "boom"}}), ("release", {})])
async def test_fail_and_release_are_one_transaction_of_two_statements(
    queue: Replica, verb: str, fields: dict[str, object]
):
    await queue.enqueue()
    leased = await queue.lease_one()
    async with logged(queue) as statements:
        assert (await queue.verb(verb, leased, **fields)).status_code == 200
    assert statements == TRANSACTION


async def test_a_cancel_is_one_statement_that_waits_for_locks_no_longer_than_it_may(queue: Replica):
    job = await queue.enqueue()
    async with logged(queue) as statements:
        assert (await queue.http.post(f"/jobs/{job['id']}/cancel")).status_code == 200
    assert statements == ["BEGIN;", "SET LOCAL lock_timeout = '2.0s'", "cancel", "COMMIT;"]


async def test_a_retry_of_a_job_without_a_unique_key_is_a_look_and_a_move_in_one_transaction(queue: Replica):
    job = await queue.enqueue()
    await queue.fail(await queue.lease_one(), retry=False)
    async with logged(queue) as statements:
        assert (await queue.http.post(f"/jobs/{job['id']}/retry")).status_code == 200
    assert statements == ["BEGIN;", "SET LOCAL lock_timeout = '2.0s'", "dead_keys", "retry", "COMMIT;"]


async def test_a_hundred_jobs_are_enqueued_leased_and_acked_with_a_statement_each(queue: Replica):
    jobs = queue.machine.jobs
    async with logged(queue) as statements:
        await jobs.enqueue(new_jobs(100))
        leased = (await claim(jobs, 100)).jobs
        acked = await jobs.ack([Ack(job.id, job.lease_id, None) for job in leased])
    assert len(acked) == 100
    assert statements == ["enqueue", "lease", "ack"]


async def test_a_hundred_leases_end_in_one_transaction(queue: Replica):
    jobs = queue.machine.jobs
    await jobs.enqueue(new_jobs(100))
    leased = (await claim(jobs, 100)).jobs
    async with logged(queue) as statements:
        ended = await jobs.conclude([released(job.id, job.lease_id, 0) for job in leased])
    assert len(ended) == 100
    assert statements == TRANSACTION


async def test_a_hundred_leases_are_reaped_in_one_transaction(queue: Replica):
    jobs = queue.machine.jobs
    await jobs.enqueue(new_jobs(100))
    await claim(jobs, 100)
    queue.clock.move(60)
    async with logged(queue) as statements:
        reaped, _ = await jobs.reap(100, lambda lease, now: decide_expiry(lease, now, 0.5))
    assert len(reaped) == 100
    assert statements == ["BEGIN;", "lock_expired", "conclude", "COMMIT;"]


async def test_a_round_of_reaping_with_nothing_to_reap_writes_no_verdict(queue: Replica):
    async with logged(queue) as statements:
        assert await queue.machine.service.maintenance.reap() == 0
    assert statements == ["survive_outage", "BEGIN;", "lock_expired", "COMMIT;"]


async def test_a_hundred_jobs_are_promoted_with_one_statement(queue: Replica):
    jobs = queue.machine.jobs
    await jobs.enqueue(
        [resolve(JobRequest(queue="q", delay_seconds=5), JobDefaults(), uuid7()) for _ in range(100)]
    )
    queue.clock.move(60)
    async with logged(queue) as statements:
        assert await queue.machine.service.maintenance.promote() == 100
    assert statements == ["promote"]


async def test_a_waiting_lease_asks_nothing_while_it_waits(queue: Replica):
    async with logged(queue) as statements:
        assert await queue.lease(wait_seconds=0.2) == []
    assert statements == ["lease"]


async def test_a_lost_lease_costs_no_transaction(queue: Replica):
    await queue.enqueue()
    leased = await queue.lease_one()
    await queue.verb("ack", leased)
    async with logged(queue) as statements:
        assert (await queue.verb("heartbeat", leased)).status_code == 409
    # The group's, one alone that would wait if somebody held the lease, and a look at the record.
    assert statements == ["heartbeat", "stands"]
