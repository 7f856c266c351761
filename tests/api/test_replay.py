"""A lease with a `request_id`: asked again under it, a worker gets what a lost answer would have told."""

import asyncio
from datetime import datetime
from typing import Any
from uuid import uuid4

import pytest

from app.engine import leasing
from app.engine.cursors import Cursors
from app.engine.leasing import NAMED_MAX
from app.engine.service import released
from app.queue.events import AttemptEnded, JobLeased, LeasesReplayed
from app.store.jobs import Line, RequestName, Slot
from tests.api.refusals import problem
from tests.api.test_waiting import (
    no_claim_ends,
    until_nobody_waits,
    vanish_seen_by_the_server,
    waiting,
)
from tests.conftest import Replica, World
from tests.store.conftest import holding, idle_replica
from tests.wire import Cut, wire_to

REQUEST = "SELECT FROM lease_requests WHERE request_id = $1 FOR UPDATE"


async def ask(queue: Replica, request_id: str = "r", **fields: Any) -> list[dict[str, Any]]:
    return await queue.lease(**{"request_id": request_id, "max_jobs": 10, **fields})


async def requests(world: World) -> list[tuple[str, int]]:
    connection = await world.connect()
    rows = await connection.fetch("SELECT request_id, delivery FROM lease_requests ORDER BY request_id")
    return [(row["request_id"], row["delivery"]) for row in rows]


class TestReplay:
    @pytest.mark.parametrize("elsewhere", [False, True], ids=["same replica", "another replica"])
    async def test_the_same_name_again_gets_the_same_jobs_and_leases_in_the_same_order(
        self, world: World, elsewhere: bool
    ):
        queue = await world.replica()
        other = await world.replica() if elsewhere else queue
        await queue.enqueue(payload=1, priority=1)
        await queue.enqueue(payload=2, priority=9, tags=["t"], metadata={"m": 1})
        await queue.enqueue(payload=3, priority=5)
        first = await ask(queue, max_jobs=2, worker="w")
        assert [job["payload"] for job in first] == [2, 3]
        again = await ask(other, max_jobs=2, worker="w")
        assert again == first
        assert await requests(world) == [("r", 2)]
        assert len(queue.events.of(JobLeased)) == 2
        assert other.events.of(LeasesReplayed) == [LeasesReplayed(worker="w", leases=2)]

    async def test_whatever_else_it_asks_for(self, queue: Replica):
        await queue.enqueue()
        await queue.enqueue("other")
        first = await ask(queue)
        assert await ask(queue, types=["none"], max_jobs=1, lease_seconds=600) == first

    async def test_a_replay_extends_nothing(self, queue: Replica):
        queue.clock.move(0)
        await queue.enqueue()
        [first] = await ask(queue)
        queue.clock.move(29)
        [again] = await ask(queue)
        assert again["lease_expires_at"] == first["lease_expires_at"]
        queue.clock.move(1)
        await queue.maintain()
        assert (await queue.job(first["id"]))["state"] == "retry"

    async def test_a_replay_tells_of_what_stands_only(self, queue: Replica):
        for number in range(4):
            await queue.enqueue(payload=number)
        first = await ask(queue)
        await queue.verb("ack", first[0])
        await queue.fail(first[2])
        assert await ask(queue) == [first[1], first[3]]

    async def test_a_replay_tells_of_a_heartbeat_and_a_checkpoint_since(self, queue: Replica):
        await queue.enqueue()
        [first] = await ask(queue)
        beat = (await queue.verb("heartbeat", first, extend_seconds=600, checkpoint=[1])).json()
        [again] = await ask(queue)
        assert again == {**first, "lease_expires_at": beat["lease_expires_at"], "checkpoint": [1]}

    async def test_a_lease_that_ran_out_stands_until_it_is_reaped(self, queue: Replica):
        queue.clock.move(0)
        await queue.enqueue()
        first = await ask(queue)
        queue.clock.move(31)
        assert await ask(queue) == first
        await queue.maintain()
        assert await ask(queue) == []

    async def test_where_none_stands_the_name_counts_as_new(self, queue: Replica, world: World):
        await queue.enqueue(payload=1)
        [first] = await ask(queue)
        await queue.verb("ack", first)
        await queue.enqueue(payload=2)
        [second] = await ask(queue)
        assert second["payload"] == 2
        assert await ask(queue) == [second]
        assert await requests(world) == [("r", 3)]

    async def test_the_same_job_may_be_leased_anew_under_the_same_name(self, queue: Replica):
        await queue.enqueue()
        [first] = await ask(queue)
        await queue.verb("release", first)
        [second] = await ask(queue)
        assert second["id"] == first["id"]
        assert second["lease_id"] != first["lease_id"]
        assert await ask(queue) == [second]

    async def test_an_empty_answer_counts_as_new_and_is_not_kept(self, queue: Replica, world: World):
        assert await ask(queue) == []
        assert await requests(world) == []
        job = await queue.enqueue()
        assert [leased["id"] for leased in await ask(queue)] == [job["id"]]

    async def test_names_do_not_meet(self, queue: Replica):
        first, second = [await queue.enqueue() for _ in range(2)]
        assert [job["id"] for job in await ask(queue, "a", max_jobs=1)] == [first["id"]]
        assert [job["id"] for job in await ask(queue, "b", max_jobs=1)] == [second["id"]]

    async def test_a_lease_without_a_name_is_never_replayed(self, queue: Replica):
        await queue.enqueue()
        assert len(await queue.lease()) == 1
        assert await queue.lease() == []

    async def test_a_waiting_lease_holds_no_row_and_no_transaction(self, queue: Replica, world: World):
        reply = await waiting(queue, request_id="r")
        connection = await world.connect()
        assert await requests(world) == []
        # Others of its process may be between two statements at this moment, but not for as long as it waits.
        async with asyncio.timeout(10):
            while await connection.fetchval(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
                " AND application_name = 'leaseq' AND (xact_start IS NOT NULL AND state <> 'active')"
            ):
                await asyncio.sleep(0.005)
        job = await queue.enqueue()
        [leased] = await reply
        assert leased["id"] == job["id"]
        assert await ask(queue) == [leased]

    async def test_a_lease_that_waited_in_vain_gets_what_its_twin_was_given_elsewhere(self, world: World):
        here, there = await world.replica(), await world.replica()
        job = await there.enqueue("busy")
        reply = await waiting(here, "q", request_id="r", worker="w")
        [twin] = await ask(there, queues=["busy"])
        # What ends the wait here is an operator; else it would be its time.
        assert (await here.http.post("/workers/w/quiet")).status_code == 200
        assert await reply == [twin]
        assert twin["id"] == job["id"]

    async def test_a_worker_that_is_told_to_be_quiet_is_still_told_what_it_has(self, queue: Replica):
        await queue.enqueue()
        first = await ask(queue, worker="w")
        await queue.http.post("/workers/w/quiet")
        await queue.enqueue()
        assert await ask(queue, worker="w") == first
        await queue.verb("ack", first[0])
        assert await ask(queue, worker="w") == []

    async def test_of_a_paused_queue_a_replay_still_tells(self, queue: Replica):
        await queue.enqueue()
        first = await ask(queue)
        assert (await queue.http.post("/queues/q/pause")).status_code == 200
        assert await ask(queue) == first
        assert await ask(queue, "other") == []

    async def test_what_was_settled_beside_it_is_answered_again(self, queue: Replica):
        await queue.enqueue()
        await queue.enqueue()
        done = await queue.lease_one()
        item = {
            "job_id": done["id"],
            "lease_id": done["lease_id"],
            "outcome": "fail",
            "error": {"message": "x"},
        }
        body = {"queues": ["q"], "wait_seconds": 0, "request_id": "r", "settle": [item]}
        first = (await queue.http.post("/lease", json=body)).json()
        again = (await queue.http.post("/lease", json=body)).json()
        assert first == again
        assert [result["status"] for result in first["settled"]] == [200]
        assert len(first["jobs"]) == 1
        assert len(await queue.attempts(done["id"])) == 1

    async def test_replays_are_counted(self, queue: Replica):
        await queue.enqueue()
        await ask(queue)
        await ask(queue)
        assert "leaseq_lease_replays_total 1.0" in (await queue.http.get("/metrics")).text

    @pytest.mark.parametrize("request_id", ["", "x" * 129, "ä", "a\n", "a\x00", 5, "a\x7f"])
    async def test_what_is_no_name_is_refused(self, queue: Replica, request_id: Any):
        body = {"queues": ["q"], "wait_seconds": 0, "request_id": request_id}
        refused = problem(await queue.http.post("/lease", json=body), "invalid")
        assert refused["errors"][0]["field"] == "request_id"

    @pytest.mark.parametrize("request_id", ["x", "x" * 128, "a b/c?d=~", "'; --"])
    async def test_any_printable_ascii_is_one(self, queue: Replica, request_id: str):
        await queue.enqueue()
        assert await ask(queue, request_id) == await ask(queue, request_id) != []


class TestRaces:
    async def test_of_two_replicas_that_ask_at_once_both_get_the_leases_of_one(self, world: World):
        here, there = await idle_replica(world), await idle_replica(world)
        for _ in range(3):
            await here.enqueue()
        async with no_claim_ends(world, here):
            first = asyncio.create_task(ask(here, max_jobs=2))
            await world.blocked()
            second = asyncio.create_task(ask(there, max_jobs=2))
            await world.blocked(2)
        assert await first == await second
        assert len(await first) == 2
        assert await requests(world) == [("r", 2)]
        assert (await here.stats())["active"] == 2

    async def test_twins_in_one_process_take_turns(self, queue: Replica):
        for _ in range(3):
            await queue.enqueue()
        answers = await asyncio.gather(*(ask(queue, max_jobs=2) for _ in range(5)))
        assert len(answers[0]) == 2
        assert all(answer == answers[0] for answer in answers)

    async def test_only_a_few_at_a_time_and_who_does_not_get_a_turn_comes_back(
        self, queue: Replica, world: World, monkeypatch: pytest.MonkeyPatch
    ):
        for _ in range(NAMED_MAX + 1):
            await queue.enqueue()
        async with no_claim_ends(world, queue):
            first = [asyncio.create_task(ask(queue, f"r{n}", max_jobs=1)) for n in range(NAMED_MAX)]
            await world.blocked(NAMED_MAX)
            monkeypatch.setattr(leasing, "NAMED_WAIT_SECONDS", 0.01)
            body = {"queues": ["q"], "wait_seconds": 0, "request_id": "late"}
            late = await queue.http.post("/lease", json=body)
            assert "request_id" in problem(late, "unavailable")["detail"]
            # Nobody else waits for them.
            assert (await queue.http.post("/jobs", json={"queue": "other"})).status_code == 201
        leased = [*await asyncio.gather(*first), await ask(queue, "late", max_jobs=1)]
        assert len({job["id"] for [job] in leased}) == NAMED_MAX + 1

    async def test_more_at_once_get_their_turn_one_after_the_other(self, queue: Replica):
        for _ in range(3 * NAMED_MAX):
            await queue.enqueue()
        leased = await asyncio.gather(*(ask(queue, f"r{n}", max_jobs=1) for n in range(3 * NAMED_MAX)))
        assert len({job["id"] for [job] in leased}) == 3 * NAMED_MAX

    async def test_the_winner_that_finds_nothing_lets_the_other_look_for_itself(self, world: World):
        here, there = await idle_replica(world), await idle_replica(world)
        await here.enqueue("mine")
        await here.enqueue("purged")
        async with no_claim_ends(world, here):
            first = asyncio.create_task(ask(here, queues=["purged"]))
            await world.blocked()
            second = asyncio.create_task(ask(there, queues=["mine"]))
            await world.blocked(2)
            # It saw a job, and will find none.
            assert (await there.http.post("/queues/purged/purge")).status_code == 200
        assert await first == []
        assert len(await second) == 1

    async def test_a_client_that_vanishes_during_the_claim_has_its_jobs_released(
        self, queue: Replica, world: World
    ):
        job = await queue.enqueue()
        async with no_claim_ends(world, queue):
            reply = asyncio.create_task(ask(queue))
            await world.blocked()
            await vanish_seen_by_the_server(queue, reply)
        await queue.events.wait_for(AttemptEnded)
        assert (await queue.job(job["id"]))["state"] == "ready"
        [again] = await ask(queue)
        assert (again["id"], again["attempt"]) == (job["id"], 1)

    async def test_a_replay_that_came_before_the_release_keeps_the_leases(self, world: World):
        here, there = await idle_replica(world), await idle_replica(world)
        job = await here.enqueue()
        async with no_claim_ends(world, here):
            reply = asyncio.create_task(ask(here))
            await world.blocked()
            replay = asyncio.create_task(ask(there))
            await world.blocked(2)
            await vanish_seen_by_the_server(here, reply)
        # Whichever of replay and release has the row first: what the replay has told stands.
        [leased] = await replay
        await until_nobody_waits(here)
        assert leased["id"] == job["id"]
        assert (await here.job(job["id"]))["state"] == "active"
        assert (await there.verb("ack", leased)).status_code == 200

    @pytest.mark.parametrize("replayed", [False, True])
    async def test_leases_are_taken_back_unless_they_were_handed_out_once_more(
        self, queue: Replica, replayed: bool
    ):
        job = await queue.enqueue()
        jobs = queue.machine.jobs
        stretches = Cursors().ahead([Line("q")])
        claim = await jobs.lease_named(RequestName("r"), stretches, [Slot(uuid4(), None, None)])
        if replayed:
            assert len(await ask(queue)) == 1
        assert claim.delivery is not None
        endings = [released(leased.id, leased.lease_id, 0) for leased in claim.jobs]
        assert len(await jobs.take_back(claim.delivery, endings)) == (0 if replayed else 1)
        assert (await queue.job(job["id"]))["state"] == ("active" if replayed else "ready")

    async def test_a_replay_that_comes_after_the_release_leases_anew(self, world: World):
        here, there = await idle_replica(world), await idle_replica(world)
        job = await here.enqueue()
        async with no_claim_ends(world, here):
            reply = asyncio.create_task(ask(here))
            await world.blocked()
            await vanish_seen_by_the_server(here, reply)
        await here.events.wait_for(AttemptEnded)
        [leased] = await ask(there)
        assert (leased["id"], leased["attempt"]) == (job["id"], 1)

    async def test_a_client_that_vanishes_after_a_replay_takes_nothing_from_who_has_it(
        self, queue: Replica, world: World
    ):
        await queue.enqueue()
        [first] = await ask(queue)
        async with holding(world, REQUEST, "r"):
            reply = asyncio.create_task(ask(queue))
            await world.blocked()
            await vanish_seen_by_the_server(queue, reply)
        await until_nobody_waits(queue)
        assert (await queue.verb("heartbeat", first)).status_code == 200

    @pytest.mark.parametrize("cut", Cut)
    async def test_a_connection_that_is_cut_leases_once(self, world: World, cut: Cut):
        async with wire_to(world.database_url) as wire:
            queue = await idle_replica(world, database_url=wire.url, db_pool_size=1)
            await queue.enqueue("warm")
            [warm] = await ask(queue, "warm", queues=["warm"])
            await ask(queue, "warm", queues=["warm"])
            await queue.verb("ack", warm)
            job = await queue.enqueue()
            wire.arm(cut)
            answer = await queue.http.post(
                "/lease", json={"queues": ["q"], "wait_seconds": 0, "request_id": "r"}
            )
            assert wire.cuts == 1
            if answer.status_code == 503:
                [leased] = await ask(queue)
            else:
                [leased] = answer.json()["jobs"]
                assert await ask(queue) == [leased]
            assert leased["id"] == job["id"]
            assert len(await queue.attempts(job["id"])) == 1
            assert datetime.fromisoformat(leased["lease_expires_at"])
