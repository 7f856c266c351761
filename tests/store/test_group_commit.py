"""Group commit under faults, with real connections: cut wires, ended backends, locks of strangers, bad neighbours.

The rule is that of tests/system/test_faults.py: what was acknowledged stays, what was refused did not happen, what had
no answer happened whole or not at all. Every test ends with the invariants.
"""

import asyncio
from typing import Any

import httpx
import pytest

from app.engine import batching
from app.engine.batching import Batcher
from app.engine.leasing import LeaseRequest
from app.queue.events import AttemptEnded, JobEnqueued
from app.queue.model import JobRequest
from app.store.database import HOT_SETTINGS
from tests.conftest import Clock, Replica, World
from tests.store.conftest import holding, idle_replica, logged
from tests.wire import Cut, Wire, wire_to

STORING = "LOCK TABLE deltas IN SHARE MODE"
"""Stops every verb in the middle of its writing statement."""

TERMINATE = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
 WHERE datname = current_database() AND application_name = 'leaseq' AND wait_event_type = 'Lock'"""


SETTLED = {"ack": "completed", "fail": "retry", "release": "ready", "heartbeat": "active"}
"""What becomes of a job by each word."""


def refused(answer: httpx.Response) -> None:
    assert answer.status_code == 503, answer.text
    assert answer.json()["code"] == "unavailable"
    assert int(answer.headers["retry-after"]) > 0


async def in_line(batcher: Batcher[Any, Any], count: int) -> None:
    """Wait until so many items are in line behind the flush that runs."""
    async with asyncio.timeout(10):
        while len(batcher._line) < count:
            await asyncio.sleep(0)


def enqueues(queue: Replica) -> Batcher[Any, Any]:
    return queue.machine.service._enqueues


def post(queue: Replica, path: str, /, **body: Any) -> "asyncio.Task[httpx.Response]":
    return asyncio.create_task(queue.http.post(path, json=body))


def verb(queue: Replica, name: str, job: dict[str, Any], **fields: Any) -> "asyncio.Task[httpx.Response]":
    if name == "fail":
        fields = {"error": {"message": "boom"}, **fields}
    return asyncio.create_task(queue.verb(name, job, **fields))


async def leased(queue: Replica, count: int, **fields: Any) -> list[dict[str, Any]]:
    for _ in range(count):
        await queue.enqueue(backoff={"jitter": "none", "initial_seconds": 600}, **fields)
    jobs = await queue.lease(max_jobs=count, lease_seconds=600)
    assert len(jobs) == count
    return jobs


async def count(world: World, table: str, where: str = "true") -> int:
    connection = await world.connect()
    number: int = await connection.fetchval(f"SELECT count(*) FROM {table} WHERE {where}")
    return number


# ---------------------------------------------------------------------------------------------------------------------
# The connection dies


@pytest.fixture
async def wire(world: World) -> Wire:
    return await world.stack.enter_async_context(wire_to(world.database_url))


@pytest.fixture
async def wired(world: World, wire: Wire) -> Replica:
    """A replica whose verbs share one connection over the wire, where every statement has been prepared."""
    queue = await idle_replica(world, database_url=wire.url, db_pool_size=1)
    for _ in SETTLED:
        await queue.enqueue("warm")
    for name, job in zip(SETTLED, await queue.lease("warm", max_jobs=4), strict=True):
        assert (await verb(queue, name, job)).status_code == 200
    return queue


@pytest.mark.parametrize("cut", Cut)
async def test_an_enqueue_whose_connection_is_cut_is_stored_once_and_answered(
    cut: Cut, world: World, wired: Replica, wire: Wire
):
    wire.arm(cut)
    job = await wired.enqueue("q", payload=1, delay_seconds=0)
    assert wire.cuts == 1
    assert [found["id"] for found in await wired.lease("q", max_jobs=10)] == [job["id"]]
    assert await count(world, "jobs", "queue = 'q'") == 1


@pytest.mark.parametrize("cut", Cut)
async def test_a_group_of_enqueues_whose_connection_is_cut_is_stored_once(
    cut: Cut, world: World, wired: Replica, wire: Wire
):
    async with holding(world, STORING):
        posting = [post(wired, "/jobs", queue="q", payload=0)]
        await world.blocked()
        posting += [post(wired, "/jobs", queue="q", payload=n) for n in range(1, 20)]
        await in_line(enqueues(wired), 19)
        wire.arm(cut)
    answers = await asyncio.gather(*posting)
    assert wire.cuts == 1
    assert [answer.status_code for answer in answers] == [201] * 20
    found = await wired.lease("q", max_jobs=100)
    assert sorted(job["payload"] for job in found) == list(range(20))
    assert {job["id"] for job in found} == {answer.json()["id"] for answer in answers}


async def test_an_enqueue_cut_off_while_the_server_is_still_at_it_is_stored_once(
    world: World, wired: Replica, wire: Wire
):
    """The server does not notice: it stores the jobs when it can, while their second try waits behind it."""
    async with holding(world, STORING):
        posting = post(wired, "/jobs", queue="q")
        await world.blocked()
        wire.cut_now()
        await world.blocked(2)
    answer = await posting
    assert answer.status_code == 201
    assert [found["id"] for found in await wired.lease("q", max_jobs=10)] == [answer.json()["id"]]


async def test_a_claim_that_never_reached_the_server_took_nothing(wired: Replica, wire: Wire):
    job = await wired.enqueue()
    wire.arm(Cut.BEFORE)
    refused(await wired.http.post("/lease", json={"queues": ["q"], "wait_seconds": 0}))
    again = await wired.lease_one()
    assert (again["id"], again["attempt"]) == (job["id"], 1)


async def test_a_claim_whose_reply_is_lost_is_handed_over(wired: Replica, wire: Wire):
    ids = [(await wired.enqueue(payload=n))["id"] for n in range(3)]
    wire.arm(Cut.AFTER)
    jobs = await wired.lease(max_jobs=2)
    assert wire.cuts == 1
    assert [(job["id"], job["attempt"]) for job in jobs] == [(ids[0], 1), (ids[1], 1)]
    assert {(await verb(wired, "ack", job)).status_code for job in jobs} == {200}
    assert [job["id"] for job in await wired.lease(max_jobs=2)] == ids[2:]


async def test_a_shared_claim_whose_reply_is_lost_gives_each_its_own(
    world: World, wired: Replica, wire: Wire
):
    for n in range(4):
        await wired.enqueue(payload=n)
    async with holding(world, "LOCK TABLE ready IN ACCESS EXCLUSIVE MODE"):
        first = asyncio.create_task(wired.lease(worker="a"))
        await world.blocked()
        two = asyncio.create_task(wired.lease(worker="b", max_jobs=2))
        one = asyncio.create_task(wired.lease(worker="c"))
        [batcher] = wired.machine.service._claims._batchers.values()
        await in_line(batcher, 2)
        wire.arm(Cut.AFTER)
    replies = await asyncio.gather(first, two, one)
    assert wire.cuts == 1
    assert [len(reply) for reply in replies] == [1, 2, 1]
    assert sorted(job["payload"] for reply in replies for job in reply) == [0, 1, 2, 3]
    for reply, worker in zip(replies, "abc", strict=True):
        assert {(await wired.job(job["id"]))["worker"] for job in reply} == {worker}


async def test_a_claim_cut_off_while_the_server_is_still_at_it_comes_back_when_its_lease_ends(
    world: World, wired: Replica, wire: Wire, clock: Clock
):
    job = await wired.enqueue(lease_seconds=30)
    async with holding(world, STORING):
        leasing = post(wired, "/lease", queues=["q"], wait_seconds=0)
        await world.blocked()
        wire.cut_now()
        refused(await leasing)
    connection = await world.connect()
    async with asyncio.timeout(10):
        while not await connection.fetchval("SELECT count(*) FROM leases WHERE queue = 'q'"):
            await asyncio.sleep(0.005)
    clock.move(31)
    await wired.maintain()
    clock.move(3600)
    await wired.maintain()
    assert (await wired.lease_one())["id"] == job["id"]


@pytest.mark.parametrize("cut", Cut)
@pytest.mark.parametrize(("name", "state"), SETTLED.items())
async def test_a_word_whose_connection_is_cut_is_taken_once(
    name: str, state: str, cut: Cut, wired: Replica, wire: Wire
):
    [job] = await leased(wired, 1)
    wire.arm(cut)
    answer = await verb(wired, name, job)
    assert wire.cuts == 1
    assert answer.status_code == 200
    assert (await wired.job(job["id"]))["state"] == state
    again = await verb(wired, name, job)
    if name != "heartbeat":
        assert again.json() == answer.json()
        assert len(await wired.attempts(job["id"])) == 1


@pytest.mark.parametrize("name", ["ack", "fail", "release", "heartbeat"])
async def test_a_word_cut_off_while_the_server_is_still_at_it_is_taken_once(
    name: str, world: World, wired: Replica, wire: Wire
):
    [job] = await leased(wired, 1)
    stopping = "SELECT FROM leases WHERE id = $1 FOR UPDATE" if name == "heartbeat" else STORING
    async with holding(world, stopping, *([job["id"]] if name == "heartbeat" else [])):
        saying = verb(wired, name, job)
        await world.blocked()
        wire.cut_now()
        # The second try waits for the first, which holds the lease; its server has not noticed.
        await world.blocked(2)
    answer = await saying
    assert answer.status_code == 200
    assert (await wired.job(job["id"]))["state"] == SETTLED[name]
    assert len(await wired.attempts(job["id"])) == 1


@pytest.mark.parametrize("cut", Cut)
async def test_a_settle_whose_connection_is_cut_is_taken_once(cut: Cut, wired: Replica, wire: Wire):
    jobs = await leased(wired, 4)
    items = [
        {"job_id": job["id"], "lease_id": job["lease_id"], "outcome": outcome}
        for job, outcome in zip(jobs, SETTLED, strict=True)
    ]
    items[1]["error"] = {"message": "boom"}
    wire.arm(cut)
    answer = await wired.http.post("/settle", json={"items": items})
    assert wire.cuts == 1
    assert answer.status_code == 200
    results = answer.json()["results"]
    assert [result["status"] for result in results] == [200] * 4
    assert [result["state"] for result in results] == list(SETTLED.values())
    again = (await wired.http.post("/settle", json={"items": items})).json()["results"]
    assert again[:3] == results[:3]
    for job, state in zip(jobs, SETTLED.values(), strict=True):
        assert (await wired.job(job["id"]))["state"] == state
        assert len(await wired.attempts(job["id"])) == 1


# ---------------------------------------------------------------------------------------------------------------------
# The backend ends in the middle of a flush, with others in line


async def test_when_a_flush_loses_its_backend_nothing_is_doubled_and_the_line_goes_on(
    world: World, queue: Replica
):
    async with holding(world, STORING) as stranger:
        posting = [post(queue, "/jobs", queue="q", payload="first")]
        await world.blocked()
        posting += [post(queue, "/jobs", queue="q", payload=n) for n in range(5)]
        await in_line(enqueues(queue), 5)
        assert len(await stranger.fetch(TERMINATE)) == 1
        await world.blocked()
    answers = await asyncio.gather(*posting)
    stored = [answer.json()["id"] for answer in answers if answer.status_code == 201]
    for answer in answers:
        if answer.status_code != 201:
            refused(answer)
    assert len(stored) >= 5
    assert sorted(job["id"] for job in await queue.lease(max_jobs=100)) == sorted(stored)


@pytest.mark.parametrize("name", ["ack", "fail", "release", "heartbeat"])
async def test_when_a_flush_of_words_loses_its_backend_each_is_taken_once(
    name: str, world: World, queue: Replica
):
    jobs = await leased(queue, 6)
    async with holding(world, "LOCK TABLE leases IN EXCLUSIVE MODE") as stranger:
        saying = [verb(queue, name, jobs[0])]
        await world.blocked()
        saying += [verb(queue, name, job) for job in jobs[1:]]
        service = queue.machine.service
        batcher: Batcher[Any, Any] = service._endings
        if name in {"ack", "heartbeat"}:
            batcher = service._acks if name == "ack" else service._heartbeats
        await in_line(batcher, 5)
        assert len(await stranger.fetch(TERMINATE)) == 1
        await world.blocked()
    assert {answer.status_code for answer in await asyncio.gather(*saying)} == {200}
    for job in jobs:
        assert (await queue.job(job["id"]))["state"] == SETTLED[name]
        assert len(await queue.attempts(job["id"])) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Neighbours


async def test_a_poison_item_fails_alone_and_its_neighbours_are_stored(world: World, queue: Replica):
    connection = await world.connect()
    await connection.execute("ALTER TABLE jobs ADD CHECK (convert_from(payload, 'UTF8') <> '\"poison\"')")
    async with holding(world, STORING):
        posting = [post(queue, "/jobs", queue="q", payload="first")]
        await world.blocked()
        payloads = [*range(7), "poison", *range(7, 12), "poison", 12]
        posting += [post(queue, "/jobs", queue="q", payload=payload) for payload in payloads]
        await in_line(enqueues(queue), len(payloads))
    answers = await asyncio.gather(*posting)
    statuses = [answer.status_code for answer in answers]
    assert statuses == [201, *(500 if payload == "poison" else 201 for payload in payloads)]
    stored = {answer.json()["id"] for answer in answers if answer.status_code == 201}
    assert {job["id"] for job in await queue.lease(max_jobs=100)} == stored


async def test_a_poison_ack_fails_alone_and_its_neighbours_are_done(world: World, queue: Replica):
    jobs = await leased(queue, 6)
    connection = await world.connect()
    await connection.execute(
        "CREATE FUNCTION leaseq.refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        "  IF convert_from(NEW.result, 'UTF8') = '\"poison\"' THEN RAISE EXCEPTION 'no' USING ERRCODE = '22000'; END IF;"
        "  RETURN NEW; END $$;"
        "CREATE TRIGGER refuse BEFORE INSERT ON leaseq.history FOR EACH ROW EXECUTE FUNCTION leaseq.refuse()"
    )
    async with holding(world, STORING):
        saying = [verb(queue, "ack", jobs[0], result=0)]
        await world.blocked()
        saying += [
            verb(queue, "ack", job, result="poison" if n == 3 else n) for n, job in enumerate(jobs[1:], 1)
        ]
        await in_line(queue.machine.service._acks, 5)
    statuses = [answer.status_code for answer in await asyncio.gather(*saying)]
    assert statuses == [200, 200, 200, 500, 200, 200]
    assert (await queue.job(jobs[3]["id"]))["state"] == "active"


@pytest.mark.parametrize("name", ["ack", "fail", "release", "heartbeat"])
async def test_a_lease_that_a_stranger_holds_keeps_nobody_waiting_but_its_own_word(
    name: str, world: World, queue: Replica
):
    held, *others = await leased(queue, 6)
    async with holding(world, "SELECT FROM leases WHERE id = $1 FOR UPDATE", held["id"]):
        waiting = verb(queue, name, held)
        await world.blocked()
        answers = await asyncio.gather(*(verb(queue, name, job) for job in others))
        assert {answer.status_code for answer in answers} == {200}
        assert not waiting.done()
    assert (await waiting).status_code == 200
    assert (await queue.job(held["id"]))["state"] == SETTLED[name]


async def test_words_that_wait_for_strangers_leave_connections_to_the_others(world: World, queue: Replica):
    jobs = await leased(queue, 12)
    held = [job["id"] for job in jobs[:8]]
    async with holding(world, "SELECT FROM leases WHERE id = ANY ($1) FOR UPDATE", held):
        waiting = [verb(queue, "ack", job) for job in jobs[:8]]
        await world.blocked(2)
        answers = await asyncio.gather(*(verb(queue, "ack", job) for job in jobs[8:]))
        assert {answer.status_code for answer in answers} == {200}
    assert {answer.status_code for answer in await asyncio.gather(*waiting)} == {200}


async def test_of_two_words_for_one_job_in_one_flush_the_first_wins(world: World, queue: Replica):
    first, *jobs = await leased(queue, 3)
    async with holding(world, STORING):
        saying = [verb(queue, "ack", first, result=0)]
        await world.blocked()
        for job in jobs:
            for result in (1, 2):
                saying.append(verb(queue, "ack", job, result=result))
                await in_line(queue.machine.service._acks, len(saying) - 1)
    answers = await asyncio.gather(*saying)
    assert [answer.json()["result"] for answer in answers] == [0, 1, 1, 1, 1]
    for job in jobs:
        assert len(await queue.attempts(job["id"])) == 1


@pytest.mark.parametrize(("won", "lost"), [("fail", "release"), ("release", "fail")])
async def test_of_two_endings_for_one_job_in_one_flush_the_other_has_lost_its_lease(
    won: str, lost: str, world: World, queue: Replica
):
    first, job = await leased(queue, 2)
    async with holding(world, STORING):
        ahead = verb(queue, "fail", first)
        await world.blocked()
        winner = verb(queue, won, job)
        await in_line(queue.machine.service._endings, 1)
        loser = verb(queue, lost, job)
        await in_line(queue.machine.service._endings, 2)
    assert (await ahead).status_code == (await winner).status_code == 200
    answer = await loser
    assert (answer.status_code, answer.json()["code"]) == (409, "lease_lost")
    assert (await queue.job(job["id"]))["state"] == SETTLED[won]
    assert len(await queue.attempts(job["id"])) == 1


async def test_an_ack_and_a_release_of_one_job_at_once_have_one_winner(queue: Replica):
    [job] = await leased(queue, 1)
    answers = await asyncio.gather(verb(queue, "ack", job), verb(queue, "release", job))
    assert sorted(answer.status_code for answer in answers) == [200, 409]
    assert len(await queue.attempts(job["id"])) == 1


# ---------------------------------------------------------------------------------------------------------------------
# A flush takes too long


@pytest.mark.parametrize("limit", ["statement_timeout", "lock_timeout"])
async def test_a_flush_that_takes_too_long_refuses_its_items_and_stores_nothing(
    limit: str, world: World, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(HOT_SETTINGS, limit, "1s")
    queue = await idle_replica(world)
    async with holding(world, STORING):
        posting = [post(queue, "/jobs", queue="q", payload=0)]
        await world.blocked()
        posting += [post(queue, "/jobs", queue="q", payload=n) for n in range(1, 6)]
        for answer in await asyncio.gather(*posting):
            refused(answer)
    assert await count(world, "jobs") == 0
    assert (await post(queue, "/jobs", queue="q")).status_code == 201


async def test_a_claim_that_takes_too_long_is_not_tried_again(world: World, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(HOT_SETTINGS, "statement_timeout", "1s")
    queue = await idle_replica(world, db_pool_size=1)
    job = await queue.enqueue()
    async with logged(queue) as statements, holding(world, STORING):
        refused(await post(queue, "/lease", queues=["q"], wait_seconds=20))
    assert statements == ["lease"]
    again = await queue.lease_one()
    assert (again["id"], again["attempt"]) == (job["id"], 1)


# ---------------------------------------------------------------------------------------------------------------------
# The submitter goes away


async def test_an_enqueue_whose_client_goes_away_is_stored_and_told_all_the_same(
    world: World, queue: Replica
):
    async with holding(world, STORING):
        ahead = post(queue, "/jobs", queue="q", payload="ahead")
        await world.blocked()
        async with httpx.AsyncClient(base_url=queue.http.base_url) as vanishing:
            posting = asyncio.create_task(vanishing.post("/jobs", json={"queue": "q", "payload": "gone"}))
            await in_line(enqueues(queue), 1)
            posting.cancel()
    await ahead
    await queue.events.wait_for(JobEnqueued, 2)
    assert [job["payload"] for job in await queue.lease(max_jobs=10)] == ["ahead", "gone"]


async def test_an_enqueue_that_is_cancelled_in_line_is_stored_and_calls_who_waits(
    world: World, queue: Replica
):
    service = queue.machine.service
    wanted = JobRequest(queue="q", payload=b"1")
    async with holding(world, STORING):
        enqueueing = [asyncio.create_task(service.enqueue(wanted)) for _ in range(2)]
        await world.blocked()
        for task in enqueueing:
            task.cancel()
        await asyncio.wait(enqueueing)
    await queue.events.wait_for(JobEnqueued, 2)
    assert len(await queue.lease(max_jobs=10)) == 2


async def test_a_claim_whose_request_is_cancelled_is_released_uncounted(world: World, queue: Replica):
    job = await queue.enqueue()
    service = queue.machine.service
    async with holding(world, STORING):
        gone = asyncio.get_running_loop().create_future()
        leasing = asyncio.create_task(service.lease(LeaseRequest(("q",)), gone))
        await world.blocked()
        leasing.cancel()
        await asyncio.wait({leasing})
    await queue.events.wait_for(AttemptEnded, 1)
    again = await queue.lease_one()
    assert (again["id"], again["attempt"]) == (job["id"], 1)


async def test_a_claim_whose_client_goes_away_goes_to_the_next_in_line(world: World, queue: Replica):
    job = await queue.enqueue()
    async with holding(world, STORING), httpx.AsyncClient(base_url=queue.http.base_url) as vanishing:
        leasing = asyncio.create_task(vanishing.post("/lease", json={"queues": ["q"], "wait_seconds": 20}))
        await world.blocked()
        waiting = asyncio.create_task(queue.lease_one(wait_seconds=20))
        [batcher] = queue.machine.service._claims._batchers.values()
        await in_line(batcher, 1)
        leasing.cancel()
        await asyncio.wait({leasing})
    again = await waiting
    assert (again["id"], again["attempt"]) == (job["id"], 1)


# ---------------------------------------------------------------------------------------------------------------------
# A full line, and the end


async def test_a_full_line_is_told_as_unavailable(
    world: World, queue: Replica, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(batching, "LINE_MAX", 3)
    async with holding(world, STORING):
        posting = [post(queue, "/jobs", queue="q")]
        await world.blocked()
        posting += [post(queue, "/jobs", queue="q") for _ in range(3)]
        await in_line(enqueues(queue), 3)
        refused(await post(queue, "/jobs", queue="q"))
    assert {answer.status_code for answer in await asyncio.gather(*posting)} == {201}
    assert await count(world, "jobs") == 4


async def test_a_service_that_stops_writes_and_answers_all_that_is_in_line(world: World, queue: Replica):
    async with holding(world, STORING):
        posting = [post(queue, "/jobs", queue="q")]
        await world.blocked()
        posting += [post(queue, "/jobs", queue="q") for _ in range(9)]
        await in_line(enqueues(queue), 9)
        queue.server.should_exit = True
        stopping = asyncio.create_task(queue.machine.service.stop())
    answers = await asyncio.gather(*posting)
    await stopping
    assert {answer.status_code for answer in answers} == {201}
    assert await count(world, "jobs") == 10


async def test_a_claim_that_outlives_its_request_is_given_back_before_the_service_has_stopped(
    world: World, queue: Replica
):
    job = await queue.enqueue()
    service = queue.machine.service
    async with holding(world, STORING):
        gone = asyncio.get_running_loop().create_future()
        leasing = asyncio.create_task(service.lease(LeaseRequest(("q",)), gone))
        await world.blocked()
        leasing.cancel()
        await asyncio.wait({leasing})
        stopping = asyncio.create_task(service.stop())
        done, _ = await asyncio.wait({stopping}, timeout=0.2)
        assert not done
    await stopping
    assert await count(world, "ready", f"id = '{job['id']}'") == 1


async def test_what_a_cut_off_flush_was_writing_is_refused_and_the_line_goes_on(world: World, queue: Replica):
    async with holding(world, STORING):
        first = post(queue, "/jobs", queue="q")
        await world.blocked()
        posting = [post(queue, "/jobs", queue="q") for _ in range(3)]
        await in_line(enqueues(queue), 3)
        [flushing] = enqueues(queue)._flushing
        flushing.cancel()
        refused(await first)
    assert {answer.status_code for answer in await asyncio.gather(*posting)} == {201}


async def test_a_flush_that_is_stuck_does_not_keep_the_next_one(world: World, queue: Replica):
    connection = await world.connect()
    await connection.execute(
        "CREATE FUNCTION leaseq.stick() RETURNS trigger LANGUAGE plpgsql AS $$"
        " BEGIN PERFORM pg_advisory_xact_lock(1); RETURN NEW; END $$;"
        "CREATE TRIGGER stick BEFORE INSERT ON leaseq.jobs FOR EACH ROW WHEN (NEW.queue = 'sticky')"
        " EXECUTE FUNCTION leaseq.stick();"
        "SELECT pg_advisory_lock(1)"
    )
    stuck = post(queue, "/jobs", queue="sticky")
    await world.blocked()
    answers = await asyncio.gather(*(queue.enqueue() for _ in range(5)))
    assert len({job["id"] for job in answers}) == 5
    assert not stuck.done()
    await connection.execute("SELECT pg_advisory_unlock(1)")
    assert (await stuck).status_code == 201
