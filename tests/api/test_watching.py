"""Requests that wait for the end of a job: who answers them, when, and with what."""

import asyncio
from contextlib import suppress
from typing import Any

import httpx
import pytest

from app.engine import watching
from tests.conftest import Replica, World
from tests.store.conftest import logged

Reply = asyncio.Task[httpx.Response]


async def until_watching(queue: Replica, count: int) -> None:
    """Wait until so many requests have looked, and wait to be called."""
    async with asyncio.timeout(10):
        while (
            sum(
                bool(call._waiters)
                for calls in queue.machine.service.watching._watched.values()
                for call in calls
            )
            != count
        ):
            await asyncio.sleep(0.002)


async def watched(queue: Replica, job: dict[str, Any], count: int = 1) -> Reply:
    """Begin to wait for a job's end; return when the request sleeps."""
    reply = asyncio.create_task(queue.http.get(f"/jobs/{job['id']}?wait_seconds=25"))
    await until_watching(queue, count)
    return reply


async def called(reply: Reply) -> httpx.Response:
    """Return the answer of a request that was called: its time was not up yet."""
    async with asyncio.timeout(15):
        return await reply


@pytest.fixture
def no_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is answered was called for: nobody looks by himself."""
    monkeypatch.setattr(watching, "LOOK_SECONDS", 3600)


async def test_without_a_wait_a_job_is_shown_as_it_stands(queue: Replica):
    job = await queue.enqueue()
    for query in ("", "?wait_seconds=0"):
        answer = await queue.http.get(f"/jobs/{job['id']}{query}")
        assert (answer.status_code, answer.json()) == (200, job)


@pytest.mark.usefixtures("no_looks")
@pytest.mark.parametrize("end", ["ack", "fail", "settle", "cancel", "cancel while active"])
async def test_an_end_made_by_this_process_answers_at_once(queue: Replica, end: str):
    job = await queue.enqueue()
    reply = await watched(queue, job)
    state = {"ack": "completed", "settle": "completed", "fail": "failed"}.get(end, "cancelled")
    if end == "cancel":
        await queue.http.post(f"/jobs/{job['id']}/cancel")
    else:
        leased = await queue.lease_one()
        match end:
            case "ack":
                await queue.verb("ack", leased, result={"pages": 3})
            case "settle":
                item = {
                    "job_id": job["id"],
                    "lease_id": leased["lease_id"],
                    "outcome": "ack",
                    "result": {"pages": 3},
                }
                await queue.http.post("/settle", json={"items": [item]})
            case "fail":
                await queue.fail(leased, retry=False)
            case _:
                await queue.http.post(f"/jobs/{job['id']}/cancel")
                await queue.fail(leased)
    answer = await called(reply)
    assert (answer.status_code, answer.json()["state"]) == (200, state)
    assert answer.json() == await queue.job(job["id"])
    if state == "completed":
        assert answer.json()["result"] == {"pages": 3}


@pytest.mark.usefixtures("no_looks")
async def test_the_end_by_the_reaper_answers_too(queue: Replica):
    job = await queue.enqueue(max_retries=0)
    reply = await watched(queue, job)
    await queue.lease_one()
    queue.clock.move(31)
    await queue.maintain()
    assert (await called(reply)).json()["state"] == "failed"


@pytest.mark.usefixtures("no_looks")
async def test_the_end_by_the_start_deadline_answers_too(queue: Replica):
    job = await queue.enqueue(expires_in_seconds=60)
    reply = await watched(queue, job)
    queue.clock.move(61)
    await queue.maintain()
    assert (await called(reply)).json()["state"] == "expired"


@pytest.mark.usefixtures("no_looks")
async def test_a_retry_is_no_end(queue: Replica):
    job = await queue.enqueue(backoff={"initial_seconds": 0})
    reply = await watched(queue, job)
    await queue.fail(await queue.lease_one())
    await queue.maintain()
    await queue.verb("ack", await queue.lease_one())
    ended = (await called(reply)).json()
    assert (ended["state"], ended["attempt"]) == ("completed", 2)


@pytest.mark.usefixtures("no_looks")
async def test_everybody_who_waits_for_a_job_is_answered(queue: Replica):
    job, other = await queue.enqueue(), await queue.enqueue("other")
    replies = [await watched(queue, job, count) for count in (1, 2)]
    another = await watched(queue, other, 3)
    await queue.verb("ack", await queue.lease_one())
    assert [(await called(reply)).json()["state"] for reply in replies] == ["completed"] * 2
    assert not another.done()
    await queue.verb("ack", await queue.lease_one("other"))
    assert (await called(another)).json()["id"] == other["id"]


async def test_an_end_made_elsewhere_answers_too(queue: Replica, world: World):
    elsewhere = await world.replica()
    job = await queue.enqueue()
    reply = await watched(queue, job)
    await elsewhere.verb("ack", await elsewhere.lease_one())
    assert (await called(reply)).json()["state"] == "completed"


@pytest.mark.usefixtures("no_looks")
async def test_one_look_is_for_all_that_is_watched_and_none_holds_a_connection(world: World):
    queue = await world.replica(db_pool_size=1)
    elsewhere = await world.replica()
    jobs = [await queue.enqueue() for _ in range(12)]
    replies = [await watched(queue, job, count) for count, job in enumerate(jobs, 1)]
    assert queue.machine.database.hot.get_idle_size() == queue.machine.database.hot.get_size()
    assert queue.machine.database.looking.pool.checkedout() == 0  # type: ignore[attr-defined]
    for job in await elsewhere.lease(max_jobs=11):
        await elsewhere.verb("ack", job)
    async with logged(queue) as statements:
        await queue.machine.service.watching.look()
    assert statements.count("living") == 1
    ended = await asyncio.gather(*map(called, replies[:11]))
    assert {answer.json()["state"] for answer in ended} == {"completed"}
    assert not replies[11].done()
    await queue.verb("ack", await queue.lease_one())
    assert (await called(replies[11])).json()["state"] == "completed"


async def test_nobody_looks_while_nobody_watches(world: World):
    queue = await world.replica(db_pool_size=1)
    await queue.first_round()
    job = await queue.enqueue()
    reply = await watched(queue, job)
    await queue.verb("ack", await queue.lease_one())
    await reply
    async with logged(queue) as statements:
        await queue.machine.service.watching.look()
    assert statements == []


async def test_a_wait_in_vain_is_answered_with_the_job_as_it_stands_then(queue: Replica):
    job = await queue.enqueue()
    answer = await queue.http.get(f"/jobs/{job['id']}?wait_seconds=0.01")
    assert (answer.status_code, answer.json()) == (200, job)


@pytest.mark.usefixtures("no_looks")
async def test_a_job_that_has_ended_is_answered_at_once(queue: Replica):
    job = await queue.enqueue()
    await queue.verb("ack", await queue.lease_one())
    answer = await queue.http.get(f"/jobs/{job['id']}?wait_seconds=30")
    assert answer.json()["state"] == "completed"


@pytest.mark.usefixtures("no_looks")
@pytest.mark.parametrize("job_id", ["0198f2c1-9a4e-7c3d-8f21-5b6a7c8d9e0f", "none"])
async def test_an_unknown_job_is_not_found_at_once(queue: Replica, job_id: str):
    answer = await queue.http.get(f"/jobs/{job_id}?wait_seconds=30")
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
    assert queue.machine.service.watching.watchers == 0


@pytest.mark.usefixtures("no_looks")
async def test_a_job_that_is_deleted_while_it_is_watched_is_not_found(queue: Replica, world: World):
    elsewhere = await world.replica()
    job = await queue.enqueue()
    reply = await watched(queue, job)
    await elsewhere.verb("ack", await elsewhere.lease_one())
    assert (await elsewhere.http.delete(f"/jobs/{job['id']}")).status_code == 204
    await queue.machine.service.watching.look()
    answer = await called(reply)
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


async def test_a_client_that_goes_away_leaves_at_once(queue: Replica):
    job = await queue.enqueue()
    reply = await watched(queue, job)
    reply.cancel()
    with suppress(asyncio.CancelledError):
        await reply
    async with asyncio.timeout(10):
        while queue.machine.service.watching.watchers:
            await asyncio.sleep(0.002)
    assert not queue.machine.service.watching._watched


@pytest.mark.usefixtures("no_looks")
async def test_a_stop_answers_all_with_the_present_state(queue: Replica):
    jobs = [await queue.enqueue() for _ in range(2)]
    replies = [await watched(queue, job, count) for count, job in enumerate(jobs, 1)]
    queue.server.stop()
    answers = await asyncio.gather(*map(called, replies))
    assert [(answer.status_code, answer.json()) for answer in answers] == [(200, job) for job in jobs]


async def test_whoever_comes_during_a_stop_does_not_wait(queue: Replica):
    job = await queue.enqueue()
    queue.machine.service.drain()
    assert (await queue.http.get(f"/jobs/{job['id']}?wait_seconds=30")).json() == job


async def test_more_than_the_setting_allows_are_told_to_come_back(world: World):
    queue = await world.replica(max_job_watchers=1)
    job = await queue.enqueue()
    reply = await watched(queue, job)
    answer = await queue.http.get(f"/jobs/{job['id']}?wait_seconds=30")
    assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
    assert int(answer.headers["retry-after"]) > 0
    assert (await queue.job(job["id"])) == job  # who does not wait is not counted
    await queue.verb("ack", await queue.lease_one())
    assert (await called(reply)).json()["state"] == "completed"


@pytest.mark.parametrize(
    "query", ["wait_seconds=-1", "wait_seconds=30.1", "wait_seconds=nan", "wait_seconds=x", "wait=1"]
)
async def test_a_wait_that_can_not_be_is_refused(queue: Replica, query: str):
    job = await queue.enqueue()
    answer = await queue.http.get(f"/jobs/{job['id']}?{query}")
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid")


async def test_a_wait_says_nothing_of_the_speed_of_answers(queue: Replica):
    job = await queue.enqueue()
    await queue.http.get(f"/jobs/{job['id']}?wait_seconds=0.01")
    series = 'leaseq_http_request_duration_seconds_count{handler="/jobs/{job_id}",method="GET"}'
    assert f"{series} 0.0" in (await queue.http.get("/metrics")).text
    await queue.job(job["id"])
    assert f"{series} 1.0" in (await queue.http.get("/metrics")).text


async def test_a_gauge_shows_who_waits(queue: Replica):
    job = await queue.enqueue()
    reply = await watched(queue, job)
    assert "\nleaseq_job_watchers 1.0\n" in (await queue.http.get("/metrics")).text
    await queue.verb("ack", await queue.lease_one())
    await reply
    assert "\nleaseq_job_watchers 0.0\n" in (await queue.http.get("/metrics")).text
