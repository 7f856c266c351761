"""What waits for a stranger's lock leaves connections for all the others."""

import asyncio
from collections.abc import Awaitable, Callable

import httpx
import pytest

from tests.conftest import Replica, World
from tests.store.conftest import holding

ASKS = 12
"""Three times as many as there are connections."""
POOL = 4

KEY = "SELECT FROM unique_keys WHERE key = 'k' FOR UPDATE"
READY = "SELECT FROM ready FOR UPDATE"
DEAD = "SELECT FROM dead FOR UPDATE"

Ask = Callable[[int], Awaitable[httpx.Response]]


async def acks(queue: Replica) -> Ask:
    for _ in range(ASKS):
        await queue.enqueue()
    leased = await queue.lease(max_jobs=ASKS)
    await queue.enqueue("next", unique={"key": "k"})
    return lambda number: queue.verb("ack", leased[number], then=[{"queue": "next", "unique": {"key": "k"}}])


async def items(queue: Replica) -> Ask:
    for _ in range(ASKS):
        await queue.enqueue()
    leased = await queue.lease(max_jobs=ASKS)
    await queue.enqueue("next", unique={"key": "k"})

    def ask(number: int) -> Awaitable[httpx.Response]:
        names = {"job_id": leased[number]["id"], "lease_id": leased[number]["lease_id"], "outcome": "ack"}
        item = {**names, "then": [{"queue": "next", "unique": {"key": "k"}}]}
        return queue.http.post("/settle", json={"items": [item]})

    return ask


async def retries(queue: Replica) -> Ask:
    job = await queue.enqueue("next", unique={"key": "k"})
    await queue.http.post(f"/jobs/{job['id']}/cancel")
    return lambda _: queue.http.post(f"/jobs/{job['id']}/retry")


async def redrives(queue: Replica) -> Ask:
    await queue.enqueue("next", unique={"key": "k"}, max_retries=0)
    await queue.fail(await queue.lease_one("next"))
    return lambda _: queue.http.post("/queues/next/redrive", json={})


async def cancels(queue: Replica) -> Ask:
    job = await queue.enqueue("next")
    return lambda _: queue.http.post(f"/jobs/{job['id']}/cancel")


async def edits(queue: Replica) -> Ask:
    job = await queue.enqueue("next")
    return lambda number: queue.http.patch(f"/jobs/{job['id']}", json={"priority": number % 10})


async def deletions(queue: Replica) -> Ask:
    job = await queue.enqueue("next")
    await queue.http.post(f"/jobs/{job['id']}/cancel")
    return lambda _: queue.http.delete(f"/jobs/{job['id']}")


async def purges(queue: Replica) -> Ask:
    await queue.enqueue("next")
    return lambda _: queue.http.post("/queues/next/purge")


@pytest.mark.parametrize(
    ("prepare", "held"),
    [
        (acks, KEY),
        (items, KEY),
        (retries, KEY),
        (redrives, KEY),
        (cancels, READY),
        (edits, READY),
        (purges, READY),
        (deletions, DEAD),
    ],
)
async def test_a_strangers_lock_stalls_no_plain_job_however_many_wait_for_it(
    world: World, prepare: Callable[[Replica], Awaitable[Ask]], held: str
):
    queue = await world.replica(db_pool_size=POOL)
    await queue.first_round()
    ask = await prepare(queue)
    async with holding(world, held):
        asks = [asyncio.ensure_future(ask(number)) for number in range(ASKS)]
        await world.blocked(POOL // 2)
        for _ in range(3):
            await queue.enqueue("plain")
        # It did not wait for them to give up.
        assert not any(asked.done() for asked in asks)
    statuses = {answer.status_code for answer in await asyncio.gather(*asks)}
    assert statuses <= {200, 204, 404, 409}
    assert statuses & {200, 204}
