"""An edit beside a lease, a promotion, another edit, a retry: whoever has the job's place first decides."""

import asyncio
from typing import Any

import httpx
import pytest

from tests.conftest import Clock, Replica, World
from tests.store.conftest import holding, idle_replica, in_turn

BODY = "SELECT FROM jobs WHERE id = $1 FOR UPDATE"
READY = "SELECT FROM ready WHERE id = $1 FOR UPDATE"
SCHEDULED = "SELECT FROM scheduled WHERE id = $1 FOR UPDATE"
DEAD = "SELECT FROM dead WHERE id = $1 FOR UPDATE"
LEASING = """
INSERT INTO leases (id, queue, type, priority, attempt, noted, lease_id, since, leased_at, expires_at, lease_seconds,
                    cancel_requested)
VALUES ($1, 'q', 'default', 5, 1, false, gen_random_uuid(), now(), now(), now(), 30, false)"""
"""Stops a claim of this job, with the ready rows in its hands."""
PROMOTING = """
INSERT INTO ready (id, queue, type, priority, attempt, noted, since) VALUES ($1, 'q', 'default', 5, 0, false, now())"""
"""Stops the promotion of this job, with the scheduled rows in its hands."""


async def patch(queue: Replica, job_id: str, **fields: Any) -> httpx.Response:
    return await queue.http.patch(f"/jobs/{job_id}", json=fields)


async def test_a_lease_beside_an_edit_passes_the_job_over_and_gets_it_as_it_is_then(
    world: World, queue: Replica
):
    job = await queue.enqueue(payload="old")
    async with holding(world, BODY, job["id"]):
        # It has the place, and waits to write the body.
        edit = asyncio.create_task(patch(queue, job["id"], payload="new", priority=9))
        await world.blocked()
        assert await queue.lease() == []
    assert (await edit).status_code == 200
    leased = await queue.lease_one()
    assert (leased["payload"], leased["priority"]) == ("new", 9)


async def test_a_lease_that_has_the_job_first_keeps_it_from_being_changed(world: World, queue: Replica):
    job = await queue.enqueue(payload="old")
    other = await idle_replica(world)
    async with holding(world, LEASING, job["id"]):
        lease = asyncio.create_task(other.lease())
        await world.blocked()
        edit = asyncio.create_task(patch(queue, job["id"], payload="new"))
        await world.blocked(2)
    [leased] = await lease
    answer = await edit
    assert (answer.status_code, answer.json()["code"], answer.json()["state"]) == (
        409,
        "wrong_state",
        "active",
    )
    assert leased["payload"] == "old"
    assert (await queue.job(job["id"]))["payload"] == "old"


@pytest.mark.parametrize("fields", [{"payload": "new"}, {"delay_seconds": 0}, {"delay_seconds": 600}])
async def test_an_edit_beside_a_promotion_finds_the_job_where_it_is_then(
    world: World, queue: Replica, clock: Clock, fields: dict[str, Any]
):
    clock.move(0)
    job = await queue.enqueue(payload="old", delay_seconds=60)
    clock.move(61)
    async with holding(world, PROMOTING, job["id"]):
        promotion = asyncio.create_task(queue.machine.service.maintenance.promote())
        await world.blocked()
        edit = asyncio.create_task(patch(queue, job["id"], **fields))
        await world.blocked(2)
    assert await promotion == 1
    answer = await edit
    assert answer.status_code == 200
    assert answer.json()["state"] == ("scheduled" if fields.get("delay_seconds") else "ready")


async def test_a_promotion_beside_an_edit_leaves_the_job_to_it(world: World, queue: Replica, clock: Clock):
    clock.move(0)
    job = await queue.enqueue(payload="old", delay_seconds=60)
    clock.move(61)
    async with holding(world, BODY, job["id"]):
        edit = asyncio.create_task(patch(queue, job["id"], payload="new"))
        await world.blocked()
        assert await queue.machine.service.maintenance.promote() == 0
    assert (await edit).json()["state"] == "scheduled"
    await queue.maintain()
    assert (await queue.lease_one())["payload"] == "new"


@pytest.mark.parametrize("place", [READY, SCHEDULED, DEAD])
async def test_of_two_edits_each_keeps_what_the_other_has_changed(world: World, queue: Replica, place: str):
    job = await queue.enqueue(delay_seconds=600 if place == SCHEDULED else None)
    if place == DEAD:
        await queue.http.post(f"/jobs/{job['id']}/cancel")
    other = await idle_replica(world)
    first, second = await in_turn(
        world,
        place,
        job["id"],
        patch(queue, job["id"], payload="new", tags=["a"]),
        patch(other, job["id"], priority=9, tags=["b"]),
    )
    assert (first.status_code, second.status_code) == (200, 200)
    after = await queue.job(job["id"])
    assert (after["payload"], after["priority"], after["tags"]) == ("new", 9, ["b"])


async def test_an_edit_after_a_retry_changes_the_living_job(world: World, queue: Replica):
    job = await queue.enqueue()
    await queue.http.post(f"/jobs/{job['id']}/cancel")
    other = await idle_replica(world)
    retry, edit = await in_turn(
        world,
        DEAD,
        job["id"],
        queue.http.post(f"/jobs/{job['id']}/retry"),
        patch(other, job["id"], payload="new"),
    )
    assert (retry.status_code, edit.status_code, edit.json()["state"]) == (200, 200, "ready")
    assert (await queue.lease_one())["payload"] == "new"


async def test_an_edit_after_a_delete_finds_nothing(world: World, queue: Replica):
    job = await queue.enqueue()
    await queue.http.post(f"/jobs/{job['id']}/cancel")
    gone, edit = await in_turn(
        world, DEAD, job["id"], queue.http.delete(f"/jobs/{job['id']}"), patch(queue, job["id"], payload=1)
    )
    assert (gone.status_code, edit.status_code) == (204, 404)


async def test_two_calls_for_many_change_each_job_once(world: World, queue: Replica):
    ids = [(await queue.enqueue())["id"] for _ in range(5)]
    other = await idle_replica(world)
    body = {"filter": {"queue": ["q"]}}
    first, second = await in_turn(
        world,
        READY,
        ids[2],
        queue.http.post("/jobs/cancel", json=body),
        other.http.post("/jobs/cancel", json=body),
    )
    assert first.json()["changed"] + second.json()["changed"] == 5
    assert [(await queue.job(job_id))["state"] for job_id in ids] == ["cancelled"] * 5
