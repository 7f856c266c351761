"""The register of workers, and what operators tell them."""

import asyncio
from datetime import datetime
from typing import Any
from urllib.parse import quote

import asyncpg
import httpx
import pytest

from app.engine import workers
from app.queue.events import JobLeased, WorkerDirected
from app.queue.model import Directive
from app.store.workers import StoredWorkers
from tests.api.refusals import problem
from tests.api.test_waiting import until_asleep, waiting
from tests.conftest import Replica, World


async def written(queue: Replica) -> None:
    await queue.machine.service.workers.write()


async def listed(queue: Replica, **query: Any) -> list[dict[str, Any]]:
    answer = await queue.http.get("/workers", params=query)
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["workers"]
    return found


async def names(queue: Replica) -> list[str]:
    return [worker["name"] for worker in await listed(queue)]


async def tell(queue: Replica, verb: str, name: str = "w") -> dict[str, Any]:
    answer = await queue.http.post(f"/workers/{quote(name, safe='')}/{verb}")
    assert answer.status_code == 200, answer.text
    worker: dict[str, Any] = answer.json()
    return worker


async def reply_of(queue: Replica, **fields: Any) -> dict[str, Any]:
    answer = await queue.http.post(
        "/lease", json={"queues": ["q"], "wait_seconds": 0, "worker": "w", **fields}
    )
    assert answer.status_code == 200, answer.text
    reply: dict[str, Any] = answer.json()
    return reply


class TestRegister:
    async def test_shows_who_asks_for_what_and_holds_how_much(self, queue: Replica):
        now = queue.clock.move(0)
        await queue.enqueue("a")
        await queue.enqueue("a")
        await queue.lease("a", "b", types=["default", "x"], worker="w", max_jobs=2)
        await written(queue)
        later = queue.clock.move(10)
        await queue.lease("c", worker="idle")
        await written(queue)
        [idle, worker] = await listed(queue)
        assert worker == {
            "name": "w",
            "queues": ["a", "b"],
            "types": ["default", "x"],
            "active": 2,
            "first_seen_at": now.isoformat().replace("+00:00", "Z"),
            "last_seen_at": now.isoformat().replace("+00:00", "Z"),
            "directive": "continue",
        }
        assert (idle["name"], idle["queues"], idle["types"], idle["active"]) == ("idle", ["c"], None, 0)
        assert datetime.fromisoformat(idle["last_seen_at"]) == later

    @pytest.mark.parametrize("way", ["alone", "settled"])
    async def test_a_heartbeat_is_a_sign_of_life_of_the_leases_worker(self, queue: Replica, way: str):
        first = queue.clock.move(0)
        await queue.enqueue()
        leased = await queue.lease_one(worker="w")
        await written(queue)
        later = queue.clock.move(5)
        if way == "alone":
            await queue.verb("heartbeat", leased)
        else:
            item = {"job_id": leased["id"], "lease_id": leased["lease_id"], "outcome": "heartbeat"}
            await queue.http.post("/settle", json={"items": [item]})
        await written(queue)
        [worker] = await listed(queue)
        assert datetime.fromisoformat(worker["first_seen_at"]) == first
        assert datetime.fromisoformat(worker["last_seen_at"]) == later
        assert worker["queues"] == ["q"]

    async def test_a_worker_that_another_process_leased_to_is_known_by_its_heartbeat(self, world: World):
        here, there = await world.replica(), await world.replica()
        await here.enqueue()
        leased = await here.lease_one(worker="w")
        await there.verb("heartbeat", leased)
        await written(there)
        [worker] = await listed(here)
        assert (worker["name"], worker["queues"], worker["active"]) == ("w", [], 1)
        await written(here)
        [worker] = await listed(here)
        assert worker["queues"] == ["q"]
        await there.verb("heartbeat", leased)
        await written(there)
        [worker] = await listed(here)
        assert worker["queues"] == ["q"]

    async def test_a_worker_with_several_loops_asks_for_what_they_all_ask_for(self, queue: Replica):
        await queue.lease("a", types=["x"], worker="w")
        await queue.lease("b", types=["y"], worker="w")
        await written(queue)
        [worker] = await listed(queue)
        assert (worker["queues"], worker["types"]) == (["a", "b"], ["x", "y"])
        await queue.lease("c", worker="w")
        await written(queue)
        [worker] = await listed(queue)
        assert (worker["queues"], worker["types"]) == (["a", "b", "c"], None)

    async def test_a_lease_without_a_name_lists_nobody(self, queue: Replica):
        await queue.lease()
        await written(queue)
        assert await listed(queue) == []

    async def test_leases_without_a_name_that_ask_for_the_same_in_another_order_are_one(
        self, queue: Replica, world: World
    ):
        for queues in (["a", "b"], ["b", "a"]):
            for types in (["x", "y"], ["y", "x"], None):
                await queue.lease(*queues, types=types)
        await queue.lease("a", worker="w")
        assert (await tell(queue, "quiet"))["directive"] == "quiet"
        connection = await world.connect()
        assert await connection.fetchval("SELECT count(*) FROM workers") == 3

    async def test_a_lease_writes_nothing_by_itself(self, queue: Replica, world: World):
        await queue.lease(worker="w")
        connection = await world.connect()
        assert await connection.fetchval("SELECT count(*) FROM workers") == 0

    async def test_the_register_writes_by_itself_every_few_seconds(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr("tests.conftest.NEVER_SECONDS", 0.01)
        queue = await world.replica(maintenance_seconds=3600)
        await queue.lease(worker="w")
        async with asyncio.timeout(10):
            while not await listed(queue):
                await asyncio.sleep(0.005)

    async def test_what_could_not_be_written_is_written_later(self, queue: Replica, world: World):
        await queue.lease(worker="w")
        connection = await world.connect()
        async with connection.transaction():
            await connection.execute("LOCK TABLE workers")
            writing = asyncio.create_task(written(queue))
            await world.blocked()
            await connection.execute(
                "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE application_name = 'leaseq'"
                " AND wait_event_type = 'Lock'"
            )
            assert isinstance((await asyncio.gather(writing, return_exceptions=True))[0], Exception)
        assert await listed(queue) == []
        await written(queue)
        assert await names(queue) == ["w"]

    async def test_nothing_heard_is_lost_by_an_error_that_is_no_outage(self, queue: Replica, world: World):
        await queue.lease(worker="w")
        connection = await world.connect()
        await connection.execute("ALTER TABLE workers ADD CONSTRAINT nobody CHECK (name = '')")
        with pytest.raises(asyncpg.CheckViolationError):
            await written(queue)
        await connection.execute("ALTER TABLE workers DROP CONSTRAINT nobody")
        await written(queue)
        assert await names(queue) == ["w"]

    async def test_who_was_not_heard_of_for_a_day_is_forgotten(
        self, queue: Replica, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(workers, "FORGET_EVERY_SECONDS", 0)
        queue.clock.move(0)
        await queue.lease(worker="old")
        await written(queue)
        queue.clock.move(86_400)
        await queue.lease(worker="new")
        await written(queue)
        assert await names(queue) == ["new", "old"]
        queue.clock.move(0.001)
        await written(queue)
        assert await names(queue) == ["new"]

    async def test_a_worker_that_is_forgotten_is_told_nothing_when_it_comes_back(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(workers, "FORGET_EVERY_SECONDS", 0)
        here, there = await world.replica(), await world.replica()
        here.clock.move(0)
        await here.lease(worker="w")
        await tell(here, "quiet")
        here.clock.move(86_401)
        await written(here)
        assert await names(here) == []
        for replica in (here, there):
            await replica.machine.service.copies.compare()
            assert (await reply_of(replica))["directive"] == "continue"

    async def test_only_so_many_are_kept_the_last_heard_of(
        self, queue: Replica, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(workers, "WORKERS_MAX", 3)
        queue.clock.move(0)
        for number in range(5):
            await queue.lease(worker=f"w{number}")
            await written(queue)
            queue.clock.move(1)
        assert await names(queue) == ["w2", "w3", "w4"]

    async def test_a_flood_of_names_between_two_writes_is_cut(
        self, queue: Replica, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(workers, "WORKERS_MAX", 3)
        for number in range(5):
            await queue.lease(worker=f"w{number}")
        await written(queue)
        assert await names(queue) == ["w0", "w1", "w2"]

    async def test_the_list_has_pages(self, queue: Replica):
        every = ["a", "a/b", "b", "c", "ä ö"]
        for name in every:
            await queue.lease(worker=name)
        await written(queue)
        found: list[str] = []
        cursor = None
        for _ in range(3):
            query = {"limit": 2} if cursor is None else {"limit": 2, "cursor": cursor}
            page = (await queue.http.get("/workers", params=query)).json()
            found += [worker["name"] for worker in page["workers"]]
            cursor = page["next_cursor"]
        assert cursor is None
        assert sorted(found) == sorted(every)

    @pytest.mark.parametrize(
        "query", [{"cursor": "ä"}, {"cursor": "AQ"}, {"limit": 0}, {"limit": 501}, {"x": 1}]
    )
    async def test_an_odd_query_is_refused(self, queue: Replica, query: dict[str, Any]):
        problem(await queue.http.get("/workers", params=query), "invalid")

    async def test_two_processes_write_the_same_workers_at_once(self, world: World):
        here, there = await world.replica(), await world.replica()
        for number in range(20):
            await here.lease(worker=f"w{number}")
            await there.lease(worker=f"w{19 - number}")
        await asyncio.gather(written(here), written(there))
        assert len(await listed(here)) == 20


class TestPolling:
    async def test_tells_whose_leases_ask_for_a_queue_and_type(self, queue: Replica):
        stored = StoredWorkers(queue.machine.database, queue.clock)
        queue.clock.move(0)
        await queue.lease("a", "b", types=["x"], worker="w")
        await queue.lease("a")
        await written(queue)

        async def who(queue_name: str, type_: str) -> list[str | None]:
            return [poller.name for poller in await stored.polling(queue_name, type_)]

        assert sorted(await who("a", "x"), key=str) == [None, "w"]
        assert await who("b", "x") == ["w"]
        assert await who("b", "y") == []
        assert await who("a", "y") == [None]
        assert await who("c", "x") == []
        queue.clock.move(60)
        assert await who("a", "x") == []

    async def test_tells_what_they_are_told(self, queue: Replica):
        await queue.lease(worker="w")
        await tell(queue, "quiet")
        [poller] = await StoredWorkers(queue.machine.database).polling("q", "default")
        assert (poller.name, poller.directive) == ("w", Directive.QUIET)


class TestDirectives:
    async def test_a_worker_goes_on_while_nobody_says_otherwise(self, queue: Replica):
        await queue.enqueue()
        reply = await reply_of(queue)
        assert (len(reply["jobs"]), reply["directive"]) == (1, "continue")
        [leased] = reply["jobs"]
        assert (await queue.verb("heartbeat", leased)).json()["directive"] == "continue"
        answer = await queue.http.post("/lease", json={"queues": ["q"], "wait_seconds": 0})
        assert answer.json() == {"jobs": [], "directive": "continue"}

    @pytest.mark.parametrize(("verb", "directive"), [("quiet", "quiet"), ("terminate", "terminate")])
    async def test_lease_replies_and_heartbeats_carry_what_a_worker_is_told(
        self, queue: Replica, verb: str, directive: str
    ):
        await queue.enqueue()
        leased = await queue.lease_one(worker="w")
        told = await tell(queue, verb)
        assert (told["name"], told["directive"], told["active"]) == ("w", directive, 1)
        assert queue.events.of(WorkerDirected) == [WorkerDirected(worker="w", directive=Directive(directive))]

        assert (await queue.verb("heartbeat", leased)).json()["directive"] == directive
        item = {"job_id": leased["id"], "lease_id": leased["lease_id"], "outcome": "heartbeat"}
        settled = await queue.http.post("/settle", json={"items": [item]})
        assert settled.json()["results"][0]["directive"] == directive
        reply = await reply_of(queue, settle=[item])
        assert reply["settled"][0]["directive"] == reply["directive"] == directive

    @pytest.mark.parametrize("verb", ["quiet", "terminate"])
    async def test_a_worker_that_is_to_take_no_jobs_gets_none_but_others_do(self, queue: Replica, verb: str):
        await queue.lease(worker="w")
        await tell(queue, verb)
        job = await queue.enqueue()
        assert (await reply_of(queue))["jobs"] == []
        assert [leased["id"] for leased in await queue.lease(worker="other")] == [job["id"]]

    async def test_it_may_finish_what_it_has(self, queue: Replica):
        await queue.enqueue()
        leased = await queue.lease_one(worker="w")
        await tell(queue, "terminate")
        assert (await queue.verb("ack", leased)).status_code == 200

    @pytest.mark.parametrize("verb", ["quiet", "terminate"])
    async def test_its_waiting_lease_is_answered_empty_at_once(self, queue: Replica, verb: str):
        reply = await waiting(queue, worker="w")
        other = await waiting(queue, worker="other")
        await tell(queue, verb)
        assert await reply == []
        job = await queue.enqueue()
        assert [leased["id"] for leased in await other] == [job["id"]]

    async def test_a_new_lease_of_it_waits_so_that_it_does_not_ask_again_and_again(self, queue: Replica):
        await queue.lease(worker="w")
        await tell(queue, "quiet")
        reply = await waiting(queue, worker="w")
        await queue.enqueue()
        assert queue.machine.service.wakeups.waiters == 1
        assert not reply.done()
        # The job calls nobody in vain: another worker gets it.
        assert len(await queue.lease(worker="other")) == 1
        # What ends its waiting is the word that it may go on.
        await tell(queue, "resume")
        assert await reply == []

    async def test_a_lease_that_may_not_wait_is_answered_with_the_directive_when_its_time_is_over(
        self, queue: Replica
    ):
        await queue.lease(worker="w")
        await tell(queue, "quiet")
        assert await reply_of(queue, wait_seconds=0.01) == {"jobs": [], "directive": "quiet"}

    async def test_resumed_it_takes_jobs_again(self, queue: Replica):
        await queue.lease(worker="w")
        await tell(queue, "quiet")
        assert (await tell(queue, "resume"))["directive"] == "continue"
        await queue.enqueue()
        reply = await reply_of(queue)
        assert (len(reply["jobs"]), reply["directive"]) == (1, "continue")

    async def test_a_directive_is_in_force_at_other_replicas_too(self, world: World):
        here, there = await world.replica(), await world.replica()
        await here.lease(worker="w")
        reply = await waiting(there, worker="w")
        await tell(here, "quiet")
        assert await reply == []
        await here.enqueue()
        assert (await reply_of(there)) == {"jobs": [], "directive": "quiet"}

    async def test_a_lease_that_waits_without_a_claim_ends_at_a_stop(self, queue: Replica):
        await queue.lease(worker="w")
        await tell(queue, "quiet")
        reply = await waiting(queue, worker="w")
        queue.machine.service.drain()
        assert await reply == []
        assert queue.events.of(JobLeased) == []

    async def test_its_client_may_go_away(self, queue: Replica):
        await queue.lease(worker="w")
        await tell(queue, "quiet")
        reply = await waiting(queue, worker="w")
        reply.cancel()
        async with asyncio.timeout(10):
            while queue.machine.service.wakeups.waiters:
                await asyncio.sleep(0.002)
        await until_asleep(queue, 0)

    async def test_a_directive_stands_while_the_worker_is_heard_of(self, queue: Replica):
        queue.clock.move(0)
        await queue.lease(worker="w")
        await tell(queue, "quiet")
        queue.clock.move(3600)
        await queue.lease(worker="w")
        await written(queue)
        [worker] = await listed(queue)
        assert worker["directive"] == "quiet"
        assert datetime.fromisoformat(worker["last_seen_at"]) == queue.clock.move(0)

    @pytest.mark.parametrize("name", ["a/b", "with space", "ä", "a%2Fb", "quiet", "?#"])
    async def test_any_name_that_a_lease_takes_can_be_told(self, queue: Replica, name: str):
        await queue.lease(worker=name)
        assert (await tell(queue, "quiet", name))["name"] == name
        assert (await reply_of(queue, worker=name))["directive"] == "quiet"

    @pytest.mark.parametrize("verb", ["quiet", "terminate", "resume"])
    @pytest.mark.parametrize("name", ["nobody", "\x01", "a\x00b", "x" * 300])
    async def test_who_is_not_known_can_be_told_nothing(self, queue: Replica, verb: str, name: str):
        await queue.lease()
        await written(queue)
        answer: httpx.Response = await queue.http.post(f"/workers/{quote(name, safe='')}/{verb}")
        problem(answer, "not_found")

    async def test_health_still_lists_who_holds_leases(self, queue: Replica):
        await queue.enqueue()
        await queue.lease_one(worker="w")
        [seen] = (await queue.http.get("/health")).json()["workers"]
        assert (seen["name"], seen["active"]) == ("w", 1)


async def test_what_a_worker_asked_for_long_ago_is_over(queue: Replica, monkeypatch: pytest.MonkeyPatch):
    register = queue.machine.service.workers
    await queue.lease("old", worker="w")
    monkeypatch.setattr(workers, "POLLED_SECONDS", 0)
    await queue.lease("new", worker="w")
    await register.write()
    [worker] = await listed(queue)
    assert worker["queues"] == ["new"]
