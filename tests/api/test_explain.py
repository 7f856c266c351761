"""Why a job is not running: every reason, with its facts, as an operator asks for it."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from app.store import standing
from tests.conftest import Replica, World
from tests.store.conftest import holding, idle_replica


@pytest.fixture
async def queue(world: World) -> Replica:
    """One replica whose first round of maintenance is over: it would end what is to be explained."""
    return await idle_replica(world)


async def explain(queue: Replica, job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the reasons by their codes, in their order; their facts are checked by the document's own test."""
    answer = await queue.http.get(f"/jobs/{job['id']}/explain")
    assert answer.status_code == 200, answer.text
    reply = answer.json()
    assert set(reply) == {"job_id", "state", "reasons"}
    assert reply["job_id"] == job["id"]
    assert reply["state"] == (await queue.job(job["id"]))["state"]
    assert reply["reasons"]
    for reason in reply["reasons"]:
        assert reason["message"][0].isupper() or reason["message"][0].isdigit()
        assert reason["message"].endswith(".")
    return {reason["code"]: reason for reason in reply["reasons"]}


async def asked(queue: Replica, *queues: str, **fields: Any) -> None:
    """Let a worker ask in vain."""
    assert await queue.lease(*queues, **{"worker": "w", **fields}) == []


def instant(text: str) -> datetime:
    return datetime.fromisoformat(text)


async def test_a_job_for_later_says_when(queue: Replica):
    queue.clock.move(0)
    job = await queue.enqueue(delay_seconds=90)
    await asked(queue)
    reasons = await explain(queue, job)
    assert list(reasons) == ["scheduled"]
    assert reasons["scheduled"] == {
        "code": "scheduled",
        "message": "It is not to run before its run_at, in 1 min 30 s.",
        "run_at": job["run_at"],
        "in_seconds": 90.0,
    }


async def test_a_job_in_backoff_says_until_when_after_which_attempt_and_what_error(queue: Replica):
    job = await queue.enqueue(
        max_retries=2, backoff={"strategy": "fixed", "initial_seconds": 50, "jitter": "none"}
    )
    queue.clock.move(0)
    answer = await queue.verb(
        "fail", await queue.lease_one(worker="w"), error={"message": "secret", "type": "SmtpError"}
    )
    reason = (await explain(queue, job))["backoff"]
    assert reason["run_at"] == answer.json()["run_at"]
    assert (reason["in_seconds"], reason["attempt"], reason["retries_left"]) == (50.0, 1, 2)
    assert reason["error_type"] == "SmtpError"
    assert "Attempt 1 did not succeed (SmtpError)" in reason["message"]
    assert "secret" not in str(reason)
    queue.clock.move(51)
    await queue.maintain()
    await queue.fail(await queue.lease_one(worker="w"))
    reason = (await explain(queue, job))["backoff"]
    assert (reason["attempt"], reason["retries_left"], reason["error_type"]) == (2, 1, None)


async def test_a_delayed_job_that_is_due_says_that_maintenance_is_late(queue: Replica):
    queue.clock.move(0)
    job = await queue.enqueue(delay_seconds=60)
    queue.clock.move(75)
    await asked(queue)
    reasons = await explain(queue, job)
    assert list(reasons) == ["maintenance_late"]
    assert reasons["maintenance_late"]["due_at"] == job["run_at"]
    assert reasons["maintenance_late"]["late_seconds"] == 15.0
    assert reasons["maintenance_late"]["maintained_seconds_ago"] >= 0
    await queue.maintain()
    assert "maintenance_late" not in await explain(queue, job)


async def test_a_paused_queue_is_the_first_reason(queue: Replica):
    jobs = [await queue.enqueue(), await queue.enqueue(delay_seconds=60)]
    await asked(queue, "other", "q2")
    assert (await queue.http.post("/queues/q/pause")).status_code == 200
    reasons = await explain(queue, jobs[0])
    assert next(iter(reasons)) == "queue_paused"
    assert reasons["queue_paused"]["queue"] == "q"
    assert list(await explain(queue, jobs[1]))[:2] == ["scheduled", "queue_paused"]
    await queue.http.post("/queues/q/resume")
    for job in jobs:
        assert "queue_paused" not in await explain(queue, job)


async def test_without_a_worker_nobody_ever_asked(queue: Replica):
    job = await queue.enqueue(type="t")
    reasons = await explain(queue, job)
    assert list(reasons) == ["no_worker", "in_line"]
    facts = {name: value for name, value in reasons["no_worker"].items() if name != "message"}
    assert facts == {
        "code": "no_worker",
        "queue": "q",
        "type": "t",
        "last_worker": None,
        "last_seen_at": None,
    }


@pytest.mark.parametrize(("queues", "types"), [(["other"], None), (["q"], ["x", "y"])])
async def test_a_worker_of_another_queue_or_type_is_none(
    queue: Replica, queues: list[str], types: list[str] | None
):
    job = await queue.enqueue(type="t")
    await asked(queue, *queues, **({"types": types} if types else {}))
    assert "no_worker" in await explain(queue, job)
    await queue.http.post("/queues/q/pause")  # so that it stays
    await asked(queue, "other", "q", types=["x", "t"])
    assert "no_worker" not in await explain(queue, job)


async def test_a_worker_that_was_not_heard_of_for_a_minute_is_none_and_is_named(queue: Replica):
    await asked(queue, worker="mailer-1")
    job = await queue.enqueue(run_at=(datetime.now(UTC) + timedelta(days=1)).isoformat())
    assert "no_worker" not in await explain(queue, job)
    queue.clock.move(3600)
    reason = (await explain(queue, job))["no_worker"]
    assert reason["last_worker"] == "mailer-1"
    assert abs((instant(reason["last_seen_at"]) - datetime.now(UTC)).total_seconds()) < 600
    assert "mailer-1, heard of" in reason["message"]


async def test_a_worker_without_a_name_counts_but_is_not_named(queue: Replica):
    await asked(queue, worker=None)
    job = await queue.enqueue(delay_seconds=7200)
    assert "no_worker" not in await explain(queue, job)
    queue.clock.move(3600)
    reason = (await explain(queue, job))["no_worker"]
    assert reason["last_worker"] is None
    assert reason["last_seen_at"] is not None


async def test_a_worker_at_another_replica_counts(queue: Replica, world: World):
    elsewhere = await world.replica()
    await asked(elsewhere)
    await elsewhere.machine.service.workers.write()
    job = await queue.enqueue(delay_seconds=60)
    assert "no_worker" not in await explain(queue, job)


async def test_workers_that_are_told_to_take_no_more_do_not_count(queue: Replica):
    await asked(queue)
    job = await queue.enqueue(delay_seconds=60)
    assert (await queue.http.post("/workers/w/quiet")).status_code == 200
    reason = (await explain(queue, job))["workers_quiet"]
    assert (reason["queue"], reason["type"], reason["workers"]) == ("q", "default", 1)
    await queue.http.post("/workers/w/resume")
    assert list(await explain(queue, job)) == ["scheduled"]


async def test_a_ready_job_says_how_many_are_before_it(queue: Replica):
    jobs = [await queue.enqueue(priority=priority) for priority in (5, 5, 8, 5, 2)]
    await queue.enqueue("other", priority=10)
    lines = [(await explain(queue, job))["in_line"] for job in jobs]
    assert [line["ahead"] for line in lines] == [1, 2, 0, 3, 4]
    assert [line["priority"] for line in lines] == [5, 5, 8, 5, 2]
    assert [line["since"] for line in lines] == [job["created_at"] for job in jobs]
    assert not any(line["ahead_is_capped"] for line in lines)
    assert lines[0]["message"].startswith("1 ready job is before it in its queue (priority 5, ready for")
    assert lines[2]["message"].startswith("It is the first in line")


async def test_what_has_been_leased_is_not_before_it_any_more(queue: Replica):
    jobs = [await queue.enqueue() for _ in range(5)]
    first = await queue.lease(max_jobs=3)
    assert (await explain(queue, jobs[4]))["in_line"]["ahead"] == 1
    await queue.verb("release", first[1])  # it keeps its place
    assert (await explain(queue, jobs[4]))["in_line"]["ahead"] == 2
    assert (await explain(queue, {"id": first[1]["id"]}))["in_line"]["ahead"] == 0


async def test_those_before_it_are_counted_up_to_a_thousand(queue: Replica, monkeypatch: pytest.MonkeyPatch):
    assert standing.AHEAD_MAX == 1000
    monkeypatch.setattr(standing, "AHEAD_MAX", 3)
    jobs = [await queue.enqueue(priority=priority) for priority in (9, 7, 5, 5)]
    line = (await explain(queue, jobs[2]))["in_line"]
    assert (line["ahead"], line["ahead_is_capped"]) == (2, False)
    line = (await explain(queue, jobs[3]))["in_line"]
    assert (line["ahead"], line["ahead_is_capped"]) == (3, True)
    assert line["message"].startswith("3+ ready jobs are before it")


async def test_a_start_deadline_says_how_long_it_is(queue: Replica):
    queue.clock.move(0)
    job = await queue.enqueue(expires_in_seconds=100)
    queue.clock.move(40)
    reasons = await explain(queue, job)
    assert list(reasons) == ["no_worker", "in_line", "deadline"]
    assert reasons["deadline"]["expires_at"] == job["expires_at"]
    assert reasons["deadline"]["left_seconds"] == 60.0
    queue.clock.move(61)
    reasons = await explain(queue, job)
    assert next(iter(reasons)) == "deadline"
    assert reasons["deadline"]["left_seconds"] == 0.0
    assert "passed 1.0 s ago" in reasons["deadline"]["message"]
    await queue.maintain()
    reasons = await explain(queue, job)
    assert list(reasons) == ["expired"]
    assert reasons["expired"]["expires_at"] == job["expires_at"]


async def test_an_active_job_says_who_has_it_since_when_and_until_when(queue: Replica):
    job = await queue.enqueue(timeout_seconds=600)
    queue.clock.move(0)
    leased = await queue.lease_one(worker="w")
    queue.clock.move(10)
    reasons = await explain(queue, job)
    assert list(reasons) == ["active"]
    active = reasons["active"]
    assert (active["worker"], active["attempt"], active["heartbeat_at"]) == ("w", 1, None)
    assert active["lease_expires_at"] == leased["lease_expires_at"]
    assert instant(active["deadline_at"]) == instant(active["since"]) + timedelta(seconds=600)
    assert active["overdue_seconds"] == 0.0
    assert "w has it for 10 s" in active["message"]
    assert "no heartbeat yet; its lease ends in 20 s" in active["message"]
    await queue.verb("heartbeat", leased)
    assert (
        "last heartbeat 0.0 s ago; its lease ends in 30 s" in (await explain(queue, job))["active"]["message"]
    )
    queue.clock.move(35)
    reasons = await explain(queue, job)
    assert list(reasons) == ["active", "maintenance_late"]
    assert reasons["active"]["overdue_seconds"] == 5.0
    assert reasons["maintenance_late"]["late_seconds"] == 5.0


async def test_a_wanted_cancel_is_told(queue: Replica):
    job = await queue.enqueue()
    await queue.lease_one(worker="w")
    await queue.http.post(f"/jobs/{job['id']}/cancel")
    assert list(await explain(queue, job)) == ["cancel_requested", "active"]


async def test_what_has_ended_says_how(queue: Replica):
    completed, failed, last, cancelled = [await queue.enqueue(max_retries=0) for _ in range(4)]
    queue.clock.move(1)
    await queue.verb("ack", await queue.lease_one(worker="w"))
    await queue.verb(
        "fail", await queue.lease_one(worker="w"), error={"message": "secret", "type": "Boom"}, retry=False
    )
    await queue.verb("fail", await queue.lease_one(worker="w"), error={"message": "secret"})
    await queue.http.post(f"/jobs/{cancelled['id']}/cancel")
    queue.clock.move(90)
    ends = {}
    for code, job in [
        ("completed", completed),
        ("failed", failed),
        ("failed", last),
        ("cancelled", cancelled),
    ]:
        reasons = await explain(queue, job)
        assert list(reasons) == [code]
        assert instant(reasons[code]["finished_at"]) == instant((await queue.job(job["id"]))["finished_at"])
        assert "1 min 30 s ago" in reasons[code]["message"]
        assert "secret" not in str(reasons)
        ends[job["id"]] = reasons[code]
    assert ends[completed["id"]]["worker"] == "w"
    assert (ends[failed["id"]]["reason"], ends[failed["id"]]["error_type"]) == ("not_retryable", "Boom")
    assert "a retry is of no use. The last error was Boom." in ends[failed["id"]]["message"]
    assert (ends[last["id"]]["reason"], ends[last["id"]]["error_type"]) == ("retries_exhausted", None)


@pytest.mark.parametrize("job_id", ["0198f2c1-9a4e-7c3d-8f21-5b6a7c8d9e0f", "none"])
async def test_an_unknown_job_is_not_found(queue: Replica, job_id: str):
    answer = await queue.http.get(f"/jobs/{job_id}/explain")
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


async def test_it_waits_for_nobody(queue: Replica, world: World):
    job = await queue.enqueue()
    async with holding(world, "SELECT FROM ready FOR UPDATE"):
        assert "in_line" in await explain(queue, job)
