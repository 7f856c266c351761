"""`then` on an ack: follow-up jobs in the same transaction."""

import asyncio
from datetime import timedelta
from typing import Any

import httpx
import pytest

from app.queue.events import JobEnqueued
from tests.api.refusals import nothing_changes, problem
from tests.conftest import Clock, Replica, World
from tests.store.conftest import in_turn

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
LEASE = "SELECT FROM leases WHERE id = $1 FOR UPDATE"


async def leased(queue: Replica, name: str = "q") -> dict[str, Any]:
    await queue.enqueue(name)
    return await queue.lease_one(name)


def next_job(payload: Any = None, **fields: Any) -> dict[str, Any]:
    return {"queue": "next", "payload": payload, **fields}


def ack_item(job: dict[str, Any], *then: dict[str, Any]) -> dict[str, Any]:
    fields = {"then": list(then)} if then else {}
    return {"job_id": job["id"], "lease_id": job["lease_id"], "outcome": "ack", **fields}


async def test_follow_ups_are_enqueued_with_the_ack_and_named_again_at_a_repeat(queue: Replica):
    job = await leased(queue)
    body = {"lease_id": job["lease_id"], "then": [next_job(1, priority=9), next_job(2, delay_seconds=60)]}
    path = f"/jobs/{job['id']}/ack"
    answer = await queue.http.post(path, json=body, headers={"traceparent": TRACEPARENT})
    assert answer.status_code == 200, answer.text
    done = answer.json()
    assert done["state"] == "completed"
    first, second = [await queue.job(job_id) for job_id in done["then"]]
    assert (first["payload"], first["priority"], first["state"]) == (1, 9, "ready")
    assert (second["payload"], second["state"], second["traceparent"]) == (2, "scheduled", TRACEPARENT)
    assert len(queue.events.of(JobEnqueued)) == 3
    again = await queue.http.post(path, json=body)
    assert (again.status_code, again.json()["then"]) == (200, done["then"])
    assert [each["id"] for each in await queue.lease("next", max_jobs=9)] == done["then"][:1]
    assert "then" not in await queue.job(job["id"])


async def test_an_ack_without_follow_ups_says_nothing_of_them(queue: Replica):
    fields: dict[str, Any]
    for fields in ({}, {"then": []}):
        job = await leased(queue)
        for _ in range(2):
            assert "then" not in (await queue.verb("ack", job, **fields)).json()


async def test_a_lost_lease_enqueues_nothing(world: World, queue: Replica):
    job = await leased(queue)
    await queue.verb("release", job)
    async with nothing_changes(world):
        problem(await queue.verb("ack", job, then=[next_job()]), "lease_lost")


@pytest.mark.parametrize(
    ("then", "code", "field"),
    [
        ([next_job(), {"queue": "no name"}], "invalid", "then[1].queue"),
        ([next_job(colour="red")], "invalid", "then[0]"),
        ([next_job(), "job"], "invalid", "then[1]"),
        ([next_job(run_at="2030-01-01T00:00:00Z", delay_seconds=1)], "invalid", "then[0].run_at"),
        ([next_job(delay_seconds=60, expires_in_seconds=1)], "invalid", "then[0].expires_in_seconds"),
        ([next_job("x" * 20)], "payload_too_large", None),
        ([next_job()] * 101, "invalid", "then"),
        ({}, "invalid", "then"),
    ],
)
async def test_a_bad_follow_up_is_told_before_anything_happens(
    world: World, then: Any, code: str, field: str | None
):
    queue = await world.replica(max_payload_bytes=10)
    job = await leased(queue)
    async with nothing_changes(world):
        told = problem(await queue.verb("ack", job, then=then), code)
        if field is not None:
            assert told["errors"][0]["field"] == field
    assert (await queue.verb("ack", job, then=[next_job()])).status_code == 200


async def test_100_follow_ups_call_who_waits_for_them(queue: Replica):
    job = await leased(queue)
    waiting = asyncio.create_task(queue.lease_one("next", wait_seconds=20))
    while queue.machine.service.wakeups.waiters == 0:
        await asyncio.sleep(0.005)
    done = (await queue.verb("ack", job, then=[next_job(n) for n in range(100)])).json()
    assert len(set(done["then"])) == 100
    assert (await waiting)["id"] == done["then"][0]


async def test_a_follow_up_with_a_taken_key_is_the_one_that_holds_it(queue: Replica):
    holder = await queue.enqueue("next", unique={"key": "k"})
    job = await leased(queue)
    done = (await queue.verb("ack", job, then=[next_job(unique={"key": "k"}), next_job()])).json()
    assert done["then"][0] == holder["id"]
    assert (await queue.verb("ack", job)).json()["then"] == done["then"]


async def test_a_follow_up_that_rejects_keeps_its_ack_from_happening(world: World, queue: Replica):
    unique = {"key": "k", "on_conflict": "reject"}
    await queue.enqueue("next", unique=unique)
    job = await leased(queue)
    async with nothing_changes(world):
        problem(await queue.verb("ack", job, then=[next_job(1), next_job(unique=unique)]), "duplicate")
    assert (await queue.job(job["id"]))["state"] == "active"


@pytest.mark.parametrize("path", ["/settle", "/lease"])
async def test_acks_among_others_bring_theirs(queue: Replica, path: str):
    unique = {"key": "k", "on_conflict": "reject"}
    await queue.enqueue("next", unique=unique)
    plain, following, rejected, bad, failing, lost = [await leased(queue) for _ in range(6)]
    await queue.verb("release", lost, delay_seconds=600)
    items = [
        ack_item(plain),
        ack_item(following, next_job(1), next_job(2)),
        ack_item(rejected, next_job(3), next_job(unique=unique)),
        ack_item(bad, {"queue": "no name"}),
        {
            "job_id": failing["id"],
            "lease_id": failing["lease_id"],
            "outcome": "fail",
            "error": {"message": "boom"},
        },
        ack_item(lost, next_job(4)),
    ]

    async def settle() -> list[dict[str, Any]]:
        if path == "/settle":
            return list((await queue.http.post(path, json={"items": items})).json()["results"])
        body = {"queues": ["nothing"], "wait_seconds": 0, "settle": items}
        return list((await queue.http.post(path, json=body)).json()["settled"])

    told = await settle()
    assert [each["status"] for each in told] == [200, 200, 409, 422, 200, 409]
    assert [each["error"]["code"] for each in told if "error" in each] == [
        "duplicate",
        "invalid",
        "lease_lost",
    ]
    assert told[3]["error"]["errors"][0]["field"] == "then[0].queue"
    assert [each.get("then") and len(each["then"]) for each in told] == [None, 2, None, None, None, None]
    assert (await settle())[1] == told[1]
    waiting = await queue.lease("next", max_jobs=9)
    assert [each["payload"] for each in waiting] == [None, 1, 2]
    assert (await queue.job(rejected["id"]))["state"] == "active"


async def test_a_single_item_of_a_settle_brings_its_own(queue: Replica):
    job = await leased(queue)
    [told] = (await queue.http.post("/settle", json={"items": [ack_item(job, next_job(1))]})).json()[
        "results"
    ]
    assert told["then"] == [(await queue.lease_one("next"))["id"]]


async def test_of_two_acks_at_once_one_brings_its_follow_ups(world: World, queue: Replica):
    job = await leased(queue)
    other = await world.replica()
    answers: list[httpx.Response] = await in_turn(
        world,
        LEASE,
        job["id"],
        queue.verb("ack", job, then=[next_job(1)]),
        other.verb("ack", job, then=[next_job(2)]),
    )
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].json()["then"] == answers[1].json()["then"]
    assert [each["payload"] for each in await queue.lease("next", max_jobs=9)] == [1]


async def test_an_ack_that_comes_after_the_reaper_enqueues_nothing(queue: Replica, clock: Clock):
    job = await leased(queue)
    clock.move(31)
    await queue.maintain()
    problem(await queue.verb("ack", job, then=[next_job()]), "lease_lost")
    assert await queue.lease("next") == []


async def test_a_repeat_after_a_follow_ups_start_deadline_gets_the_recorded_answer(
    world: World, queue: Replica, clock: Clock
):
    until = (clock.move(0) + timedelta(seconds=60)).isoformat()
    first, second, third = [await leased(queue) for _ in range(3)]
    late = next_job(expires_at=until)
    done = (await queue.verb("ack", first, then=[late])).json()
    items = [ack_item(first, late), ack_item(second, late), ack_item(third)]
    clock.move(61)
    again = await queue.verb("ack", first, then=[late])
    assert (again.status_code, again.json()["then"]) == (200, done["then"])
    async with nothing_changes(world):
        assert problem(await queue.verb("ack", second, then=[late]), "invalid")
    results = (await queue.http.post("/settle", json={"items": items})).json()["results"]
    assert [each["status"] for each in results] == [200, 422, 200]
    assert (results[0]["state"], results[0]["then"]) == ("completed", done["then"])


async def test_many_follow_ups_in_one_call_wait_for_a_batchs_turn(
    world: World, queue: Replica, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("app.engine.once.BATCHES_IN_LINE_MAX", 0)
    jobs = [await leased(queue) for _ in range(7)]
    few, many = ([ack_item(job, *[next_job()] * 100) for job in part] for part in (jobs[:3], jobs[3:]))
    assert (await queue.http.post("/settle", json={"items": few})).status_code == 200
    async with nothing_changes(world):
        for path, body in [("/settle", {"items": many}), ("/lease", {"queues": ["q"], "settle": many})]:
            refused = await queue.http.post(path, json=body)
            problem(refused, "unavailable")
            assert int(refused.headers["retry-after"]) > 0
    monkeypatch.setattr("app.engine.once.BATCHES_IN_LINE_MAX", 1)
    results = (await queue.http.post("/settle", json={"items": many})).json()["results"]
    assert [(each["status"], len(each["then"])) for each in results] == [(200, 100)] * 4
    assert len(queue.events.of(JobEnqueued)) == 7 + 700
