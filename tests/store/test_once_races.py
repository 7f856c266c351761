"""Keys and batches when two things happen at once, when strangers hold rows, and when connections die."""

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from app.queue.events import JobEnqueued
from tests.conftest import Replica, World
from tests.store.conftest import holding, idle_replica
from tests.wire import Cut, Wire, wire_to

KEY = "SELECT FROM unique_keys WHERE key = $1 FOR UPDATE"
STORING = "LOCK TABLE deltas IN SHARE MODE"
"""Stops whoever stores, in the middle of a transaction."""
TERMINATE = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
 WHERE datname = current_database() AND application_name = 'leaseq' AND wait_event_type = 'Lock'"""


def post(queue: Replica, key: str | None = "k", **fields: Any) -> "asyncio.Task[httpx.Response]":
    unique = {} if key is None else {"unique": {"key": key, **fields.pop("unique", {})}}
    return asyncio.create_task(queue.http.post("/jobs", json={"queue": "q", **unique, **fields}))


async def count(world: World, queue: str = "q") -> int:
    connection = await world.connect()
    number: int = await connection.fetchval("SELECT count(*) FROM jobs WHERE queue = $1", queue)
    return number


@pytest.mark.parametrize("scope", ["queued", "unfinished"])
@pytest.mark.parametrize("end", ["ack", "lease", "cancel"])
async def test_a_newcomer_sees_what_became_of_the_holder_while_it_waited(
    world: World, queue: Replica, scope: str, end: str
):
    first = (await post(queue, unique={"scope": scope})).json()
    leased = await queue.lease_one() if end == "ack" else {}
    async with holding(world, KEY, "k"):
        newcomer = post(queue, unique={"scope": scope})
        await world.blocked()
        # The busy verbs do not wait for a key that somebody holds.
        if end == "ack":
            assert (await queue.verb("ack", leased)).status_code == 200
        elif end == "lease":
            assert (await queue.lease_one())["id"] == first["id"]
        else:
            assert (await queue.http.post(f"/jobs/{first['id']}/cancel")).status_code == 200
    answer = await newcomer
    still_held = end == "lease" and scope == "unfinished"
    assert answer.status_code == (200 if still_held else 201), answer.text
    assert (answer.json()["id"] == first["id"]) is still_held


async def test_a_newcomer_that_waits_for_a_deletion_is_stored(world: World, queue: Replica):
    window = {"scope": "window", "window_seconds": 600}
    first = (await post(queue, unique=window)).json()
    await queue.verb("ack", await queue.lease_one())
    other = await idle_replica(world)
    async with holding(world, KEY, "k"):
        deleting = asyncio.create_task(queue.http.delete(f"/jobs/{first['id']}"))
        await world.blocked()
        newcomer = post(other, unique=window)
        await world.blocked(2)
    assert (await deleting).status_code == 204
    answer = await newcomer
    assert (answer.status_code, answer.json()["id"] == first["id"]) == (201, False)


async def test_of_a_retry_and_a_newcomer_the_first_gets_the_key(world: World, queue: Replica):
    other = await idle_replica(world)
    first = (await post(queue)).json()
    await queue.http.post(f"/jobs/{first['id']}/cancel")
    async with holding(world, KEY, "k"):
        retrying = asyncio.create_task(queue.http.post(f"/jobs/{first['id']}/retry"))
        await world.blocked()
        newcomer = post(other)
        await world.blocked(2)
    assert (await retrying).status_code == 200
    answer = await newcomer
    assert (answer.status_code, answer.json()["id"]) == (200, first["id"])


async def test_a_replacement_that_a_lease_outruns_returns_the_holder(world: World, queue: Replica):
    first = (await post(queue, payload=1)).json()
    async with holding(world, "SELECT FROM ready WHERE id = $1 FOR UPDATE", first["id"]) as stranger:
        replacing = post(queue, unique={"on_conflict": "replace"}, payload=2)
        await world.blocked()
        # What a claim does, as far as the place is concerned.
        await stranger.execute("DELETE FROM ready WHERE id = $1", first["id"])
        await stranger.execute(
            "INSERT INTO leases (id, queue, type, priority, attempt, noted, lease_id, since, leased_at, expires_at,"
            " lease_seconds, cancel_requested) VALUES ($1, 'q', 'default', 5, 1, false, gen_random_uuid(), now(), now(),"
            " now() + interval '1 hour', 3600, false)",
            first["id"],
        )
        await stranger.execute("INSERT INTO deltas (queue, ready, active) VALUES ('q', -1, 1)")
        await stranger.execute("COMMIT; BEGIN")
    found = (await replacing).json()
    assert (found["id"], found["payload"], found["state"]) == (first["id"], 1, "active")
    assert "replaced" not in found


async def test_strangers_locks_on_keys_stall_no_other_job_and_the_blocked_ones_are_told(
    world: World, queue: Replica, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("app.engine.once.LOCK_SECONDS", 0.2)
    # Two that wait use up the time there is for those that wait, as they do in earnest.
    monkeypatch.setattr("app.engine.once.ALONE_LOCK_SECONDS", 0.2)
    monkeypatch.setattr("app.engine.once.ALONE_SECONDS", 0.4)
    held = ("held", "held too", "held as well")
    await asyncio.gather(*(post(queue, key) for key in held))
    async with holding(world, "SELECT FROM unique_keys FOR UPDATE"):
        first = post(queue, "held")
        await world.blocked()
        keyed = [post(queue, key) for key in (*held, "a", "held", "b", "c")]
        assert [(await post(queue, None)).status_code for _ in range(3)] == [201] * 3
        answers = await asyncio.gather(first, *keyed)
    assert [answer.status_code for answer in answers] == [503, 503, 503, 503, 201, 503, 201, 201]
    assert int(answers[0].headers["retry-after"]) > 0
    assert [(await post(queue, key)).status_code for key in held] == [200] * 3


ASKS: dict[str, Callable[[Replica], Any]] = {
    "unique": lambda queue: queue.http.post("/jobs", json={"queue": "q", "unique": {"key": "k"}}),
    "idempotent": lambda queue: queue.http.post(
        "/jobs", json={"queue": "q"}, headers={"Idempotency-Key": "k"}
    ),
    "batch": lambda queue: queue.http.post(
        "/jobs/batch", json={"jobs": [{"queue": "q"}, {"queue": "q", "unique": {"key": "k"}}, {"queue": 1}]}
    ),
    "idempotent batch": lambda queue: queue.http.post(
        "/jobs/batch", json={"jobs": [{"queue": "q"}, {"queue": "q"}]}, headers={"Idempotency-Key": "k"}
    ),
}


def made(answer: httpx.Response) -> list[str]:
    """Return the ids of the jobs that a call has stored, all of them told as new."""
    assert answer.is_success, answer.text
    told = answer.json().get("results", [answer.json()])
    assert not any(each.get("duplicate") for each in told)
    return [each["id"] for each in told if "id" in each]


@pytest.fixture
async def wire(world: World) -> Wire:
    return await world.stack.enter_async_context(wire_to(world.database_url))


@pytest.mark.parametrize("cut", Cut)
@pytest.mark.parametrize("ask", ASKS)
async def test_what_a_cut_connection_leaves_open_is_stored_once(world: World, wire: Wire, cut: Cut, ask: str):
    queue = await idle_replica(world, database_url=wire.url, db_pool_size=1)
    await queue.enqueue("warm")
    wire.arm(cut)
    ids = made(await ASKS[ask](queue))
    assert wire.cuts == 1
    assert sorted(job["id"] for job in await queue.lease(max_jobs=9)) == sorted(ids)
    assert await count(world) == len(ids)
    assert len(queue.events.of(JobEnqueued)) == 1 + len(ids)


@pytest.mark.parametrize("ask", ASKS)
async def test_a_backend_that_is_ended_within_the_transaction_leaves_nothing_behind(
    world: World, queue: Replica, ask: str
):
    async with holding(world, STORING) as stranger:
        asking = asyncio.create_task(ASKS[ask](queue))
        await world.blocked()
        await stranger.execute(TERMINATE)
        await world.blocked()
    ids = made(await asking)
    assert await count(world) == len(ids)


@pytest.mark.parametrize("cut", Cut)
async def test_an_ack_whose_connection_is_cut_brings_its_follow_ups_once(world: World, wire: Wire, cut: Cut):
    queue = await idle_replica(world, database_url=wire.url, db_pool_size=1)
    await queue.enqueue()
    job = await queue.lease_one()
    wire.arm(cut)
    answer = await queue.verb("ack", job, then=[{"queue": "next"}, {"queue": "next", "unique": {"key": "k"}}])
    assert (answer.status_code, wire.cuts) == (200, 1)
    assert sorted(answer.json()["then"]) == sorted(
        each["id"] for each in await queue.lease("next", max_jobs=9)
    )
    assert await count(world, "next") == 2


async def test_two_batches_with_the_same_keys_in_turned_order_do_not_wait_in_a_circle(
    world: World, queue: Replica
):
    other = await idle_replica(world)
    jobs = [{"queue": "q", "unique": {"key": f"k{n}"}} for n in range(200)]

    async def batch(replica: Replica, jobs: list[Any]) -> list[Any]:
        answer = await replica.http.post("/jobs/batch", json={"jobs": jobs})
        assert answer.status_code == 200, answer.text
        return list(answer.json()["results"])

    forth, back = await asyncio.gather(batch(queue, jobs), batch(other, jobs[::-1]))
    assert [each["id"] for each in forth] == [each["id"] for each in back[::-1]]
    assert await count(world) == 200
