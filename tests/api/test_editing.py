"""Changing a job that no worker has."""

import asyncio
from datetime import datetime, timedelta
from typing import Any

import httpx
import pytest

from app.queue.events import JobEdited
from tests.api.refusals import nothing_changes, problem
from tests.api.test_operating import DEAD, WAITING, brought_to, wrong_state
from tests.conftest import Clock, Replica, World


async def patch(replica: Replica, job_id: str, **fields: Any) -> httpx.Response:
    return await replica.http.patch(f"/jobs/{job_id}", json=fields)


def at(now: datetime, seconds: float = 0) -> str:
    return (now + timedelta(seconds=seconds)).isoformat().replace("+00:00", "Z")


CHANGES: dict[str, Any] = {
    "type": "other",
    "payload": {"n": 12345678901234567890},
    "priority": 9,
    "lease_seconds": 12,
    "timeout_seconds": 40,
    "max_retries": 7,
    "tags": ["a", "b"],
    "metadata": {"tenant": 1},
    "dead_letter_queue": "dlq",
}


@pytest.mark.parametrize("state", [*WAITING, *DEAD])
async def test_a_job_that_no_worker_has_takes_every_field(queue: Replica, world: World, state: str):
    job_id = await brought_to(state, queue, world)
    before = await queue.job(job_id)
    answer = await patch(queue, job_id, **CHANGES, backoff={"factor": 3})
    assert answer.status_code == 200, answer.text
    assert answer.json() == before | CHANGES | {"backoff": before["backoff"] | {"factor": 3}}
    assert await queue.job(job_id) == answer.json()
    [event] = queue.events.of(JobEdited)
    assert (str(event.job_id), event.type) == (job_id, "other")


async def test_what_is_not_named_stays_and_null_clears(queue: Replica):
    job = await queue.enqueue(**CHANGES, expires_in_seconds=60)
    assert (await patch(queue, job["id"], priority="bulk")).json() == job | {"priority": 1}
    cleared = {"timeout_seconds": None, "dead_letter_queue": None, "expires_at": None}
    assert (await patch(queue, job["id"], **cleared)).json() == job | {"priority": 1} | cleared


async def test_a_changed_job_is_leased_as_it_is_now(queue: Replica):
    first = await queue.enqueue(payload=1, type="a")
    await queue.enqueue(payload=2, type="a")
    await patch(queue, first["id"], payload=[3], type="b", lease_seconds=100)
    assert [job["payload"] for job in await queue.lease(types=["a"], max_jobs=5)] == [2]
    [job] = await queue.lease(types=["b"], max_jobs=5)
    assert (job["id"], job["payload"], job["attempt"]) == (first["id"], [3], 1)


async def test_a_job_keeps_its_place_in_line_but_for_its_priority(queue: Replica):
    ids = [(await queue.enqueue())["id"] for _ in range(4)]
    await patch(queue, ids[0], payload=1)
    await patch(queue, ids[3], priority="fast")
    await patch(queue, ids[1], priority=0)
    assert [job["id"] for job in await queue.lease(max_jobs=5)] == [ids[3], ids[0], ids[2], ids[1]]


async def test_a_job_with_another_time_stands_where_that_puts_it(queue: Replica, clock: Clock):
    now = clock.move(0)
    first, second, third = [(await queue.enqueue())["id"] for _ in range(3)]
    later = (await patch(queue, first, run_at=at(now, 60))).json()
    assert (later["state"], later["run_at"]) == ("scheduled", at(now, 60))
    moved = (await patch(queue, first, delay_seconds=90)).json()
    assert (moved["state"], moved["run_at"]) == ("scheduled", at(now, 90))
    now = clock.move(1)
    again = (await patch(queue, second, run_at=at(now, -3600))).json()
    assert (again["state"], again["run_at"]) == ("ready", at(now))
    # It is the last in line now: it became ready after the third.
    assert [job["id"] for job in await queue.lease(max_jobs=5)] == [third, second]
    assert (await patch(queue, first, delay_seconds=0)).json()["state"] == "ready"
    assert [job["id"] for job in await queue.lease(max_jobs=5)] == [first]
    assert await queue.stats() == {**(await queue.stats()), "active": 3, "waiting": 0, "delayed": 0}


async def test_a_backoff_may_be_cut_short_or_made_longer(queue: Replica, clock: Clock):
    now = clock.move(0)
    job_id = (await queue.enqueue())["id"]
    await queue.fail(await queue.lease_one(), retry_in_seconds=60)
    longer = (await patch(queue, job_id, delay_seconds=100)).json()
    assert (longer["state"], longer["run_at"], longer["attempt"]) == ("retry", at(now, 100), 1)
    assert (await patch(queue, job_id, delay_seconds=0)).json()["state"] == "ready"
    leased = await queue.lease_one()
    assert (leased["attempt"], leased["last_error"]) == (2, {"message": "boom"})


async def test_a_failed_jobs_payload_is_mended_and_its_history_stays(queue: Replica, world: World):
    job_id = await brought_to("failed", queue, world, payload="bad")
    await patch(queue, job_id, payload="good", max_retries=5)
    assert (await queue.job(job_id))["state"] == "failed"
    await queue.http.post(f"/jobs/{job_id}/retry")
    leased = await queue.lease_one()
    assert (leased["payload"], leased["attempt"], leased["max_retries"]) == ("good", 2, 5)
    assert [attempt["outcome"] for attempt in await queue.attempts(job_id)] == ["failed", None]


async def test_who_waits_for_what_an_edit_makes_ready_is_called(world: World, queue: Replica):
    other = await world.replica()
    job = await queue.enqueue(delay_seconds=600)
    waiting = asyncio.create_task(other.lease("q", wait_seconds=20))
    while other.machine.service.wakeups.waiters < 1:
        await asyncio.sleep(0.005)
    await patch(queue, job["id"], delay_seconds=0)
    assert [each["id"] for each in await waiting] == [job["id"]]


@pytest.mark.parametrize("state", ["active", "completed"])
async def test_what_a_worker_has_or_has_done_is_not_changed(queue: Replica, world: World, state: str):
    job_id = await brought_to(state, queue, world)
    async with nothing_changes(world):
        assert wrong_state(await patch(queue, job_id, priority=1)) == state


async def test_an_unknown_job_is_not_found(queue: Replica):
    problem(await patch(queue, "0190a4f4-3b7a-7c39-8f3e-000000000000", priority=1), "not_found")


# Start deadlines


async def test_a_start_deadline_holds_from_then_on(queue: Replica, clock: Clock):
    now = clock.move(0)
    ids = [(await queue.enqueue(delay_seconds=delay))["id"] for delay in (0, 30)]
    assert (await patch(queue, ids[0], expires_at=at(now, 10))).json()["expires_at"] == at(now, 10)
    assert (await patch(queue, ids[1], expires_in_seconds=40)).json()["expires_at"] == at(now, 40)
    clock.move(11)
    await queue.maintain()
    assert [(await queue.job(job_id))["state"] for job_id in ids] == ["expired", "scheduled"]
    # Other edits leave it in force.
    await patch(queue, ids[1], priority=1)
    clock.move(30)
    assert await queue.lease() == []
    await queue.maintain()
    assert (await queue.job(ids[1]))["state"] == "expired"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"run_at": "2100-01-01T00:00:00Z", "expires_in_seconds": 5}, "expires_at"),
        ({"delay_seconds": 200}, "expires_at"),
        ({"expires_at": "2020-01-01T00:00:00Z"}, "expires_at"),
    ],
)
async def test_a_start_deadline_before_the_job_is_due_is_refused(
    queue: Replica, world: World, fields: dict[str, Any], field: str
):
    job = await queue.enqueue(expires_in_seconds=100)
    async with nothing_changes(world):
        told = problem(await patch(queue, job["id"], **fields), "invalid")
    assert told["errors"][0]["field"] == field


async def test_what_has_had_its_effect_is_not_changed(queue: Replica, world: World):
    started = await brought_to("retry", queue, world, "a")
    ended = await brought_to("failed", queue, world, "b")
    cases: list[tuple[str, dict[str, Any]]] = [
        (started, {"expires_in_seconds": 60}),
        (ended, {"expires_in_seconds": 60}),
        (ended, {"delay_seconds": 60}),
        (ended, {"run_at": "2100-01-01T00:00:00Z"}),
    ]
    for job_id, fields in cases:
        async with nothing_changes(world):
            problem(await patch(queue, job_id, **fields), "invalid")


# What is refused


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"queue": "other"},
        {"unique": {"key": "k"}},
        {"state": "ready"},
        {"priority": 11},
        {"priority": None},
        {"payload": 1, "max_retries": -1},
        {"type": "a b"},
        {"tags": ["a\n"]},
        {"tags": None},
        {"metadata": []},
        {"metadata": {"a": "x" * 5000}},
        {"run_at": "2100-01-01T00:00:00Z", "delay_seconds": 1},
        {"expires_at": "2100-01-01T00:00:00Z", "expires_in_seconds": 1},
        {"run_at": "2300-01-01T00:00:00Z"},
        {"dead_letter_queue": "q"},
        {"dead_letter_queue": "a b"},
        {"backoff": {"strategy": "never"}},
    ],
)
async def test_a_bad_edit_changes_nothing(queue: Replica, world: World, fields: dict[str, Any]):
    job = await queue.enqueue()
    async with nothing_changes(world):
        problem(await patch(queue, job["id"], **fields), "invalid")


async def test_a_payload_that_is_too_large_is_refused(world: World):
    queue = await world.replica(max_payload_bytes=100)
    job = await queue.enqueue()
    problem(await patch(queue, job["id"], payload="x" * 100), "payload_too_large")
