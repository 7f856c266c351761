"""Lease: which jobs a worker gets, in which order, for how long. Waiting for them is in test_waiting.py."""

import asyncio
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import pytest

from tests.conftest import Replica, World

MIB = 1024 * 1024


def payloads(jobs: list[dict[str, Any]]) -> list[Any]:
    return [job["payload"] for job in jobs]


def length_seconds(leased: dict[str, Any], now: datetime) -> float:
    return (datetime.fromisoformat(leased["lease_expires_at"]) - now).total_seconds()


async def test_a_leased_job_brings_all_that_its_worker_needs_and_nothing_else(queue: Replica):
    now = queue.clock.move(0)
    job = await queue.enqueue(
        "emails", type="welcome", payload=[1], tags=["a"], metadata={"m": 1}, priority=8
    )
    leased = await queue.lease_one("emails", worker="w")
    assert leased == {
        "id": job["id"],
        "queue": "emails",
        "type": "welcome",
        "payload": [1],
        "attempt": 1,
        "max_retries": 3,
        "priority": 8,
        "lease_id": str(UUID(leased["lease_id"])),
        "lease_expires_at": (now + timedelta(seconds=30)).isoformat().replace("+00:00", "Z"),
        "created_at": job["created_at"],
        "run_at": job["run_at"],
        "tags": ["a"],
        "metadata": {"m": 1},
        "traceparent": None,
        "last_error": None,
        "checkpoint": None,
        "source": None,
    }


async def test_a_leased_job_is_active_and_names_its_worker_but_not_its_lease(queue: Replica):
    now = queue.clock.move(0)
    job = await queue.enqueue()
    leased = await queue.lease_one(worker="w-1")
    shown = await queue.http.get(f"/jobs/{job['id']}")
    changed = {"state": "active", "attempt": 1, "worker": "w-1", "started_at": now.isoformat()}
    assert shown.json() == job | changed | {"started_at": shown.json()["started_at"]}
    assert datetime.fromisoformat(shown.json()["started_at"]) == now
    assert leased["lease_id"] not in shown.text


async def test_a_leased_job_is_invisible_to_others(queue: Replica):
    await queue.enqueue()
    assert len(await queue.lease(max_jobs=1000)) == 1
    assert await queue.lease(max_jobs=1000) == []


async def test_leases_at_the_same_time_never_share_a_job(queue: Replica):
    ids = {(await queue.enqueue())["id"] for _ in range(12)}
    replies = await asyncio.gather(*(queue.lease(max_jobs=2) for _ in range(6)))
    leased = [job["id"] for jobs in replies for job in jobs]
    assert len(leased) == 12
    assert set(leased) == ids


async def test_nothing_to_do_is_an_empty_list(queue: Replica):
    answer = await queue.http.post("/lease", json={"queues": ["never-seen"], "wait_seconds": 0})
    assert (answer.status_code, answer.json()) == (200, {"jobs": [], "directive": "continue"})


@pytest.mark.parametrize("max_jobs", [1, 10])
async def test_higher_priority_comes_first_and_equal_priority_oldest_first(queue: Replica, max_jobs: int):
    for name, priority in [("a", "bulk"), ("b", 5), ("c", "fast"), ("d", "normal"), ("e", 10), ("f", 0)]:
        await queue.enqueue(payload=name, priority=priority)
    leased = []
    while jobs := await queue.lease(max_jobs=max_jobs):
        leased += payloads(jobs)
    assert leased == ["c", "e", "b", "d", "a", "f"]


@pytest.mark.parametrize("queues", ["abc", "cba", "bca"])
async def test_the_order_goes_over_all_queues_and_their_order_means_nothing(queue: Replica, queues: str):
    for name, priority in [("b", 5), ("a", 5), ("c", 9), ("a", 9), ("c", 5), ("b", 9)]:
        await queue.enqueue(name, payload=f"{name}{priority}", priority=priority)
    assert payloads(await queue.lease(*queues, max_jobs=4)) == ["c9", "a9", "b9", "b5"]
    assert payloads(await queue.lease(*queues, max_jobs=4)) == ["a5", "c5"]


async def test_a_delayed_job_stands_in_line_from_when_it_became_ready(queue: Replica):
    await queue.enqueue(payload="delayed", delay_seconds=10)
    queue.clock.move(5)
    await queue.enqueue(payload="before it")
    queue.clock.move(5)
    await queue.maintain()
    queue.clock.move(5)
    await queue.enqueue(payload="after it")
    assert payloads(await queue.lease(max_jobs=3)) == ["before it", "delayed", "after it"]


async def test_a_released_job_keeps_its_place_in_line(queue: Replica):
    for name in "abc":
        await queue.enqueue(payload=name)
    [a, b] = await queue.lease(max_jobs=2)
    await queue.verb("release", b)
    await queue.verb("release", a)
    assert payloads(await queue.lease(max_jobs=3)) == ["a", "b", "c"]


async def test_a_released_job_keeps_its_place_among_other_queues(queue: Replica):
    await queue.enqueue("q1", payload="first")
    await queue.enqueue("q2", payload="second")
    await queue.verb("release", await queue.lease_one("q1"))
    assert payloads(await queue.lease("q2", "q1", max_jobs=2)) == ["first", "second"]


async def test_only_the_named_types_are_leased(queue: Replica):
    for queue_name, type_ in [("q1", "x"), ("q1", "y"), ("q2", "z"), ("q2", "y"), ("q3", "y")]:
        await queue.enqueue(queue_name, type=type_, payload=f"{queue_name}{type_}")
    assert await queue.lease("q1", "q2", types=["none"], max_jobs=9) == []
    assert payloads(await queue.lease("q1", "q2", types=["z", "y", "y"], max_jobs=9)) == ["q1y", "q2z", "q2y"]
    assert payloads(await queue.lease("q1", "q2", "q1", max_jobs=9)) == ["q1x"]


async def test_at_most_max_jobs_are_leased_and_one_by_default(queue: Replica):
    for name in "abcde":
        await queue.enqueue(payload=name)
    assert payloads(await queue.lease()) == ["a"]
    assert payloads(await queue.lease(max_jobs=3)) == ["b", "c", "d"]
    assert payloads(await queue.lease(max_jobs=3)) == ["e"]


async def test_a_lease_is_as_long_as_the_request_else_the_job_else_the_environment_says(world: World):
    queue = await world.replica(lease_seconds=7)
    now = queue.clock.move(0)
    cases: list[tuple[dict[str, Any], dict[str, Any], float]] = [
        ({}, {}, 7),
        ({"lease_seconds": 40}, {}, 40),
        ({"lease_seconds": 40}, {"lease_seconds": 0.5}, 0.5),
        ({}, {"lease_seconds": 43_200}, 43_200),
        ({"lease_seconds": 40, "timeout_seconds": 20}, {}, 20),
        ({"timeout_seconds": 20}, {"lease_seconds": 60}, 20),
    ]
    for job, request, expected in cases:
        await queue.enqueue(**job)
        assert length_seconds(await queue.lease_one(**request), now) == expected


async def test_the_length_of_a_lease_is_what_a_heartbeat_extends_it_by(queue: Replica):
    queue.clock.move(0)
    requests: list[tuple[dict[str, Any], float]] = [
        ({}, 10),
        ({"lease_seconds": 100}, 100),
        ({"lease_seconds": 2}, 2),
    ]
    for request, expected in requests:
        await queue.enqueue(lease_seconds=10)
        leased = await queue.lease_one(**request)
        now = queue.clock.move(1)
        beat = (await queue.verb("heartbeat", leased)).json()
        assert length_seconds(beat, now) == expected


async def test_every_attempt_has_a_lease_of_its_own_and_a_number(queue: Replica):
    await queue.enqueue()
    first = await queue.lease_one()
    await queue.fail(first, retry_in_seconds=0)
    await queue.maintain()
    second = await queue.lease_one()
    assert second["lease_id"] != first["lease_id"]
    assert (first["attempt"], second["attempt"]) == (1, 2)


async def test_an_attempt_learns_of_the_error_before_it(queue: Replica):
    await queue.enqueue()
    first = await queue.lease_one()
    error = {"message": "no such host", "type": "DnsError", "stack": "at line 1"}
    await queue.verb("fail", first, error=error, retry_in_seconds=0)
    await queue.maintain()
    second = await queue.lease_one()
    assert second["last_error"] == error
    await queue.verb("release", second)
    assert (await queue.lease_one())["last_error"] == error


async def test_a_reply_stops_at_8_mib_of_payload_and_the_rest_stays_ready(queue: Replica):
    quarter = "x" * (MIB // 4 - 2)
    ids = [(await queue.enqueue(payload=quarter))["id"] for _ in range(34)]
    first = await queue.lease(max_jobs=1000)
    assert [job["id"] for job in first] == ids[:32]
    assert (await queue.stats())["waiting"] == 2
    second = await queue.lease(max_jobs=1000)
    assert [(job["id"], job["attempt"]) for job in second] == [(ids[32], 1), (ids[33], 1)]


async def test_a_payload_beyond_8_mib_is_leased_alone(world: World):
    queue = await world.replica(max_payload_bytes=10 * MIB)
    large = await queue.enqueue(payload="x" * 8 * MIB)
    small = await queue.enqueue()
    assert [job["id"] for job in await queue.lease(max_jobs=2)] == [large["id"]]
    assert [job["id"] for job in await queue.lease(max_jobs=2)] == [small["id"]]


async def test_a_lease_names_1_to_100_queues(queue: Replica):
    names = [f"q{number}" for number in range(101)]
    await queue.enqueue("q99")
    assert len(await queue.lease(*names[:100])) == 1
    for refused in (names, []):
        answer = await queue.http.post("/lease", json={"queues": refused})
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid")


async def test_a_bad_value_is_refused(queue: Replica):
    await queue.enqueue()
    for field, value in [
        ("queues", "q"),
        ("queues", [""]),
        ("queues", ["a\n"]),
        ("types", []),
        ("types", ["a b"]),
        ("worker", ""),
        ("worker", "a\nb"),
        ("worker", "x" * 257),
        ("max_jobs", 0),
        ("max_jobs", 1001),
        ("max_jobs", 1.5),
        ("wait_seconds", -1),
        ("wait_seconds", 30.1),
        ("lease_seconds", 0.4),
        ("lease_seconds", 43_201),
        ("queue", "q"),
    ]:
        answer = await queue.http.post("/lease", json={"queues": ["q"], "wait_seconds": 0, field: value})
        assert (field, value, answer.status_code) == (field, value, 422)
    assert len(await queue.lease()) == 1
