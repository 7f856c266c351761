"""How long a queue keeps its jobs that have ended, and what it keeps of them, as its policy says: over HTTP."""

from typing import Any

import pytest

from tests.api.refusals import problem
from tests.conftest import Replica, World

HOUR = 3600.0
DAY = 24 * HOUR
AHEAD = HOUR
"""Ids are made by the real clock: the database's is moved past anything that a slow machine can make of that."""


async def policy(queue: Replica, name: str, **fields: Any) -> None:
    answer = await queue.http.put(f"/queues/{name}", json=fields)
    assert answer.status_code in {200, 201}, answer.text


async def completed(queue: Replica, name: str = "q", **fields: Any) -> str:
    job = await queue.enqueue(name, **fields)
    assert (await queue.verb("ack", await queue.lease_one(name), result=1)).status_code == 200
    job_id: str = job["id"]
    return job_id


async def dead(queue: Replica, name: str = "q") -> str:
    job = await queue.enqueue(name)
    await queue.fail(await queue.lease_one(name), retry=False)
    job_id: str = job["id"]
    return job_id


async def there(queue: Replica, *job_ids: str) -> list[bool]:
    """Whether each of the jobs is still kept."""
    return [(await queue.http.get(f"/jobs/{job_id}")).is_success for job_id in job_ids]


async def maintain(queue: Replica) -> dict[str, int]:
    """Do a round in which also the days have their turn."""
    # The replica's own first round has the days in it too, and would put them off.
    await queue.first_round()
    queue.machine.service.maintenance._days_due_at = 0.0
    return await queue.maintain()


class TestCompleted:
    async def test_go_when_their_queues_shorter_retention_has_ended(self, queue: Replica):
        queue.clock.move(AHEAD)
        await policy(queue, "q", retention_seconds=HOUR)
        first, other = await completed(queue), await completed(queue, "other")
        queue.clock.move(HOUR / 2)
        second = await completed(queue)
        queue.clock.move(HOUR / 2)
        await maintain(queue)
        assert await there(queue, first, second, other) == [True] * 3
        queue.clock.move(0.001)
        assert (await maintain(queue))["retain"] == 1
        assert await there(queue, first, second, other) == [False, True, True]
        assert (await queue.stats())["completed"] == 2
        queue.clock.move(HOUR)
        await maintain(queue)
        assert await there(queue, first, second, other) == [False, False, True]

    async def test_stay_for_their_queues_longer_retention_and_those_of_others_go(self, queue: Replica):
        queue.clock.move(AHEAD)
        await policy(queue, "long", retention_seconds=40 * DAY)
        await policy(queue, "short", retention_seconds=DAY)
        ids = [await completed(queue, name) for name in ("short", "unmade", "long")]
        await maintain(queue)
        queue.clock.move(DAY + 1)
        await maintain(queue)
        assert await there(queue, *ids) == [False, True, True]
        queue.clock.move(6 * DAY)
        await maintain(queue)
        assert await there(queue, *ids) == [False, False, True]
        queue.clock.move(32 * DAY)
        await maintain(queue)
        assert await there(queue, *ids) == [False, False, True]
        queue.clock.move(3 * DAY)
        assert (await maintain(queue))["days"] > 0
        assert await there(queue, *ids) == [False] * 3
        assert (await queue.stats())["completed"] == 0

    async def test_have_their_attempts_as_long_as_any_job_is_kept(self, queue: Replica):
        queue.clock.move(AHEAD)
        await policy(queue, "long", retention_seconds=60 * DAY)
        await queue.enqueue("long", backoff={"initial_seconds": 0})
        await queue.fail(await queue.lease_one("long"))
        queue.clock.move(1)
        await queue.maintain()
        leased = await queue.lease_one("long")
        await queue.verb("ack", leased)
        queue.clock.move(50 * DAY)
        await maintain(queue)
        assert [each["outcome"] for each in await queue.attempts(leased["id"])] == ["failed", "acked"]

    async def test_are_looked_at_step_by_step(self, queue: Replica, monkeypatch: pytest.MonkeyPatch):
        """Jobs that were created long before they ended stand in front of those that are past."""
        monkeypatch.setattr("app.engine.retention.BATCH", 2)
        queue.clock.move(AHEAD)
        await policy(queue, "q", retention_seconds=HOUR)
        late = [(await queue.enqueue("q", priority="bulk"))["id"] for _ in range(5)]
        early = [await completed(queue, priority="fast") for _ in range(5)]
        queue.clock.move(HOUR)
        for _ in range(5):
            await queue.verb("ack", await queue.lease_one("q"))
        queue.clock.move(1)
        await maintain(queue)
        assert await there(queue, *early) == [False] * 5
        assert await there(queue, *late) == [True] * 5

    async def test_of_many_queues_have_their_turn(self, queue: Replica, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("app.engine.retention.QUEUES_PER_ROUND", 2)
        queue.clock.move(AHEAD)
        ids = []
        for name in ("a", "b", "c", "d", "e"):
            await policy(queue, name, retention_seconds=HOUR, dead_retention_seconds=HOUR)
            ids += [await completed(queue, name), await dead(queue, name)]
        queue.clock.move(HOUR + 1)
        for _ in range(3):
            await maintain(queue)
        assert await there(queue, *ids) == [False] * 10


class TestDead:
    async def test_go_when_their_queues_shorter_retention_has_ended(self, queue: Replica):
        queue.clock.move(AHEAD)
        await policy(queue, "q", dead_retention_seconds=HOUR)
        first, other = await dead(queue), await dead(queue, "other")
        done = await completed(queue)
        queue.clock.move(HOUR)
        await maintain(queue)
        assert await there(queue, first, other, done) == [True] * 3
        queue.clock.move(0.001)
        await maintain(queue)
        assert await there(queue, first, other, done) == [False, True, True]
        assert (await queue.stats())["failed"] == 1

    async def test_stay_for_their_queues_longer_retention_and_those_of_others_go(self, queue: Replica):
        queue.clock.move(AHEAD)
        await policy(queue, "long", dead_retention_seconds=100 * DAY)
        kept, gone = await dead(queue, "long"), await dead(queue, "other")
        await maintain(queue)
        queue.clock.move(30 * DAY + 1)
        await maintain(queue)
        assert await there(queue, kept, gone) == [True, False]
        queue.clock.move(70 * DAY)
        await maintain(queue)
        assert await there(queue, kept, gone) == [False, False]


class TestPayload:
    async def test_is_left_behind_where_the_policy_says_so(self, world: World, queue: Replica):
        await policy(queue, "bare", keep_payload=False)
        body: dict[str, Any] = {"payload": {"secret": 1}, "tags": ["a"], "metadata": {"b": 2}}
        bare, whole = await completed(queue, "bare", **body), await completed(queue, "q", **body)
        job = await queue.job(bare)
        assert (job["payload"], job["tags"], job["metadata"], job["result"]) == (None, [], {}, 1)
        assert (await queue.job(whole)).items() >= body.items()
        # A dead letter is to be retried: it keeps all.
        await queue.enqueue("bare", **body)
        leased = await queue.lease_one("bare")
        await queue.fail(leased, retry=False)
        assert (await queue.job(leased["id"])).items() >= body.items()
        connection = await world.connect()
        assert (
            await connection.fetchval("SELECT count(*) FROM history WHERE position('secret' IN payload) > 0")
            == 1
        )

    async def test_is_left_behind_too_where_many_are_settled(self, queue: Replica):
        await policy(queue, "bare", keep_payload=False)
        for _ in range(2):
            await queue.enqueue("bare", payload=1)
        await queue.enqueue("q", payload=1)
        leased = await queue.lease("bare", "q", max_jobs=3)
        items = [{"job_id": job["id"], "lease_id": job["lease_id"], "outcome": "ack"} for job in leased]
        assert (await queue.http.post("/settle", json={"items": items})).status_code == 200
        payloads = {job["queue"]: (await queue.job(job["id"]))["payload"] for job in leased}
        assert payloads == {"bare": None, "q": 1}


class TestMissing:
    async def test_jobs_are_answered_with_how_long_they_are_kept(self, queue: Replica):
        queue.clock.move(AHEAD)
        job_id = await completed(queue)
        queue.clock.move(9 * DAY)
        await maintain(queue)
        told = problem(await queue.http.get(f"/jobs/{job_id}"), "not_found")
        assert "7 days when it was completed, 30 days when it failed" in told["detail"]
        await policy(queue, "q", retention_seconds=HOUR + 1, dead_retention_seconds=12 * HOUR)
        await policy(queue, "r", retention_seconds=30 * DAY)
        for answer in (
            await queue.http.get(f"/jobs/{job_id}"),
            await queue.http.get(f"/jobs/{job_id}/attempts"),
            await queue.http.post(f"/jobs/{job_id}/retry"),
        ):
            told = problem(answer, "not_found")
            assert "3601 seconds to 30 days (as its queue says) when it was completed" in told["detail"]
            assert "12 hours to 30 days (as its queue says) when it failed" in told["detail"]
