"""Settling many jobs in one call, and settling while leasing the next."""

import asyncio
from typing import Any

import pytest
from uuid_utils.compat import uuid7

from tests.conftest import Replica, World


def item(leased: dict[str, Any], outcome: str = "ack", **fields: Any) -> dict[str, Any]:
    return {"job_id": leased["id"], "lease_id": leased["lease_id"], "outcome": outcome, **fields}


async def settle(queue: Replica, *items: Any) -> list[dict[str, Any]]:
    answer = await queue.http.post("/settle", json={"items": list(items)})
    assert answer.status_code == 200, answer.text
    results: list[dict[str, Any]] = answer.json()["results"]
    return results


async def leased(queue: Replica, count: int, **fields: Any) -> list[dict[str, Any]]:
    for _ in range(count):
        await queue.enqueue(**fields)
    jobs = await queue.lease(max_jobs=count)
    assert len(jobs) == count
    return jobs


async def test_one_call_settles_each_outcome_in_the_order_of_its_items(queue: Replica):
    acked, failed, dead, back, later, alive = await leased(queue, 6, backoff={"jitter": "none"})
    results = await settle(
        queue,
        item(alive, "heartbeat", extend_seconds=600),
        item(acked, result={"n": 1}),
        item(failed, "fail", error={"message": "boom"}),
        item(dead, "fail", error={"message": "never"}, retry=False),
        item(back, "release"),
        item(later, "release", delay_seconds=60),
    )
    assert [result["status"] for result in results] == [200] * 6
    assert [result["state"] for result in results] == [
        "active",
        "completed",
        "retry",
        "failed",
        "ready",
        "scheduled",
    ]
    assert results[0]["lease_expires_at"] > alive["lease_expires_at"]
    assert results[0]["cancel_requested"] is False
    assert results[0]["directive"] == "continue"
    assert results[2]["run_at"] > failed["run_at"]
    assert (await queue.job(acked["id"]))["result"] == {"n": 1}


@pytest.mark.parametrize(
    ("spoil", "status", "code"),
    [
        ({"lease_id": "7f3d2c52-7a4e-4a2b-9d6e-0d8b2a2f6c11"}, 409, "lease_lost"),
        ({"lease_id": "nonsense"}, 409, "lease_lost"),
        ({"job_id": "01a202b9-e765-7640-ad53-9b8729ab138b"}, 404, "not_found"),
        ({"outcome": "celebrate"}, 422, "invalid"),
        ({"outcome": "fail"}, 422, "invalid"),
        ({"surprise": 1}, 422, "invalid"),
        ({"result": "x" * 300_000}, 413, "payload_too_large"),
    ],
)
async def test_a_bad_item_fails_alone(queue: Replica, spoil: dict[str, Any], status: int, code: str):
    good, bad = await leased(queue, 2)
    first, second = await settle(queue, item(bad) | spoil, item(good))
    assert (first["status"], first["error"]["code"]) == (status, code)
    assert first["job_id"] == (bad | {"job_id": bad["id"]} | spoil)["job_id"]
    assert second["status"] == 200
    assert (await queue.job(bad["id"]))["state"] == "active"
    assert (await queue.job(good["id"]))["state"] == "completed"


async def test_the_same_settle_again_gets_the_recorded_answers(queue: Replica):
    acked, failed = await leased(queue, 2)
    items = [item(acked, result=1), item(failed, "fail", error={"message": "boom"})]
    first = await settle(queue, *items)
    assert await settle(queue, *items) == first
    other = await settle(queue, item(acked, "release"), item(failed))
    assert [result["error"]["code"] for result in other] == ["lease_lost", "lease_lost"]
    assert [result["error"]["state"] for result in other] == ["completed", "retry"]


async def test_a_job_may_be_named_once(queue: Replica):
    [job] = await leased(queue, 1)
    for other in (
        item(job, "release"),
        item(job) | {"job_id": job["id"].upper()},
        item(job) | {"surprise": 1},
        {"job_id": job["id"]},
    ):
        answer = await queue.http.post("/settle", json={"items": [item(job), other]})
        assert answer.status_code == 422
        assert (await queue.job(job["id"]))["state"] == "active"
    # What is no name of a job names none twice.
    assert [
        each["status"] for each in await settle(queue, item(job), *[item(job) | {"job_id": "x"}] * 2)
    ] == [
        200,
        404,
        404,
    ]


async def test_a_thousand_items_are_the_most(queue: Replica):
    items = [item({"id": str(uuid7()), "lease_id": "x"}) for _ in range(1001)]
    assert [each["status"] for each in await settle(queue, *items[:1000])] == [404] * 1000
    answer = await queue.http.post("/settle", json={"items": items})
    assert answer.status_code == 422


async def test_settle_and_lease_in_one_round_trip(queue: Replica):
    await queue.enqueue(payload=1)
    await queue.enqueue(payload=2)
    first = await queue.lease_one()
    answer = await queue.http.post("/lease", json={"queues": ["q"], "settle": [item(first)]})
    assert [result["state"] for result in answer.json()["settled"]] == ["completed"]
    assert [job["payload"] for job in answer.json()["jobs"]] == [2]


async def test_a_lease_does_not_wait_when_an_item_was_refused(queue: Replica):
    lost = {"id": "01a202b9-e765-7640-ad53-9b8729ab138b", "lease_id": "x"}
    # Without this the request would wait for 30 seconds, and the client gives up after 5.
    answer = await queue.http.post(
        "/lease", json={"queues": ["q"], "wait_seconds": 30, "settle": [item(lost)]}, timeout=5
    )
    assert answer.json()["jobs"] == []
    assert [result["status"] for result in answer.json()["settled"]] == [404]


async def test_a_bad_lease_settles_nothing(queue: Replica):
    [job] = await leased(queue, 1)
    answer = await queue.http.post("/lease", json={"queues": ["no spaces"], "settle": [item(job)]})
    assert answer.status_code == 422
    assert (await queue.job(job["id"]))["state"] == "active"


async def test_what_is_settled_is_told_even_when_leasing_is_not_possible(queue: Replica):
    [job] = await leased(queue, 1)
    queue.machine.service.drain()
    answer = await queue.http.post("/lease", json={"queues": ["q"], "settle": [item(job)]})
    assert answer.status_code == 200
    assert answer.json()["jobs"] == []
    assert answer.json()["retry_after_seconds"] >= 1
    assert [result["state"] for result in answer.json()["settled"]] == ["completed"]


async def test_two_settles_with_the_same_jobs_in_opposite_order_both_end(world: World):
    one, two = await world.replica(), await world.replica()
    jobs = await leased(one, 40)
    there, back = await asyncio.gather(
        settle(one, *(item(job) for job in jobs)), settle(two, *(item(job) for job in reversed(jobs)))
    )
    assert {result["status"] for result in there + back} == {200}


async def test_concurrent_requests_share_commits(world: World):
    queue = await world.replica(db_pool_size=2)
    await asyncio.gather(*(queue.enqueue(payload=n) for n in range(50)))
    jobs = [job for each in await asyncio.gather(*(queue.lease() for _ in range(50))) for job in each]
    assert sorted(job["payload"] for job in jobs) == list(range(50))
    answers = await asyncio.gather(*(queue.verb("ack", job) for job in jobs))
    assert {answer.status_code for answer in answers} == {200}


async def test_requests_that_share_a_claim_get_what_each_asked_for(world: World):
    queue = await world.replica()
    for n in range(7):
        await queue.enqueue(payload=n)
    blocker = await world.connect()
    transaction = blocker.transaction()
    await transaction.start()
    await blocker.execute("LOCK TABLE ready IN ACCESS EXCLUSIVE MODE")
    first = asyncio.create_task(queue.lease(worker="a"))
    await world.blocked()
    many = asyncio.create_task(queue.lease(worker="b", max_jobs=4, lease_seconds=5))
    one = asyncio.create_task(queue.lease(worker="c", lease_seconds=500))
    await asyncio.sleep(0)
    await transaction.rollback()
    assert len(await first) == 1
    assert len(await many) == 4
    [job] = await one
    shown = await queue.job(job["id"])
    assert shown["worker"] == "c"
    assert job["lease_expires_at"] > (await many)[0]["lease_expires_at"]
