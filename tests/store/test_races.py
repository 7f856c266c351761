"""Two of anything at once. Who waits for a lock waits for one that the test holds: the order is chosen, not hoped for."""

import asyncio
from typing import Any
from uuid import UUID

import httpx
import pytest

from app.engine.service import released
from app.queue.lifecycle import State
from app.queue.model import Ack
from app.queue.policy import decide_expiry
from tests.conftest import Clock, Replica, World
from tests.store.conftest import claim, holding, idle_replica, in_turn, logged

LEASE = "SELECT FROM leases WHERE id = $1 FOR UPDATE"
BODY = "SELECT FROM jobs WHERE id = $1 FOR UPDATE"
"""Stops whoever is about to take a body away, with the job's place already in its hands."""
DEAD = "SELECT FROM dead WHERE id = $1 FOR UPDATE"
DONE = "SELECT FROM history WHERE id = $1 FOR UPDATE"
CONCLUDING = "LOCK TABLE attempts IN SHARE MODE"
"""Stops fail, release and reap between their two statements, with the leases in their hands."""
LEASING = """
INSERT INTO leases (id, queue, type, priority, attempt, noted, lease_id, since, leased_at, expires_at, lease_seconds,
                    cancel_requested)
VALUES ($1, 'q', 'default', 5, 1, false, gen_random_uuid(), now(), now(), now(), 30, false)"""
"""Stops a claim of this job, with the ready rows in its hands: the key is taken until this is rolled back."""
PROMOTING = """
INSERT INTO ready (id, queue, type, priority, attempt, noted, since) VALUES ($1, 'q', 'default', 5, 0, false, now())"""
"""Stops the promotion of this job, with the scheduled rows in its hands."""

EXPIRED_SECONDS = 31


def settle(queue: Replica, verb: str, leased: dict[str, Any]) -> asyncio.Task[httpx.Response]:
    return asyncio.create_task(call(queue, verb, leased))


async def call(queue: Replica, verb: str, job: dict[str, Any]) -> httpx.Response:
    match verb:
        case "fail":
            # Later than any test lasts: a retry becomes ready by itself when its time has come.
            return await queue.verb("fail", job, error={"message": "boom"}, retry_in_seconds=600)
        case "ack" | "release" | "heartbeat":
            return await queue.verb(verb, job)
        case "delete":
            return await queue.http.delete(f"/jobs/{job['id']}")
        case _:
            return await queue.http.post(f"/jobs/{job['id']}/{verb}")


async def leased_job(queue: Replica) -> dict[str, Any]:
    await queue.enqueue(backoff={"jitter": "none"})
    return await queue.lease_one()


async def outcomes(queue: Replica, job: dict[str, Any]) -> list[str]:
    return [attempt["outcome"] for attempt in await queue.attempts(job["id"])]


@pytest.fixture
def moved(clock: Clock) -> Clock:
    """Let time stand still from the beginning, so that it can pass by the second."""
    clock.move(0)
    return clock


class TestSettling:
    """Whoever has the lease's row first decides; the other one waits, then learns what was decided."""

    @pytest.mark.parametrize(
        ("first", "second", "state"),
        [
            ("ack", "fail", "completed"),
            ("ack", "release", "completed"),
            ("ack", "heartbeat", "completed"),
            ("fail", "ack", "retry"),
            ("fail", "release", "retry"),
            ("fail", "heartbeat", "retry"),
            ("release", "ack", "ready"),
            ("release", "fail", "ready"),
            ("release", "heartbeat", "ready"),
        ],
    )
    async def test_of_two_verbs_with_one_lease_the_first_wins_and_the_other_has_lost_it(
        self, world: World, queue: Replica, first: str, second: str, state: str
    ):
        job = await leased_job(queue)
        other = await idle_replica(world)
        won, lost = await in_turn(world, LEASE, job["id"], call(queue, first, job), call(other, second, job))
        assert won.status_code == 200
        assert won.json()["state"] == state
        assert lost.status_code == 409
        assert (lost.json()["code"], lost.json()["state"]) == ("lease_lost", state)
        assert (await queue.job(job["id"]))["state"] == state
        assert len(await queue.attempts(job["id"])) == 1

    @pytest.mark.parametrize("verb", ["ack", "fail", "release"])
    async def test_the_same_verb_twice_at_once_gets_the_same_answer_twice(
        self, world: World, queue: Replica, verb: str
    ):
        job = await leased_job(queue)
        other = await idle_replica(world)
        first, second = await in_turn(world, LEASE, job["id"], call(queue, verb, job), call(other, verb, job))
        assert first.status_code == second.status_code == 200
        assert first.json() == second.json()
        assert len(await queue.attempts(job["id"])) == 1

    async def test_of_two_acks_at_once_the_first_result_is_kept(self, world: World, queue: Replica):
        job = await leased_job(queue)
        other = await idle_replica(world)
        first, second = await in_turn(
            world,
            LEASE,
            job["id"],
            queue.verb("ack", job, result={"n": 1}),
            other.verb("ack", job, result={"n": 2}),
        )
        assert first.json()["result"] == second.json()["result"] == {"n": 1}

    async def test_a_heartbeat_before_an_ack_changes_nothing_for_it(self, world: World, queue: Replica):
        job = await leased_job(queue)
        beat, ack = await in_turn(
            world, LEASE, job["id"], call(queue, "heartbeat", job), call(queue, "ack", job)
        )
        assert (beat.status_code, ack.status_code) == (200, 200)
        assert (await queue.job(job["id"]))["state"] == "completed"

    async def test_of_two_heartbeats_at_once_the_longer_extension_stands(
        self, world: World, queue: Replica, moved: Clock
    ):
        job = await leased_job(queue)
        other = await idle_replica(world)
        longer, shorter = await in_turn(
            world,
            LEASE,
            job["id"],
            queue.verb("heartbeat", job, extend_seconds=500),
            other.verb("heartbeat", job, extend_seconds=100),
        )
        assert longer.json()["lease_expires_at"] == shorter.json()["lease_expires_at"]
        moved.move(499)
        assert (await queue.maintain())["reap"] == 0

    async def test_batches_that_name_the_same_jobs_in_opposite_order_do_not_block_each_other(
        self, world: World, queue: Replica
    ):
        for _ in range(2):
            await queue.enqueue()
        one, two = (
            Ack(UUID(job["id"]), UUID(job["lease_id"]), None) for job in await queue.lease(max_jobs=2)
        )
        jobs = queue.machine.jobs
        first, second = await in_turn(
            world, LEASE, str(min(one.job_id, two.job_id)), jobs.ack([one, two]), jobs.ack([two, one])
        )
        assert set(first) == {one.job_id, two.job_id}
        assert second == {}

    @pytest.mark.parametrize("verb", ["ack", "fail", "release", "heartbeat"])
    async def test_a_verb_with_the_lease_of_an_earlier_attempt_changes_nothing_for_the_present_one(
        self, queue: Replica, moved: Clock, verb: str
    ):
        earlier = await leased_job(queue)
        moved.move(EXPIRED_SECONDS)
        await queue.maintain()
        moved.move(1)
        await queue.maintain()
        present = await queue.lease_one()
        before = await queue.job(present["id"])
        answer = await call(queue, verb, earlier)
        assert (answer.status_code, answer.json()["code"]) == (409, "lease_lost")
        assert answer.json()["state"] == "active"
        assert await queue.job(present["id"]) == before
        assert (await call(queue, "ack", present)).status_code == 200


class TestNoting:
    """The first note of a job, which whoever began before it can not see."""

    async def test_an_ack_that_waits_while_the_first_checkpoint_is_noted_leaves_no_note(
        self, world: World, queue: Replica
    ):
        job = await leased_job(queue)
        other = await idle_replica(world)
        beat, ack = await in_turn(
            world, LEASE, job["id"], queue.verb("heartbeat", job, checkpoint=[1]), call(other, "ack", job)
        )
        assert (beat.status_code, ack.status_code) == (200, 200)
        assert (await queue.job(job["id"]))["state"] == "completed"
        connection = await world.connect()
        assert await connection.fetchval("SELECT count(*) FROM notes") == 0

    @pytest.mark.parametrize("others", ["ack", "release"])
    async def test_so_does_a_settle_of_several(self, world: World, queue: Replica, others: str):
        await queue.enqueue()
        job, neighbour = await leased_job(queue), await queue.lease_one()
        other = await idle_replica(world)
        items = [
            {"job_id": each["id"], "lease_id": each["lease_id"], "outcome": outcome}
            for each, outcome in ((job, "ack"), (neighbour, others))
        ]
        beat, settled = await in_turn(
            world,
            LEASE,
            job["id"],
            queue.verb("heartbeat", job, checkpoint=[1]),
            other.http.post("/settle", json={"items": items}),
        )
        assert beat.status_code == 200
        assert [result["status"] for result in settled.json()["results"]] == [200, 200]
        assert (await queue.job(job["id"]))["state"] == "completed"

    async def test_an_ack_before_a_checkpoint_has_the_last_word(self, world: World, queue: Replica):
        job = await leased_job(queue)
        other = await idle_replica(world)
        ack, beat = await in_turn(
            world, LEASE, job["id"], call(other, "ack", job), queue.verb("heartbeat", job, checkpoint=[1])
        )
        assert (ack.status_code, beat.status_code) == (200, 409)

    async def test_a_failure_that_waits_while_a_checkpoint_is_noted_takes_it_along(
        self, world: World, queue: Replica
    ):
        job = await leased_job(queue)
        other = await idle_replica(world)
        beat, failure = await in_turn(
            world,
            LEASE,
            job["id"],
            queue.verb("heartbeat", job, checkpoint=[1]),
            other.verb("fail", job, error={"message": "boom"}, retry=False),
        )
        assert (beat.status_code, failure.status_code) == (200, 200)
        dead = await queue.job(job["id"])
        assert (dead["state"], dead["checkpoint"]) == ("failed", [1])

    async def test_a_checkpoint_that_comes_while_its_lease_is_reaped_is_refused(
        self, world: World, queue: Replica, moved: Clock
    ):
        job = await leased_job(queue)
        other = await idle_replica(world)
        moved.move(EXPIRED_SECONDS)
        async with holding(world, CONCLUDING):
            reap = asyncio.create_task(other.machine.service.maintenance.reap())
            await world.blocked()
            beat = asyncio.create_task(queue.verb("heartbeat", job, checkpoint=[1]))
            await world.blocked(2)
        assert await reap == 1
        assert (await beat).status_code == 409
        assert (await queue.job(job["id"]))["checkpoint"] is None

    async def test_the_reaper_leaves_a_lease_to_the_heartbeat_that_notes_a_checkpoint(
        self, world: World, queue: Replica, moved: Clock
    ):
        job = await leased_job(queue)
        other = await idle_replica(world)
        moved.move(EXPIRED_SECONDS)
        noting = "INSERT INTO notes (job_id) VALUES ($1)"
        async with holding(world, noting, UUID(job["id"])):
            beat = asyncio.create_task(queue.verb("heartbeat", job, checkpoint=[1]))
            await world.blocked()
            assert await other.machine.service.maintenance.reap() == 0
        assert (await beat).status_code == 200
        assert await other.machine.service.maintenance.reap() == 0
        assert (await queue.job(job["id"]))["checkpoint"] == [1]


class TestReaping:
    """The reaper never waits for a worker; a worker that comes while it reaps waits, and has lost its lease."""

    @pytest.mark.parametrize("verb", ["ack", "fail", "release", "heartbeat"])
    async def test_a_verb_that_comes_while_its_lease_is_reaped_has_lost_it(
        self, world: World, queue: Replica, moved: Clock, verb: str
    ):
        job = await leased_job(queue)
        moved.move(EXPIRED_SECONDS)
        async with holding(world, CONCLUDING):
            reaping = asyncio.create_task(queue.machine.service.maintenance.reap())
            await world.blocked(1)
            late = settle(queue, verb, job)
            await world.blocked(2)
        assert await reaping == 1
        answer = await late
        assert (answer.status_code, answer.json()["code"]) == (409, "lease_lost")
        assert answer.json()["state"] == "retry"
        assert (await queue.job(job["id"]))["state"] == "retry"
        assert await outcomes(queue, job) == ["lease_expired"]

    @pytest.mark.parametrize(
        ("verb", "lock", "state", "outcome"),
        [
            ("ack", BODY, "completed", "acked"),
            ("fail", CONCLUDING, "retry", "failed"),
            ("release", CONCLUDING, "ready", "released"),
        ],
    )
    async def test_the_reaper_leaves_a_lease_to_the_verb_that_has_begun_to_end_it(
        self, world: World, queue: Replica, moved: Clock, verb: str, lock: str, state: str, outcome: str
    ):
        job = await leased_job(queue)
        moved.move(EXPIRED_SECONDS)
        async with holding(world, lock, *([job["id"]] if lock is BODY else [])):
            settling = settle(queue, verb, job)
            await world.blocked(1)
            assert await queue.machine.service.maintenance.reap() == 0
        answer = await settling
        assert (answer.status_code, answer.json()["state"]) == (200, state)
        assert await queue.machine.service.maintenance.reap() == 0
        assert await outcomes(queue, job) == [outcome]

    async def test_the_reaper_leaves_a_lease_to_the_heartbeat_that_extends_it(
        self, world: World, queue: Replica, moved: Clock
    ):
        job = await leased_job(queue)
        moved.move(EXPIRED_SECONDS)
        async with holding(world, LEASE, job["id"]):
            beating = settle(queue, "heartbeat", job)
            await world.blocked(1)
            assert await queue.machine.service.maintenance.reap() == 0
        assert (await beating).status_code == 200
        assert await queue.machine.service.maintenance.reap() == 0
        assert (await call(queue, "ack", job)).status_code == 200

    async def test_two_reapers_end_every_expired_lease_once(self, world: World, queue: Replica, moved: Clock):
        other = await idle_replica(world)
        ids = [(await queue.enqueue())["id"] for _ in range(3)]
        await queue.lease(max_jobs=3)
        moved.move(EXPIRED_SECONDS)

        def rule(lease, now):
            return decide_expiry(lease, now, 0.5)

        async with holding(world, CONCLUDING):
            first = asyncio.create_task(queue.machine.jobs.reap(2, rule))
            await world.blocked(1)
            second = asyncio.create_task(other.machine.jobs.reap(10, rule))
            await world.blocked(2)
        reaped = [verdict.lease.job_id for verdicts, _ in (await first, await second) for verdict in verdicts]
        assert len((await first)[0]) == 2
        assert sorted(map(str, reaped)) == sorted(ids)
        assert [len(await queue.attempts(job_id)) for job_id in ids] == [1, 1, 1]


class TestLeasing:
    async def test_of_two_leases_of_one_job_neither_waits_and_one_gets_it(self, world: World, queue: Replica):
        job = await queue.enqueue()
        other = await idle_replica(world)
        async with holding(world, LEASING, job["id"]):
            first = asyncio.create_task(queue.lease())
            await world.blocked(1)
            assert await other.lease() == []
        assert [leased["id"] for leased in await first] == [job["id"]]

    async def test_of_many_jobs_none_is_leased_twice_and_none_lost(self, world: World, queue: Replica):
        other = await idle_replica(world)
        ids = [(await queue.enqueue())["id"] for _ in range(6)]
        async with holding(world, LEASING, ids[0]):
            first = asyncio.create_task(queue.lease(max_jobs=3))
            await world.blocked(1)
            assert [leased["id"] for leased in await other.lease(max_jobs=10)] == ids[3:]
        assert [leased["id"] for leased in await first] == ids[:3]

    async def test_a_crowd_of_leases_shares_the_jobs_out(self, world: World, queue: Replica):
        replicas = [queue, await idle_replica(world)]
        ids = [(await queue.enqueue())["id"] for _ in range(40)]
        replies = await asyncio.gather(*(replicas[n % 2].lease(max_jobs=3) for n in range(20)))
        leased = [job["id"] for reply in replies for job in reply]
        while last := await queue.lease(max_jobs=10):
            leased += [job["id"] for job in last]
        assert sorted(leased) == sorted(ids)

    async def test_a_lease_finds_the_jobs_behind_a_large_claim_of_another(self, world: World, queue: Replica):
        ids = [(await queue.enqueue())["id"] for _ in range(60)]
        other = await idle_replica(world)
        async with holding(world, LEASING, ids[0]):
            large = asyncio.create_task(queue.lease(max_jobs=50))
            await world.blocked(1)
            assert [leased["id"] for leased in await other.lease()] == [ids[50]]
        assert len(await large) == 50

    async def test_a_claim_that_finds_every_job_in_other_hands_says_so(self, world: World, queue: Replica):
        job = await queue.enqueue()
        jobs = queue.machine.jobs
        assert not (await claim(jobs, 1, ["other"])).contended
        async with holding(world, "SELECT FROM ready WHERE id = $1 FOR UPDATE", job["id"]):
            for types in (None, ["default"]):
                found = await claim(jobs, 1, ["q"], types)
                assert (found.jobs, found.contended) == ([], True)

    async def test_a_lease_that_waits_looks_again_while_every_job_is_in_other_hands(self, world: World):
        """Nobody calls it when the other one lets go of what it held."""
        queue = await idle_replica(world, db_pool_size=1)
        job = await queue.enqueue()
        async with logged(queue) as statements:
            async with holding(world, "SELECT FROM ready WHERE id = $1 FOR UPDATE", job["id"]):
                leasing = asyncio.create_task(queue.lease_one(wait_seconds=20))
                async with asyncio.timeout(10):
                    while statements.count("lease") < 2:
                        await asyncio.sleep(0.005)
            assert (await leasing)["id"] == job["id"]

    async def test_a_claim_cut_off_by_its_database_leaves_the_jobs_to_others(
        self, world: World, queue: Replica
    ):
        job = await queue.enqueue()
        async with holding(world, LEASING, job["id"]) as connection:
            cut = asyncio.create_task(queue.http.post("/lease", json={"queues": ["q"], "wait_seconds": 0}))
            await world.blocked(1)
            await connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE application_name = 'leaseq' AND wait_event_type = 'Lock'"
                " AND datname = current_database()"
            )
            answer = await cut
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
        assert (await queue.lease_one())["attempt"] == 1


class TestCancelling:
    async def test_a_cancel_that_comes_while_the_job_is_leased_asks_its_worker(
        self, world: World, queue: Replica
    ):
        job = await queue.enqueue()
        async with holding(world, LEASING, job["id"]):
            leasing = asyncio.create_task(queue.lease_one())
            await world.blocked(1)
            cancelling = asyncio.create_task(call(queue, "cancel", job))
            await world.blocked(2)
        leased = await leasing
        answer = await cancelling
        assert (answer.status_code, answer.json()["state"]) == (200, "active")
        assert (await queue.verb("heartbeat", leased)).json()["cancel_requested"] is True
        assert (await queue.fail(leased)) == {"state": "cancelled"}

    async def test_a_lease_passes_over_a_job_that_is_being_cancelled(self, world: World, queue: Replica):
        job = await queue.enqueue()
        async with holding(world, BODY, job["id"]):
            cancelling = asyncio.create_task(call(queue, "cancel", job))
            await world.blocked(1)
            assert await queue.lease() == []
        assert (await cancelling).json()["state"] == "cancelled"
        assert await queue.lease() == []

    async def test_an_ack_before_a_cancel_completes_the_job(self, world: World, queue: Replica):
        job = await leased_job(queue)
        acked, cancel = await in_turn(
            world, LEASE, job["id"], call(queue, "ack", job), call(queue, "cancel", job)
        )
        assert acked.json()["state"] == "completed"
        assert (cancel.status_code, cancel.json()["code"]) == (409, "wrong_state")
        assert cancel.json()["state"] == "completed"

    @pytest.mark.parametrize(
        ("verb", "state"), [("ack", "completed"), ("fail", "cancelled"), ("release", "cancelled")]
    )
    async def test_a_verb_that_comes_while_an_end_is_asked_for_heeds_it(
        self, world: World, queue: Replica, verb: str, state: str
    ):
        job = await leased_job(queue)
        cancel, answer = await in_turn(
            world, LEASE, job["id"], call(queue, "cancel", job), call(queue, verb, job)
        )
        assert (cancel.status_code, answer.status_code) == (200, 200)
        assert answer.json()["state"] == state
        assert (await queue.job(job["id"]))["state"] == state

    @pytest.mark.parametrize("verb", ["fail", "release"])
    async def test_a_cancel_that_comes_while_the_job_is_given_up_finds_it_where_it_went(
        self, world: World, queue: Replica, verb: str
    ):
        job = await leased_job(queue)
        answer, cancel = await in_turn(
            world, LEASE, job["id"], call(queue, verb, job), call(queue, "cancel", job)
        )
        assert answer.status_code == 200
        assert (cancel.status_code, cancel.json()["state"]) == (200, "cancelled")

    async def test_a_heartbeat_that_comes_while_an_end_is_asked_for_tells_of_it_and_extends(
        self, world: World, queue: Replica, moved: Clock
    ):
        job = await leased_job(queue)
        moved.move(10)
        _, beat = await in_turn(
            world, LEASE, job["id"], call(queue, "cancel", job), call(queue, "heartbeat", job)
        )
        assert beat.json()["cancel_requested"] is True
        assert beat.json()["lease_expires_at"] > job["lease_expires_at"]

    async def test_a_cancel_that_comes_while_a_heartbeat_extends_undoes_nothing(
        self, world: World, queue: Replica, moved: Clock
    ):
        job = await leased_job(queue)
        moved.move(10)
        beat, _ = await in_turn(
            world, LEASE, job["id"], call(queue, "heartbeat", job), call(queue, "cancel", job)
        )
        again = (await call(queue, "heartbeat", job)).json()
        assert again == beat.json() | {"cancel_requested": True}

    async def test_a_cancel_that_comes_while_the_lease_is_reaped_cancels_the_retry(
        self, world: World, queue: Replica, moved: Clock
    ):
        job = await leased_job(queue)
        moved.move(EXPIRED_SECONDS)
        async with holding(world, CONCLUDING):
            reaping = asyncio.create_task(queue.machine.service.maintenance.reap())
            await world.blocked(1)
            cancelling = asyncio.create_task(call(queue, "cancel", job))
            await world.blocked(2)
        assert await reaping == 1
        answer = await cancelling
        assert (answer.status_code, answer.json()["state"]) == (200, "cancelled")
        assert await outcomes(queue, job) == ["lease_expired"]

    async def test_the_reaper_leaves_a_lease_to_the_cancel_that_marks_it_then_ends_it_as_cancelled(
        self, world: World, queue: Replica, moved: Clock
    ):
        job = await leased_job(queue)
        moved.move(EXPIRED_SECONDS)
        async with holding(world, LEASE, job["id"]):
            cancelling = asyncio.create_task(call(queue, "cancel", job))
            await world.blocked(1)
            assert await queue.machine.service.maintenance.reap() == 0
        assert (await cancelling).status_code == 200
        assert await queue.machine.service.maintenance.reap() == 1
        assert (await queue.job(job["id"]))["state"] == "cancelled"

    async def test_a_cancel_that_comes_while_the_job_is_promoted_finds_it_ready(
        self, world: World, queue: Replica, moved: Clock
    ):
        job = await queue.enqueue(delay_seconds=10)
        moved.move(10)
        async with holding(world, PROMOTING, job["id"]):
            promoting = asyncio.create_task(queue.machine.service.maintenance.promote())
            await world.blocked(1)
            cancelling = asyncio.create_task(call(queue, "cancel", job))
            await world.blocked(2)
        assert await promoting == 1
        answer = await cancelling
        assert (answer.status_code, answer.json()["state"]) == (200, "cancelled")
        assert await queue.lease() == []

    async def test_a_promotion_passes_over_a_job_that_is_being_cancelled(
        self, world: World, queue: Replica, moved: Clock
    ):
        job = await queue.enqueue(delay_seconds=10)
        moved.move(10)
        async with holding(world, BODY, job["id"]):
            cancelling = asyncio.create_task(call(queue, "cancel", job))
            await world.blocked(1)
            assert await queue.machine.service.maintenance.promote() == 0
        assert (await cancelling).json()["state"] == "cancelled"
        assert await queue.machine.service.maintenance.promote() == 0

    async def test_two_cancels_of_a_waiting_job_both_find_it_cancelled(self, world: World, queue: Replica):
        job = await queue.enqueue()
        answers = await in_turn(
            world,
            "SELECT FROM ready WHERE id = $1 FOR UPDATE",
            job["id"],
            call(queue, "cancel", job),
            call(queue, "cancel", job),
        )
        assert [(answer.status_code, answer.json()["state"]) for answer in answers] == [
            (200, "cancelled")
        ] * 2


class TestExpiring:
    """A start deadline against whoever has the job's place in hand at that moment."""

    @pytest.fixture
    async def other(self, world: World) -> Replica:
        return await idle_replica(world)

    @pytest.fixture
    async def late(self, queue: Replica, other: Replica, moved: Clock) -> dict[str, Any]:
        """A ready job whose deadline is now, to the microsecond."""
        assert other is not queue
        job = await queue.enqueue(expires_in_seconds=10)
        moved.move(10)
        return job

    async def test_an_expiry_passes_over_a_job_that_is_being_leased(
        self, world: World, queue: Replica, other: Replica, moved: Clock
    ):
        job = await queue.enqueue(expires_in_seconds=10)
        async with holding(world, LEASING, UUID(job["id"])):
            lease = asyncio.create_task(queue.lease())
            await world.blocked()
            moved.move(10)
            assert (await other.maintain())["expire"] == 0
        assert [leased["id"] for leased in await lease] == [job["id"]]
        assert (await other.maintain())["expire"] == 0
        assert (await queue.job(job["id"]))["state"] == "active"

    async def test_a_lease_passes_over_a_job_that_is_being_expired(
        self, world: World, queue: Replica, other: Replica, late: dict[str, Any]
    ):
        async with holding(world, BODY, late["id"]):
            expiry = asyncio.create_task(other.machine.service.maintenance.expire())
            await world.blocked()
            assert await queue.lease() == []
        assert await expiry == 1
        assert (await queue.job(late["id"]))["state"] == "expired"

    async def test_a_cancel_that_comes_while_the_job_expires_finds_it_expired(
        self, world: World, queue: Replica, other: Replica, late: dict[str, Any]
    ):
        async with holding(world, BODY, late["id"]):
            expiry = asyncio.create_task(other.machine.service.maintenance.expire())
            await world.blocked()
            cancel = asyncio.create_task(call(queue, "cancel", late))
            await world.blocked(2)
        assert await expiry == 1
        answer = await cancel
        assert (answer.status_code, answer.json()["code"]) == (409, "wrong_state")
        assert (await queue.job(late["id"]))["state"] == "expired"

    async def test_an_expiry_passes_over_a_job_that_is_being_cancelled(
        self, world: World, queue: Replica, other: Replica, late: dict[str, Any]
    ):
        async with holding(world, BODY, late["id"]):
            cancel = asyncio.create_task(call(queue, "cancel", late))
            await world.blocked()
            assert await other.machine.service.maintenance.expire() == 0
        assert (await cancel).json()["state"] == "cancelled"

    async def test_two_maintainers_expire_every_job_once(self, queue: Replica, other: Replica, moved: Clock):
        for _ in range(20):
            await queue.enqueue(expires_in_seconds=10)
        moved.move(10)
        gone = await asyncio.gather(*(each.machine.service.maintenance.expire() for each in (queue, other)))
        assert sum(gone) == 20
        assert (await queue.stats())["expired"] == 20


class TestOperating:
    async def dead_job(self, queue: Replica) -> dict[str, Any]:
        job = await leased_job(queue)
        assert await queue.fail(job, retry=False) == {"state": "failed"}
        return job

    async def test_of_two_retries_one_brings_the_job_back(self, world: World, queue: Replica):
        job = await self.dead_job(queue)
        won, lost = await in_turn(
            world, DEAD, job["id"], call(queue, "retry", job), call(queue, "retry", job)
        )
        assert (won.status_code, won.json()["state"]) == (200, "ready")
        assert (lost.status_code, lost.json()["code"], lost.json()["state"]) == (409, "wrong_state", "ready")
        assert len(await queue.lease(max_jobs=5)) == 1

    async def test_of_two_deletes_one_removes_the_job(self, world: World, queue: Replica):
        job = await self.dead_job(queue)
        won, lost = await in_turn(
            world, DEAD, job["id"], call(queue, "delete", job), call(queue, "delete", job)
        )
        assert (won.status_code, lost.status_code) == (204, 404)

    async def test_of_two_deletes_of_a_completed_job_one_removes_it(self, world: World, queue: Replica):
        job = await leased_job(queue)
        await call(queue, "ack", job)
        won, lost = await in_turn(
            world, DONE, job["id"], call(queue, "delete", job), call(queue, "delete", job)
        )
        assert (won.status_code, lost.status_code) == (204, 404)

    async def test_a_delete_after_a_retry_finds_a_living_job_and_leaves_it(
        self, world: World, queue: Replica
    ):
        job = await self.dead_job(queue)
        retry, delete = await in_turn(
            world, DEAD, job["id"], call(queue, "retry", job), call(queue, "delete", job)
        )
        assert retry.status_code == 200
        assert (delete.status_code, delete.json()["code"]) == (409, "wrong_state")
        assert delete.json()["state"] == "ready"
        assert (await queue.lease_one())["id"] == job["id"]
        assert len(await queue.attempts(job["id"])) == 2

    async def test_a_retry_after_a_delete_finds_nothing(self, world: World, queue: Replica):
        job = await self.dead_job(queue)
        delete, retry = await in_turn(
            world, DEAD, job["id"], call(queue, "delete", job), call(queue, "retry", job)
        )
        assert (delete.status_code, retry.status_code) == (204, 404)
        assert await queue.lease() == []

    async def test_the_retention_passes_over_a_job_that_is_being_retried(self, world: World, queue: Replica):
        job = await self.dead_job(queue)
        async with holding(world, DEAD, job["id"]):
            retrying = asyncio.create_task(call(queue, "retry", job))
            await world.blocked(1)
            assert await queue.machine.jobs.retain_dead(-60, 10) == 0
        assert (await retrying).status_code == 200


class TestMaintaining:
    async def test_two_promoters_promote_every_job_once(self, world: World, queue: Replica, moved: Clock):
        other = await idle_replica(world)
        ids = [(await queue.enqueue(delay_seconds=seconds))["id"] for seconds in (10, 11, 12)]
        moved.move(12)
        async with holding(world, PROMOTING, ids[0]):
            first = asyncio.create_task(queue.machine.jobs.promote(1))
            await world.blocked(1)
            assert len((await other.machine.jobs.promote(10))[0]) == 2
        assert len((await first)[0]) == 1
        assert sorted(job["id"] for job in await queue.lease(max_jobs=10)) == sorted(ids)

    async def test_two_folders_count_every_delta_once(self, world: World, queue: Replica):
        other = await idle_replica(world)
        await queue.enqueue()
        assert (await queue.machine.jobs.fold(10))[0] == 1
        for _ in range(3):
            await queue.enqueue()
        async with holding(world, "SELECT FROM counts WHERE queue = 'q' FOR UPDATE"):
            first = asyncio.create_task(queue.machine.jobs.fold(1))
            await world.blocked(1)
            second = asyncio.create_task(other.machine.jobs.fold(10))
            await world.blocked(2)
            assert (await queue.stats())["waiting"] == 4
        assert [folded for folded, _ in (await first, await second)] == [1, 2]
        assert (await queue.stats())["waiting"] == 4
        connection = await world.connect()
        assert await connection.fetchval("SELECT ready FROM counts WHERE queue = 'q'") == 4

    async def test_two_folders_may_count_a_new_queue_at_once(self, world: World, queue: Replica):
        for _ in range(2):
            await queue.enqueue("new")
        async with holding(world, "INSERT INTO counts (queue) VALUES ('new')"):
            first = asyncio.create_task(queue.machine.jobs.fold(1))
            await world.blocked(1)
            second = asyncio.create_task(queue.machine.jobs.fold(1))
            await world.blocked(2)
        assert [folded for folded, _ in (await first, await second)] == [1, 1]
        assert (await queue.stats())["waiting"] == 2

    async def test_two_replicas_that_start_at_once_make_the_days_once(self, world: World, clock: Clock):
        replicas = [await idle_replica(world), await idle_replica(world)]
        clock.move(40 * 86_400)
        async with holding(
            world, "SELECT pg_advisory_xact_lock(hashtextextended('leaseq partitions leaseq', 0))"
        ):
            starting = [asyncio.create_task(replica.machine.jobs.prepare()) for replica in replicas]
            await world.blocked(2)
        await asyncio.gather(*starting)
        await replicas[1].enqueue()
        assert (await replicas[0].verb("ack", await replicas[0].lease_one())).status_code == 200

    async def test_two_workers_that_miss_a_day_at_once_both_get_it_made(
        self, world: World, queue: Replica, clock: Clock
    ):
        for _ in range(2):
            await queue.enqueue()
        clock.move(40 * 86_400)
        one, two = await queue.lease(max_jobs=2)
        async with holding(
            world, "SELECT pg_advisory_xact_lock(hashtextextended('leaseq partitions leaseq', 0))"
        ):
            settling = [settle(queue, "ack", one), settle(queue, "fail", two)]
            await world.blocked(2)
        assert [answer.status_code for answer in await asyncio.gather(*settling)] == [200, 200]

    async def test_a_release_of_many_leaves_out_those_that_are_lost(self, world: World, queue: Replica):
        for _ in range(2):
            await queue.enqueue()
        kept, lost = await queue.lease(max_jobs=2)
        releases = [released(UUID(job["id"]), UUID(job["lease_id"]), 0) for job in (kept, lost)]
        async with holding(world, BODY, lost["id"]):
            acking = settle(queue, "ack", lost)
            await world.blocked(1)
            releasing = asyncio.create_task(queue.machine.jobs.conclude(releases))
            await world.blocked(2)
        assert (await acking).status_code == 200
        verdicts = await releasing
        assert {str(job_id): verdict.state for job_id, verdict in verdicts.items()} == {
            kept["id"]: State.READY
        }
