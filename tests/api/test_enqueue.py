"""Enqueue: what is accepted, with which defaults it is stored, and how it comes back."""

import json
import re
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import httpx
import pytest

from tests.conftest import Replica, World

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

AWKWARD_JSON = {
    "a number beyond every double": b"1e400",
    "more digits than a double keeps": b"0.1000000000000000055511151231257827021181583404541015625",
    "an integer beyond 64 bits": b"-123456789012345678901234567890123456789",
    "negative zero": b"-0.0",
    "a key twice": b'{"key":1,"key":2}',
    "keys in no order": b'{"b":1,"":2,"a":3}',
    "NUL": rb'{"nu\u0000l":"\u0000"}',
    "text of many scripts": '"Žluťoučký kůň, 漢字, \u2028, 🦓"'.encode(),
    "an escaped surrogate pair": rb'"\ud83e\udd93"',
    "escapes that need not be": rb'"\u0041\/"',
    "deep nesting": b"[" * 499 + b"]" * 499,
    "nothing": b"null",
}


async def post(queue: Replica, **fields: Any) -> httpx.Response:
    return await queue.http.post("/jobs", json={"queue": "q", **fields})


def refused_field(answer: httpx.Response) -> str:
    assert answer.status_code == 422, answer.text
    assert answer.json()["code"] == "invalid"
    field: str = answer.json()["errors"][0]["field"]
    return field


async def test_a_job_that_names_only_its_queue_gets_every_default(queue: Replica):
    answer = await queue.http.post("/jobs", json={"queue": "emails"})
    job = answer.json()
    assert answer.status_code == 201
    assert answer.headers["location"] == f"/jobs/{job['id']}"
    assert UUID(job["id"]).version == 7
    assert job == {
        "id": job["id"],
        "queue": "emails",
        "type": "default",
        "state": "ready",
        "payload": None,
        "priority": 5,
        "attempt": 0,
        "retry_count": 0,
        "max_retries": 3,
        "backoff": {
            "strategy": "exponential",
            "initial_seconds": 1,
            "factor": 2,
            "max_seconds": 3600,
            "jitter": "equal",
        },
        "lease_seconds": 30,
        "timeout_seconds": None,
        "tags": [],
        "metadata": {},
        "traceparent": None,
        "created_at": job["created_at"],
        "run_at": job["created_at"],
        "started_at": None,
        "finished_at": None,
        "worker": None,
        "cancel_requested": False,
        "reason": None,
        "last_error": None,
        "result": None,
        "expires_at": None,
        "unique": None,
        "dead_letter_queue": None,
        "source": None,
        "progress": None,
        "checkpoint": None,
    }


async def test_every_field_is_kept_as_it_was_sent(queue: Replica):
    named: dict[str, Any] = {
        "queue": "A-z.0_9:x",
        "type": "pdf:parse",
        "payload": {"pages": [1, 2]},
        "priority": 7,
        "run_at": "2199-12-31T23:59:59.123456Z",
        "lease_seconds": 0.5,
        "timeout_seconds": 90.5,
        "max_retries": 0,
        "backoff": {
            "strategy": "linear",
            "initial_seconds": 0.25,
            "factor": 3,
            "max_seconds": 60,
            "jitter": "full",
        },
        "tags": ["zeta", "alpha", "mit Leerraum und ü"],
        "metadata": {"tenant": "t1", "depth": {"of": [1]}},
    }
    job = await queue.enqueue(**named)
    assert {name: job[name] for name in named} == named
    assert job["state"] == "scheduled"


async def test_location_leads_to_the_job_as_it_was_answered(queue: Replica):
    answer = await post(queue, payload={"n": 1}, tags=["a"], delay_seconds=60)
    assert (await queue.http.get(answer.headers["location"])).json() == answer.json()


async def test_priority_goes_by_name_and_by_number(queue: Replica):
    for named, stored in [("fast", 10), ("normal", 5), ("bulk", 1), (0, 0), (10, 10), (3, 3)]:
        assert (await queue.enqueue(priority=named))["priority"] == stored


async def test_payload_and_result_come_back_value_for_value(queue: Replica):
    for payload in AWKWARD_JSON.values():
        await check_that_it_comes_back(queue, payload)


async def check_that_it_comes_back(queue: Replica, payload: bytes) -> None:
    """Lead a job through its places, alive, dead and completed, and look at the bytes of each answer."""

    async def post_raw(path: str, **fields: bytes) -> httpx.Response:
        content = b"{%s}" % b", ".join(b'"%s": %s' % (name.encode(), fields[name]) for name in fields)
        return await queue.http.post(path, content=content, headers={"content-type": "application/json"})

    async def lease() -> bytes:
        leased = await post_raw("/lease", queues=b'["q"]', wait_seconds=b"0")
        assert sent in leased.content
        return b'"%s"' % leased.content.partition(b'"lease_id":"')[2][:36]

    sent = b'"payload":' + payload
    posted = await post_raw("/jobs", queue=b'"q"', payload=payload)
    path = posted.headers["location"]
    assert sent in posted.content
    assert sent in (await queue.http.get("/jobs?state=ready")).content

    failed = await post_raw(f"{path}/fail", lease_id=await lease(), error=b'{"message":""}', retry=b"false")
    assert failed.content == b'{"state":"failed"}'
    assert sent in (await queue.http.get(path)).content

    assert sent in (await queue.http.post(f"{path}/retry")).content
    acked = await post_raw(f"{path}/ack", lease_id=await lease(), result=payload)
    kept = await queue.http.get(path)
    for answer in (acked, kept):
        assert sent in answer.content
        assert b'"result":' + payload in answer.content


async def test_metadata_keeps_nul_and_numbers(queue: Replica):
    metadata = rb'{"n":1e400,"z":"\u0000"}'
    posted = await queue.http.post(
        "/jobs",
        content=b'{"queue":"q",\n "metadata" : ' + metadata + b"}",
        headers={"content-type": "application/json"},
    )
    assert b'"metadata":' + metadata in posted.content
    assert b'"metadata":' + metadata in (await queue.http.get("/jobs")).content


async def test_a_payload_of_the_greatest_size_is_taken_and_a_byte_more_refused(queue: Replica):
    largest = "x" * (256 * 1024 - 2)
    job = await queue.enqueue(payload=largest)
    assert (await queue.job(job["id"]))["payload"] == largest
    refused = await post(queue, payload=largest + "x")
    assert (refused.status_code, refused.json()["code"]) == (413, "payload_too_large")


async def test_the_greatest_payload_is_a_setting(world: World):
    queue = await world.replica(max_payload_bytes=10)
    assert (await post(queue, payload="12345678")).status_code == 201
    assert (await post(queue, payload="123456789")).status_code == 413


async def test_metadata_of_4_kib_are_taken_and_a_byte_more_refused(queue: Replica):
    def metadata(length: int) -> dict[str, str]:
        return {"k": "x" * (length - len('{"k":""}'))}

    assert (await post(queue, metadata=metadata(4096))).status_code == 201
    assert refused_field(await post(queue, metadata=metadata(4097))) == "metadata"


async def test_tags_are_at_most_20_of_128_characters_and_count_once(queue: Replica):
    most = [f"{number:0128}" for number in range(20)]
    assert (await queue.enqueue(tags=most))["tags"] == most
    assert (await queue.enqueue(tags=["b", "a", "b"]))["tags"] == ["b", "a"]
    assert refused_field(await post(queue, tags=[*most, "x"])) == "tags"


async def test_names_of_queues_and_types_are_1_to_128_of_the_alphabet(queue: Replica):
    for name in ("a", "0", "Z" * 128, "a.b_c-d:e"):
        job = await queue.enqueue(name, type=name)
        assert (job["queue"], job["type"]) == (name, name)
        assert (await queue.lease_one(name, types=[name]))["id"] == job["id"]


@pytest.mark.parametrize("field", ["queue", "type"])
async def test_other_names_are_refused(queue: Replica, field: str):
    for name in ("", "-a", ".a", "a b", "ä", "a/b", "a\n", "a\x00", "Z" * 129, None, 1):
        refused = await queue.http.post("/jobs", json={"queue": "q", field: name})
        assert (name, refused_field(refused)) == (name, field)


async def test_a_job_without_a_queue_is_refused(queue: Replica):
    answer = await queue.http.post("/jobs", json={"type": "t"})
    assert answer.status_code == 422
    assert "queue" in answer.json()["detail"]


REFUSED: list[tuple[str, Any]] = [
    ("priority", 11),
    ("priority", -1),
    ("priority", 5.5),
    ("priority", True),
    ("priority", "urgent"),
    ("run_at", "2030-01-01T00:00:00"),
    ("run_at", "tomorrow"),
    ("run_at", "2200-01-01T00:00:00Z"),
    ("run_at", "0001-01-01T00:00:00+14:00"),
    ("delay_seconds", -1),
    ("delay_seconds", 1e300),
    ("lease_seconds", 0.49),
    ("lease_seconds", 43_200.1),
    ("timeout_seconds", 0),
    ("max_retries", -1),
    ("max_retries", 1.5),
    ("backoff", "exponential"),
    ("backoff.strategy", {"strategy": "random"}),
    ("backoff.jitter", {"jitter": "some"}),
    ("backoff.initial_seconds", {"initial_seconds": -1}),
    ("backoff.factor", {"factor": 0.5}),
    ("backoff.max_seconds", {"max_seconds": -1}),
    ("tags", "a"),
    ("tags[0]", ["x" * 129]),
    ("tags[0]", [""]),
    ("tags[0]", [1]),
    ("tags", ["a\x00b"]),
    ("metadata", []),
    ("metadata", None),
]


async def test_a_bad_value_is_refused_by_its_field_and_nothing_is_stored(queue: Replica):
    for field, value in REFUSED:
        [name] = re.findall(r"^\w+", field)
        assert (value, refused_field(await post(queue, **{name: value}))) == (value, field)
    assert (await queue.http.get("/jobs")).json()["jobs"] == []


async def test_an_unknown_field_is_refused(queue: Replica):
    for field in ("quue", "callback_url", "id"):
        answer = await post(queue, **{field: "x"})
        assert answer.status_code == 422
        assert field in answer.json()["detail"]


async def test_both_run_at_and_delay_seconds_are_refused(queue: Replica):
    assert refused_field(await post(queue, run_at="2030-01-01T00:00:00Z", delay_seconds=1)) == "run_at"


async def test_run_at_in_the_past_is_now(queue: Replica):
    now = queue.clock.move(0)
    for past in ({"run_at": "2001-01-01T00:00:00Z"}, {"run_at": now.isoformat()}, {"delay_seconds": 0}):
        job = await queue.enqueue(**past)
        assert job["state"] == "ready"
        assert datetime.fromisoformat(job["run_at"]) == datetime.fromisoformat(job["created_at"]) == now


async def test_delay_seconds_count_from_the_enqueue(queue: Replica):
    now = queue.clock.move(0)
    job = await queue.enqueue(delay_seconds=1.5)
    assert job["state"] == "scheduled"
    assert datetime.fromisoformat(job["run_at"]) == now + timedelta(seconds=1.5)


async def test_run_at_is_told_in_utc(queue: Replica):
    job = await queue.enqueue(run_at="2100-01-01T02:00:00+02:00")
    assert job["run_at"] == "2100-01-01T00:00:00Z"


@pytest.mark.parametrize("field", ["run_at", "delay_seconds"])
async def test_a_job_is_leased_at_its_run_at_and_not_before(queue: Replica, field: str):
    now = queue.clock.move(0)
    due = now + timedelta(seconds=10)
    named: dict[str, Any] = {"run_at": due.isoformat(), "delay_seconds": 10}
    await queue.enqueue(**{field: named[field]})

    queue.clock.set(due - timedelta(microseconds=1))
    await queue.maintain()
    assert await queue.lease() == []

    queue.clock.set(due)
    await queue.maintain()
    assert len(await queue.lease()) == 1


async def test_a_partial_backoff_is_merged_field_by_field(queue: Replica):
    job = await queue.enqueue(backoff={"strategy": "fixed", "jitter": "none"})
    assert job["backoff"] == {
        "strategy": "fixed",
        "initial_seconds": 1,
        "factor": 2,
        "max_seconds": 3600,
        "jitter": "none",
    }


async def test_defaults_come_from_the_environment_and_are_fixed_at_enqueue(world: World):
    before = await world.replica(
        max_retries=7, lease_seconds=11, backoff_strategy="linear", backoff_seconds=4
    )
    after = await world.replica(max_retries=1, lease_seconds=99, backoff_seconds=9)
    job = await before.enqueue(backoff={"factor": 5})
    assert (job["max_retries"], job["lease_seconds"]) == (7, 11)
    assert job["backoff"] == {
        "strategy": "linear",
        "initial_seconds": 4,
        "factor": 5,
        "max_seconds": 3600,
        "jitter": "equal",
    }
    assert await after.job(job["id"]) == job


async def test_traceparent_is_kept_for_the_worker_and_ignored_when_malformed(queue: Replica):
    for sent, kept in [(TRACEPARENT, TRACEPARENT), ("no such thing", None), ("", None)]:
        answer = await queue.http.post("/jobs", json={"queue": "q"}, headers={"traceparent": sent})
        assert answer.json()["traceparent"] == kept
        assert (await queue.lease_one())["traceparent"] == kept


async def test_a_body_written_with_white_space_is_the_same(queue: Replica):
    fields = {"queue": "q", "payload": {"n": 1}, "metadata": {"m": 2}, "backoff": {"factor": 3}}
    answer = await queue.http.post(
        "/jobs",
        content=f"\n\t {json.dumps(fields, indent=2)} \r\n",
        headers={"content-type": "application/json; charset=utf-8"},
    )
    assert answer.status_code == 201
    assert answer.json()["payload"] == {"n": 1}
    assert answer.json()["metadata"] == {"m": 2}
