"""Leases that run out, and the road from a failure to the next attempt or to the dead letter."""

from datetime import datetime, timedelta
from typing import Any

import pytest

from app.queue.events import AttemptEnded
from tests.conftest import Replica, World

MOMENT = timedelta(microseconds=1)
NO_JITTER = {"jitter": "none"}


def instant(text: str) -> datetime:
    return datetime.fromisoformat(text)


async def reach(queue: Replica, moment: datetime) -> None:
    """Let the clock be `moment`, and maintenance be done."""
    queue.clock.set(moment)
    await queue.maintain()


async def let_expire(queue: Replica, leased: dict[str, Any]) -> dict[str, Any]:
    """End a lease by silence, at the very moment of its end; return the job."""
    await reach(queue, instant(leased["lease_expires_at"]))
    return await queue.job(leased["id"])


async def test_a_lease_ends_at_its_expiry_and_not_before(queue: Replica):
    queue.clock.move(0)
    await queue.enqueue()
    leased = await queue.lease_one()
    expires_at = instant(leased["lease_expires_at"])

    await reach(queue, expires_at - MOMENT)
    assert (await queue.job(leased["id"]))["state"] == "active"
    await reach(queue, expires_at)
    assert (await queue.job(leased["id"]))["state"] == "retry"


async def test_an_expired_lease_is_a_failed_attempt_with_an_error_that_says_so(queue: Replica):
    await queue.enqueue(payload=[1])
    leased = await queue.lease_one(worker="w")
    job = await let_expire(queue, leased)
    [attempt] = await queue.attempts(job["id"])
    assert (attempt["attempt"], attempt["worker"], attempt["outcome"]) == (1, "w", "lease_expired")
    assert instant(attempt["ended_at"]) == instant(leased["lease_expires_at"])
    assert attempt["error"]["type"] == "lease_expired"
    assert leased["lease_expires_at"] in attempt["error"]["message"]
    assert job["last_error"] == attempt["error"]
    assert (job["payload"], job["attempt"], job["worker"]) == ([1], 1, None)


async def test_an_expired_lease_lets_another_worker_have_the_job(queue: Replica):
    await queue.enqueue(backoff=NO_JITTER)
    first = await queue.lease_one(worker="dead")
    job = await let_expire(queue, first)
    await reach(queue, instant(job["run_at"]))
    second = await queue.lease_one(worker="alive")
    assert (second["id"], second["attempt"]) == (first["id"], 2)
    assert (await queue.verb("ack", second)).status_code == 200
    assert [each["outcome"] for each in await queue.attempts(job["id"])] == ["lease_expired", "acked"]


@pytest.mark.parametrize("ending", ["fail", "silence"])
async def test_attempts_come_after_1_2_and_4_seconds_and_then_the_dead_letter(queue: Replica, ending: str):
    queue.clock.move(0)
    enqueued = await queue.enqueue(
        payload={"keep": "me"}, tags=["t"], metadata={"m": 1}, backoff=NO_JITTER, lease_seconds=10
    )
    delays = []
    for attempt in range(1, 5):
        leased = await queue.lease_one(worker=f"worker {attempt}")
        assert leased["attempt"] == attempt
        if ending == "fail":
            await queue.fail(leased, f"error {attempt}")
            job = await queue.job(leased["id"])
        else:
            job = await let_expire(queue, leased)
        assert job["retry_count"] == attempt - 1
        if job["state"] == "retry":
            ended_at = (await queue.attempts(job["id"]))[-1]["ended_at"]
            due = instant(job["run_at"])
            delays.append((due - instant(ended_at)).total_seconds())
            await reach(queue, due - MOMENT)
            assert await queue.lease() == []
            await reach(queue, due)

    assert delays == [1, 2, 4]
    attempts = await queue.attempts(job["id"])
    changed = {
        "state": "failed",
        "reason": "retries_exhausted",
        "attempt": 4,
        "retry_count": 3,
        "worker": "worker 4",
        "last_error": attempts[-1]["error"],
        "run_at": enqueued["run_at"],
        "started_at": attempts[-1]["started_at"],
        "finished_at": attempts[-1]["ended_at"],
    }
    assert job == enqueued | changed
    assert [each["worker"] for each in attempts] == [f"worker {number}" for number in range(1, 5)]
    if ending == "fail":
        assert [each["error"] for each in attempts] == [{"message": f"error {n}"} for n in range(1, 5)]
    else:
        assert len({each["error"]["message"] for each in attempts}) == 4
    assert {each["outcome"] for each in attempts} == {"failed" if ending == "fail" else "lease_expired"}

    await reach(queue, queue.clock.move(10_000))
    assert await queue.lease() == []


@pytest.mark.parametrize("ending", ["fail", "silence"])
async def test_without_retries_the_first_failure_is_the_last(queue: Replica, ending: str):
    await queue.enqueue(max_retries=0)
    leased = await queue.lease_one()
    if ending == "fail":
        assert await queue.fail(leased, retry=True) == {"state": "failed"}
    job = await let_expire(queue, leased)
    assert (job["state"], job["reason"], job["attempt"]) == ("failed", "retries_exhausted", 1)


@pytest.mark.parametrize(
    ("backoff", "expected"),
    [
        ({"strategy": "linear", "initial_seconds": 5}, [5, 10, 15]),
        ({"strategy": "fixed", "initial_seconds": 5}, [5, 5, 5]),
        ({"initial_seconds": 2, "factor": 10, "max_seconds": 30}, [2, 20, 30]),
    ],
)
async def test_the_job_says_how_its_backoff_grows(
    queue: Replica, backoff: dict[str, Any], expected: list[float]
):
    queue.clock.move(0)
    await queue.enqueue(backoff=NO_JITTER | backoff)
    delays = []
    for _ in range(3):
        due = instant((await queue.fail(await queue.lease_one()))["run_at"])
        now = queue.clock()
        assert now is not None
        delays.append((due - now).total_seconds())
        await reach(queue, due)
    assert delays == expected


async def test_the_environment_says_how_many_retries_and_which_backoff(world: World):
    queue = await world.replica(max_retries=1, backoff_strategy="fixed", backoff_seconds=7)
    now = queue.clock.move(0)
    await queue.enqueue(backoff=NO_JITTER)
    settled = await queue.fail(await queue.lease_one())
    assert instant(settled["run_at"]) == now + timedelta(seconds=7)
    await reach(queue, instant(settled["run_at"]))
    assert await queue.fail(await queue.lease_one()) == {"state": "failed"}


async def test_an_attempt_that_reaches_timeout_seconds_has_timed_out_whatever_heartbeats_said(queue: Replica):
    start = queue.clock.move(0)
    await queue.enqueue(lease_seconds=10, timeout_seconds=25)
    leased = await queue.lease_one(worker="w")
    for _ in range(2):
        queue.clock.move(9)
        await queue.verb("heartbeat", leased, extend_seconds=1000)
    await reach(queue, start + timedelta(seconds=25) - MOMENT)
    assert (await queue.job(leased["id"]))["state"] == "active"

    await reach(queue, start + timedelta(seconds=25))
    job = await queue.job(leased["id"])
    [attempt] = await queue.attempts(leased["id"])
    assert (job["state"], attempt["outcome"]) == ("retry", "timed_out")
    assert attempt["error"]["type"] == "timed_out"
    assert "25 seconds" in attempt["error"]["message"]


async def test_a_lease_that_ends_before_timeout_seconds_has_expired(queue: Replica):
    queue.clock.move(0)
    await queue.enqueue(lease_seconds=10, timeout_seconds=25)
    leased = await queue.lease_one()
    await let_expire(queue, leased)
    assert [each["outcome"] for each in await queue.attempts(leased["id"])] == ["lease_expired"]


async def test_every_attempt_has_timeout_seconds_of_its_own(queue: Replica):
    queue.clock.move(0)
    await queue.enqueue(lease_seconds=30, timeout_seconds=20, backoff=NO_JITTER)
    job = await let_expire(queue, await queue.lease_one())
    await reach(queue, instant(job["run_at"]))
    leased = await queue.lease_one()
    now = queue.clock()
    assert now is not None
    assert instant(leased["lease_expires_at"]) == now + timedelta(seconds=20)


async def test_a_lease_is_reaped_once_however_many_replicas_do_it(world: World):
    one, other = await world.replica(), await world.replica()
    await one.enqueue()
    leased = await one.lease_one()
    await let_expire(one, leased)
    await let_expire(other, leased)
    assert len(one.events.of(AttemptEnded) + other.events.of(AttemptEnded)) == 1
    assert len(await one.attempts(leased["id"])) == 1
