"""The header `Idempotency-Key`: a repeated request does nothing more and gets the job of the first one."""

import asyncio
from datetime import timedelta
from typing import Any

import httpx
import pytest

from app.queue.events import JobEnqueued
from tests.api.refusals import nothing_changes, problem
from tests.conftest import Clock, Replica, World


async def post(queue: Replica, key: str | None = "k", **fields: Any) -> httpx.Response:
    headers = {} if key is None else {"Idempotency-Key": key}
    return await queue.http.post("/jobs", json={"queue": "q", **fields}, headers=headers)


async def test_a_repeat_gets_the_job_as_it_stands_now(queue: Replica):
    first = await post(queue, payload=1)
    assert first.status_code == 201
    assert "duplicate" not in first.json()
    await queue.lease_one(worker="w")
    again = await post(queue, payload=1)
    assert again.status_code == 200
    assert again.headers["location"] == first.headers["location"]
    found = again.json()
    assert found.pop("duplicate") is True
    assert found == await queue.job(first.json()["id"])
    assert found["worker"] == "w"
    assert len(queue.events.of(JobEnqueued)) == 1


async def test_another_body_is_a_conflict_and_changes_nothing(world: World, queue: Replica):
    first = (await post(queue, payload=1)).json()
    async with nothing_changes(world):
        problem(await post(queue, payload=2), "idempotency_conflict")
    # The raw body counts: what means the same is not the same.
    answer = await queue.http.post(
        "/jobs",
        content=b'{"payload": 1, "queue": "q"}',
        headers={"Idempotency-Key": "k", "content-type": "application/json"},
    )
    problem(answer, "idempotency_conflict")
    assert (await post(queue, payload=1)).json()["id"] == first["id"]


async def test_other_keys_and_no_key_are_other_requests(queue: Replica):
    ids = {(await post(queue, key)).json()["id"] for key in ("k", "K", "k2", None, None)}
    assert len(ids) == 5


async def test_quoted_and_bare_are_one_key(queue: Replica):
    for quoted, bare in [('"abc"', "abc"), (r'"a\"b\\c"', r'a"b\c'), ('"two words"', "two words")]:
        first = await post(queue, quoted)
        assert first.status_code == 201, first.text
        assert (await post(queue, bare)).json()["id"] == first.json()["id"]


async def test_keys_are_1_to_255_printable_characters(world: World, queue: Replica):
    assert (await post(queue, "x" * 255)).status_code == 201
    assert (await post(queue, f'"{"y" * 255}"')).status_code == 201
    async with nothing_changes(world):
        for key in (
            "",
            '""',
            "x" * 256,
            f'"{"x" * 256}"',
            '"open',
            '"a";p=1',
            "tab\there",
            "caf\xe9",
            r'"\x"',
        ):
            headers = {b"Idempotency-Key": key.encode("latin-1")}
            answer = await queue.http.post("/jobs", json={"queue": "q"}, headers=headers)
            assert problem(answer, "invalid")["errors"][0]["field"] == "Idempotency-Key", key


async def test_it_stands_for_24_hours(queue: Replica, clock: Clock):
    clock.move(0)
    first = (await post(queue, payload=1)).json()
    clock.move(86_399)
    assert (await post(queue, payload=1)).json()["id"] == first["id"]
    clock.move(1)
    second = await post(queue, payload=2)
    assert second.status_code == 201
    assert (await post(queue, payload=2)).json()["id"] == second.json()["id"]
    problem(await post(queue, payload=1), "idempotency_conflict")


@pytest.mark.parametrize(
    ("body", "code"),
    [({"queue": "not a name"}, "invalid"), ({"queue": "q", "payload": "x" * 20}, "payload_too_large")],
)
async def test_a_refused_request_leaves_its_key_free(world: World, body: dict[str, Any], code: str):
    queue = await world.replica(max_payload_bytes=10)
    headers = {"Idempotency-Key": "k"}
    problem(await queue.http.post("/jobs", json=body, headers=headers), code)
    assert (await post(queue)).status_code == 201


async def test_a_rejected_duplicate_leaves_its_key_free(world: World, queue: Replica):
    unique = {"key": "u", "on_conflict": "reject"}
    holder = (await post(queue, None, unique=unique)).json()
    async with nothing_changes(world):
        problem(await post(queue, unique=unique), "duplicate")
    await queue.http.post(f"/jobs/{holder['id']}/cancel")
    stored = await post(queue, unique=unique)
    assert stored.status_code == 201
    again = await post(queue, unique=unique)
    assert (again.status_code, again.json()["id"]) == (200, stored.json()["id"])


async def test_a_duplicate_by_unique_key_is_what_its_repeats_get(queue: Replica):
    unique = {"key": "u"}
    holder = (await post(queue, None, unique=unique)).json()
    first = await post(queue, unique=unique)
    assert (first.status_code, first.json()["id"]) == (200, holder["id"])
    await queue.http.post(f"/jobs/{holder['id']}/cancel")
    again = await post(queue, unique=unique)
    assert (again.status_code, again.json()["id"], again.json()["state"]) == (200, holder["id"], "cancelled")


async def test_a_repeat_after_the_job_was_deleted_says_so(queue: Replica):
    first = (await post(queue)).json()
    await queue.http.post(f"/jobs/{first['id']}/cancel")
    await queue.http.delete(f"/jobs/{first['id']}")
    told = problem(await post(queue), "not_found")
    assert "deleted" in told["detail"]


async def test_50_repeats_at_two_replicas_make_one_job(world: World, queue: Replica):
    other = await world.replica()
    answers = await asyncio.gather(*(post((queue, other)[n % 2]) for n in range(50)))
    assert sorted(answer.status_code for answer in answers) == [200] * 49 + [201]
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert (await queue.stats())["waiting"] == 1
    assert len(queue.events.of(JobEnqueued) + other.events.of(JobEnqueued)) == 1


async def test_maintenance_forgets_keys_after_24_hours(world: World, queue: Replica, clock: Clock):
    await queue.first_round()
    clock.move(0)
    await post(queue, "old")
    clock.move(86_399)
    await post(queue, "new")
    assert (await queue.maintain())["sweep"] == 0
    clock.move(1)
    assert (await queue.maintain())["sweep"] == 1
    connection = await world.connect()
    assert await connection.fetchval("SELECT array_agg(key) FROM idempotency_keys") == ["new"]


async def test_a_repeat_after_the_start_deadline_gets_the_job_and_a_new_request_is_refused(
    world: World, queue: Replica, clock: Clock
):
    until = (clock.move(0) + timedelta(seconds=60)).isoformat()
    first = (await post(queue, expires_at=until)).json()
    clock.move(61)
    again = await post(queue, expires_at=until)
    assert (again.status_code, again.json()["id"], again.json()["duplicate"]) == (200, first["id"], True)
    async with nothing_changes(world):
        assert problem(await post(queue, "other", expires_at=until), "invalid")
        problem(await post(queue, expires_at=until, payload=2), "idempotency_conflict")
    # What was refused has left its key free.
    assert (await post(queue, "other")).status_code == 201


async def test_a_repeat_after_the_queue_was_forgotten_gets_the_job(world: World):
    queue = await world.replica(create_queues=False)
    await queue.http.put("/queues/q", json={"dead_letter_queue": None})
    await queue.http.put("/queues/gone", json={})
    first = (await post(queue, dead_letter_queue="gone")).json()
    await queue.http.delete("/queues/gone")
    again = await post(queue, dead_letter_queue="gone")
    assert (again.status_code, again.json()["id"]) == (200, first["id"])
    problem(await post(queue, "other", dead_letter_queue="gone"), "invalid")
