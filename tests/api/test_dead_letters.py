"""What has failed: its groups, its copies, its way back."""

import asyncio
from typing import Any

import pytest

from app.engine import redriving
from app.queue.events import BulkRan, BulkVerb, JobEnqueued
from app.queue.groups import error_group
from tests.api.refusals import nothing_changes, problem
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


# Redrive


async def redrive(replica: Replica, name: str, **body: Any) -> tuple[int, int]:
    answer = await replica.http.post(f"/queues/{name}/redrive", json=body)
    assert answer.status_code == 200, answer.text
    told = answer.json()
    assert told == {"matched": told["matched"], "changed": told["changed"], "more": "limit" in body}
    return told["matched"], told["changed"]


async def states(queue: Replica, *job_ids: str) -> list[tuple[str, str]]:
    jobs = [await queue.job(job_id) for job_id in job_ids]
    return [(job["queue"], job["state"]) for job in jobs]


async def test_failed_jobs_go_back_to_their_queue_with_a_fresh_budget(queue: Replica):
    ids = [(await failed_job(queue, max_retries=1))["id"] for _ in range(2)]
    await failed_job(queue, "other")
    cancelled = (await queue.enqueue())["id"]
    await queue.http.post(f"/jobs/{cancelled}/cancel")
    # A body is not needed.
    answer = await queue.http.post("/queues/q/redrive")
    assert answer.json() == {"matched": 2, "changed": 2, "more": False}
    leased = await queue.lease(max_jobs=5)
    assert [(job["id"], job["attempt"]) for job in leased] == [(job_id, 2) for job_id in ids]
    assert (await queue.fail(leased[0]))["state"] == "retry"
    assert [attempt["outcome"] for attempt in await queue.attempts(ids[0])] == ["failed", "failed"]
    assert await states(queue, cancelled) == [("q", "cancelled")]
    [ran] = queue.events.of(BulkRan)
    assert (ran.verb, ran.matched, ran.changed, ran.finished) == (BulkVerb.REDRIVE, 2, 2, True)


async def test_a_redrive_of_one_group_leaves_the_others(queue: Replica):
    ids = [(await failed_job(queue, message=text))["id"] for text in ("row 1", "row 2", "other")]
    assert await redrive(queue, "q", error_group=error_group(None, "row 9")) == (2, 2)
    assert await states(queue, *ids) == [("q", "ready"), ("q", "ready"), ("q", "failed")]


async def test_a_redrive_stops_at_its_limit_the_oldest_first(queue: Replica):
    ids = [(await failed_job(queue))["id"] for _ in range(3)]
    assert await redrive(queue, "q", limit=2) == (2, 2)
    assert [state for _, state in await states(queue, *ids)] == ["ready", "ready", "failed"]


async def test_copies_go_home_by_retrying_their_originals(queue: Replica):
    original = await failed_job(queue, dead_letter_queue="dlq", payload=[1])
    other = await failed_job(queue, "other", dead_letter_queue="dlq")
    own = await queue.enqueue("dlq")
    first, second = [job["id"] for job in reversed(await copies(queue)) if job["source"] is not None]
    assert await redrive(queue, "dlq") == (2, 2)
    assert await states(queue, original["id"], other["id"], own["id"]) == [
        ("q", "ready"),
        ("other", "ready"),
        ("dlq", "ready"),
    ]
    for gone in (first, second):
        assert (await queue.http.get(f"/jobs/{gone}")).status_code == 404
    leased = await queue.lease_one()
    assert (leased["id"], leased["attempt"], leased["payload"]) == (original["id"], 2, [1])
    assert [attempt["outcome"] for attempt in await queue.attempts(original["id"])] == ["failed", None]
    # It has come home: when it fails again there is another copy.
    await queue.fail(leased, retry=False)
    assert [job["source"]["attempts"] for job in await copies(queue) if job["source"]] == [2]


async def test_copies_whose_original_is_gone_go_home_as_new_jobs(queue: Replica):
    original = await failed_job(queue, dead_letter_queue="dlq", **FIELDS)
    assert (await queue.http.delete(f"/jobs/{original['id']}")).status_code == 204
    [copy] = await copies(queue)
    released = await queue.lease_one("dlq")
    await queue.verb("release", released)
    assert await redrive(queue, "dlq") == (1, 1)
    assert await copies(queue) == []
    [job] = await copies(queue, "q")
    assert job["id"] not in {original["id"], copy["id"]}
    expected = {**copy, "id": job["id"], "queue": "q", "source": None, "last_error": None}
    assert job == expected | {
        "created_at": job["created_at"],
        "run_at": job["run_at"],
        "dead_letter_queue": "dlq",
    }
    assert (await queue.lease_one())["id"] == job["id"]
    assert (await queue.http.get(f"/jobs/{copy['id']}/attempts")).status_code == 404


async def test_copies_of_one_group_and_of_no_more_than_the_limit(queue: Replica):
    for message in ("row 1", "other", "row 2", "row 3"):
        await failed_job(queue, message=message, dead_letter_queue="dlq")
    group = error_group(None, "row 9")
    assert await redrive(queue, "dlq", error_group=group, limit=2) == (2, 2)
    messages = [job["source"]["error"]["message"] for job in await copies(queue)]
    assert messages == ["row 3", "other"]


async def test_copies_that_a_worker_has_or_whose_original_has_not_failed_stay(queue: Replica):
    first, second = [await failed_job(queue, dead_letter_queue="dlq") for _ in range(2)]
    leased = await queue.lease_one("dlq")
    assert leased["source"]["job_id"] == first["id"]
    await queue.http.post(f"/jobs/{second['id']}/retry")
    assert await redrive(queue, "dlq") == (1, 0)
    assert [job["state"] for job in await copies(queue)] == ["ready", "active"]
    assert await states(queue, first["id"], second["id"]) == [("q", "failed"), ("q", "ready")]


async def test_two_copies_of_one_job_go_home_together(queue: Replica):
    job = await failed_job(queue, dead_letter_queue="dlq")
    await queue.http.post(f"/jobs/{job['id']}/retry")
    await queue.fail(await queue.lease_one(), retry=False)
    assert await redrive(queue, "dlq") == (2, 2)
    assert await states(queue, job["id"]) == [("q", "ready")]
    assert await copies(queue) == []


async def test_a_dead_letter_queues_own_failures_go_back_to_it(queue: Replica):
    await failed_job(queue, dead_letter_queue="dlq")
    copy = await queue.lease_one("dlq")
    await queue.fail(copy, retry=False)
    assert await redrive(queue, "dlq") == (1, 1)
    assert await states(queue, copy["id"]) == [("dlq", "ready")]
    assert [job["state"] for job in await copies(queue, "q")] == ["failed"]
    # From there it goes home like any other.
    assert await redrive(queue, "dlq") == (1, 1)
    assert [job["state"] for job in await copies(queue, "q")] == ["ready"]


async def test_a_redrive_elsewhere_keeps_id_and_history(queue: Replica):
    failed = await failed_job(queue, payload=[1])
    assert await redrive(queue, "q", to="elsewhere") == (1, 1)
    leased = await queue.lease_one("elsewhere")
    assert (leased["id"], leased["attempt"], leased["payload"]) == (failed["id"], 2, [1])
    assert len(await queue.attempts(failed["id"])) == 2
    assert await queue.lease() == []
    assert [group["count"] for group in await failures(queue)] == []


async def test_copies_go_elsewhere_as_they_are(queue: Replica):
    original = await failed_job(queue, dead_letter_queue="dlq", payload=[1])
    [copy] = await copies(queue)
    assert await redrive(queue, "dlq", to="elsewhere") == (1, 1)
    assert (await queue.job(copy["id"])) == copy | {"queue": "elsewhere"}
    assert await states(queue, original["id"]) == [("q", "failed")]
    assert (await queue.lease_one("elsewhere"))["source"]["job_id"] == original["id"]


async def test_who_goes_to_its_own_dead_letter_queue_has_none_there(queue: Replica):
    failed = await failed_job(queue, dead_letter_queue="dlq")
    await queue.http.put("/queues/dlq", json={"dead_letter_queue": "second"})
    copied = await failed_job(queue, "other", dead_letter_queue="dlq")
    [copy] = [job for job in await copies(queue) if job["source"]["job_id"] == copied["id"]]
    assert copy["dead_letter_queue"] == "second"
    assert await redrive(queue, "dlq", to="second") == (2, 2)
    assert await redrive(queue, "q", to="dlq") == (1, 1)
    for job_id in (failed["id"], copy["id"]):
        assert (await queue.job(job_id))["dead_letter_queue"] is None
        assert (await queue.http.patch(f"/jobs/{job_id}", json={"priority": 1})).status_code == 200


async def test_a_redrive_onto_a_taken_key_is_not_made(queue: Replica):
    unique = {"key": "k"}
    failed = await failed_job(queue, unique=unique, dead_letter_queue="dlq")
    holder = await queue.enqueue(unique=unique)
    elsewhere = await queue.enqueue("elsewhere", unique=unique)
    for name, body in [("q", {}), ("dlq", {}), ("q", {"to": "elsewhere"})]:
        assert await redrive(queue, name, **body) == (1, 0)
    assert await states(queue, failed["id"]) == [("q", "failed")]
    assert len(await copies(queue)) == 1
    # Each queue has keys of its own: who goes elsewhere takes its key along.
    assert await redrive(queue, "q", to="third") == (1, 1)
    again = await queue.http.post("/jobs", json={"queue": "third", "unique": unique})
    assert (again.status_code, again.json()["id"]) == (200, failed["id"])
    for name, job in (("q", holder), ("elsewhere", elsewhere)):
        again = await queue.http.post("/jobs", json={"queue": name, "unique": unique})
        assert (again.status_code, again.json()["id"]) == (200, job["id"])


async def test_who_goes_elsewhere_lets_its_key_go(queue: Replica):
    unique = {"key": "k", "scope": "window", "window_seconds": 3600}
    failed = await failed_job(queue, unique=unique)
    assert await redrive(queue, "q", to="r") == (1, 1)
    new = await queue.enqueue(unique=unique)
    assert new["id"] != failed["id"]


async def test_a_redrive_that_has_taken_its_time_says_that_there_may_be_more(
    queue: Replica, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(redriving, "STEP", 1)
    queue.machine.service.redriving.seconds = 0
    for _ in range(2):
        await failed_job(queue, dead_letter_queue="dlq")
    calls = [(await queue.http.post("/queues/dlq/redrive")).json() for _ in range(3)]
    assert [(told["changed"], told["more"]) for told in calls] == [(1, True), (1, False), (0, False)]


async def test_a_long_line_does_not_keep_failed_jobs_from_going_back(
    queue: Replica, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(redriving, "LOOKED_AT", 2)
    failed = await failed_job(queue)
    for _ in range(4):
        await queue.enqueue()
    queue.machine.service.redriving.seconds = 0
    answer = await queue.http.post("/queues/q/redrive")
    assert answer.json() == {"matched": 1, "changed": 1, "more": True}
    assert await states(queue, failed["id"]) == [("q", "ready")]


async def test_a_copy_far_back_in_line_goes_home(queue: Replica, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(redriving, "LOOKED_AT", 2)
    for _ in range(5):
        await queue.enqueue("dlq")
    failed = [(await failed_job(queue, dead_letter_queue="dlq"))["id"] for _ in range(3)]
    group = error_group(None, "boom")
    assert await redrive(queue, "dlq", error_group=group, limit=2) == (2, 2)
    assert await redrive(queue, "dlq", error_group=group) == (1, 1)
    assert await states(queue, *failed) == [("q", "ready")] * 3


async def test_who_waits_for_what_comes_home_is_called(world: World, queue: Replica):
    job = await failed_job(queue, dead_letter_queue="dlq")
    other = await world.replica()
    waiting = asyncio.create_task(other.lease("q", wait_seconds=20))
    while other.machine.service.wakeups.waiters < 1:
        await asyncio.sleep(0.005)
    await redrive(queue, "dlq")
    assert [each["id"] for each in await waiting] == [job["id"]]


@pytest.mark.parametrize(
    "body", [{"to": "q"}, {"to": "a b"}, {"error_group": "E"}, {"limit": 0}, {"all": True}, {"to": "a\n"}]
)
async def test_a_bad_redrive_changes_nothing(queue: Replica, world: World, body: dict[str, Any]):
    await failed_job(queue)
    async with nothing_changes(world):
        problem(await queue.http.post("/queues/q/redrive", json=body), "invalid")


async def test_what_can_be_no_queue_is_not_redriven(queue: Replica):
    problem(await queue.http.post("/queues/-/redrive"), "not_found")
    assert await redrive(queue, "nobody_knows") == (0, 0)
