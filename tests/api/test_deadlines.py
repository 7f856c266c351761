"""Start deadlines: a job that no worker has taken in time is `expired`."""

from datetime import datetime, timedelta
from typing import Any

import httpx
import pytest

from app.queue.events import JobExpired, JobLeased
from app.queue.policy import DEADLINE_TOO_EARLY
from tests.api.test_waiting import waiting
from tests.conftest import Clock, Replica

MOMENT = timedelta(microseconds=1)


@pytest.fixture(autouse=True)
def moved(clock: Clock) -> Clock:
    """Let time stand still, so that it can pass by the second."""
    clock.move(0)
    return clock


async def post(queue: Replica, **fields: Any) -> httpx.Response:
    return await queue.http.post("/jobs", json={"queue": "q", **fields})


async def reach(queue: Replica, job: dict[str, Any], *, before: timedelta = timedelta()) -> None:
    queue.clock.set(datetime.fromisoformat(job["expires_at"]) - before)


@pytest.mark.parametrize("form", ["expires_at", "expires_in_seconds"])
async def test_past_its_deadline_a_job_expires_and_not_before(queue: Replica, form: str):
    now = queue.clock.move(0)
    deadline: Any = 60 if form == "expires_in_seconds" else (now + timedelta(seconds=60)).isoformat()
    fields = {form: deadline, "payload": {"n": 1}, "tags": ["t"]}
    job = await queue.enqueue(**fields)
    assert datetime.fromisoformat(job["expires_at"]) == now + timedelta(seconds=60)

    await reach(queue, job, before=MOMENT)
    assert (await queue.maintain())["expire"] == 0
    assert (await queue.job(job["id"]))["state"] == "ready"

    await reach(queue, job)
    assert (await queue.maintain())["expire"] == 1
    expired = await queue.job(job["id"])
    assert (expired["state"], expired["reason"]) == ("expired", "expired")
    assert expired["finished_at"] == job["expires_at"]
    # Its whole body is kept.
    unchanged = job.keys() - {"state", "reason", "finished_at"}
    assert {name: expired[name] for name in unchanged} == {name: job[name] for name in unchanged}
    assert (await queue.stats())["expired"] == 1
    assert (await queue.stats())["waiting"] == 0
    assert [str(event.job_id) for event in queue.events.of(JobExpired)] == [job["id"]]
    page = await queue.http.get("/jobs", params={"state": "expired"})
    assert [each["id"] for each in page.json()["jobs"]] == [job["id"]]
    assert 'leaseq_jobs_expired_total{queue="q"} 1.0' in (await queue.http.get("/metrics")).text


@pytest.mark.parametrize("types", [None, ["default"]])
async def test_no_lease_gets_a_job_past_its_deadline_also_before_maintenance(
    queue: Replica, types: list[str] | None
):
    late = await queue.enqueue(expires_in_seconds=10, priority=10)
    other = await queue.enqueue()
    await reach(queue, late)
    assert [job["id"] for job in await queue.lease(max_jobs=10, types=types)] == [other["id"]]
    assert await queue.lease(types=types) == []


async def test_until_its_deadline_a_job_is_leased(queue: Replica):
    job = await queue.enqueue(expires_in_seconds=10)
    await reach(queue, job, before=MOMENT)
    assert (await queue.lease_one())["id"] == job["id"]


async def test_the_poll_calls_nobody_for_a_job_past_its_deadline(queue: Replica):
    late = await queue.enqueue("late", expires_in_seconds=10)
    await reach(queue, late)
    reply = await waiting(queue, "late", "q")
    await queue.machine.service.wakeups.look(everywhere=True)
    job = await queue.enqueue()
    assert [leased["id"] for leased in await reply] == [job["id"]]
    assert len(queue.events.of(JobLeased)) == 1


async def test_a_delayed_job_expires_too(queue: Replica):
    job = await queue.enqueue(delay_seconds=10, expires_in_seconds=10)
    assert job["state"] == "scheduled"
    await reach(queue, job)
    await queue.maintain()
    assert (await queue.job(job["id"]))["state"] == "expired"
    assert await queue.lease() == []


async def test_a_promoted_job_keeps_its_deadline(queue: Replica):
    job = await queue.enqueue(delay_seconds=10, expires_in_seconds=20)
    queue.clock.move(10)
    await queue.maintain()
    assert (await queue.job(job["id"]))["state"] == "ready"
    queue.clock.move(10)
    await queue.maintain()
    assert (await queue.job(job["id"]))["state"] == "expired"


async def test_a_job_that_was_leased_in_time_does_not_expire(queue: Replica):
    job = await queue.enqueue(expires_in_seconds=10, backoff={"jitter": "none"})
    leased = await queue.lease_one()
    queue.clock.move(20)
    await queue.maintain()
    assert (await queue.job(job["id"]))["state"] == "active"
    # Nor does its retry.
    await queue.fail(leased)
    await queue.maintain()
    assert (await queue.job(job["id"]))["state"] == "retry"
    queue.clock.move(1)
    assert (await queue.maintain())["expire"] == 0
    assert (await queue.lease_one())["id"] == job["id"]


@pytest.mark.parametrize("delay_seconds", [0, 1])
async def test_a_release_of_the_first_attempt_gives_the_deadline_back(queue: Replica, delay_seconds: int):
    job = await queue.enqueue(expires_in_seconds=10)
    await queue.verb("release", await queue.lease_one(), delay_seconds=delay_seconds)
    await reach(queue, job, before=MOMENT)
    await queue.maintain()
    assert (await queue.job(job["id"]))["state"] == "ready"
    await reach(queue, job)
    await queue.maintain()
    assert (await queue.job(job["id"]))["state"] == "expired"
    [attempt] = await queue.attempts(job["id"])
    assert attempt["outcome"] == "released"


async def test_a_release_of_a_later_attempt_does_not(queue: Replica):
    job = await queue.enqueue(expires_in_seconds=10)
    await queue.fail(await queue.lease_one(), retry_in_seconds=0)
    await queue.maintain()
    await queue.verb("release", await queue.lease_one())
    queue.clock.move(11)
    assert (await queue.maintain())["expire"] == 0
    assert (await queue.lease_one())["id"] == job["id"]


async def test_an_operator_may_retry_an_expired_job_and_its_deadline_is_gone(queue: Replica):
    job = await queue.enqueue(expires_in_seconds=10)
    await reach(queue, job)
    await queue.maintain()
    answer = await queue.http.post(f"/jobs/{job['id']}/retry")
    assert (answer.status_code, answer.json()["state"], answer.json()["expires_at"]) == (200, "ready", None)
    queue.clock.move(1000)
    await queue.maintain()
    assert (await queue.lease_one())["attempt"] == 1
    assert (await queue.stats())["expired"] == 0


@pytest.mark.parametrize("delay_seconds", [0, 5])
@pytest.mark.parametrize("released", [False, True])
async def test_a_job_that_was_cancelled_before_its_first_attempt_counted_keeps_its_deadline_when_it_comes_back(
    queue: Replica, delay_seconds: int, released: bool
):
    job = await queue.enqueue(expires_in_seconds=10, delay_seconds=0 if released else delay_seconds)
    if released:
        await queue.verb("release", await queue.lease_one(), delay_seconds=delay_seconds)
    await queue.http.post(f"/jobs/{job['id']}/cancel")
    back = (await queue.http.post(f"/jobs/{job['id']}/retry")).json()
    assert (back["state"], back["expires_at"]) == ("ready", job["expires_at"])
    await reach(queue, job, before=MOMENT)
    await queue.maintain()
    assert (await queue.job(job["id"]))["state"] == "ready"
    await reach(queue, job)
    assert await queue.lease() == []
    await queue.maintain()
    assert (await queue.job(job["id"]))["state"] == "expired"


@pytest.mark.parametrize(
    ("ending", "state"), [("while active", "cancelled"), ("in retry", "cancelled"), ("given up", "failed")]
)
async def test_a_job_that_was_started_in_time_has_no_deadline_when_it_comes_back(
    queue: Replica, ending: str, state: str
):
    job = await queue.enqueue(expires_in_seconds=10)
    leased = await queue.lease_one()
    if ending == "while active":
        await queue.http.post(f"/jobs/{job['id']}/cancel")
        await queue.verb("release", leased)
    else:
        await queue.fail(leased, retry=ending == "in retry")
        await queue.http.post(f"/jobs/{job['id']}/cancel")
    assert (await queue.job(job["id"]))["state"] == state
    back = (await queue.http.post(f"/jobs/{job['id']}/retry")).json()
    assert (back["state"], back["expires_at"]) == ("ready", None)
    queue.clock.move(1000)
    await queue.maintain()
    assert (await queue.lease_one())["id"] == job["id"]


async def test_a_deadline_that_has_passed_meanwhile_is_gone_when_the_job_comes_back(queue: Replica):
    job = await queue.enqueue(expires_in_seconds=10)
    await queue.http.post(f"/jobs/{job['id']}/cancel")
    await reach(queue, job)
    back = (await queue.http.post(f"/jobs/{job['id']}/retry")).json()
    assert (back["state"], back["expires_at"]) == ("ready", None)


async def test_an_expired_job_may_be_deleted_but_not_cancelled(queue: Replica):
    job = await queue.enqueue(expires_in_seconds=10)
    await reach(queue, job)
    await queue.maintain()
    refused = await queue.http.post(f"/jobs/{job['id']}/cancel")
    assert (refused.status_code, refused.json()["code"], refused.json()["state"]) == (
        409,
        "wrong_state",
        "expired",
    )
    assert (await queue.http.delete(f"/jobs/{job['id']}")).status_code == 204


async def test_a_deadline_before_the_job_is_due_is_refused(queue: Replica):
    now = queue.clock.move(0)

    def at(seconds: float) -> str:
        return (now + timedelta(seconds=seconds)).isoformat()

    refused: list[tuple[dict[str, Any], str]] = [
        ({"expires_at": at(-1)}, "expires_at"),
        ({"expires_at": at(9), "run_at": at(10)}, "expires_at"),
        ({"expires_at": at(9), "delay_seconds": 10}, "expires_at"),
        ({"expires_in_seconds": 9, "run_at": at(10)}, "expires_in_seconds"),
        ({"expires_in_seconds": 9, "delay_seconds": 10}, "expires_in_seconds"),
    ]
    for fields, field in refused:
        answer = await post(queue, **fields)
        assert answer.status_code == 422, fields
        assert answer.json()["errors"] == [{"field": field, "message": DEADLINE_TOO_EARLY}]
    taken: list[dict[str, Any]] = [
        {"expires_at": at(10), "run_at": at(10)},
        {"expires_at": at(10), "delay_seconds": 10},
        {"expires_in_seconds": 10, "run_at": at(10)},
        {"expires_in_seconds": 10, "delay_seconds": 10},
        {"expires_at": at(1), "run_at": at(-10)},
    ]
    for fields in taken:
        assert (await post(queue, **fields)).status_code == 201, fields


async def test_both_forms_of_a_deadline_at_once_are_refused(queue: Replica):
    answer = await post(queue, expires_at="2190-01-01T00:00:00Z", expires_in_seconds=1)
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"] == "expires_at"


@pytest.mark.parametrize(
    "fields",
    [
        {"expires_at": "2300-01-01T00:00:00Z"},
        {"expires_at": "tomorrow"},
        {"expires_at": "2100-01-01T00:00:00"},
        {"expires_in_seconds": 0},
        {"expires_in_seconds": -1},
        {"expires_in_seconds": 1e12},
    ],
)
async def test_what_is_no_deadline_is_refused(queue: Replica, fields: dict[str, Any]):
    answer = await post(queue, **fields)
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"] in fields
