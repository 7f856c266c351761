"""What a worker tells with its heartbeats: progress and checkpoint, and who gets to see them."""

import json
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest

from app.queue.events import JobProgressed
from app.store.jobs import REPLY_BYTES_MAX
from tests.conftest import Replica

PAYLOAD_BYTES_MAX = 256 * 1024
HALF = {"percent": 50, "message": "half of it"}
AT_PAGE_7 = {"page": 7, "exact": 0.1}


async def beat(queue: Replica, leased: dict[str, Any], way: str = "alone", **told: Any) -> dict[str, Any]:
    """Send a heartbeat, by itself, in a settle of several, or in a lease."""
    if way == "alone":
        answer = await queue.verb("heartbeat", leased, **told)
        assert answer.status_code == 200, answer.text
        single: dict[str, Any] = answer.json()
        return single
    item = {"job_id": leased["id"], "lease_id": leased["lease_id"], "outcome": "heartbeat", **told}
    if way == "in a lease":
        answer = await queue.http.post(
            "/lease", json={"queues": ["none"], "wait_seconds": 0, "settle": [item]}
        )
        [settled] = answer.json()["settled"]
    else:
        other = await queue.enqueue("other")
        [other_leased] = await queue.lease("other")
        ack = {"job_id": other["id"], "lease_id": other_leased["lease_id"], "outcome": "ack"}
        answer = await queue.http.post("/settle", json={"items": [ack, item]})
        settled = answer.json()["results"][1]
    assert settled["status"] == 200, settled
    result: dict[str, Any] = settled
    return result


def told(job: dict[str, Any]) -> tuple[Any, Any]:
    return job["progress"], job["checkpoint"]


@pytest.mark.parametrize("way", ["alone", "with others", "in a lease"])
async def test_progress_and_checkpoint_are_shown_with_the_job(queue: Replica, way: str):
    await queue.enqueue()
    leased = await queue.lease_one()
    await beat(queue, leased, way, progress=HALF, checkpoint=AT_PAGE_7)
    assert told(await queue.job(leased["id"])) == (HALF, AT_PAGE_7)
    [progressed] = queue.events.of(JobProgressed)
    assert (str(progressed.job_id), progressed.queue, progressed.type) == (leased["id"], "q", "default")
    [listed] = (await queue.http.get("/jobs", params={"state": "active"})).json()["jobs"]
    assert told(listed) == (HALF, AT_PAGE_7)


async def test_a_progress_replaces_the_one_before_and_leaves_the_checkpoint(queue: Replica):
    await queue.enqueue()
    leased = await queue.lease_one()
    await beat(queue, leased, progress=HALF, checkpoint=AT_PAGE_7)
    await beat(queue, leased, progress={"message": "more"})
    assert told(await queue.job(leased["id"])) == ({"percent": None, "message": "more"}, AT_PAGE_7)
    await beat(queue, leased, progress={"percent": 100})
    assert told(await queue.job(leased["id"])) == ({"percent": 100, "message": None}, AT_PAGE_7)


async def test_a_checkpoint_replaces_the_one_before_and_leaves_the_progress(queue: Replica):
    await queue.enqueue()
    leased = await queue.lease_one()
    await beat(queue, leased, progress=HALF)
    await beat(queue, leased, checkpoint=[1])
    await beat(queue, leased, checkpoint=[2])
    assert told(await queue.job(leased["id"])) == (HALF, [2])
    assert len(queue.events.of(JobProgressed)) == 1


async def test_a_heartbeat_that_tells_nothing_leaves_both(queue: Replica):
    await queue.enqueue()
    leased = await queue.lease_one()
    await beat(queue, leased, progress=HALF, checkpoint=AT_PAGE_7)
    await beat(queue, leased)
    assert told(await queue.job(leased["id"])) == (HALF, AT_PAGE_7)


@pytest.mark.parametrize("end", ["failed", "released", "lease expired"])
async def test_the_next_attempt_gets_the_checkpoint(queue: Replica, end: str):
    queue.clock.set(datetime.now(UTC))
    await queue.enqueue(backoff={"jitter": "none"})
    first = await queue.lease_one()
    assert first["checkpoint"] is None
    await beat(queue, first, progress=HALF, checkpoint=AT_PAGE_7)
    match end:
        case "failed":
            await queue.fail(first)
        case "released":
            await queue.verb("release", first)
        case _:
            queue.clock.move(60)
            await queue.maintain()
    assert told(await queue.job(first["id"])) == (HALF, AT_PAGE_7)
    queue.clock.move(60)
    await queue.maintain()
    second = await queue.lease_one()
    assert second["checkpoint"] == AT_PAGE_7
    assert (second["last_error"] is None) is (end == "released")


@pytest.mark.parametrize("end", ["failed", "cancelled while active", "cancelled while waiting"])
async def test_a_dead_job_keeps_both_and_takes_them_along_when_retried(queue: Replica, end: str):
    await queue.enqueue()
    leased = await queue.lease_one()
    await beat(queue, leased, progress=HALF, checkpoint=AT_PAGE_7)
    if end == "failed":
        await queue.fail(leased, retry=False)
    elif end == "cancelled while active":
        await queue.http.post(f"/jobs/{leased['id']}/cancel")
        await queue.verb("release", leased)
    else:
        await queue.verb("release", leased)
        await queue.http.post(f"/jobs/{leased['id']}/cancel")
    dead = await queue.job(leased["id"])
    assert dead["state"] == ("failed" if end == "failed" else "cancelled")
    assert told(dead) == (HALF, AT_PAGE_7)
    await queue.http.post(f"/jobs/{leased['id']}/retry")
    assert told(await queue.job(leased["id"])) == (HALF, AT_PAGE_7)
    assert (await queue.lease_one())["checkpoint"] == AT_PAGE_7


async def test_progress_alone_survives_death_and_retry(queue: Replica):
    await queue.enqueue()
    leased = await queue.lease_one()
    await beat(queue, leased, progress=HALF)
    await queue.verb("release", leased)
    await queue.http.post(f"/jobs/{leased['id']}/cancel")
    await queue.http.post(f"/jobs/{leased['id']}/retry")
    assert told(await queue.job(leased["id"])) == (HALF, None)


async def test_an_expired_job_keeps_them_too(queue: Replica):
    queue.clock.move(0)
    await queue.enqueue(expires_in_seconds=10)
    leased = await queue.lease_one()
    await beat(queue, leased, progress=HALF, checkpoint=AT_PAGE_7)
    await queue.verb("release", leased)
    queue.clock.move(10)
    await queue.maintain()
    expired = await queue.job(leased["id"])
    assert (expired["state"], told(expired)) == ("expired", (HALF, AT_PAGE_7))


async def test_an_acked_job_has_a_result_instead(queue: Replica):
    await queue.enqueue()
    leased = await queue.lease_one()
    await beat(queue, leased, progress=HALF, checkpoint=AT_PAGE_7)
    done = (await queue.verb("ack", leased, result=1)).json()
    assert (done["result"], told(done)) == (1, (None, None))


async def test_a_lost_lease_notes_nothing(queue: Replica):
    await queue.enqueue()
    leased = await queue.lease_one()
    await queue.verb("release", leased)
    answer = await queue.verb("heartbeat", leased, progress=HALF, checkpoint=AT_PAGE_7)
    assert (answer.status_code, answer.json()["code"]) == (409, "lease_lost")
    assert told(await queue.job(leased["id"])) == (None, None)
    assert queue.events.of(JobProgressed) == []


@pytest.mark.parametrize("text", ["1e400", '"\\u0000"', "[[1.10]]", "123456789012345678901234567890", "null"])
async def test_a_checkpoint_comes_back_value_for_value(queue: Replica, text: str):
    await queue.enqueue()
    leased = await queue.lease_one()
    body = f'{{"lease_id": "{leased["lease_id"]}", "checkpoint": {text}}}'
    url = f"/jobs/{leased['id']}/heartbeat"
    answer = await queue.http.post(url, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 200, answer.text
    await queue.verb("release", leased)
    answer = await queue.http.post("/lease", json={"queues": ["q"]})
    assert f'"checkpoint":{text},' in answer.text
    assert f'"checkpoint":{text}}}' in (await queue.http.get(f"/jobs/{leased['id']}")).text


async def test_a_checkpoint_may_be_as_large_as_a_payload_and_no_larger(queue: Replica):
    await queue.enqueue()
    leased = await queue.lease_one()
    largest = "x" * (PAYLOAD_BYTES_MAX - 2)
    await beat(queue, leased, checkpoint=largest)
    assert (await queue.job(leased["id"]))["checkpoint"] == largest
    refused = await queue.verb("heartbeat", leased, checkpoint=largest + "x")
    assert (refused.status_code, refused.json()["code"]) == (413, "payload_too_large")
    item = {"job_id": leased["id"], "lease_id": leased["lease_id"], "outcome": "heartbeat"}
    settled = await queue.http.post("/settle", json={"items": [{**item, "checkpoint": largest + "x"}]})
    assert settled.json()["results"][0]["status"] == 413


async def test_a_reply_with_large_checkpoints_stops_like_one_with_large_payloads(queue: Replica):
    fit = REPLY_BYTES_MAX // PAYLOAD_BYTES_MAX
    for _ in range(fit + 1):
        await queue.enqueue(payload=0)
    leased = await queue.lease(max_jobs=fit + 1)
    for job in leased:
        await beat(queue, job, checkpoint="x" * (PAYLOAD_BYTES_MAX - 3))
        await queue.verb("release", job)
    assert len(await queue.lease(max_jobs=fit + 1)) == fit


async def test_a_long_message_is_cut_at_1_kib(queue: Replica):
    await queue.enqueue()
    leased = await queue.lease_one()
    await beat(queue, leased, progress={"message": "ä" * 1000})
    progress = (await queue.job(leased["id"]))["progress"]
    assert progress == {"percent": None, "message": "ä" * 512}


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"progress": {"percent": -0.1}}, "progress.percent"),
        ({"progress": {"percent": 100.1}}, "progress.percent"),
        ({"progress": {"percent": "50"}}, "progress.percent"),
        ({"progress": {}}, "progress"),
        ({"progress": {"message": "a\x00b"}}, "progress.message"),
        ({"progress": 50}, "progress"),
        ({"progress": {"done": 1}}, "progress"),
    ],
)
async def test_what_is_no_progress_is_refused_and_extends_nothing(
    queue: Replica, fields: dict[str, Any], field: str
):
    await queue.enqueue()
    leased = await queue.lease_one()
    answer = await queue.verb("heartbeat", leased, extend_seconds=600, **fields)
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"] == field
    row: httpx.Response = await queue.http.get(f"/jobs/{leased['id']}")
    assert told(row.json()) == (None, None)
    again = (await queue.verb("heartbeat", leased, extend_seconds=0)).json()
    assert again["lease_expires_at"] == leased["lease_expires_at"]


async def test_progress_words_reach_no_log_line(queue: Replica, capsys: pytest.CaptureFixture[str]):
    await queue.enqueue()
    leased = await queue.lease_one()
    await beat(queue, leased, progress={"message": "secret words"}, checkpoint="secret place")
    written = capsys.readouterr()
    assert "secret" not in written.out + written.err
    assert "secret" not in json.dumps([repr(event) for event in queue.events.events])
