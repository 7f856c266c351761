"""Many jobs at a time: retry, cancel, delete, update by a filter."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from app.engine import operating
from app.queue.events import BulkRan, BulkVerb, JobCancelled, JobRetried
from app.queue.groups import error_group
from tests.api.refusals import nothing_changes, problem
from tests.api.test_dead_letters import failed_job
from tests.api.test_operating import STATES, brought_to
from tests.conftest import Replica, World

SETS = {"update": {"set": {"priority": 2}}}
TOUCHED = {
    "retry": {"failed", "cancelled", "expired"},
    "cancel": {"scheduled", "ready", "retry", "active"},
    "delete": {"completed", "failed", "cancelled", "expired"},
    "update": {"scheduled", "ready", "retry", "failed", "cancelled", "expired"},
}


async def call(queue: Replica, verb: str, **body: Any) -> httpx.Response:
    return await queue.http.post(f"/jobs/{verb}", json={**SETS.get(verb, {}), **body})


async def done(queue: Replica, verb: str, **body: Any) -> tuple[int, int]:
    """Call a verb for many; return how many matched and were changed."""
    answer = await call(queue, verb, **body)
    assert answer.status_code == 200, answer.text
    told = answer.json()
    assert told == {"matched": told["matched"], "changed": told["changed"], "next_cursor": None}
    return told["matched"], told["changed"]


async def jobs(queue: Replica) -> dict[str, dict[str, Any]]:
    answer = await queue.http.get("/jobs", params={"limit": 500})
    return {job["id"]: job for job in answer.json()["jobs"]}


@pytest.mark.parametrize("verb", TOUCHED)
async def test_a_verb_touches_the_states_that_allow_it_and_no_others(queue: Replica, world: World, verb: str):
    for state in STATES:
        await brought_to(state, queue, world, state)
    before = await jobs(queue)
    states = {job_id: job["state"] for job_id, job in before.items()}
    async with nothing_changes(world):
        count = len(TOUCHED[verb])
        assert await done(queue, verb, all=True, dry_run=True) == (count, 0)
    assert await done(queue, verb, all=True) == (count, count)
    after = await jobs(queue)
    changed = {states[job_id] for job_id in before if after.get(job_id) != before[job_id]}
    assert changed == TOUCHED[verb]
    match verb:
        case "retry":
            assert len(queue.events.of(JobRetried)) == 3
            assert {after[job_id]["state"] for job_id in before if states[job_id] in changed} == {"ready"}
        case "cancel":
            assert len(queue.events.of(JobCancelled)) >= 3
            assert [job["cancel_requested"] for job in after.values() if job["state"] == "active"] == [True]
        case "delete":
            assert len(after) == len(before) - count
        case "update":
            assert {after[job_id]["priority"] for job_id in before if states[job_id] in changed} == {2}
    [ran] = queue.events.of(BulkRan)
    assert (ran.verb, ran.matched, ran.changed, ran.finished) == (BulkVerb(verb), count, count, True)


FIELDS: list[dict[str, Any]] = [
    {"state": ["ready"]},
    {"state": "ready"},
    {"queue": ["wanted"]},
    {"queue": "wanted"},
    {"type": ["wanted", "nobody"]},
    {"tag": "wanted"},
    {"ids": []},
]


@pytest.mark.parametrize("wanted", FIELDS)
async def test_a_filter_has_the_names_of_the_list(queue: Replica, wanted: dict[str, Any]):
    job = await queue.enqueue("wanted", type="wanted", tags=["wanted", "x"])
    await queue.enqueue(delay_seconds=60)
    if "ids" in wanted:
        wanted = {"ids": [job["id"], "0190a4f4-3b7a-7c39-8f3e-000000000000"]}
    assert await done(queue, "cancel", filter=wanted) == (1, 1)
    assert (await queue.job(job["id"]))["state"] == "cancelled"


async def test_a_filter_by_error_worker_and_age(queue: Replica):
    old = await failed_job(queue, message="no user 1", error_type="E")
    new = await failed_job(queue, message="no user 2", error_type="E")
    other = await failed_job(queue, message="other", error_type="E")
    group = error_group("E", "no user 9")
    for wanted, count in [
        ({"error": "E"}, 3),
        ({"error": group}, 2),
        ({"error": "no user"}, 0),
        ({"error": group, "created_after": old["created_at"]}, 1),
        ({"error": group, "created_before": new["created_at"]}, 1),
        ({"worker": "nobody"}, 0),
        ({"state": ["ready"]}, 0),
    ]:
        assert await done(queue, "retry", filter=wanted, dry_run=True) == (count, 0)
    assert await done(queue, "retry", filter={"error": group}) == (2, 2)
    assert [job["id"] for job in await queue.lease(max_jobs=5)] == [old["id"], new["id"]]
    assert (await queue.job(other["id"]))["state"] == "failed"


@pytest.mark.parametrize("verb", TOUCHED)
@pytest.mark.parametrize(
    "body",
    [
        {},
        {"filter": {}},
        {"filter": {"tag": None}},
        {"filter": {"queue": ["q"]}, "all": True},
        {"filter": {"colour": "red"}, "all": True},
        {"filter": {"state": ["gone"]}},
        {"filter": {"queue": ["a b"]}},
        {"filter": {"tag": "a\nb"}},
        {"filter": {"ids": ["x"]}},
        {"all": True, "cursor": "x"},
        {"all": True, "extra": 1},
    ],
)
async def test_a_call_that_names_nothing_or_what_there_is_not_changes_nothing(
    queue: Replica, world: World, verb: str, body: dict[str, Any]
):
    await queue.enqueue()
    await failed_job(queue, "f")
    async with nothing_changes(world):
        problem(await call(queue, verb, **body), "invalid")


@pytest.mark.parametrize("verb", TOUCHED)
async def test_an_empty_list_does_not_mean_all(queue: Replica, world: World, verb: str):
    await queue.enqueue("wanted", tags=["x"])
    await failed_job(queue, tags=["x"])
    async with nothing_changes(world):
        for field in ("ids", "state", "queue", "type"):
            for dry_run in (False, True):
                wanted = {"tag": "x", field: []}
                told = problem(await call(queue, verb, filter=wanted, dry_run=dry_run), "invalid")
                assert told["errors"][0]["field"] == f"filter.{field}"


async def test_an_update_must_name_what_to_change(queue: Replica, world: World):
    await queue.enqueue()
    async with nothing_changes(world):
        bodies: list[dict[str, Any]] = [{}, {"set": {}}, {"set": {"queue": "r"}}, {"set": {"run_at": "soon"}}]
        for body in bodies:
            problem(await queue.http.post("/jobs/update", json={"all": True, **body}), "invalid")


async def test_of_many_those_that_can_not_take_a_change_are_left(queue: Replica, world: World):
    waiting = await brought_to("ready", queue, world)
    await brought_to("failed", queue, world)
    await queue.enqueue("dlq")
    changes = {"set": {"dead_letter_queue": "dlq", "delay_seconds": 60}}
    assert await done(queue, "update", all=True, **changes) == (3, 1)
    assert (await queue.job(waiting))["dead_letter_queue"] == "dlq"


async def test_a_call_goes_on_where_the_one_before_has_ended(queue: Replica, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(operating, "STEP", 2)
    queue.machine.service.operating.bulk_seconds = 0
    old = [(await queue.enqueue())["id"] for _ in range(5)]
    calls, cursor, new = [], None, ""
    while True:
        answer = (await call(queue, "cancel", filter={"queue": ["q"]}, cursor=cursor)).json()
        calls.append((answer["matched"], answer["changed"]))
        if not new:
            # What comes after the first call is not its business.
            new = (await queue.enqueue())["id"]
        cursor = answer["next_cursor"]
        if cursor is None:
            break
        for body in ({"filter": {"queue": ["r"]}}, {"all": True}):
            told = problem(await call(queue, "cancel", cursor=cursor, **body), "invalid")
            assert told["errors"][0]["field"] == "cursor"
        problem(await call(queue, "delete", filter={"queue": ["q"]}, cursor=cursor), "invalid")
    assert calls == [(2, 2), (2, 2), (1, 1)]
    assert {(await queue.job(job_id))["state"] for job_id in old} == {"cancelled"}
    assert (await queue.job(new))["state"] == "ready"
    assert [ran.finished for ran in queue.events.of(BulkRan)] == [False, False, True]


async def swept(queue: Replica, verb: str, **body: Any) -> list[tuple[int, int]]:
    """Call a verb for many again and again until it has come to the end; return what each call says."""
    calls: list[tuple[int, int]] = []
    cursor = None
    while not calls or cursor is not None:
        answer = await call(queue, verb, cursor=cursor, **body)
        assert answer.status_code == 200, answer.text
        told = answer.json()
        calls.append((told["matched"], told["changed"]))
        cursor = told["next_cursor"]
    return calls


@pytest.mark.parametrize("wanted", [{"tag": "rare"}, {"state": "retry"}, {"type": "rare"}])
async def test_a_call_goes_on_also_where_nothing_matches(
    queue: Replica, monkeypatch: pytest.MonkeyPatch, wanted: dict[str, Any]
):
    monkeypatch.setattr(operating, "LOOKED_AT", 2)
    queue.machine.service.operating.bulk_seconds = 0
    for _ in range(4):
        await queue.enqueue("other", delay_seconds=60)
    rare = await queue.enqueue(type="rare", tags=["rare"])
    await queue.fail(await queue.lease_one(), retry_in_seconds=60)
    assert await swept(queue, "cancel", filter=wanted, dry_run=True) == [(0, 0), (0, 0), (1, 0)]
    assert await swept(queue, "cancel", filter=wanted) == [(0, 0), (0, 0), (1, 1)]
    assert (await queue.job(rare["id"]))["state"] == "cancelled"


@pytest.mark.parametrize("verb", TOUCHED)
async def test_small_looks_leave_nobody_out(
    queue: Replica, world: World, monkeypatch: pytest.MonkeyPatch, verb: str
):
    monkeypatch.setattr(operating, "LOOKED_AT", 1)
    queue.machine.service.operating.bulk_seconds = 0
    for state in STATES * 2:
        await brought_to(state, queue, world, state)
    count = 2 * len(TOUCHED[verb])
    calls = await swept(queue, verb, all=True)
    assert (sum(matched for matched, _ in calls), sum(changed for _, changed in calls)) == (count, count)


async def test_a_retry_of_many_passes_over_taken_unique_keys(queue: Replica):
    unique = {"key": "k"}
    ids = []
    for _ in range(2):
        ids.append((await queue.enqueue(unique=unique))["id"])
        await queue.fail(await queue.lease_one(), retry=False)
    ids.append((await queue.enqueue())["id"])
    await queue.fail(await queue.lease_one(), retry=False)
    assert await done(queue, "retry", filter={"state": ["failed"]}) == (3, 2)
    states = [(await queue.job(job_id))["state"] for job_id in ids]
    assert states == ["ready", "failed", "ready"]


async def after_the_look(queue: Replica, monkeypatch: pytest.MonkeyPatch, happens: Callable[[], Any]) -> None:
    """Let something happen between the next call's look at the jobs and its change."""
    reads = queue.machine.service.operating._reads
    look = reads.look

    async def then(*arguments: Any, **named: Any) -> Any:
        found = await look(*arguments, **named)
        await happens()
        return found

    monkeypatch.setattr(reads, "look", then)


@pytest.mark.parametrize("verb", ["cancel", "update"])
async def test_a_job_that_has_left_the_wanted_state_meanwhile_is_left_alone(
    queue: Replica, monkeypatch: pytest.MonkeyPatch, verb: str
):
    leased, delayed = [(await queue.enqueue(name))["id"] for name in ("q", "r")]

    async def moves() -> None:
        await queue.lease_one()
        await queue.http.patch(f"/jobs/{delayed}", json={"delay_seconds": 60})

    await after_the_look(queue, monkeypatch, moves)
    assert await done(queue, verb, filter={"state": "ready"}) == (2, 0)
    active, scheduled = await queue.job(leased), await queue.job(delayed)
    assert (active["state"], active["cancel_requested"]) == ("active", False)
    assert (scheduled["state"], scheduled["priority"]) == ("scheduled", 5)
