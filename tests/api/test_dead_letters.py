"""What has failed: its groups, its copies, its way back."""

import asyncio
from typing import Any

import pytest

from app.queue.events import JobEnqueued
from app.queue.groups import error_group
from tests.api.refusals import problem
from tests.conftest import Clock, Replica, World
from tests.store.conftest import idle_replica, logged


async def failed_job(queue: Replica, name: str = "q", message: str = "boom", **fields: Any) -> dict[str, Any]:
    """Let a new job fail for good; return it."""
    type_ = fields.pop("error_type", None)
    job_id = (await queue.enqueue(name, **fields))["id"]
    leased = await queue.lease_one(name)
    assert leased["id"] == job_id
    error = {"message": message} | ({} if type_ is None else {"type": type_})
    answer = await queue.verb("fail", leased, error=error, retry=False)
    assert answer.json() == {"state": "failed"}
    return await queue.job(job_id)


async def failures(queue: Replica, name: str = "q") -> list[dict[str, Any]]:
    answer = await queue.http.get(f"/queues/{name}/failures")
    assert answer.status_code == 200, answer.text
    groups: list[dict[str, Any]] = answer.json()["groups"]
    return groups


async def listed(replica: Replica, **filters: Any) -> set[str]:
    answer = await replica.http.get("/jobs", params=filters)
    assert answer.status_code == 200, answer.text
    return {job["id"] for job in answer.json()["jobs"]}


# Groups


async def test_failed_jobs_are_grouped_by_type_and_normalised_message(queue: Replica, clock: Clock):
    clock.move(0)
    first = await failed_job(queue, message="mailbox 12 is full", error_type="SmtpError")
    await failed_job(queue, message="mailbox 12 is full", error_type="Other")
    clock.move(60)
    await failed_job(queue, message="mailbox 13 is full", error_type="SmtpError")
    clock.move(60)
    last = await failed_job(queue, message="mailbox 9 is  full", error_type="SmtpError")
    clock.move(60)
    single = await failed_job(queue)
    await failed_job(queue, "elsewhere", message="mailbox 1 is full", error_type="SmtpError")
    groups = await failures(queue)
    assert groups[0] == {
        "error_group": error_group("SmtpError", "mailbox 1 is full"),
        "type": "SmtpError",
        "message": "mailbox 9 is  full",
        "count": 3,
        "first_at": first["finished_at"],
        "last_at": last["finished_at"],
        "sample_job_id": last["id"],
    }
    # Of equally many those seen last come first.
    assert [(group["type"], group["message"], group["count"]) for group in groups[1:]] == [
        (None, "boom", 1),
        ("Other", "mailbox 12 is full", 1),
    ]
    assert groups[1]["sample_job_id"] == single["id"]


async def test_only_what_has_failed_is_grouped(queue: Replica):
    await queue.enqueue()
    await queue.fail(await queue.lease_one(), retry_in_seconds=60)
    cancelled = (await queue.enqueue("c"))["id"]
    await queue.http.post(f"/jobs/{cancelled}/cancel")
    assert await failures(queue) == []
    assert await failures(queue, "c") == []
    assert await failures(queue, "nobody_knows") == []


async def test_leases_that_ran_out_are_a_group_of_their_own(queue: Replica, clock: Clock):
    clock.move(0)
    for _ in range(2):
        await queue.enqueue(max_retries=0)
        await queue.lease_one()
        clock.move(31)
        await queue.maintain()
    [group] = await failures(queue)
    assert (group["type"], group["count"]) == ("lease_expired", 2)


async def test_the_last_error_says_which_group_a_job_is_in(queue: Replica, clock: Clock):
    clock.move(0)
    await queue.enqueue(max_retries=1, backoff={"strategy": "fixed", "jitter": "none"})
    await queue.fail(await queue.lease_one(), "first")
    clock.move(1)
    await queue.maintain()
    await queue.fail(await queue.lease_one(), "second")
    [group] = await failures(queue)
    assert (group["message"], group["error_group"]) == ("second", error_group(None, "second"))


async def test_a_group_is_kept_through_a_retry_and_a_cancel(queue: Replica):
    job = await failed_job(queue)
    group = error_group(None, "boom")
    for verb in ("retry", "cancel", "retry"):
        assert (await queue.http.post(f"/jobs/{job['id']}/{verb}")).status_code == 200
        assert await listed(queue, error=group) == {job["id"]}
    leased = await queue.lease_one()
    assert await listed(queue, error=group) == {job["id"]}
    await queue.http.post(f"/jobs/{job['id']}/cancel")
    await queue.verb("release", leased)
    assert (await queue.job(job["id"]))["state"] == "cancelled"
    assert await listed(queue, error=group) == {job["id"]}


async def test_an_error_filter_takes_a_group_or_an_exact_type_never_a_part(queue: Replica):
    one = await failed_job(queue, message="no user 1", error_type="LookupError")
    other = await failed_job(queue, message="no group 1", error_type="LookupError")
    await failed_job(queue, message="no user 1", error_type="Lookup")
    assert await listed(queue, error="LookupError") == {one["id"], other["id"]}
    assert await listed(queue, error=error_group("LookupError", "no user 2")) == {one["id"]}
    for part in ("Look", "lookuperror", "no user", error_group("LookupError", "no user 2")[:15]):
        assert await listed(queue, error=part) == set()


@pytest.mark.parametrize("name", ["-x", "a%20b", "a" * 129, "a%0A"])
async def test_what_can_be_no_queue_has_no_failures(queue: Replica, name: str):
    problem(await queue.http.get(f"/queues/{name}/failures"), "not_found")


# Copies


async def copies(queue: Replica, name: str = "dlq") -> list[dict[str, Any]]:
    answer = await queue.http.get("/jobs", params={"queue": name})
    jobs: list[dict[str, Any]] = answer.json()["jobs"]
    return jobs


FIELDS: dict[str, Any] = {
    "type": "welcome",
    "payload": {"n": 12345678901234567890},
    "priority": 7,
    "lease_seconds": 12,
    "timeout_seconds": 40,
    "max_retries": 0,
    "backoff": {"strategy": "linear", "initial_seconds": 3, "factor": 1, "max_seconds": 9, "jitter": "none"},
    "tags": ["a", "b"],
    "metadata": {"tenant": 1},
}


async def test_on_final_failure_a_copy_is_enqueued_with_where_it_comes_from(queue: Replica, clock: Clock):
    clock.move(0)
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    enqueued = await queue.http.post(
        "/jobs", json={"queue": "q", "dead_letter_queue": "dlq", **FIELDS}, headers={"traceparent": trace}
    )
    job_id = enqueued.json()["id"]
    assert enqueued.json()["dead_letter_queue"] == "dlq"
    leased = await queue.lease_one(lease_seconds=5)
    answer = await queue.verb("fail", leased, error={"type": "E", "message": "boom", "stack": "s"})
    assert answer.json() == {"state": "failed"}

    original = await queue.job(job_id)
    assert (original["state"], original["payload"], original["attempt"]) == ("failed", FIELDS["payload"], 1)
    [copy] = await copies(queue)
    source = {
        "queue": "q",
        "job_id": job_id,
        "attempts": 1,
        "error": {"type": "E", "message": "boom", "stack": "s"},
        "failed_at": copy["source"]["failed_at"],
        "chain": ["q"],
    }
    assert copy == {
        **original,
        "id": copy["id"],
        "queue": "dlq",
        "state": "ready",
        "attempt": 0,
        "created_at": copy["created_at"],
        "run_at": copy["created_at"],
        "started_at": None,
        "finished_at": None,
        "worker": None,
        "reason": None,
        "dead_letter_queue": None,
        "source": source,
    }
    assert copy["id"] != job_id
    assert copy["traceparent"] == trace
    # As exact as the instant of which the job itself speaks.
    assert source["failed_at"].rstrip("Z")[:23] == original["finished_at"].rstrip("Z")[:23]
    taken = await queue.lease_one("dlq")
    assert (taken["id"], taken["source"], taken["payload"]) == (copy["id"], source, FIELDS["payload"])
    assert await queue.stats() == {**(await queue.stats()), "failed": 1, "active": 1, "waiting": 0}


@pytest.mark.parametrize("end", ["retries used up", "not to be retried", "settled", "silence", "time limit"])
async def test_every_final_failure_makes_one_copy(queue: Replica, clock: Clock, end: str):
    clock.move(0)
    final = end in {"not to be retried", "settled"}
    fields: dict[str, Any] = {"timeout_seconds": 10} if end == "time limit" else {}
    await queue.enqueue(max_retries=5 if final else 0, dead_letter_queue="dlq", **fields)
    await queue.enqueue("other", dead_letter_queue="dlq")
    leased = await queue.lease_one()
    other = await queue.lease_one("other")
    match end:
        case "settled":
            item = {"job_id": leased["id"], "lease_id": leased["lease_id"]}
            settled = {"job_id": other["id"], "lease_id": other["lease_id"], "outcome": "ack"}
            failing = {**item, "outcome": "fail", "error": {"message": "boom"}, "retry": False}
            await queue.http.post("/settle", json={"items": [failing, settled]})
        case "silence" | "time limit":
            clock.move(31)
            await queue.maintain()
        case _:
            for _ in range(2):  # the second is the repeat of a lost answer
                await queue.fail(leased, retry=not final)
    [copy] = [job for job in await copies(queue) if job["source"]["job_id"] == leased["id"]]
    types = {"silence": "lease_expired", "time limit": "timed_out"}
    assert copy["source"]["error"].get("type") == types.get(end)
    assert (await queue.job(leased["id"]))["state"] == "failed"


async def test_what_is_retried_cancelled_or_expired_is_not_copied(queue: Replica, clock: Clock):
    clock.move(0)
    ids = [
        (await queue.enqueue(name, dead_letter_queue="dlq", **more))["id"]
        for name, more in [("q", {}), ("c", {}), ("a", {}), ("e", {"expires_in_seconds": 5})]
    ]
    await queue.fail(await queue.lease_one(), retry_in_seconds=60)
    await queue.http.post(f"/jobs/{ids[1]}/cancel")
    active = await queue.lease_one("a")
    await queue.http.post(f"/jobs/{ids[2]}/cancel")
    await queue.fail(active, retry=False)
    clock.move(6)
    await queue.maintain()
    states = [(await queue.job(job_id))["state"] for job_id in ids]
    assert states == ["retry", "cancelled", "cancelled", "expired"]
    assert await copies(queue) == []


async def test_a_copy_has_a_fresh_budget_and_its_errors_are_its_own(queue: Replica):
    await failed_job(queue, dead_letter_queue="dlq", max_retries=1)
    assert await listed(queue, queue="dlq", error=error_group(None, "boom")) != set()
    copy = await queue.lease_one("dlq")
    assert (copy["attempt"], copy["max_retries"]) == (1, 1)
    assert (await queue.fail(copy, "other"))["state"] == "retry"
    job = await queue.job(copy["id"])
    assert (job["last_error"], job["source"]["error"]) == ({"message": "other"}, {"message": "boom"})
    assert await listed(queue, queue="dlq", error=error_group(None, "boom")) == set()


async def test_a_copys_own_dead_letters_go_where_its_queues_policy_says(queue: Replica):
    policy = {"dead_letter_queue": "second", "types": {"special": {"dead_letter_queue": "third"}}}
    assert (await queue.http.put("/queues/first", json=policy)).status_code == 201
    for type_, target in (("default", "second"), ("special", "third")):
        await failed_job(queue, type=type_, dead_letter_queue="first")
        [copy] = [job for job in await copies(queue, "first") if job["type"] == type_]
        assert copy["dead_letter_queue"] == target
        await queue.fail(await queue.lease_one("first"), retry=False)
        [onward] = await copies(queue, target)
        assert (onward["source"]["queue"], onward["source"]["job_id"]) == ("first", copy["id"])
        assert onward["source"]["chain"] == ["q", "first"]


async def test_dead_letters_do_not_go_round(queue: Replica):
    for name, target in (("a", "b"), ("b", "c"), ("c", "a")):
        await queue.http.put(f"/queues/{name}", json={"dead_letter_queue": target})
    await failed_job(queue, "a")
    for name in ("b", "c"):
        await queue.fail(await queue.lease_one(name), retry=False)
    assert [len(await copies(queue, name)) for name in ("a", "b", "c")] == [1, 1, 1]
    assert (await queue.stats())["failed"] == 3


@pytest.mark.parametrize("name", ["q", "-x", "a\n", "", 5])
async def test_a_dead_letter_queue_is_another_queue(queue: Replica, name: Any):
    answer = await queue.http.post("/jobs", json={"queue": "q", "dead_letter_queue": name})
    assert problem(answer, "invalid")["errors"][0]["field"] == "dead_letter_queue"


async def test_who_waits_for_dead_letters_is_called(world: World, queue: Replica):
    other = await world.replica()
    await queue.enqueue(max_retries=0, dead_letter_queue="dlq")
    leased = await queue.lease_one()
    waiting = asyncio.create_task(other.lease("dlq", wait_seconds=20))
    while other.machine.service.wakeups.waiters < 1:
        await asyncio.sleep(0.005)
    await queue.fail(leased)
    [copy] = await waiting
    assert copy["source"]["job_id"] == leased["id"]
    [told] = [event for event in queue.events.of(JobEnqueued) if event.queue == "dlq"]
    assert str(told.job_id) == copy["id"]


async def test_a_failure_without_a_dead_letter_queue_runs_nothing_more(world: World):
    queue = await idle_replica(world, db_pool_size=1)
    await queue.enqueue(max_retries=0)
    leased = await queue.lease_one()
    async with logged(queue) as statements:
        await queue.fail(leased)
    assert [name for name in statements if name in {"lock_leases", "conclude", "copy"}] == [
        "lock_leases",
        "conclude",
    ]
