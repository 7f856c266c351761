"""Every error is a problem (RFC 9457) with a stable code and the request's id, whoever refuses the request."""

import asyncio
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.api.problems import CODES, MEDIA_TYPE
from tests.api.refusals import JSON, LEASE_ID, nothing_changes, outcome, problem, raw_request
from tests.conftest import Replica, World
from tests.served import served

SECRET = "hunter2-in-a-payload"  # noqa: S105  # a marker to look for


async def answers_of_every_kind(queue: Replica) -> dict[str, httpx.Response]:
    """Provoke every problem that a client can provoke while all is well."""
    ready, done = await queue.enqueue("waiting"), await queue.enqueue("work")
    await queue.verb("ack", await queue.lease_one("work"))
    http = queue.http
    too_large = b" " * (queue.machine.settings.max_body_bytes + 1)
    return {
        "malformed_json": await http.post("/jobs", content=b"{", headers=JSON),
        "not_found": await http.get(f"/jobs/{LEASE_ID}"),
        "method_not_allowed": await http.put("/jobs"),
        "lease_lost": await http.post(f"/jobs/{done['id']}/ack", json={"lease_id": LEASE_ID}),
        "wrong_state": await http.post(f"/jobs/{ready['id']}/retry"),
        "body_too_large": await http.post("/jobs", content=too_large, headers=JSON),
        "payload_too_large": await http.post("/jobs", json={"queue": "q", "payload": "x" * 300_000}),
        "unsupported_media_type": await http.post("/jobs", content=b"{}"),
        "invalid": await http.post("/jobs", json={}),
    }


async def test_every_kind_of_refusal_is_a_problem_with_its_own_code(world: World):
    queue = await world.replica(max_body_bytes=400_000)
    answers = await answers_of_every_kind(queue)
    for code, answer in answers.items():
        told = problem(answer, code)
        assert set(told) <= {"type", "title", "status", "detail", "code", "errors", "request_id", "state"}
        assert ("state" in told) == (code in {"lease_lost", "wrong_state"})
        assert ("errors" in told) == (code == "invalid")


async def test_a_problem_of_a_field_names_it(queue: Replica):
    backoff = problem(
        await queue.http.post("/jobs", json={"queue": "q", "backoff": {"factor": 0}}), "invalid"
    )
    assert [error["field"] for error in backoff["errors"]] == ["backoff.factor"]
    assert "backoff.factor" in backoff["detail"]
    listing = problem(await queue.http.get("/jobs?limit=0&tag=%00"), "invalid")
    assert {error["field"] for error in listing["errors"]} == {"limit", "tag"}


async def test_a_job_in_the_wrong_state_is_told_with_its_state(queue: Replica):
    job = await queue.enqueue()
    for refused in (
        await queue.http.post(f"/jobs/{job['id']}/retry"),
        await queue.http.delete(f"/jobs/{job['id']}"),
    ):
        assert problem(refused, "wrong_state")["state"] == "ready"


@pytest.mark.parametrize(
    "path", ["/", "/nothing", "/jobs/", "/Jobs", "/jobs//", "/lease/x", "/docs/x", "/%FF", "/a%0Ab"]
)
async def test_a_path_that_leads_nowhere_is_not_found_for_every_method(queue: Replica, path):
    for method in ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
        problem(await queue.http.request(method, path), "not_found")


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/jobs", {"GET", "POST"}),
        ("/lease", {"POST"}),
        (f"/jobs/{LEASE_ID}", {"GET", "PATCH", "DELETE"}),
        (f"/jobs/{LEASE_ID}/ack", {"POST"}),
        ("/stats", {"GET"}),
        ("/metrics", {"GET"}),
        ("/health/ready", {"GET"}),
    ],
)
async def test_a_method_that_a_path_does_not_take_is_refused_with_those_that_it_takes(
    world: World, queue: Replica, path, allowed
):
    async with nothing_changes(world):
        for method in {"PUT", "PATCH", "OPTIONS", "TRACE", "GET", "POST", "DELETE"} - allowed:
            answer = await queue.http.request(method, path, json={"queue": "q", "queues": ["q"]})
            problem(answer, "method_not_allowed")
            assert set(re.split(r"\s*,\s*", answer.headers["allow"])) - {"HEAD"} == allowed


async def test_a_refused_head_request_has_the_headers_of_a_problem_and_no_body(queue: Replica):
    for path, status in [("/jobs", 405), ("/nothing", 404)]:
        answer = await raw_request(queue, f"HEAD {path} HTTP/1.1\r\nHost: a".encode())
        assert answer.status in {status, 200}
        assert answer.body == b""
        assert answer.headers["x-request-id"]


NO_HTTP = {
    "no request at all": b"garbage",
    "an unknown method": b"FROB /jobs HTTP/1.1\r\nHost: a",
    "a raw byte in the path": b"GET /jobs/\xff HTTP/1.1\r\nHost: a",
    "a raw byte in the query": b"GET /jobs?tag=\xff HTTP/1.1\r\nHost: a",
    "a target that is no URL": b"GET http://[x/jobs HTTP/1.1\r\nHost: a",
    "a negative length": b"POST /jobs HTTP/1.1\r\nHost: a\r\nContent-Length: -1",
    "a length beyond 64 bits": b"POST /jobs HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999999999999",
    "two lengths": b"POST /jobs HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2",
    "a length and chunks": b"POST /jobs HTTP/1.1\r\nHost: a\r\nContent-Length: 13\r\nTransfer-Encoding: chunked",
    "a NUL in a header": b"GET /jobs HTTP/1.1\r\nHost: a\r\nX-A: \x00",
    "another protocol": b"PRI * HTTP/2.0\r\n\r\nSM",
}


@pytest.mark.parametrize("name", NO_HTTP)
async def test_what_is_no_http_is_a_problem_too(world: World, queue: Replica, name):
    async with nothing_changes(world):
        answer = await raw_request(queue, NO_HTTP[name])
    assert answer.status == 400
    assert answer.headers["content-type"] == MEDIA_TYPE
    told = answer.json()
    assert (told["code"], told["status"]) == ("bad_request", 400)
    assert told["detail"]


async def test_odd_but_lawful_requests_are_answered_like_others(queue: Replica):
    big = b"\r\nX-Big: " + b"x" * 60_000
    for head, status in [
        (b"GET /stats HTTP/1.0", 200),
        (b"GET /stats HTTP/1.1\r\nHost: [::1", 200),
        (b"GET /stats HTTP/1.1\r\nHost: \xff", 200),
        (b"GET /nothing HTTP/1.1\r\nHost: [::1", 404),
        (b"GET /nothing HTTP/1.1\r\nHost: a b:x:y", 404),
        (b"GET //nothing HTTP/1.1\r\nHost: a", 404),
        (b"OPTIONS * HTTP/1.1\r\nHost: a", 404),
        (b"GET /stats HTTP/1.1\r\nHost: a" + big, 200),
        (b"GET /nothing HTTP/1.1\r\nHost: a\r\nCookie: \xff\xfe\r\nX-Request-Id: " + b"x" * 60_000, 404),
        (b"GET /stats HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade", 200),
    ]:
        answer = await raw_request(queue, head)
        assert answer.status == status, (head[:60], answer)
        assert answer.headers["x-request-id"]


@pytest.mark.parametrize("given", ["a", "0198f2c1-7a4e", "job.1_2-3", "x" * 128])
async def test_a_request_keeps_the_id_that_its_client_gave_it(queue: Replica, given):
    headers = {"X-Request-Id": given}
    assert (await queue.http.get("/stats", headers=headers)).headers["x-request-id"] == given
    refused = await queue.http.get("/nothing", headers=headers)
    assert refused.headers.get_list("x-request-id") == [given]
    assert problem(refused, "not_found")["request_id"] == given


@pytest.mark.parametrize(
    "odd", [b"", b" ", b"a b", b"a\tb", b'"', b"\xff", "é".encode(), b"x" * 129, b"{}", b"a;b"]
)
async def test_an_odd_request_id_is_replaced(queue: Replica, odd):
    answer = await raw_request(queue, b"GET /nothing HTTP/1.1\r\nHost: a\r\nX-Request-Id: " + odd)
    made = answer.headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{32}", made)
    assert answer.json()["request_id"] == made


async def test_requests_without_an_id_get_one_each(queue: Replica):
    ids = {(await queue.http.get("/stats")).headers["x-request-id"] for _ in range(5)}
    assert len(ids) == 5


async def test_a_stopping_service_answers_503_with_retry_after(queue: Replica):
    queue.machine.service.drain()
    answer = await queue.http.post("/lease", json={"queues": ["q"]})
    problem(answer, "unavailable")
    assert int(answer.headers["retry-after"]) > 0


async def test_a_lease_beyond_those_that_may_wait_gets_503_and_waits_for_nothing(world: World):
    queue = await world.replica(max_lease_waiters=1)
    waiting = asyncio.create_task(queue.lease(wait_seconds=30))
    while queue.machine.service.wakeups.waiters == 0:
        await asyncio.sleep(0.005)
    answer = await queue.http.post("/lease", json={"queues": ["q"], "wait_seconds": 30})
    problem(answer, "unavailable")
    assert int(answer.headers["retry-after"]) > 0
    job = await queue.enqueue()
    assert [each["id"] for each in await waiting] == [job["id"]]


async def test_an_unexpected_error_is_a_problem_that_gives_nothing_away(world: World, queue: Replica):
    await (await world.connect()).execute("ALTER TABLE jobs RENAME TO lost")
    try:
        answers = {
            "enqueue": await queue.http.post("/jobs", json={"queue": "q", "payload": SECRET}),
            "show": await queue.http.get(f"/jobs/{LEASE_ID}", headers={"X-Request-Id": "mine"}),
            "list": await queue.http.get("/jobs"),
            "cancel": await queue.http.post(f"/jobs/{LEASE_ID}/cancel"),
        }
    finally:
        await (await world.connect()).execute("ALTER TABLE lost RENAME TO jobs")
    assert {verb: outcome(answer) for verb, answer in answers.items()} == dict.fromkeys(
        answers, "500 internal_error"
    )
    assert answers["show"].json()["request_id"] == "mine"
    for answer in answers.values():
        for word in (SECRET, "Error", "jobs", "SELECT", "asyncpg", "relation", ".py"):
            assert word not in answer.json()["detail"]


async def test_a_connection_survives_an_unexpected_error(world: World, queue: Replica):
    connection = await world.connect()
    await connection.execute("ALTER TABLE jobs RENAME TO lost")
    assert (await queue.http.post("/jobs", json={"queue": "q"})).status_code == 500
    await connection.execute("ALTER TABLE lost RENAME TO jobs")
    assert (await queue.http.post("/jobs", json={"queue": "q"})).status_code == 201


@pytest.mark.slow
async def test_an_unexpected_error_is_logged_once_with_its_request_and_without_the_payload(
    world: World, tmp_path: Path
):
    connection = await world.connect()
    await connection.execute("ALTER TABLE jobs ADD CONSTRAINT broken CHECK (queue <> 'cursed')")
    async with served(
        tmp_path, world.database_url, QUEUE_LOG_FORMAT="json", QUEUE_LOG_LEVEL="debug"
    ) as leaseq:
        body = {"queue": "cursed", "payload": SECRET, "metadata": {"note": SECRET}}
        answer = await leaseq.http.post("/jobs", json=body, headers={"X-Request-Id": "cursed-1"})
        problem(answer, "internal_error")
    errors: list[dict[str, Any]] = [line for line in leaseq.lines if line["level"] in {"error", "critical"}]
    assert [line["request_id"] for line in errors] == ["cursed-1"]
    assert "CheckViolation" in str(errors)
    assert SECRET not in leaseq.log
    assert SECRET.encode().hex() not in leaseq.log


def test_every_code_is_a_word_with_a_status_of_its_kind():
    for code, (status, title) in CODES.items():
        assert re.fullmatch("[a-z]+(_[a-z]+)*", code)
        assert 400 <= status <= 599
        assert title
