"""Queues as a whole, over HTTP: policies, lists, defaults for jobs."""

import asyncio
from typing import Any

import httpx
import pytest

from app.queue.events import QueueChange, QueueChanged
from tests.api.refusals import problem
from tests.conftest import Replica, World

EMPTY_POLICY: dict[str, Any] = {
    "priority": None,
    "delay_seconds": None,
    "lease_seconds": None,
    "timeout_seconds": None,
    "max_retries": None,
    "backoff": None,
    "expires_in_seconds": None,
    "dead_letter_queue": None,
    "types": {},
    "retention_seconds": None,
    "dead_retention_seconds": None,
    "keep_payload": True,
}


async def put(queue: Replica, name: str = "q", **policy: Any) -> dict[str, Any]:
    answer = await queue.http.put(f"/queues/{name}", json=policy)
    assert answer.status_code in {200, 201}, answer.text
    shown: dict[str, Any] = answer.json()
    return shown


async def show(queue: Replica, name: str = "q") -> dict[str, Any]:
    answer = await queue.http.get(f"/queues/{name}")
    assert answer.status_code == 200, answer.text
    shown: dict[str, Any] = answer.json()
    return shown


async def names(queue: Replica, **query: Any) -> tuple[list[str], str | None]:
    answer = await queue.http.get("/queues", params=query)
    assert answer.status_code == 200, answer.text
    page = answer.json()
    return [each["name"] for each in page["queues"]], page["next_cursor"]


class TestPut:
    async def test_makes_a_queue_and_then_replaces_its_policy_as_a_whole(self, queue: Replica):
        made = await queue.http.put("/queues/q", json={"max_retries": 7, "priority": "fast"})
        assert (made.status_code, made.headers["location"]) == (201, "/queues/q")
        assert made.json()["policy"] == {**EMPTY_POLICY, "max_retries": 7, "priority": 10}

        replaced = await queue.http.put("/queues/q", json={"lease_seconds": 60, "max_retries": None})
        assert replaced.status_code == 200
        assert "location" not in replaced.headers
        assert replaced.json() == await show(queue)
        assert replaced.json()["policy"] == {**EMPTY_POLICY, "lease_seconds": 60}

    async def test_shows_a_policy_in_the_form_in_which_it_takes_it(self, queue: Replica):
        policy: dict[str, Any] = {
            "priority": 3,
            "delay_seconds": 1.5,
            "lease_seconds": 45,
            "timeout_seconds": 600,
            "max_retries": 9,
            "backoff": {"strategy": "fixed", "jitter": "none"},
            "expires_in_seconds": 3600,
            "dead_letter_queue": "dead",
            "types": {"a": {"max_retries": 1, "backoff": {"factor": 4}}, "b": {}},
            "retention_seconds": 3600,
            "dead_retention_seconds": 7200,
            "keep_payload": False,
        }
        shown = (await put(queue, **policy))["policy"]
        assert shown["backoff"]["strategy"] == "fixed"
        assert shown["types"]["a"]["max_retries"] == 1
        assert shown["types"]["b"]["backoff"] is None
        assert (await put(queue, **shown))["policy"] == shown

    async def test_leaves_it_paused_or_not_where_nothing_is_said_of_it(self, queue: Replica):
        assert (await put(queue, max_retries=1))["paused"] is False
        assert (await put(queue, paused=True))["paused"] is True
        assert (await put(queue, max_retries=2))["paused"] is True
        assert (await put(queue, paused=None))["paused"] is True
        assert (await put(queue, paused=False))["paused"] is False

    async def test_tells_observers_what_has_changed(self, queue: Replica):
        await put(queue, max_retries=1)
        await put(queue, max_retries=2)
        assert queue.events.of(QueueChanged) == [
            QueueChanged(queue="q", change=QueueChange.CREATED),
            QueueChanged(queue="q", change=QueueChange.POLICY),
        ]

    @pytest.mark.parametrize(
        ("policy", "field"),
        [
            ({"dead_letter_queue": "q"}, "dead_letter_queue"),
            ({"types": {"t": {"dead_letter_queue": "q"}}}, "dead_letter_queue"),
            ({"dead_letter_queue": "a b"}, "dead_letter_queue"),
            ({"types": {"t": {"dead_letter_queue": "x\n"}}}, "types.t.dead_letter_queue"),
            ({"types": {"a b": {}}}, "types"),
            ({"types": {"a\n": {}}}, "types"),
            ({"types": {"t": {"retention_seconds": 60}}}, "types"),
            ({"retention_seconds": 1}, "retention_seconds"),
            ({"dead_retention_seconds": 1e12}, "dead_retention_seconds"),
            ({"max_retries": -1}, "max_retries"),
            ({"backoff": {"factor": 0}}, "backoff.factor"),
            ({"expires_in_seconds": 0}, "expires_in_seconds"),
            ({"paused": "yes"}, "paused"),
            ({"concurrency": 5}, ""),
            ({"run_at": "2030-01-01T00:00:00Z"}, ""),
        ],
    )
    async def test_refuses_what_no_policy_can_say(self, queue: Replica, policy: dict[str, Any], field: str):
        told = problem(await queue.http.put("/queues/q", json=policy), "invalid")
        assert field in told["detail"]
        problem(await queue.http.get("/queues/q"), "not_found")

    @pytest.mark.parametrize("name", ["-q", "a%20b", "a%00b", "q%0A", "a" * 129, "%2Fq", "ä"])
    async def test_makes_no_queue_of_a_name_that_none_can_have(self, queue: Replica, name: str):
        answer = await queue.http.put(f"/queues/{name}", json={})
        assert answer.status_code in {404, 422}, answer.text
        problem(await queue.http.get(f"/queues/{name}"), "not_found")
        assert await names(queue) == ([], None)

    async def test_two_at_once_leave_one_whole_policy(self, world: World, queue: Replica):
        other = await world.replica()
        answers: list[httpx.Response] = await asyncio.gather(
            *(
                replica.http.put("/queues/q", json={"max_retries": n, "priority": n})
                for n in range(10)
                for replica in (queue, other)
            )
        )
        assert sorted(answer.status_code for answer in answers) == [200] * 19 + [201]
        policy = (await show(queue))["policy"]
        assert policy["max_retries"] == policy["priority"]
        for replica in (queue, other):
            job = await replica.enqueue("q")
            assert (job["max_retries"], job["priority"]) == (policy["max_retries"],) * 2


class TestShow:
    async def test_a_queue_appears_with_its_first_job_and_goes_with_its_last(self, queue: Replica):
        problem(await queue.http.get("/queues/q"), "not_found")
        job = await queue.enqueue("q")
        shown = await show(queue)
        assert (shown["name"], shown["paused"], shown["policy"]) == ("q", False, EMPTY_POLICY)
        assert shown["jobs"] == (await queue.http.get("/stats")).json()["queues"]["q"]
        assert shown["jobs"]["waiting"] == 1
        await queue.http.post(f"/jobs/{job['id']}/cancel")
        await queue.http.delete(f"/jobs/{job['id']}")
        problem(await queue.http.get("/queues/q"), "not_found")
        await queue.maintain()
        problem(await queue.http.get("/queues/q"), "not_found")

    async def test_tells_how_long_its_oldest_job_waits(self, queue: Replica):
        queue.clock.move(0)
        await put(queue)
        assert (await show(queue))["oldest_ready_seconds"] is None
        await queue.enqueue("q")
        queue.clock.move(30)
        await queue.enqueue("q")
        assert (await show(queue))["oldest_ready_seconds"] == pytest.approx(30, abs=0.1)


class TestList:
    async def test_has_those_with_a_policy_and_those_with_jobs_page_by_page(self, queue: Replica):
        for name in ("b", "d", "B"):
            await put(queue, name)
        for name in ("a", "c", "d"):
            await queue.enqueue(name)
        await queue.maintain()
        await queue.enqueue("e")
        everything = ["B", "a", "b", "c", "d", "e"]
        assert await names(queue) == (everything, None)
        first, cursor = await names(queue, limit=4)
        assert first == everything[:4]
        assert await names(queue, limit=4, cursor=cursor) == (everything[4:], None)
        assert await names(queue, limit=6) == (everything, None)

    @pytest.mark.parametrize(
        "query", ["limit=0", "limit=501", "cursor=%21", "cursor=_w", "cursor=", "queue=q"]
    )
    async def test_refuses_what_it_does_not_know(self, queue: Replica, query: str):
        problem(await queue.http.get(f"/queues?{query}"), "invalid")


class TestDefaults:
    async def test_go_to_jobs_enqueued_from_then_on_on_every_replica(self, world: World, queue: Replica):
        other = await world.replica()
        before = await queue.enqueue("q")
        await put(
            queue,
            max_retries=7,
            priority="bulk",
            backoff={"initial_seconds": 9},
            types={"fix": {"priority": "fast", "backoff": {"factor": 3}}},
        )
        job = await queue.enqueue("q")
        assert (job["max_retries"], job["priority"], job["backoff"]["initial_seconds"]) == (7, 1, 9)
        async with asyncio.timeout(10):
            while (await other.enqueue("q"))["max_retries"] != 7:
                pass
        fixed = await other.enqueue("q", type="fix", max_retries=2)
        assert (fixed["max_retries"], fixed["priority"]) == (2, 10)
        assert (fixed["backoff"]["initial_seconds"], fixed["backoff"]["factor"]) == (9, 3)
        assert (await queue.enqueue("elsewhere"))["max_retries"] == 3
        assert (await queue.job(before["id"]))["max_retries"] == 3

    async def test_are_there_from_the_first_request_of_a_new_process_on(self, world: World, queue: Replica):
        await put(queue, max_retries=7)
        other = await world.replica()
        assert (await other.enqueue("q"))["max_retries"] == 7

    async def test_delay_and_deadline(self, queue: Replica):
        queue.clock.move(0)
        await put(queue, delay_seconds=60, expires_in_seconds=30)
        job = await queue.enqueue("q")
        assert job["state"] == "scheduled"
        assert job["expires_at"] > job["run_at"] > job["created_at"]
        late = await queue.enqueue("q", run_at="2040-01-01T00:00:00Z")
        assert (late["run_at"], late["expires_at"]) == ("2040-01-01T00:00:00Z", "2040-01-01T00:00:30Z")
        past = await queue.enqueue("q", run_at="2001-01-01T00:00:00Z")
        assert past["state"] == "ready"
        assert past["expires_at"] > past["created_at"]
        assert (await queue.enqueue("q", delay_seconds=0))["state"] == "ready"
        # Its own deadline is measured against its queue's delay.
        own = await queue.http.post("/jobs", json={"queue": "q", "expires_in_seconds": 10})
        problem(own, "invalid")


class TestQueuesThatMustBeMade:
    async def test_a_job_for_another_is_refused_with_a_sentence(self, world: World):
        queue = await world.replica(create_queues=False)
        told = problem(await queue.http.post("/jobs", json={"queue": "q"}), "invalid")
        assert "PUT /queues/q" in told["detail"]
        assert told["errors"][0]["field"] == "queue"
        assert await queue.lease("q") == []
        assert await names(queue) == ([], None)
        await put(queue)
        await queue.enqueue("q")

    async def test_dead_letters_go_to_none_either(self, world: World):
        queue = await world.replica(create_queues=False)
        await put(queue, dead_letter_queue="dead")
        told = problem(await queue.http.post("/jobs", json={"queue": "q"}), "invalid")
        assert told["errors"][0]["field"] == "dead_letter_queue"
        await put(queue, "dead")
        assert (await queue.enqueue("q"))["dead_letter_queue"] == "dead"

    async def test_whatever_way_the_job_comes(self, world: World):
        queue = await world.replica(create_queues=False)
        await put(queue)
        batch = await queue.http.post("/jobs/batch", json={"jobs": [{"queue": "q"}, {"queue": "nowhere"}]})
        assert [each["status"] for each in batch.json()["results"]] == [201, 422]
        leased = await queue.lease_one("q")
        problem(await queue.verb("ack", leased, then=[{"queue": "nowhere"}]), "invalid")
        assert (await queue.job(leased["id"]))["state"] == "active"
        schedule = {"every_seconds": 60, "job": {"queue": "nowhere"}}
        problem(await queue.http.put("/schedules/s", json=schedule), "invalid")
