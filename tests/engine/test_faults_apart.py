"""What goes wrong in one part must not reach another."""

import asyncio
from typing import Any

import asyncpg
import pytest

from tests.conftest import World


async def test_the_poll_finds_jobs_while_hints_can_not_be_had(world: World, monkeypatch: pytest.MonkeyPatch):
    here, there = await world.replica(poll_seconds=0.05), await world.replica()
    refused = asyncio.Event()

    async def connect(**_settings: Any) -> None:
        refused.set()
        raise asyncpg.InvalidPasswordError("the password was changed")

    # No role but the test's own may be touched, so its connection is refused here.
    monkeypatch.setattr(here.machine.database, "connect", connect)
    await here.machine.service.wakeups.stop()
    await here.machine.service.wakeups.start()
    await refused.wait()
    waiting = asyncio.create_task(here.lease(wait_seconds=20))
    while not here.machine.service.wakeups.waiters:
        await asyncio.sleep(0)
    job = await there.enqueue()
    assert [leased["id"] for leased in await waiting] == [job["id"]]


async def test_slow_pages_leave_readiness_and_lost_leases_their_answers(world: World):
    queue = await world.replica()
    job = await queue.enqueue()
    blocker = await world.connect()
    transaction = blocker.transaction()
    await transaction.start()
    await blocker.execute("LOCK TABLE counts IN ACCESS EXCLUSIVE MODE")
    pages = [asyncio.create_task(queue.http.get("/stats")) for _ in range(6)]
    await world.blocked(4)
    assert (await queue.http.get("/health/ready")).status_code == 200
    answer = await queue.http.post(f"/jobs/{job['id']}/ack", json={"lease_id": "none"})
    assert answer.json()["code"] == "lease_lost"
    await transaction.rollback()
    assert {page.status_code for page in await asyncio.gather(*pages)} == {200}


async def test_a_claim_passes_over_more_jobs_than_it_first_sees_in_other_hands(world: World):
    queue = await world.replica()
    jobs = [await queue.enqueue(payload=n) for n in range(60)]
    free = await queue.enqueue(payload="free")
    blocker = await world.connect()
    transaction = blocker.transaction()
    await transaction.start()
    held = await blocker.fetch("SELECT FROM ready WHERE id <> $1 FOR UPDATE", free["id"])
    assert len(held) == len(jobs)
    assert (await queue.lease_one())["id"] == free["id"]
    await transaction.rollback()


async def test_a_waiting_lease_gets_what_another_claim_lets_go(world: World):
    queue = await world.replica()
    job = await queue.enqueue()
    blocker = await world.connect()
    transaction = blocker.transaction()
    await transaction.start()
    await blocker.execute("SELECT FROM ready FOR UPDATE")
    waiting = asyncio.create_task(queue.lease(wait_seconds=20))
    while not queue.machine.service.wakeups.waiters:
        await asyncio.sleep(0)
    # The poll is a minute away, and a rollback tells nobody.
    await transaction.rollback()
    assert [leased["id"] for leased in await waiting] == [job["id"]]
