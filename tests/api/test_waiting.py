"""Waiting leases: who is woken by what, and what becomes of a job whose worker has gone.

The poll is set to 60 s and no wait is longer than 30 s: what arrives here was brought by a call, never by the poll.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx
import pytest

from app.queue.events import AttemptEnded, JobEnqueued, JobEvent, JobLeased
from app.queue.model import Outcome
from tests.conftest import Replica, World

Reply = asyncio.Task[list[dict[str, Any]]]


def asleep(queue: Replica) -> int:
    """Count the leases that have looked, found nothing, and sleep until they are called."""
    waiters = queue.machine.service.wakeups._room._waiters
    return sum(bool(waiter._answer._callbacks) and not waiter._answer.done() for waiter in waiters)


async def until_asleep(queue: Replica, count: int) -> None:
    async with asyncio.timeout(10):
        while asleep(queue) != count:
            await asyncio.sleep(0.002)


async def waiting(queue: Replica, *queues: str, **fields: Any) -> Reply:
    """Begin a lease, and return when it sleeps."""
    before = asleep(queue)
    reply = asyncio.create_task(queue.lease(*queues, wait_seconds=25, **fields))
    await until_asleep(queue, before + 1)
    return reply


async def vanish(reply: Reply) -> None:
    """End a lease's client: its connection is closed before its answer."""
    reply.cancel()
    with suppress(asyncio.CancelledError):
        await reply


async def until_nobody_waits(queue: Replica) -> None:
    async with asyncio.timeout(10):
        while queue.machine.service.wakeups.waiters:
            await asyncio.sleep(0.002)


@asynccontextmanager
async def no_claim_ends(world: World, queue: Replica) -> AsyncIterator[None]:
    """Keep every claim from ending within the block."""
    # The first round of maintenance would be kept too, and be taken for a claim.
    await queue.first_round()
    connection = await world.connect()
    async with connection.transaction():
        await connection.execute("LOCK TABLE leases IN SHARE MODE")
        yield


async def vanish_seen_by_the_server(queue: Replica, reply: Reply) -> None:
    """End a lease's client, and return when the server has noticed."""
    connections = queue.server.server_state.connections
    before = len(connections)
    await vanish(reply)
    async with asyncio.timeout(10):
        while len(connections) >= before:
            await asyncio.sleep(0.002)


async def test_a_lease_that_waits_in_vain_is_answered_with_an_empty_list(queue: Replica):
    assert await queue.lease(wait_seconds=0.01) == []


async def test_a_lease_does_not_wait_when_there_is_a_job(queue: Replica):
    job = await queue.enqueue()
    assert [leased["id"] for leased in await queue.lease(wait_seconds=30)] == [job["id"]]
    assert queue.machine.service.wakeups.waiters == 0


async def test_a_job_posted_here_goes_to_a_waiting_lease_at_once(queue: Replica):
    reply = await waiting(queue)
    job = await queue.enqueue()
    assert [leased["id"] for leased in await reply] == [job["id"]]
    jobs = [type(event) for event in queue.events.events if isinstance(event, JobEvent)]
    assert jobs == [JobEnqueued, JobLeased]


async def test_a_job_posted_at_another_replica_goes_to_a_waiting_lease_at_once(world: World):
    here, there = await world.replica(), await world.replica()
    reply = await waiting(here)
    job = await there.enqueue()
    assert [leased["id"] for leased in await reply] == [job["id"]]
    assert [event.job_id for event in here.events.of(JobLeased)] == [
        event.job_id for event in there.events.of(JobEnqueued)
    ]


async def test_a_job_posted_to_another_queue_wakes_nobody(queue: Replica):
    reply = await waiting(queue, "mine")
    await queue.enqueue("other")
    assert asleep(queue) == 1
    await queue.enqueue("mine")
    assert [leased["queue"] for leased in await reply] == ["mine"]


@pytest.mark.parametrize("way", ["promoted", "tried again", "released", "retried by an operator"])
async def test_a_job_that_becomes_ready_otherwise_wakes_a_waiting_lease_too(queue: Replica, way: str):
    await queue.enqueue(delay_seconds=10 if way == "promoted" else 0, backoff={"jitter": "none"})
    leased = [] if way == "promoted" else await queue.lease()
    if way == "tried again":
        await queue.fail(leased[0])
    elif way == "retried by an operator":
        await queue.fail(leased[0], retry=False)
    reply = await waiting(queue)
    match way:
        case "promoted" | "tried again":
            queue.clock.move(10)
            await queue.maintain()
        case "released":
            await queue.verb("release", leased[0])
        case "retried by an operator":
            await queue.http.post(f"/jobs/{leased[0]['id']}/retry")
    assert len(await reply) == 1


async def test_as_many_leases_are_woken_as_there_are_jobs_the_oldest_first(queue: Replica):
    replies = [await waiting(queue) for _ in range(4)]
    jobs = [await queue.enqueue(payload=number) for number in range(2)]
    leased = [await reply for reply in replies[:2]]
    assert {job["id"] for [job] in leased} == {job["id"] for job in jobs}
    assert asleep(queue) == 2
    for number, reply in enumerate(replies[2:], 2):
        await queue.enqueue(payload=number)
        assert [job["payload"] for job in await reply] == [number]


async def test_a_hint_from_another_replica_wakes_as_many_leases_as_there_are_jobs(world: World):
    here, there = await world.replica(), await world.replica()
    first, second = await waiting(here), await waiting(here)
    await there.enqueue(payload=1)
    assert [job["payload"] for job in await first] == [1]
    assert asleep(here) == 1
    await there.enqueue(payload=2)
    assert [job["payload"] for job in await second] == [2]


async def test_a_lease_that_waits_for_types_is_woken_by_these_only(queue: Replica):
    pictures = await waiting(queue, types=["png", "jpg"])
    await queue.enqueue(type="text")
    assert asleep(queue) == 1
    await queue.enqueue(type="jpg")
    assert [job["type"] for job in await pictures] == ["jpg"]


async def test_a_job_of_another_replica_wakes_the_lease_that_waits_for_its_type(world: World):
    here, there = await world.replica(), await world.replica()
    pictures, texts = await waiting(here, types=["png"]), await waiting(here, types=["text"])
    await there.enqueue(type="text")
    assert [job["type"] for job in await texts] == ["text"]
    await there.enqueue(type="png")
    assert [job["type"] for job in await pictures] == ["png"]


@pytest.mark.parametrize("typed_first", [True, False])
async def test_leases_with_and_without_types_stand_in_one_line(queue: Replica, typed_first: bool):
    oldest = await waiting(queue, types=["x"] if typed_first else None)
    youngest = await waiting(queue, types=None if typed_first else ["x"])
    for name, reply in [("one", oldest), ("two", youngest)]:
        await queue.enqueue(type="x", payload=name)
        assert [job["payload"] for job in await reply] == [name]


async def test_a_lease_that_waits_at_several_queues_is_woken_by_each(queue: Replica):
    for name in ("q1", "q2"):
        reply = await waiting(queue, "q1", "q2")
        await queue.enqueue(name)
        assert [job["queue"] for job in await reply] == [name]


async def test_a_client_that_vanished_while_waiting_gets_nothing(queue: Replica):
    await vanish(await waiting(queue))
    await until_nobody_waits(queue)
    job = await queue.enqueue()
    assert (await queue.job(job["id"]))["state"] == "ready"
    assert await queue.attempts(job["id"]) == []
    assert queue.events.of(JobLeased) == []


async def test_the_job_of_a_client_that_vanished_goes_to_the_next_in_line(queue: Replica):
    oldest, next_one = await waiting(queue), await waiting(queue)
    await vanish(oldest)
    await until_asleep(queue, 1)
    await queue.enqueue()
    assert [job["attempt"] for job in await next_one] == [1]


async def test_a_client_that_vanishes_during_the_claim_has_its_jobs_released_uncounted(
    queue: Replica, world: World
):
    jobs = [await queue.enqueue() for _ in range(2)]
    async with no_claim_ends(world, queue):
        reply = asyncio.create_task(queue.lease(max_jobs=2))
        await world.blocked()
        await vanish_seen_by_the_server(queue, reply)

    ended = await queue.events.wait_for(AttemptEnded, 2)
    assert {event.outcome for event in ended} == {Outcome.RELEASED}
    assert queue.events.of(JobLeased) == []
    for job in jobs:
        assert await queue.job(job["id"]) == job
    leased = await queue.lease(max_jobs=2)
    assert [(job["id"], job["attempt"]) for job in leased] == [(job["id"], 1) for job in jobs]


async def test_the_call_of_a_client_that_vanishes_during_the_claim_goes_to_the_next_in_line(
    queue: Replica, world: World
):
    oldest, next_one = await waiting(queue), await waiting(queue)
    async with no_claim_ends(world, queue):
        await queue.enqueue()
        await world.blocked()
        await vanish_seen_by_the_server(queue, oldest)
    assert [job["attempt"] for job in await next_one] == [1]
    assert len(queue.events.of(JobLeased)) == 1


@pytest.mark.parametrize("vanishes", [False, True])
async def test_the_call_of_a_lease_that_took_another_job_goes_to_the_next_in_line(
    queue: Replica, world: World, vanishes: bool
):
    both, one = await waiting(queue, "q1", "q2"), await waiting(queue, "q1")
    async with no_claim_ends(world, queue):
        await queue.enqueue("q1")
        await world.blocked()
        await queue.enqueue("q2", priority="fast")
        if vanishes:
            await vanish_seen_by_the_server(queue, both)
    if not vanishes:
        assert [job["queue"] for job in await both] == ["q2"]
    assert [job["queue"] for job in await one] == ["q1"]


async def test_more_waiting_leases_than_the_setting_allows_are_told_to_come_back(world: World):
    queue = await world.replica(max_lease_waiters=1)
    reply = await waiting(queue)
    answer: httpx.Response = await queue.http.post("/lease", json={"queues": ["q"]})
    assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
    assert int(answer.headers["retry-after"]) > 0
    await queue.enqueue()
    assert len(await reply) == 1
