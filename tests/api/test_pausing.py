"""Pausing, resuming, purging and deleting whole queues, over HTTP, also where another replica or a lease is quicker."""

import asyncio
from typing import Any

import pytest

from app.queue.events import QueueChange, QueueChanged, QueuePurged
from tests.api.refusals import problem
from tests.conftest import Replica, World
from tests.store.conftest import holding


async def do(queue: Replica, verb: str, name: str = "q") -> dict[str, Any]:
    answer = await queue.http.post(f"/queues/{name}/{verb}")
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


async def waits(replica: Replica, count: int = 1) -> None:
    """Wait until so many leases are in this replica's room."""
    async with asyncio.timeout(10):
        while replica.machine.service.wakeups.waiters < count:
            await asyncio.sleep(0.005)


async def knows(replica: Replica, *, paused: bool, name: str = "q") -> None:
    """Wait until a replica's copy has heard of it."""
    async with asyncio.timeout(10):
        while (name in replica.machine.service.policies.paused) is not paused:
            await asyncio.sleep(0.005)


class TestPause:
    async def test_leases_pass_a_paused_queue_over_and_everything_else_goes_on(self, queue: Replica):
        await queue.enqueue("q")
        active = await queue.lease_one("q")
        told = await do(queue, "pause")
        assert (told["name"], told["paused"]) == ("q", True)

        job = await queue.enqueue("q")
        assert job["state"] == "ready"
        assert await queue.lease("q") == []
        assert await queue.lease("q", types=["default"]) == []
        assert (await queue.verb("heartbeat", active)).status_code == 200
        assert (await queue.verb("ack", active)).status_code == 200

        told = await do(queue, "resume")
        assert (told["paused"], told["jobs"]["waiting"]) == (False, 1)
        assert (await queue.lease_one("q"))["id"] == job["id"]
        changes = [each.change for each in queue.events.of(QueueChanged)]
        assert changes == [QueueChange.PAUSED, QueueChange.RESUMED]

    async def test_the_others_of_a_lease_are_served(self, queue: Replica):
        await do(queue, "pause")
        await queue.enqueue("q", priority="fast")
        other = await queue.enqueue("other")
        assert [job["id"] for job in await queue.lease("q", "other", max_jobs=10)] == [other["id"]]
        other = await queue.enqueue("other", type="t")
        await queue.enqueue("q", type="t")
        leased = await queue.lease("q", "other", types=["t", "u"], max_jobs=10)
        assert [job["id"] for job in leased] == [other["id"]]

    async def test_a_released_or_promoted_job_of_a_paused_queue_waits(self, queue: Replica):
        await queue.enqueue("q")
        await queue.enqueue("q", delay_seconds=10)
        leased = await queue.lease_one("q")
        await do(queue, "pause")
        assert (await queue.verb("release", leased)).status_code == 200
        queue.clock.move(11)
        await queue.maintain()
        assert await queue.lease("q", max_jobs=10) == []
        await do(queue, "resume")
        assert len(await queue.lease("q", max_jobs=10)) == 2

    async def test_an_expired_lease_of_a_paused_queue_ends_as_any(self, queue: Replica):
        await queue.enqueue("q", max_retries=0)
        leased = await queue.lease_one("q")
        await do(queue, "pause")
        queue.clock.move(31)
        await queue.maintain()
        assert (await queue.job(leased["id"]))["state"] == "failed"

    async def test_calls_nobody_for_a_paused_queue(self, world: World, queue: Replica):
        other = await world.replica()
        await do(queue, "pause")
        await knows(other, paused=True)
        async with asyncio.TaskGroup() as tasks:
            here = tasks.create_task(queue.lease("q", "open", wait_seconds=20))
            there = tasks.create_task(other.lease("q", "open", wait_seconds=20))
            await waits(queue)
            await waits(other)
            for _ in range(5):
                await queue.enqueue("q")
            # The waiting ones are still in the room to be called for this.
            wanted = {(await queue.enqueue("open"))["id"], (await queue.enqueue("open"))["id"]}
        assert {job["id"] for job in (*here.result(), *there.result())} == wanted

    async def test_a_lease_that_waits_while_its_queue_is_paused_gets_nothing_until_it_is_resumed(
        self, queue: Replica
    ):
        async with asyncio.TaskGroup() as tasks:
            waiting = tasks.create_task(queue.lease("q", wait_seconds=20))
            await waits(queue)
            await do(queue, "pause")
            job = await queue.enqueue("q")
            assert await queue.lease("q") == []
            assert (await queue.job(job["id"]))["state"] == "ready"
            await do(queue, "resume")
        assert [each["id"] for each in waiting.result()] == [job["id"]]

    @pytest.mark.parametrize("types", [None, ["default"]])
    async def test_resuming_wakes_who_waits_on_every_replica(
        self, world: World, queue: Replica, types: list[str] | None
    ):
        """Also who began to wait while it was paused. Nobody polls here for a minute."""
        other = await world.replica()
        await do(queue, "pause")
        await knows(other, paused=True)
        ids = {(await queue.enqueue("q"))["id"] for _ in range(4)}
        wanted = {"types": types} if types else {}
        async with asyncio.TaskGroup() as tasks:
            waiting = [
                tasks.create_task(replica.lease("q", wait_seconds=20, **wanted))
                for replica in (queue, other)
                for _ in range(2)
            ]
            await waits(queue, 2)
            await waits(other, 2)
            await do(queue, "resume")
        assert {job["id"] for each in waiting for job in each.result()} == ids

    async def test_one_replica_passes_over_what_another_has_paused(self, world: World, queue: Replica):
        other = await world.replica()
        await queue.enqueue("q")
        await do(queue, "pause")
        await knows(other, paused=True)
        assert await other.lease("q") == []
        await do(other, "resume")
        await knows(queue, paused=False)
        assert len(await queue.lease("q")) == 1

    async def test_it_is_known_without_any_hint(self, world: World, queue: Replica):
        """As when its NOTIFY is lost: the numbers are compared all the same."""
        connection = await world.connect()
        await connection.execute(
            "WITH q AS (INSERT INTO queues (name, paused) VALUES ('q', true))"
            " INSERT INTO changes (topic, number) VALUES ('queues', 1)"
        )
        await knows(queue, paused=True)

    async def test_is_kept_through_a_restart(self, world: World, queue: Replica):
        await do(queue, "pause")
        await queue.enqueue("q")
        other = await world.replica()
        assert await other.lease("q") == []

    async def test_is_in_the_metrics(self, queue: Replica):
        await do(queue, "pause")
        await do(queue, "resume", "open")
        await queue.enqueue("unmade")
        page = (await queue.http.get("/metrics")).text
        assert 'leaseq_queue_paused{queue="q"} 1.0' in page
        assert 'leaseq_queue_paused{queue="open"} 0.0' in page
        assert 'leaseq_queue_paused{queue="unmade"}' not in page

    @pytest.mark.parametrize("verb", ["pause", "resume"])
    async def test_of_a_name_that_no_queue_can_have_is_refused(self, queue: Replica, verb: str):
        for name in ("-q", "a%20b", "q%0A", "a" * 129):
            problem(await queue.http.post(f"/queues/{name}/{verb}"), "invalid")


class TestDelete:
    async def test_removes_the_policy_of_a_queue_without_jobs(self, queue: Replica):
        await queue.http.put("/queues/q", json={"max_retries": 9, "paused": True})
        answer = await queue.http.delete("/queues/q")
        assert (answer.status_code, answer.content) == (204, b"")
        problem(await queue.http.get("/queues/q"), "not_found")
        problem(await queue.http.delete("/queues/q"), "not_found")
        assert (await queue.enqueue("q"))["max_retries"] == 3
        assert len(await queue.lease("q")) == 1
        assert queue.events.of(QueueChanged)[-1].change is QueueChange.DELETED

    async def test_is_refused_while_any_job_is_kept(self, queue: Replica):
        await queue.http.put("/queues/q", json={"max_retries": 0})
        job = await queue.enqueue("q")
        told = problem(await queue.http.delete("/queues/q"), "queue_not_empty")
        assert "1 waiting" in told["detail"]
        leased = await queue.lease_one("q")
        problem(await queue.http.delete("/queues/q"), "queue_not_empty")
        assert (await queue.verb("ack", leased)).status_code == 200
        await queue.maintain()
        assert "1 completed" in problem(await queue.http.delete("/queues/q"), "queue_not_empty")["detail"]
        await queue.http.delete(f"/jobs/{job['id']}")
        assert (await queue.http.delete("/queues/q")).status_code == 204

    async def test_of_a_queue_that_nobody_made_needs_its_jobs_gone_too(self, queue: Replica):
        await queue.enqueue("q")
        problem(await queue.http.delete("/queues/q"), "queue_not_empty")
        problem(await queue.http.delete("/queues/nowhere"), "not_found")
        problem(await queue.http.delete("/queues/-q"), "not_found")

    async def test_that_waited_for_an_enqueue_sees_its_job(self, world: World, queue: Replica):
        """What is counted is read after the queue's row is locked."""
        await queue.http.put("/queues/q", json={})
        async with holding(world, "SELECT FROM queues WHERE name = 'q' FOR UPDATE"):
            deleting = asyncio.create_task(queue.http.delete("/queues/q"))
            await world.blocked()
            await queue.enqueue("q")
        problem(await deleting, "queue_not_empty")

    async def test_racing_an_enqueue_loses_no_job(self, world: World, queue: Replica):
        other = await world.replica()
        for _ in range(5):
            await queue.http.put("/queues/q", json={"max_retries": 9})
            deleted, job = await asyncio.gather(queue.http.delete("/queues/q"), other.enqueue("q"))
            assert deleted.status_code in {204, 409}
            [leased] = await queue.lease("q")
            assert leased["id"] == job["id"]
            await queue.verb("ack", leased)
            await queue.http.delete(f"/jobs/{job['id']}")


class TestPurge:
    async def test_removes_what_waits_or_is_delayed_and_nothing_else(self, world: World, queue: Replica):
        async def leased(**fields: Any) -> dict[str, Any]:
            await queue.enqueue("q", priority=10, **fields)
            return await queue.lease_one("q")

        done, dead, active, retried, released = [await leased(max_retries=1) for _ in range(5)]
        await queue.verb("ack", done)
        await queue.fail(dead, retry=False)
        await queue.fail(retried)
        await queue.verb("release", released)
        gone = [retried["id"], released["id"]]
        gone += [(await queue.enqueue("q", priority=n % 11))["id"] for n in range(12)]
        gone.append((await queue.enqueue("q", delay_seconds=60))["id"])
        elsewhere = [await queue.enqueue("other"), await queue.enqueue("other", delay_seconds=60)]

        assert await do(queue, "purge") == {"matched": len(gone), "changed": len(gone), "more": False}

        for job_id in gone:
            problem(await queue.http.get(f"/jobs/{job_id}"), "not_found")
            problem(await queue.http.get(f"/jobs/{job_id}/attempts"), "not_found")
        counts = (await queue.http.get("/queues/q")).json()["jobs"]
        assert {name: count for name, count in counts.items() if count} == {
            "active": 1,
            "completed": 1,
            "failed": 1,
        }
        assert (await queue.verb("ack", active)).status_code == 200
        for job in elsewhere:
            assert (await queue.job(job["id"]))["state"] == job["state"]
        connection = await world.connect()
        assert await connection.fetchval("SELECT count(*) FROM notes") == 0
        assert queue.events.of(QueuePurged) == [QueuePurged(queue="q", removed=len(gone))]
        assert await do(queue, "purge") == {"matched": 0, "changed": 0, "more": False}
        assert len(queue.events.of(QueuePurged)) == 1

    async def test_goes_on_step_by_step(self, queue: Replica, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("app.engine.queues.PURGE_BATCH", 2)
        for n in range(7):
            await queue.enqueue("q", priority=n % 2)
            await queue.enqueue("q", delay_seconds=60)
            await queue.enqueue("other", delay_seconds=60)
        assert await do(queue, "purge") == {"matched": 14, "changed": 14, "more": False}
        assert (await queue.stats())["delayed"] == 7

    async def test_says_when_it_has_taken_its_time(self, queue: Replica, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("app.engine.queues.PURGE_BATCH", 2)
        queue.machine.service.queues.purge_seconds = 0
        for _ in range(3):
            await queue.enqueue("q")
            await queue.enqueue("q", delay_seconds=60)
        assert await do(queue, "purge") == {"matched": 4, "changed": 4, "more": True}
        assert await do(queue, "purge") == {"matched": 2, "changed": 2, "more": False}

    async def test_waits_for_a_unique_key_without_the_jobs_place_in_its_hands(
        self, world: World, queue: Replica
    ):
        job = await queue.enqueue("q", unique={"key": "k"})
        # As an application that is about to replace the job in its own transaction.
        async with holding(world, "SELECT FROM unique_keys FOR UPDATE") as application:
            purging = asyncio.create_task(do(queue, "purge"))
            await world.blocked()
            await application.execute("SELECT FROM ready WHERE id = $1 FOR UPDATE NOWAIT", job["id"])
        assert await purging == {"matched": 1, "changed": 1, "more": False}
        assert (await queue.enqueue("q", unique={"key": "k"}))["id"] != job["id"]

    async def test_of_a_queue_that_is_not_is_not_found(self, queue: Replica):
        problem(await queue.http.post("/queues/nowhere/purge"), "not_found")
        problem(await queue.http.post("/queues/-q/purge"), "not_found")
        await queue.http.put("/queues/q", json={})
        assert await do(queue, "purge") == {"matched": 0, "changed": 0, "more": False}

    async def test_frees_unique_keys(self, world: World, queue: Replica):
        job = await queue.enqueue("q")
        connection = await world.connect()
        await connection.execute("UPDATE jobs SET unique_key = 'k', unique_scope = 'unfinished'")
        await connection.execute(
            "INSERT INTO unique_keys (queue, key, job_id, scope) VALUES ('q', 'k', $1, 'unfinished')",
            job["id"],
        )
        await do(queue, "purge")
        assert await connection.fetchval("SELECT count(*) FROM unique_keys") == 0

    async def test_leaves_a_job_that_was_leased_meanwhile(self, world: World, queue: Replica):
        jobs = [await queue.enqueue("q") for _ in range(3)]
        async with holding(world, "SELECT FROM ready WHERE id = $1 FOR UPDATE", jobs[1]["id"]) as lease:
            purging = asyncio.create_task(do(queue, "purge"))
            await world.blocked()
            # As a lease does that was quicker.
            await lease.execute(
                "WITH gone AS (DELETE FROM ready WHERE id = $1 RETURNING *), counted AS ("
                "  INSERT INTO deltas (queue, ready, active) VALUES ('q', -1, 1))"
                " INSERT INTO leases (id, queue, type, priority, attempt, noted, lease_id, since, leased_at,"
                "                     expires_at, lease_seconds, cancel_requested)"
                " SELECT id, queue, type, priority, 1, noted, gen_random_uuid(), since, now(), now(), 30, false"
                "   FROM gone",
                jobs[1]["id"],
            )
            await lease.execute("COMMIT")
            await lease.execute("BEGIN")
        assert await purging == {"matched": 2, "changed": 2, "more": False}
        assert (await queue.job(jobs[1]["id"]))["state"] == "active"

    async def test_follows_a_job_that_was_promoted_meanwhile(self, world: World, queue: Replica):
        job = await queue.enqueue("q", delay_seconds=60)
        async with holding(world, "SELECT FROM scheduled WHERE id = $1 FOR UPDATE", job["id"]) as promotion:
            purging = asyncio.create_task(do(queue, "purge"))
            await world.blocked()
            await promotion.execute(
                "WITH gone AS (DELETE FROM scheduled WHERE id = $1 RETURNING *), counted AS ("
                "  INSERT INTO deltas (queue, ready, scheduled) VALUES ('q', 1, -1))"
                " INSERT INTO ready (id, queue, type, priority, attempt, noted, since)"
                " SELECT id, queue, type, priority, attempt, noted, now() FROM gone",
                job["id"],
            )
            await promotion.execute("COMMIT")
            await promotion.execute("BEGIN")
        assert await purging == {"matched": 1, "changed": 1, "more": False}
        problem(await queue.http.get(f"/jobs/{job['id']}"), "not_found")

    async def test_racing_leases_and_promotions_leaves_each_job_in_one_place(
        self, world: World, queue: Replica
    ):
        other = await world.replica()
        for n in range(30):
            await queue.enqueue("q", delay_seconds=n % 2)
        queue.clock.move(5)
        async with asyncio.TaskGroup() as tasks:
            purge = tasks.create_task(do(queue, "purge"))
            leases = [tasks.create_task(other.lease("q", max_jobs=3)) for _ in range(4)]
            tasks.create_task(other.machine.service.maintenance.promote())
        active = sum(len(lease.result()) for lease in leases)
        assert purge.result()["changed"] + active == 30
        kept = await queue.stats()
        assert (kept["active"], kept["waiting"], kept["delayed"]) == (active, 0, 0)
