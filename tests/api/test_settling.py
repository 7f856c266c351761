"""Settling: what a worker says of a job it has leased, again and again, in time or too late."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Any
from uuid import uuid4

import httpx
import pytest

from app.queue.events import AttemptEnded, JobCompleted
from app.queue.model import Outcome
from tests.conftest import Replica, World

ERROR = {"message": "no such host"}
BODIES: dict[str, dict[str, Any]] = {
    "ack": {},
    # Later than any test lasts: a retry becomes ready by itself when its time has come.
    "fail": {"error": ERROR, "retry_in_seconds": 600},
    "release": {},
    "heartbeat": {},
}
ENDING = ("ack", "fail", "release")
UNKNOWN_JOB = "0190a4f4-3b7a-7c39-8f3e-000000000000"


async def leased_job(queue: Replica, **fields: Any) -> dict[str, Any]:
    await queue.enqueue(**fields)
    return await queue.lease_one(worker="w")


async def everything(queue: Replica, job_id: str) -> Any:
    """Return all that there is to know of a job, and the counts."""
    return await queue.job(job_id), await queue.attempts(job_id), await queue.stats()


def instant(text: str) -> datetime:
    return datetime.fromisoformat(text)


def lost(answer: httpx.Response) -> str:
    """Return the state that a refusal tells."""
    problem = answer.json()
    assert (answer.status_code, problem["code"]) == (409, "lease_lost"), answer.text
    state: str = problem["state"]
    return state


# ack


async def test_an_acked_job_is_completed_and_keeps_all_it_had_and_its_result(queue: Replica):
    enqueued = await queue.enqueue(payload={"n": 1}, tags=["t"], metadata={"m": 1})
    leased = await queue.lease_one(worker="w")
    answer = await queue.verb("ack", leased, result={"sent": True})
    job = answer.json()
    assert answer.status_code == 200
    assert job == enqueued | {
        "state": "completed",
        "attempt": 1,
        "worker": "w",
        "result": {"sent": True},
        "started_at": job["started_at"],
        "finished_at": job["finished_at"],
    }
    assert instant(job["started_at"]) <= instant(job["finished_at"])
    assert await queue.job(job["id"]) == job


async def test_a_result_may_be_left_out(queue: Replica):
    assert (await queue.verb("ack", await leased_job(queue))).json()["result"] is None


async def test_a_result_is_bounded_like_a_payload(world: World):
    queue = await world.replica(max_payload_bytes=10)
    leased = await leased_job(queue)
    refused = await queue.verb("ack", leased, result="123456789")
    assert (refused.status_code, refused.json()["code"]) == (413, "payload_too_large")
    assert (await queue.job(leased["id"]))["state"] == "active"
    assert (await queue.verb("ack", leased, result="12345678")).status_code == 200


# fail


async def test_a_failed_attempt_is_retried_after_its_backoff(queue: Replica):
    now = queue.clock.move(0)
    leased = await leased_job(queue, backoff={"strategy": "fixed", "initial_seconds": 8, "jitter": "none"})
    settled = await queue.fail(leased)
    assert settled["state"] == "retry"
    assert instant(settled["run_at"]) == now + timedelta(seconds=8)
    job = await queue.job(leased["id"])
    assert (job["state"], job["run_at"]) == ("retry", settled["run_at"])
    assert (job["attempt"], job["retry_count"], job["last_error"]) == (1, 0, {"message": "boom"})


@pytest.mark.parametrize("jitter", ["equal", "full"])
async def test_jitter_shortens_the_backoff_and_never_lengthens_it(queue: Replica, jitter: str):
    now = queue.clock.move(0)
    backoff = {"strategy": "fixed", "initial_seconds": 100, "jitter": jitter}
    for _ in range(5):
        settled = await queue.fail(await leased_job(queue, backoff=backoff))
        delay_seconds = (instant(settled["run_at"]) - now).total_seconds()
        assert (50 if jitter == "equal" else 0) <= delay_seconds <= 100


async def test_retry_false_fails_the_job_at_once(queue: Replica):
    leased = await leased_job(queue, payload=[1])
    assert await queue.fail(leased, "bad input", retry=False) == {"state": "failed"}
    job = await queue.job(leased["id"])
    assert (job["state"], job["reason"], job["attempt"]) == ("failed", "not_retryable", 1)
    assert (job["payload"], job["last_error"]) == ([1], {"message": "bad input"})


async def test_retry_in_seconds_changes_the_delay_only(queue: Replica):
    now = queue.clock.move(0)
    leased = await leased_job(queue, max_retries=1)
    settled = await queue.fail(leased, retry_in_seconds=500)
    assert instant(settled["run_at"]) == now + timedelta(seconds=500)
    queue.clock.move(500)
    await queue.maintain()
    assert await queue.fail(await queue.lease_one(), retry_in_seconds=500) == {"state": "failed"}


async def test_an_error_is_kept_whole_and_cut_at_its_bounds(queue: Replica):
    leased = await leased_job(queue)
    error = {"message": "ü" * 3000, "type": "Boom", "stack": "s" * 20_000}
    await queue.verb("fail", leased, error=error)
    kept = {"message": "ü" * 2048, "type": "Boom", "stack": "s" * 16 * 1024}
    assert (await queue.job(leased["id"]))["last_error"] == kept
    assert (await queue.attempts(leased["id"]))[0]["error"] == kept


async def test_a_bad_body_is_refused_and_the_lease_stands(queue: Replica):
    leased = await leased_job(queue)
    before = await everything(queue, leased["id"])
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("fail", {}),
        ("fail", {"error": {}}),
        ("fail", {"error": "boom"}),
        ("fail", {"error": {"message": "a\x00b"}}),
        ("fail", {"error": {"message": "", "type": "\x00"}}),
        ("fail", {"error": {"message": "", "stack": "\x00"}}),
        ("fail", {"error": ERROR, "retry": "no"}),
        ("fail", {"error": ERROR, "retry_in_seconds": -1}),
        ("release", {"delay_seconds": -1}),
        ("heartbeat", {"extend_seconds": -1}),
        ("heartbeat", {"extend_seconds": 43_201}),
        ("ack", {"answer": 42}),
        ("ack", {"lease_id": None}),
    ]
    for verb, fields in bodies:
        answer = await queue.verb(verb, leased, **fields)
        assert (verb, fields, answer.status_code) == (verb, fields, 422)
    assert await everything(queue, leased["id"]) == before


# release


async def test_a_released_job_is_ready_again_and_the_attempt_does_not_count(queue: Replica):
    enqueued = await queue.enqueue(max_retries=0)
    for _ in range(3):
        leased = await queue.lease_one()
        assert leased["attempt"] == 1
        answer = await queue.verb("release", leased)
        assert (answer.status_code, answer.json()) == (200, {"state": "ready"})
        assert await queue.job(enqueued["id"]) == enqueued
    attempts = await queue.attempts(enqueued["id"])
    assert [(each["attempt"], each["outcome"]) for each in attempts] == [(1, "released")] * 3


async def test_a_job_released_with_a_delay_is_scheduled(queue: Replica):
    leased = await leased_job(queue)
    due = queue.clock.move(0) + timedelta(seconds=60)
    settled = (await queue.verb("release", leased, delay_seconds=60)).json()
    assert settled["state"] == "scheduled"
    assert instant(settled["run_at"]) == due
    assert (await queue.job(leased["id"]))["state"] == "scheduled"

    queue.clock.set(due - timedelta(microseconds=1))
    await queue.maintain()
    assert await queue.lease() == []
    queue.clock.set(due)
    await queue.maintain()
    assert (await queue.lease_one())["attempt"] == 1


async def test_a_release_between_failures_leaves_the_budget_as_it_was(queue: Replica):
    await queue.enqueue(max_retries=1)
    await queue.fail(await queue.lease_one(), retry_in_seconds=0)
    await queue.maintain()
    await queue.verb("release", await queue.lease_one())
    second = await queue.lease_one()
    assert second["attempt"] == 2
    assert await queue.fail(second) == {"state": "failed"}


# heartbeat


async def test_a_heartbeat_extends_the_lease_from_now(queue: Replica):
    leased = await leased_job(queue, lease_seconds=10)
    now = queue.clock.move(5)
    answer = await queue.verb("heartbeat", leased, extend_seconds=60)
    assert answer.status_code == 200
    expires_at = answer.json()["lease_expires_at"]
    assert answer.json() == {
        "lease_expires_at": expires_at,
        "cancel_requested": False,
        "directive": "continue",
    }
    assert instant(expires_at) == now + timedelta(seconds=60)


async def test_a_heartbeat_never_shortens_a_lease(queue: Replica):
    leased = await leased_job(queue, lease_seconds=100)
    for extend_seconds in (0, 50):
        beat = (await queue.verb("heartbeat", leased, extend_seconds=extend_seconds)).json()
        assert beat["lease_expires_at"] == leased["lease_expires_at"]


async def test_heartbeats_never_extend_past_timeout_seconds(queue: Replica):
    start = queue.clock.move(0)
    leased = await leased_job(queue, lease_seconds=10, timeout_seconds=25)
    ends = []
    for _ in range(3):
        queue.clock.move(9)
        beat = (await queue.verb("heartbeat", leased)).json()
        ends.append((instant(beat["lease_expires_at"]) - start).total_seconds())
    assert ends == [19, 25, 25]


async def test_a_job_whose_heartbeats_go_on_is_not_taken_away(queue: Replica):
    leased = await leased_job(queue, lease_seconds=10)
    for _ in range(5):
        queue.clock.move(9)
        await queue.verb("heartbeat", leased)
        await queue.maintain()
    assert (await queue.verb("ack", leased)).status_code == 200


# Repeats


@pytest.mark.parametrize("verb", ENDING)
async def test_the_same_verb_again_gets_the_recorded_answer_and_the_first_body_wins(
    queue: Replica, verb: str
):
    bodies: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "ack": ({"result": 1}, {"result": 2}),
        "fail": ({"error": ERROR}, {"error": {"message": "other"}, "retry": False}),
        "release": ({"delay_seconds": 60}, {"delay_seconds": 0}),
    }
    first_body, other_body = bodies[verb]
    leased = await leased_job(queue)
    first = await queue.verb(verb, leased, **first_body)
    assert first.status_code == 200
    before = await everything(queue, leased["id"])
    for body in (first_body, other_body):
        again = await queue.verb(verb, leased, **body)
        assert (again.status_code, again.json()) == (200, first.json())
    assert await everything(queue, leased["id"]) == before
    assert len(queue.events.of(JobCompleted) + queue.events.of(AttemptEnded)) == 1


async def test_the_recorded_answer_stays_when_the_job_has_gone_on(queue: Replica):
    leased = await leased_job(queue)
    first = await queue.fail(leased, retry_in_seconds=10)
    queue.clock.move(10)
    await queue.maintain()
    second = await queue.lease_one()
    assert await queue.fail(leased, retry=False) == first
    assert (await queue.verb("ack", second)).status_code == 200
    assert await queue.fail(leased, retry=False) == first


@pytest.mark.parametrize("first", ENDING)
async def test_another_verb_after_the_first_finds_the_lease_lost(queue: Replica, first: str):
    leased = await leased_job(queue)
    assert (await queue.verb(first, leased, **BODIES[first])).status_code == 200
    before = await everything(queue, leased["id"])
    for verb in BODIES.keys() - {first}:
        assert lost(await queue.verb(verb, leased, **BODIES[verb])) == before[0]["state"]
    assert await everything(queue, leased["id"]) == before


# Leases that do not stand


async def test_a_late_word_on_an_expired_lease_is_refused_and_changes_nothing(queue: Replica):
    leased = await leased_job(queue, backoff={"jitter": "none"})
    queue.clock.move(30)
    await queue.maintain()
    for state in ("retry", "ready", "active"):
        if state == "ready":
            queue.clock.move(1)
            await queue.maintain()
        elif state == "active":
            await queue.lease_one(worker="another")
        before = await everything(queue, leased["id"])
        assert before[0]["state"] == state
        for verb, body in BODIES.items():
            assert (verb, lost(await queue.verb(verb, leased, **body))) == (verb, state)
        assert await everything(queue, leased["id"]) == before


async def test_a_word_after_the_end_of_the_lease_but_before_the_reaper_counts(queue: Replica):
    for verb, body in BODIES.items():
        leased = await leased_job(queue, lease_seconds=10)
        queue.clock.move(3600)
        assert (verb, (await queue.verb(verb, leased, **body)).status_code) == (verb, 200)
        queue.clock.move(9)
        await queue.maintain()
    ended = queue.events.of(AttemptEnded)
    assert Outcome.LEASE_EXPIRED not in {event.outcome for event in ended}


@pytest.mark.parametrize(
    "lease_id_of",
    [
        lambda _other: str(uuid4()),
        lambda _other: "not-a-uuid",
        lambda _other: "",
        lambda other: other["lease_id"],
        lambda other: other["id"],
    ],
    ids=["unknown", "malformed", "empty", "of another job", "a job's id"],
)
async def test_a_wrong_lease_is_refused_and_changes_nothing(
    queue: Replica, lease_id_of: Callable[[dict[str, Any]], str]
):
    other, leased = await leased_job(queue), await leased_job(queue)
    before = await everything(queue, leased["id"])
    wrong = leased | {"lease_id": lease_id_of(other)}
    for verb, body in BODIES.items():
        assert (verb, lost(await queue.verb(verb, wrong, **body))) == (verb, "active")
    assert await everything(queue, leased["id"]) == before
    assert (await queue.job(other["id"]))["state"] == "active"


async def test_of_an_unknown_job_every_verb_says_not_found(queue: Replica):
    for job_id in (UNKNOWN_JOB, "no-uuid", "0190A4F43B7A7C398F3E000000000000"):
        for lease_id in (str(uuid4()), "malformed"):
            for verb, body in BODIES.items():
                answer = await queue.verb(verb, {"id": job_id, "lease_id": lease_id}, **body)
                assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


async def test_of_a_deleted_job_a_repeat_says_not_found(queue: Replica):
    leased = await leased_job(queue)
    await queue.verb("ack", leased)
    await queue.http.delete(f"/jobs/{leased['id']}")
    assert (await queue.verb("ack", leased)).status_code == 404


# COMMIT


HOLD_COMMITS = """
CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS
  $$ BEGIN PERFORM pg_advisory_xact_lock(1); RETURN NULL; END $$;
CREATE CONSTRAINT TRIGGER hold AFTER INSERT ON deltas
  DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION hold();
CREATE CONSTRAINT TRIGGER hold AFTER UPDATE ON leases
  DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION hold();
"""


@asynccontextmanager
async def no_commit_ends(world: World) -> AsyncIterator[None]:
    """Keep whatever changes jobs within the block from ending its COMMIT: a deferred trigger waits there."""
    connection = await world.connect()
    await connection.execute(HOLD_COMMITS)
    async with connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock(1)")
        yield


@pytest.mark.parametrize(
    "call", ["enqueue", "lease", *BODIES, "cancel", "cancel while active", "retry", "delete"]
)
async def test_the_answer_comes_after_the_commit(world: World, queue: Replica, call: str):
    jobs = {name: await queue.enqueue(name) for name in ("waiting", "leased", "dead")}
    leased = await queue.lease_one("leased")
    await queue.fail(await queue.lease_one("dead"), retry=False)
    path = {name: f"/jobs/{job['id']}" for name, job in jobs.items()}
    http = queue.http
    requests: dict[str, Callable[[], Any]] = {
        "enqueue": lambda: http.post("/jobs", json={"queue": "new"}),
        "lease": lambda: http.post("/lease", json={"queues": ["waiting"]}),
        "cancel": lambda: http.post(f"{path['waiting']}/cancel"),
        "cancel while active": lambda: http.post(f"{path['leased']}/cancel"),
        "retry": lambda: http.post(f"{path['dead']}/retry"),
        "delete": lambda: http.delete(path["dead"]),
    }

    async def answer() -> httpx.Response:
        if call in BODIES:
            return await queue.verb(call, leased, **BODIES[call])
        result: httpx.Response = await requests[call]()
        return result

    before = (await http.get("/jobs")).json()
    async with no_commit_ends(world):
        answering = asyncio.create_task(answer())
        await world.blocked()
        assert (await http.get("/jobs")).json() == before
        assert not answering.done()
    assert (await answering).is_success
    if call != "heartbeat":
        assert (await http.get("/jobs")).json() != before
