"""A redrive beside a lease of a copy, a delete of its original, and another redrive."""

import asyncio

from tests.api.test_dead_letters import copies, failed_job
from tests.conftest import Replica, World
from tests.store.conftest import holding, idle_replica

READY = "SELECT FROM ready WHERE id = $1 FOR UPDATE"
DEAD = "SELECT FROM dead WHERE id = $1 FOR UPDATE"


async def test_a_copy_that_a_claim_has_is_passed_over(world: World, queue: Replica):
    taken, free = [await failed_job(queue, dead_letter_queue="dlq") for _ in range(2)]
    [copy] = [job for job in await copies(queue) if job["source"]["job_id"] == taken["id"]]
    async with holding(world, READY, copy["id"]):
        told = (await queue.http.post("/queues/dlq/redrive")).json()
    assert (told["matched"], told["changed"]) == (2, 1)
    assert (await queue.job(taken["id"]))["state"] == "failed"
    assert (await queue.job(free["id"]))["state"] == "ready"
    assert [job["id"] for job in await copies(queue)] == [copy["id"]]


async def test_a_lease_beside_a_redrive_passes_the_copy_over(world: World, queue: Replica):
    original = await failed_job(queue, dead_letter_queue="dlq")
    async with holding(world, DEAD, original["id"]):
        # It has the copy, and waits for the original.
        redrive = asyncio.create_task(queue.http.post("/queues/dlq/redrive"))
        await world.blocked()
        assert await queue.lease("dlq") == []
    assert (await redrive).json()["changed"] == 1
    assert [job["id"] for job in await queue.lease()] == [original["id"]]
    assert await queue.lease("dlq") == []


async def test_two_redrives_bring_a_copy_home_once(world: World, queue: Replica):
    original = await failed_job(queue, dead_letter_queue="dlq")
    other = await idle_replica(world)
    async with holding(world, DEAD, original["id"]):
        first = asyncio.create_task(queue.http.post("/queues/dlq/redrive"))
        await world.blocked()
        second = await other.http.post("/queues/dlq/redrive")
    assert ((await first).json()["changed"], second.json()["changed"]) == (1, 0)
    assert [job["id"] for job in await queue.lease(max_jobs=5)] == [original["id"]]


async def test_an_original_deleted_meanwhile_comes_home_as_a_new_job(world: World, queue: Replica):
    original = await failed_job(queue, dead_letter_queue="dlq")
    async with holding(world, DEAD, original["id"]):
        gone = asyncio.create_task(queue.http.delete(f"/jobs/{original['id']}"))
        await world.blocked()
        redrive = asyncio.create_task(queue.http.post("/queues/dlq/redrive"))
        await world.blocked(2)
    assert (await gone).status_code == 204
    assert (await redrive).json()["changed"] == 1
    [job] = await queue.lease(max_jobs=5)
    assert job["id"] != original["id"]
