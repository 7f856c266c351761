"""`POST /jobs/batch`: many jobs in one transaction, what came of each in order, all or each by itself."""

import asyncio
import json
from datetime import timedelta
from typing import Any

import httpx
import pytest

from app.queue.events import JobEnqueued, JobReplaced
from tests.api.refusals import nothing_changes, problem
from tests.conftest import Clock, Replica, World
from tests.store.conftest import holding

LINES = {"content-type": "application/x-ndjson"}
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def job(payload: Any = None, queue: str = "q", **fields: Any) -> dict[str, Any]:
    return {"queue": queue, "payload": payload, **fields}


async def batch(
    queue: Replica, *jobs: Any, headers: dict[str, str] | None = None, **fields: Any
) -> httpx.Response:
    return await queue.http.post("/jobs/batch", json={"jobs": list(jobs), **fields}, headers=headers or {})


async def lines(queue: Replica, *texts: bytes, query: str = "") -> httpx.Response:
    return await queue.http.post(f"/jobs/batch{query}", content=b"\n".join(texts), headers=LINES)


def results(answer: httpx.Response) -> list[dict[str, Any]]:
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["results"]
    return found


async def test_jobs_are_stored_in_order_with_all_that_is_said_of_them(queue: Replica):
    told = results(
        await batch(
            queue,
            job(1, type="t", tags=["a"]),
            job(2, delay_seconds=60),
            job(3, "other"),
            job(4),
            headers={"traceparent": TRACEPARENT},
        )
    )
    assert [set(each) for each in told] == [{"status", "id", "state"}] * 4
    assert [(each["status"], each["state"]) for each in told] == [
        (201, "ready"),
        (201, "scheduled"),
        (201, "ready"),
        (201, "ready"),
    ]
    stored = [await queue.job(each["id"]) for each in told]
    assert [each["payload"] for each in stored] == [1, 2, 3, 4]
    assert {each["traceparent"] for each in stored} == {TRACEPARENT}
    assert (stored[0]["type"], stored[0]["tags"]) == ("t", ["a"])
    assert [each["payload"] for each in await queue.lease("q", max_jobs=10)] == [1, 4]
    assert len(queue.events.of(JobEnqueued)) == 4


async def test_a_bad_item_fails_alone(world: World):
    queue = await world.replica(max_payload_bytes=10)
    told = results(
        await batch(
            queue, job(1), job(2, colour="red"), job("x" * 20), "no object", job(5, queue="no name"), job(6)
        )
    )
    assert [each["status"] for each in told] == [201, 422, 413, 422, 422, 201]
    assert [each["error"]["code"] for each in told if "error" in each] == [
        "invalid",
        "payload_too_large",
        "invalid",
        "invalid",
    ]
    assert told[4]["error"]["errors"][0]["field"] == "queue"
    assert {*told[4]} == {"status", "error"}
    assert [each["payload"] for each in await queue.lease(max_jobs=10)] == [1, 6]


async def test_what_a_queues_policy_refuses_fails_alone(world: World):
    queue = await world.replica(create_queues=False)
    await queue.http.put("/queues/known", json={"max_retries": 7})
    told = results(
        await batch(
            queue,
            job(1, "unknown"),
            job(2, "known"),
            job(3, "known", expires_in_seconds=0.5, delay_seconds=5),
        )
    )
    assert [each["status"] for each in told] == [422, 201, 422]
    assert (await queue.job(told[1]["id"]))["max_retries"] == 7


async def test_atomic_stores_all_or_nothing(world: World, queue: Replica):
    told = results(await batch(queue, job(1), job(2), atomic=True))
    assert [each["status"] for each in told] == [201, 201]
    async with nothing_changes(world):
        answer = await batch(queue, job(1), job(2, colour="red"), job(3), job(4, "no name"), atomic=True)
        refused = problem(answer, "invalid")
    assert [each["field"] for each in refused["errors"]] == ["jobs[1]", "jobs[3].queue"]


async def test_atomic_with_a_rejected_duplicate_stores_nothing(world: World, queue: Replica):
    unique = {"key": "k", "on_conflict": "reject"}
    await queue.enqueue(unique=unique)
    async with nothing_changes(world):
        answer = await batch(
            queue, job(1), job(2, unique=unique), atomic=True, headers={"Idempotency-Key": "k"}
        )
        refused = problem(answer, "invalid")
    assert [each["field"] for each in refused["errors"]] == ["jobs[1].unique"]
    # Its key is as free as before.
    results(await batch(queue, job(1), headers={"Idempotency-Key": "k"}))


async def test_a_job_a_line(queue: Replica):
    answer = await lines(
        queue, b"", b'{"queue":"q","payload":1e400}', b"  \t", b'{"queue":"q","payload":2}\r', b"", b""
    )
    assert [each["status"] for each in results(answer)] == [201, 201]
    leased = await queue.http.post("/lease", json={"queues": ["q"], "max_jobs": 5, "wait_seconds": 0})
    assert b'"payload":1e400' in leased.content


async def test_a_bad_line_fails_alone(queue: Replica):
    answer = await lines(
        queue,
        b'{"queue":"q"',
        b'{"queue":"q"}',
        b'{"queue":"\xff"}',
        rb'{"queue":"q","payload":"\ud800"}',
        b"[]",
    )
    assert [each["status"] for each in results(answer)] == [400, 201, 400, 400, 422]


@pytest.mark.parametrize(("query", "stored"), [("", 1), ("?atomic=false", 1), ("?atomic=true", 0)])
async def test_lines_are_atomic_by_the_query(queue: Replica, query: str, stored: int):
    answer = await lines(queue, b'{"queue":"q"}', b"{", query=query)
    assert answer.status_code == (200 if stored else 422)
    assert (await queue.stats())["waiting"] == stored


async def test_1_to_10_000_jobs(world: World, queue: Replica):
    most = [job(n) for n in range(10_000)]
    told = results(await batch(queue, *most))
    assert [each["status"] for each in told] == [201] * 10_000
    assert len({each["id"] for each in told}) == 10_000
    assert (await queue.stats())["waiting"] == 10_000
    # In the order of the batch, over all of its statements.
    first = await queue.lease(max_jobs=1000)
    assert [each["payload"] for each in first] == list(range(1000))
    assert [each["payload"] for each in await queue.lease(max_jobs=1000)] == list(range(1000, 2000))
    async with nothing_changes(world):
        for answer in (
            await batch(queue),
            await batch(queue, *most, job()),
            await lines(queue, b"\n" * 100, b" "),
            await lines(queue, *[json.dumps(each).encode() for each in most], b'{"queue":"q"}'),
        ):
            assert problem(answer, "invalid")["errors"][0]["field"] == "jobs"


async def test_other_bodies_are_refused(world: World, queue: Replica):
    async with nothing_changes(world):
        problem(await queue.http.post("/jobs/batch", json=[job()]), "invalid")
        problem(await batch(queue, job(), colour="red"), "invalid")
        problem(await batch(queue, job(), atomic="yes"), "invalid")
        problem(await lines(queue, b"{}", query="?atomic=maybe"), "invalid")
        problem(
            await queue.http.post("/jobs/batch", content=b"{", headers={"content-type": "application/json"}),
            "malformed_json",
        )
        problem(await queue.http.post("/jobs/batch", content=b"{}"), "unsupported_media_type")
        problem(
            await queue.http.post("/jobs", content=b'{"queue":"q"}', headers=LINES), "unsupported_media_type"
        )


async def test_unique_keys_hold_within_a_batch_and_against_others(queue: Replica):
    held = await queue.enqueue("q", unique={"key": "held"})
    told = results(
        await batch(
            queue,
            job(0, unique={"key": "new"}),
            job(1, unique={"key": "new"}),
            job(2, unique={"key": "held"}),
            job(3, unique={"key": "held", "on_conflict": "reject"}),
            job(4, unique={"key": "new", "on_conflict": "reject"}),
            job(5, queue="other", unique={"key": "held"}),
            job(6),
        )
    )
    assert [each["status"] for each in told] == [201, 200, 200, 409, 409, 201, 201]
    assert (told[1]["id"], told[1]["duplicate"]) == (told[0]["id"], True)
    assert (told[2]["id"], told[2]["state"]) == (held["id"], "ready")
    assert {each["error"]["code"] for each in told if "error" in each} == {"duplicate"}
    assert held["id"] in told[3]["error"]["detail"]


async def test_the_last_replacement_of_a_batch_stays(queue: Replica):
    held = await queue.enqueue(payload="old", unique={"key": "held"})

    def replace(key: str, payload: int) -> dict[str, Any]:
        return job(payload, unique={"key": key, "on_conflict": "replace"})

    told = results(
        await batch(
            queue,
            replace("new", 1),
            replace("held", 2),
            replace("new", 3),
            replace("held", 4),
            job(5, unique={"key": "held"}),
        )
    )
    assert [(each["status"], each.get("replaced", False)) for each in told] == [
        (201, False),
        (200, True),
        (200, True),
        (200, True),
        (200, False),
    ]
    assert (told[2]["id"], told[3]["id"]) == (told[0]["id"], held["id"])
    assert (await queue.job(held["id"]))["payload"] == 4
    assert (await queue.job(told[0]["id"]))["payload"] == 3
    assert (len(queue.events.of(JobEnqueued)), len(queue.events.of(JobReplaced))) == (2, 1)


async def test_many_with_one_key_take_no_more_statements_than_two(queue: Replica):
    told = results(
        await batch(queue, *(job(n, unique={"key": "k", "on_conflict": "replace"}) for n in range(5000)))
    )
    assert {each["id"] for each in told} == {told[0]["id"]}
    assert (await queue.lease_one())["payload"] == 4999


async def test_idempotency_key_covers_the_whole_call_and_gives_the_ids_again(world: World):
    queue = await world.replica(max_payload_bytes=10)
    held = await queue.enqueue("q", unique={"key": "held"})
    jobs = [
        job(1),
        job("x" * 20),
        job(2, unique={"key": "held"}),
        job(3, unique={"key": "held", "on_conflict": "reject"}),
        job(4),
    ]
    first = results(await batch(queue, *jobs, headers={"Idempotency-Key": "k"}))
    assert [each["status"] for each in first] == [201, 413, 200, 409, 201]
    await queue.http.post(f"/jobs/{held['id']}/cancel")
    async with nothing_changes(world):
        again = results(await batch(queue, *jobs, headers={"Idempotency-Key": "k"}))
    assert [each["status"] for each in again] == [200, 413, 200, 409, 200]
    assert [each.get("id") for each in again] == [each.get("id") for each in first]
    assert [each["duplicate"] for each in again if "id" in each] == [True] * 3
    assert again[2]["state"] == "cancelled"
    problem(await batch(queue, job(1), headers={"Idempotency-Key": "k"}), "idempotency_conflict")
    # The same key at another path is another key.
    single = await queue.http.post("/jobs", json=job(1), headers={"Idempotency-Key": "k"})
    assert single.status_code == 201


async def test_20_repeats_at_two_replicas_make_one_batch(world: World, queue: Replica):
    other = await world.replica()

    async def post(n: int) -> httpx.Response:
        while True:
            answer = await batch(
                (queue, other)[n % 2], *(job(n) for n in range(20)), headers={"Idempotency-Key": "k"}
            )
            if answer.status_code != 503:
                return answer

    answers = [results(answer) for answer in await asyncio.gather(*(post(n) for n in range(20)))]
    assert len({each["id"] for answer in answers for each in answer}) == 20
    assert sum("duplicate" not in answer[0] for answer in answers) == 1
    assert (await queue.stats())["waiting"] == 20


async def test_a_batch_calls_leases_that_wait_here_and_elsewhere(world: World, queue: Replica):
    other = await world.replica()
    waiting = [asyncio.create_task(replica.lease_one(wait_seconds=20)) for replica in (queue, other)]
    for replica in (queue, other):
        while replica.machine.service.wakeups.waiters == 0:
            await asyncio.sleep(0.005)
    results(await batch(queue, job(1), job(2)))
    assert sorted(each["payload"] for each in await asyncio.gather(*waiting)) == [1, 2]


async def test_too_many_batches_at_once_are_told_to_come_back(
    world: World, queue: Replica, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("app.engine.once.BATCHES_IN_LINE_MAX", 1)
    async with holding(world, "LOCK TABLE jobs IN SHARE MODE"):
        running = [asyncio.create_task(batch(queue, job(n))) for n in range(2)]
        await world.blocked(2)
        waiting = asyncio.create_task(batch(queue, job(3)))
        while queue.machine.service.once._batches_in_line == 0:
            await asyncio.sleep(0.005)
        refused = await batch(queue, job(4))
        problem(refused, "unavailable")
        assert int(refused.headers["retry-after"]) > 0
    for answer in await asyncio.gather(*running, waiting):
        assert results(answer)[0]["status"] == 201


async def test_start_deadlines_are_those_of_each_job(queue: Replica, clock: Clock):
    clock.set("2030-01-01T00:00:00Z")
    told = results(
        await batch(
            queue,
            job(1, expires_at="2029-12-31T23:59:59Z"),
            job(2, expires_in_seconds=60),
            job(3, run_at="2030-01-01T00:01:00Z", expires_at="2030-01-01T00:00:59Z"),
        )
    )
    assert [each["status"] for each in told] == [422, 201, 422]


@pytest.mark.parametrize("atomic", [False, True])
async def test_a_repeat_after_the_start_deadlines_gives_the_ids_again(
    queue: Replica, clock: Clock, atomic: bool
):
    until = (clock.move(0) + timedelta(seconds=60)).isoformat()
    body = {"jobs": [{"queue": "q", "expires_at": until}, {"queue": "q"}], "atomic": atomic}
    first = await queue.http.post("/jobs/batch", json=body, headers={"Idempotency-Key": "k"})
    ids = [each["id"] for each in first.json()["results"]]
    clock.move(61)
    again = await queue.http.post("/jobs/batch", json=body, headers={"Idempotency-Key": "k"})
    assert [(each["status"], each["id"]) for each in again.json()["results"]] == [(200, id_) for id_ in ids]
    other = await queue.http.post("/jobs/batch", json=body, headers={"Idempotency-Key": "other"})
    assert other.status_code == (422 if atomic else 200)
    if not atomic:
        assert [each["status"] for each in other.json()["results"]] == [422, 201]
