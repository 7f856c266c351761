"""What has failed: its groups, its copies, its way back."""

from typing import Any

import pytest

from app.queue.groups import error_group
from tests.api.refusals import problem
from tests.conftest import Clock, Replica


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
