"""Unique keys: one job of a queue a key, for as long as the holder's scope says, and what a second one gets."""

import asyncio
from typing import Any

import httpx
import pytest

from app.queue.events import JobEnqueued, JobReplaced
from tests.api.refusals import nothing_changes, problem
from tests.conftest import Clock, Replica, World

DAY_SECONDS = 86_400


async def post(
    queue: Replica, key: str = "k", scope: str = "unfinished", name: str = "q", **fields: Any
) -> httpx.Response:
    unique: dict[str, Any] = {"key": key, "scope": scope}
    if scope == "window":
        unique["window_seconds"] = fields.pop("window_seconds", 60)
    if "on_conflict" in fields:
        unique["on_conflict"] = fields.pop("on_conflict")
    return await queue.http.post("/jobs", json={"queue": name, "unique": unique, **fields})


async def stored(queue: Replica, **fields: Any) -> dict[str, Any]:
    answer = await post(queue, **fields)
    assert answer.status_code == 201, answer.text
    job: dict[str, Any] = answer.json()
    assert not {"duplicate", "replaced"} & job.keys()
    return job


async def duplicate_of(queue: Replica, job: dict[str, Any], **fields: Any) -> dict[str, Any]:
    answer = await post(queue, **fields)
    assert answer.status_code == 200, answer.text
    assert answer.headers["location"] == f"/jobs/{job['id']}"
    found: dict[str, Any] = answer.json()
    assert (found["id"], found.pop("duplicate")) == (job["id"], True)
    return found


async def test_a_second_job_with_the_key_gets_the_first_one_as_it_stands(queue: Replica):
    first = await stored(queue, payload=1)
    assert first["unique"] == {"key": "k", "scope": "unfinished", "window_seconds": None}
    await queue.lease_one(worker="w")
    found = await duplicate_of(queue, first, payload=2, type="other")
    assert found == await queue.job(first["id"])
    assert (found["state"], found["worker"], found["payload"]) == ("active", "w", 1)
    assert (await queue.stats())["waiting"] == 0
    assert len(queue.events.of(JobEnqueued)) == 1


async def test_each_queue_has_keys_of_its_own_for_all_its_types(queue: Replica):
    first = await stored(queue, type="a")
    await duplicate_of(queue, first, type="b")
    await stored(queue, name="other")
    await stored(queue, key="K")


async def test_plain_jobs_have_no_key(queue: Replica):
    assert (await queue.enqueue(unique=None))["unique"] is None
    assert (await queue.enqueue())["unique"] is None


@pytest.mark.parametrize("end", ["ack", "fail", "cancel", "expire"])
async def test_unfinished_holds_until_the_job_ends(queue: Replica, clock: Clock, end: str):
    first = await stored(queue, expires_in_seconds=60)
    await duplicate_of(queue, first)
    if end == "cancel":
        await queue.http.post(f"/jobs/{first['id']}/cancel")
    elif end == "expire":
        clock.move(61)
        await queue.maintain()
    else:
        leased = await queue.lease_one()
        await duplicate_of(queue, first)
        fields = {"error": {"message": "boom"}, "retry": False} if end == "fail" else {}
        assert (await queue.verb(end, leased, **fields)).status_code == 200
    second = await stored(queue)
    await duplicate_of(queue, second)


async def test_unfinished_holds_while_the_job_waits_for_a_retry(queue: Replica):
    first = await stored(queue, backoff={"initial_seconds": 600})
    await queue.fail(await queue.lease_one())
    assert (await duplicate_of(queue, first))["state"] == "retry"


async def test_queued_holds_until_the_first_lease_and_nothing_takes_it_back(queue: Replica):
    first = await stored(queue, scope="queued")
    await duplicate_of(queue, first, scope="queued")
    leased = await queue.lease_one()
    second = await stored(queue, scope="queued")
    # Given back before its first attempt counted: it has been leased all the same.
    assert (await queue.verb("release", leased)).status_code == 200
    await duplicate_of(queue, second, scope="queued")
    await queue.fail(await queue.lease_one(), retry_in_seconds=0)
    assert (await queue.job(first["id"]))["state"] in {"retry", "ready"}
    await queue.lease_one()
    await stored(queue, scope="queued")


async def test_queued_holds_while_the_job_is_delayed(queue: Replica):
    first = await stored(queue, scope="queued", delay_seconds=60)
    await duplicate_of(queue, first)


async def test_the_holders_scope_decides_not_the_newcomers(queue: Replica):
    await stored(queue, scope="queued")
    await queue.lease_one()
    second = await stored(queue, scope="unfinished")
    await queue.lease_one()
    await duplicate_of(queue, second, scope="queued")


async def test_a_window_holds_for_its_time_whatever_becomes_of_the_job(queue: Replica, clock: Clock):
    clock.move(0)
    first = await stored(queue, scope="window", window_seconds=60)
    assert first["unique"] == {"key": "k", "scope": "window", "window_seconds": 60}
    await queue.verb("ack", await queue.lease_one())
    clock.move(59.999)
    assert (await duplicate_of(queue, first))["state"] == "completed"
    clock.move(0.001)
    await stored(queue, scope="window")


async def test_a_window_over_lets_go_of_a_job_that_still_lives(queue: Replica, clock: Clock):
    clock.move(0)
    await stored(queue, scope="window", window_seconds=0.5)
    clock.move(1)
    await stored(queue, scope="window")


async def test_a_deleted_job_holds_nothing(queue: Replica):
    first = await stored(queue, scope="window", window_seconds=DAY_SECONDS)
    await queue.verb("ack", await queue.lease_one())
    await duplicate_of(queue, first)
    assert (await queue.http.delete(f"/jobs/{first['id']}")).status_code == 204
    await stored(queue, scope="window")


async def test_a_window_that_outlasts_its_jobs_retention_still_stores_nothing(
    world: World, queue: Replica, clock: Clock
):
    await stored(queue, scope="window", window_seconds=90 * DAY_SECONDS)
    await queue.fail(await queue.lease_one(), retry=False)
    clock.move(60 * DAY_SECONDS)
    await queue.maintain()
    async with nothing_changes(world):
        problem(await post(queue), "duplicate")


async def test_reject_refuses_and_names_the_holder(world: World, queue: Replica):
    first = await stored(queue, on_conflict="reject")
    async with nothing_changes(world):
        told = problem(await post(queue, on_conflict="reject"), "duplicate")
    assert first["id"] in told["detail"]


async def test_replace_gives_a_waiting_holder_the_new_fields(queue: Replica):
    first = await stored(queue, payload=1, tags=["old"], priority=1)
    await queue.enqueue(payload="behind", priority=7)
    answer = await post(
        queue,
        on_conflict="replace",
        type="other",
        payload=2,
        priority=7,
        tags=["new"],
        metadata={"n": 1},
        max_retries=7,
        lease_seconds=77,
        timeout_seconds=777,
        backoff={"strategy": "fixed", "jitter": "none"},
        expires_in_seconds=7777,
    )
    assert answer.status_code == 200, answer.text
    job = answer.json()
    assert (job["id"], job.pop("duplicate"), job.pop("replaced")) == (first["id"], True, True)
    assert job == await queue.job(first["id"])
    assert {name for name in job if job[name] != first[name]} == {
        "type", "payload", "priority", "tags", "metadata", "max_retries", "lease_seconds", "timeout_seconds",
        "backoff", "expires_at", "run_at",
    }  # fmt: skip
    assert job["created_at"] == first["created_at"]
    # It keeps its place in line: it came first.
    assert [each["payload"] for each in await queue.lease(max_jobs=2)] == [2, "behind"]
    [event] = queue.events.of(JobReplaced)
    assert (str(event.job_id), event.type, event.state) == (first["id"], "other", "ready")


async def test_replace_moves_a_holder_between_ready_and_scheduled(queue: Replica, clock: Clock):
    clock.move(0)
    first = await stored(queue)
    later = (await post(queue, on_conflict="replace", delay_seconds=60)).json()
    assert (later["id"], later["state"], later["replaced"]) == (first["id"], "scheduled", True)
    assert await queue.lease() == []
    assert (await queue.stats())["delayed"] == 1
    sooner = (await post(queue, on_conflict="replace", delay_seconds=30)).json()
    assert sooner["state"] == "scheduled"
    clock.move(30)
    await queue.maintain()
    assert (await queue.job(first["id"]))["state"] == "ready"
    await post(queue, on_conflict="replace", delay_seconds=60)
    now = (await post(queue, on_conflict="replace")).json()
    assert now["state"] == "ready"
    assert (await queue.lease_one())["id"] == first["id"]


async def test_replace_calls_a_lease_that_waits_for_it(queue: Replica):
    first = await stored(queue, delay_seconds=600)
    waiting = asyncio.create_task(queue.lease_one(wait_seconds=20))
    while queue.machine.service.wakeups.waiters == 0:
        await asyncio.sleep(0.005)
    await post(queue, on_conflict="replace", payload="now")
    leased = await waiting
    assert (leased["id"], leased["payload"]) == (first["id"], "now")


async def test_replace_of_a_retry_keeps_its_attempts_and_its_error(queue: Replica):
    first = await stored(queue)
    await queue.fail(await queue.lease_one(), retry_in_seconds=600)
    later = (
        await post(queue, on_conflict="replace", payload=2, delay_seconds=60, expires_in_seconds=90)
    ).json()
    assert (later["state"], later["attempt"], later["payload"]) == ("retry", 1, 2)
    assert later["last_error"] == {"message": "boom"}
    await post(queue, on_conflict="replace", payload=3)
    again = await queue.lease_one()
    assert (again["id"], again["attempt"], again["payload"]) == (first["id"], 2, 3)
    assert again["last_error"] == {"message": "boom"}


async def test_replace_of_a_job_that_a_worker_has_or_that_ended_returns_it(queue: Replica):
    first = await stored(queue, scope="window", payload=1)
    leased = await queue.lease_one()
    for state in ("active", "completed"):
        found = await duplicate_of(queue, first, on_conflict="replace", payload=2)
        assert (found["state"], found["payload"]) == (state, 1)
        assert "replaced" not in found
        await queue.verb("ack", leased)


async def test_replace_brings_its_own_scope_from_the_holders_birth(queue: Replica, clock: Clock):
    clock.move(0)
    first = await stored(queue)
    clock.move(10)
    job = (await post(queue, scope="window", window_seconds=60, on_conflict="replace")).json()
    assert job["unique"] == {"key": "k", "scope": "window", "window_seconds": 60}
    clock.move(49)
    await duplicate_of(queue, first)
    clock.move(1)
    await stored(queue)


async def test_replace_of_a_free_key_stores(queue: Replica):
    await stored(queue, on_conflict="replace")


async def test_keys_are_1_to_256_characters_without_control_characters(queue: Replica):
    for key in ("x", " ", "ü" * 256, "𝄞" * 256, "a/b?c=d"):
        job = await stored(queue, key=key)
        assert job["unique"]["key"] == key
        await duplicate_of(queue, job, key=key)
    for key in ("", "x" * 257, "a\nb", "nul\x00", "\u2028"):
        answer = await post(queue, key=key)
        assert problem(answer, "invalid")["errors"][0]["field"] == "unique.key"


@pytest.mark.parametrize(
    ("unique", "field"),
    [
        ({"key": "k", "scope": "window"}, "unique.window_seconds"),
        ({"key": "k", "window_seconds": 5}, "unique.window_seconds"),
        ({"key": "k", "scope": "queued", "window_seconds": 5}, "unique.window_seconds"),
        ({"key": "k", "scope": "window", "window_seconds": 0}, "unique.window_seconds"),
        ({"key": "k", "scope": "ever"}, "unique.scope"),
        ({"key": "k", "on_conflict": "ignore"}, "unique.on_conflict"),
        ({"key": 1}, "unique.key"),
        ({}, "unique"),
        ({"key": "k", "until": 1}, "unique"),
        ("k", "unique"),
    ],
)
async def test_other_keys_are_refused(queue: Replica, unique: Any, field: str):
    answer = await queue.http.post("/jobs", json={"queue": "q", "unique": unique})
    assert problem(answer, "invalid")["errors"][0]["field"] == field


async def test_50_producers_at_two_replicas_make_one_job(world: World, queue: Replica):
    other = await world.replica()
    answers = await asyncio.gather(*(post((queue, other)[n % 2], payload=n) for n in range(50)))
    assert sorted(answer.status_code for answer in answers) == [200] * 49 + [201]
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert (await queue.stats())["waiting"] == 1
    assert len(queue.events.of(JobEnqueued) + other.events.of(JobEnqueued)) == 1


class TestRetry:
    """A dead job that comes back needs its key again, as far as it would hold it."""

    @pytest.mark.parametrize("scope", ["queued", "unfinished"])
    async def test_onto_a_taken_key_it_is_refused(self, world: World, queue: Replica, scope: str):
        first = await stored(queue, scope=scope)
        await queue.http.post(f"/jobs/{first['id']}/cancel")
        second = await stored(queue, scope=scope)
        async with nothing_changes(world):
            told = problem(await queue.http.post(f"/jobs/{first['id']}/retry"), "duplicate")
        assert second["id"] in told["detail"]
        await queue.http.post(f"/jobs/{second['id']}/cancel")
        assert (await queue.http.post(f"/jobs/{first['id']}/retry")).status_code == 200
        await duplicate_of(queue, first)

    async def test_it_takes_its_key_back_when_the_row_has_been_swept(self, queue: Replica):
        await queue.first_round()
        first = await stored(queue)
        await queue.http.post(f"/jobs/{first['id']}/cancel")
        assert (await queue.maintain())["sweep"] == 1
        assert (await queue.http.post(f"/jobs/{first['id']}/retry")).status_code == 200
        await duplicate_of(queue, first)

    async def test_a_queued_one_that_was_started_needs_no_key(self, queue: Replica):
        first = await stored(queue, scope="queued")
        await queue.fail(await queue.lease_one(), retry=False)
        second = await stored(queue, scope="queued")
        assert (await queue.http.post(f"/jobs/{first['id']}/retry")).status_code == 200
        await duplicate_of(queue, second)

    async def test_a_window_counts_from_the_jobs_birth(self, queue: Replica, clock: Clock):
        clock.move(0)
        first = await stored(queue, scope="window", window_seconds=60)
        await queue.http.post(f"/jobs/{first['id']}/cancel")
        clock.move(30)
        assert (await queue.http.post(f"/jobs/{first['id']}/retry")).status_code == 200
        clock.move(29.9)
        await duplicate_of(queue, first)
        clock.move(0.1)
        second = await stored(queue)
        await queue.http.post(f"/jobs/{first['id']}/cancel")
        assert (await queue.http.post(f"/jobs/{first['id']}/retry")).status_code == 200
        await duplicate_of(queue, second)


async def test_the_sweep_leaves_what_is_held(world: World, queue: Replica, clock: Clock):
    await queue.first_round()
    clock.move(0)
    await stored(queue, key="living")
    await stored(queue, key="window", scope="window", window_seconds=60, priority=9)
    await stored(queue, key="queued", scope="queued", priority=10)
    await stored(queue, key="done", priority=8)
    leased = await queue.lease(max_jobs=3)
    for job in leased:
        await queue.verb("ack", job)
    connection = await world.connect()
    assert (await queue.maintain())["sweep"] == 2
    assert [row["key"] for row in await connection.fetch("SELECT key FROM unique_keys ORDER BY key")] == [
        "living",
        "window",
    ]
    clock.move(60)
    assert (await queue.maintain())["sweep"] == 1


async def test_the_sweep_goes_on_where_it_ended(queue: Replica, monkeypatch: pytest.MonkeyPatch):
    await queue.first_round()
    monkeypatch.setattr("app.engine.maintenance.BATCH", 2)
    living = [await stored(queue, key=f"k{n}") for n in range(4)]
    gone = await stored(queue, key="k4")
    await queue.http.post(f"/jobs/{gone['id']}/cancel")
    assert [(await queue.maintain())["sweep"] for _ in range(3)] == [0, 0, 1]
    await queue.http.post(f"/jobs/{living[0]['id']}/cancel")
    assert (await queue.maintain())["sweep"] == 1
