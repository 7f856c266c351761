"""What operators do and see: cancel, retry, delete; lists, attempts, counts."""

from datetime import timedelta
from typing import Any

import httpx
import pytest

from app.queue.events import CancelRequested, JobCancelled, JobDeleted, JobRetried
from tests.conftest import Replica, World

UNKNOWN_JOB = "0190a4f4-3b7a-7c39-8f3e-000000000000"
WAITING = ("scheduled", "ready", "retry")
DEAD = ("failed", "cancelled", "expired")
STATES = (*WAITING, "active", "completed", *DEAD)


async def brought_to(state: str, queue: Replica, world: World, name: str = "q", **fields: Any) -> str:
    """Lead a new job to a state; return its id. Its type is the state, so that no other is leased in its place."""
    delay_seconds = 60 if state == "scheduled" else None
    job_id: str = (await queue.enqueue(name, type=state, delay_seconds=delay_seconds, **fields))["id"]
    if state in {"active", "retry", "completed", "failed"}:
        leased = await queue.lease_one(name, types=[state], worker="w")
        if state == "completed":
            await queue.verb("ack", leased)
        elif state != "active":
            await queue.fail(leased, retry=state == "retry", retry_in_seconds=60)
    elif state in {"cancelled", "expired"}:
        await queue.http.post(f"/jobs/{job_id}/cancel")
    if state == "expired":
        # No job has a start deadline yet; this is how one that has passed it is kept.
        connection = await world.connect()
        await connection.execute(
            "UPDATE dead SET state = 'expired', reason = 'expired' WHERE id = $1", job_id
        )
        await connection.execute("INSERT INTO deltas (queue, cancelled, expired) VALUES ($1, -1, 1)", name)
    assert (await queue.job(job_id))["state"] == state
    return job_id


def wrong_state(answer: httpx.Response) -> str:
    """Return the state that a refusal tells."""
    problem = answer.json()
    assert (answer.status_code, problem["code"]) == (409, "wrong_state"), answer.text
    state: str = problem["state"]
    return state


async def operate(queue: Replica, verb: str, job_id: str) -> httpx.Response:
    if verb == "delete":
        return await queue.http.delete(f"/jobs/{job_id}")
    return await queue.http.post(f"/jobs/{job_id}/{verb}")


# Cancel


async def test_a_job_that_waits_is_cancelled_at_once(queue: Replica, world: World):
    for state in WAITING:
        job_id = await brought_to(state, queue, world, state, payload=[1])
        before = await queue.job(job_id)
        answer = await operate(queue, "cancel", job_id)
        job = answer.json()
        assert answer.status_code == 200
        assert (job["state"], job["reason"], job["payload"]) == ("cancelled", "cancelled", [1])
        assert (job["attempt"], job["last_error"]) == (before["attempt"], before["last_error"])
        assert job["finished_at"] is not None
        assert await queue.job(job_id) == job
    queue.clock.move(3600)
    await queue.maintain()
    assert await queue.lease(*WAITING) == []


async def test_a_cancel_of_a_cancelled_job_is_answered_again(queue: Replica, world: World):
    job_id = await brought_to("ready", queue, world)
    first = await operate(queue, "cancel", job_id)
    again = await operate(queue, "cancel", job_id)
    assert (again.status_code, again.json()) == (200, first.json())
    assert len(queue.events.of(JobCancelled)) == 1


@pytest.mark.parametrize(
    ("ending", "state", "outcome"),
    [
        ("ack", "completed", "acked"),
        ("fail", "cancelled", "cancelled"),
        ("fail for good", "cancelled", "cancelled"),
        ("release", "cancelled", "cancelled"),
        ("silence", "cancelled", "cancelled"),
    ],
)
async def test_the_cancel_of_an_active_job_is_a_request_that_its_worker_hears_of(
    queue: Replica, ending: str, state: str, outcome: str
):
    job_id = (await queue.enqueue())["id"]
    leased = await queue.lease_one()
    for _ in range(2):
        asked = await operate(queue, "cancel", job_id)
        assert asked.status_code == 200
        assert (asked.json()["state"], asked.json()["cancel_requested"]) == ("active", True)
    assert queue.events.of(CancelRequested) != []
    assert (await queue.verb("heartbeat", leased)).json()["cancel_requested"] is True

    match ending:
        case "ack":
            assert (await queue.verb("ack", leased)).status_code == 200
        case "fail":
            assert await queue.fail(leased, "stopped") == {"state": "cancelled"}
        case "fail for good":
            assert await queue.fail(leased, "stopped", retry=False) == {"state": "cancelled"}
        case "release":
            assert (await queue.verb("release", leased)).json() == {"state": "cancelled"}
        case "silence":
            queue.clock.move(60)
            await queue.maintain()
    job = await queue.job(job_id)
    assert (job["state"], job["cancel_requested"]) == (state, False)
    assert job["reason"] == ("cancelled" if state == "cancelled" else None)
    assert [each["outcome"] for each in await queue.attempts(job_id)] == [outcome]
    if ending.startswith("fail"):
        assert job["last_error"] == {"message": "stopped"}


async def test_a_job_that_has_ended_otherwise_is_not_cancelled(queue: Replica, world: World):
    for state in ("completed", "failed", "expired"):
        job_id = await brought_to(state, queue, world)
        before = await queue.job(job_id)
        assert wrong_state(await operate(queue, "cancel", job_id)) == state
        assert await queue.job(job_id) == before


# Retry


async def test_a_dead_job_is_ready_again_when_it_is_retried(queue: Replica, world: World):
    for state in DEAD:
        job_id = await brought_to(state, queue, world, state, payload=[1], metadata={"m": 1})
        before = await queue.job(job_id)
        answer = await operate(queue, "retry", job_id)
        job = answer.json()
        assert answer.status_code == 200
        changed = {
            "state": "ready",
            "retry_count": 0,
            "reason": None,
            "run_at": job["run_at"],
            "started_at": None,
            "finished_at": None,
            "worker": None,
        }
        assert job == before | changed
        assert (await queue.lease_one(state))["id"] == job_id
    assert len(queue.events.of(JobRetried)) == 3


async def test_a_retried_job_has_a_fresh_budget_and_its_attempts_count_on(queue: Replica):
    now = queue.clock.move(0)
    job_id = (await queue.enqueue(max_retries=1, backoff={"jitter": "none"}))["id"]
    for attempt in range(1, 5):
        leased = await queue.lease_one()
        assert leased["attempt"] == attempt
        settled = await queue.fail(leased, f"error {attempt}")
        if attempt % 2:
            assert settled == {"state": "retry", "run_at": settled["run_at"]}
            assert settled["run_at"] == (now + timedelta(seconds=1)).isoformat().replace("+00:00", "Z")
            now = queue.clock.move(1)
            await queue.maintain()
        else:
            assert settled == {"state": "failed"}
            await operate(queue, "retry", job_id)
    attempts = await queue.attempts(job_id)
    assert [(each["attempt"], each["error"]["message"]) for each in attempts] == [
        (number, f"error {number}") for number in range(1, 5)
    ]


async def test_a_retried_job_stands_at_the_end_of_the_line(queue: Replica, world: World):
    dead = await brought_to("failed", queue, world)
    waiting = await brought_to("ready", queue, world)
    await operate(queue, "retry", dead)
    assert [job["id"] for job in await queue.lease(max_jobs=2)] == [waiting, dead]


async def test_a_job_that_is_not_dead_is_not_retried(queue: Replica, world: World):
    for state in (*WAITING, "active", "completed"):
        job_id = await brought_to(state, queue, world, state)
        before = await queue.job(job_id)
        assert wrong_state(await operate(queue, "retry", job_id)) == state
        assert await queue.job(job_id) == before


# Delete


async def test_a_job_that_has_ended_is_deleted_with_its_attempts(queue: Replica, world: World):
    for state in ("completed", *DEAD):
        job_id = await brought_to(state, queue, world, state)
        answer = await operate(queue, "delete", job_id)
        assert (answer.status_code, answer.content) == (204, b"")
        for path in ("", "/attempts"):
            assert (await queue.http.get(f"/jobs/{job_id}{path}")).status_code == 404
    assert (await queue.http.get("/jobs")).json()["jobs"] == []
    assert set((await queue.stats()).values()) == {0}
    assert len(queue.events.of(JobDeleted)) == 4


async def test_a_job_that_has_not_ended_is_not_deleted(queue: Replica, world: World):
    for state in (*WAITING, "active"):
        job_id = await brought_to(state, queue, world, state)
        before = await queue.job(job_id)
        assert wrong_state(await operate(queue, "delete", job_id)) == state
        assert await queue.job(job_id) == before


async def test_of_an_unknown_job_every_question_and_verb_says_not_found(queue: Replica):
    for job_id in (UNKNOWN_JOB, "no-uuid"):
        answers = [await operate(queue, verb, job_id) for verb in ("cancel", "retry", "delete")]
        answers += [await queue.http.get(f"/jobs/{job_id}{path}") for path in ("", "/attempts")]
        assert {(each.status_code, each.json()["code"]) for each in answers} == {(404, "not_found")}


# Attempts


async def test_attempts_tell_of_each_how_it_began_and_ended(queue: Replica):
    start = queue.clock.move(0)
    job_id = (await queue.enqueue(backoff={"jitter": "none"}))["id"]
    assert await queue.attempts(job_id) == []
    await queue.fail(await queue.lease_one(worker="w1"), "first")
    queue.clock.move(1)
    await queue.maintain()
    leased = await queue.lease_one()
    running = (await queue.attempts(job_id))[-1]
    assert (running["outcome"], running["ended_at"], running["error"]) == (None, None, None)
    queue.clock.move(2)
    await queue.verb("ack", leased)

    def at(seconds: float) -> str:
        return (start + timedelta(seconds=seconds)).isoformat().replace("+00:00", "Z")

    assert await queue.attempts(job_id) == [
        {
            "attempt": 1,
            "worker": "w1",
            "started_at": at(0),
            "ended_at": at(0),
            "outcome": "failed",
            "error": {"message": "first"},
        },
        {
            "attempt": 2,
            "worker": None,
            "started_at": at(1),
            "ended_at": at(3),
            "outcome": "acked",
            "error": None,
        },
    ]


# Lists


async def names(queue: Replica, query: str = "") -> list[str]:
    answer = await queue.http.get(f"/jobs?{query}")
    assert answer.status_code == 200, answer.text
    return [job["payload"] for job in answer.json()["jobs"]]


async def test_a_list_shows_every_job_as_it_stands_newest_first(queue: Replica, world: World):
    ids = [await brought_to(state, queue, world, state, payload=state, tags=["t"]) for state in STATES]
    listed = (await queue.http.get("/jobs")).json()
    assert listed["jobs"] == [await queue.job(job_id) for job_id in reversed(ids)]
    assert listed["next_cursor"] is None


async def test_a_list_is_filtered_by_state(queue: Replica, world: World):
    for state in STATES:
        await brought_to(state, queue, world, state, payload=state)
    for state in STATES:
        assert await names(queue, f"state={state}") == [state]
    assert await names(queue, "state=retry&state=ready&state=completed&state=failed") == [
        "failed",
        "completed",
        "retry",
        "ready",
    ]
    assert await names(queue, "state=held") == []


async def test_a_list_is_filtered_by_each_field_and_by_all_together(queue: Replica):
    start = queue.clock.move(0)

    async def make(name: str, queue_name: str, type_: str, *tags: str) -> None:
        queue.clock.move(10)
        await queue.enqueue(queue_name, type=type_, payload=name, tags=tags)

    async def lease(worker: str) -> dict[str, Any]:
        return await queue.lease_one("a", "b", worker=worker)

    await make("done", "a", "x", "red")
    await queue.verb("ack", await lease("w1"))
    await make("dead", "a", "y", "red", "blue sky")
    await queue.verb("fail", await lease("w2"), error={"message": "m", "type": "Boom"}, retry=False)
    await make("again", "b", "y")
    await queue.verb("fail", await lease("w2"), error={"message": "m", "type": "Boom"})
    await make("busy", "b", "x", "red")
    await lease("w1")
    await make("new", "c", "x", "blue")

    def after(seconds: float) -> str:
        return (start + timedelta(seconds=seconds)).isoformat().replace("+00:00", "Z")

    expected = {
        "": ["new", "busy", "again", "dead", "done"],
        "queue=a": ["dead", "done"],
        "queue=a&queue=c": ["new", "dead", "done"],
        "queue=none": [],
        "type=y": ["again", "dead"],
        "type=x&type=y": ["new", "busy", "again", "dead", "done"],
        "tag=red": ["busy", "dead", "done"],
        "tag=blue%20sky": ["dead"],
        "tag=re": [],
        "worker=w1": ["busy", "done"],
        "worker=w2": ["dead"],
        "error=Boom": ["again", "dead"],
        "error=Boo": [],
        f"created_after={after(30)}": ["new", "busy"],
        f"created_after={after(29.9)}": ["new", "busy", "again"],
        f"created_before={after(30)}": ["dead", "done"],
        f"created_before={after(30.1)}": ["again", "dead", "done"],
        f"created_after={after(15)}&created_before={after(45)}": ["busy", "again", "dead"],
        "queue=a&type=x&tag=red&worker=w1&state=completed&state=failed": ["done"],
        "queue=a&type=y&tag=red&worker=w2&error=Boom&state=failed": ["dead"],
        "queue=a&type=y&tag=red&worker=w2&error=Boom&state=ready": [],
        "limit=2": ["new", "busy"],
    }
    assert {query: await names(queue, query) for query in expected} == expected


async def test_pages_follow_each_other_without_gap_or_repeat(queue: Replica, world: World):
    for state in STATES:
        await brought_to(state, queue, world, state, payload=state)
    pages: list[list[str]] = []
    cursor = ""
    while True:
        page = (await queue.http.get(f"/jobs?limit=3{cursor}")).json()
        pages.append([job["payload"] for job in page["jobs"]])
        # What comes meanwhile is newer than every page to come.
        await queue.enqueue("later")
        if page["next_cursor"] is None:
            break
        cursor = f"&cursor={page['next_cursor']}"
    newest_first = list(reversed(STATES))
    assert pages == [newest_first[:3], newest_first[3:6], newest_first[6:]]


async def test_the_last_page_may_be_full_and_an_empty_list_is_a_page(queue: Replica):
    assert (await queue.http.get("/jobs")).json() == {"jobs": [], "next_cursor": None}
    for _ in range(2):
        await queue.enqueue()
    page = (await queue.http.get("/jobs?limit=2")).json()
    assert (len(page["jobs"]), page["next_cursor"]) == (2, None)


async def test_a_page_has_50_jobs_unless_the_limit_says_otherwise(queue: Replica):
    for _ in range(51):
        await queue.enqueue()
    assert len(await names(queue)) == 50
    assert len(await names(queue, "limit=500")) == 51


async def test_a_page_stops_at_8_mib_and_the_next_goes_on_there(queue: Replica):
    half = "x" * (256 * 1024 - 2)
    ids = [(await queue.enqueue(payload=half))["id"] for _ in range(33)]
    first = (await queue.http.get("/jobs")).json()
    second = (await queue.http.get(f"/jobs?cursor={first['next_cursor']}")).json()
    assert [job["id"] for job in first["jobs"] + second["jobs"]] == ids[::-1]
    assert (len(second["jobs"]), second["next_cursor"]) == (1, None)


async def test_a_cursor_belongs_to_its_filters(queue: Replica):
    for _ in range(2):
        await queue.enqueue()
    cursor = (await queue.http.get("/jobs?queue=q&limit=1")).json()["next_cursor"]
    assert len(await names(queue, f"queue=q&limit=1&cursor={cursor}")) == 1
    for query in (f"queue=r&cursor={cursor}", f"cursor={cursor}", "cursor=nonsense", "cursor=%00", "cursor="):
        answer = await queue.http.get(f"/jobs?{query}")
        assert (query, answer.status_code) == (query, 422)
        assert answer.json()["errors"][0]["field"] == "cursor"


async def test_a_bad_filter_is_refused_by_its_name(queue: Replica):
    for field, value in [
        ("state", "gone"),
        ("queue", "a b"),
        ("type", "-"),
        ("tag", "%00"),
        ("worker", "%00"),
        ("error", "%00"),
        ("created_after", "yesterday"),
        ("created_before", "2030-01-01T00:00:00"),
        ("limit", "0"),
        ("limit", "501"),
        ("limit", "many"),
        ("sort", "id"),
    ]:
        answer = await queue.http.get(f"/jobs?{field}={value}")
        assert (field, answer.status_code) == (field, 422)
        assert answer.json()["errors"][0]["field"].startswith(field)


# Counts


async def test_stats_count_what_is_kept_now_in_all_and_by_queue(queue: Replica, world: World):
    counted = ("active", "waiting", "delayed", "completed", "failed", "cancelled", "expired")
    nothing = dict.fromkeys(counted, 0)
    assert (await queue.http.get("/stats")).json() == {"jobs": nothing, "queues": {}}

    for state in STATES:
        await brought_to(state, queue, world, "all")
    await brought_to("completed", queue, world, "one")
    expected = {
        "jobs": dict.fromkeys(counted, 1) | {"delayed": 2, "completed": 2},
        "queues": {
            "all": dict.fromkeys(counted, 1) | {"delayed": 2},
            "one": nothing | {"completed": 1},
        },
    }
    assert (await queue.http.get("/stats")).json() == expected
    await queue.maintain()
    assert (await queue.http.get("/stats")).json() == expected
