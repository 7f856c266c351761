"""Whatever is sent is either accepted and kept, or refused with a clear 4xx that leaves nothing behind."""

import asyncio
import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.api.body import DEPTH_MAX, check_json, depth
from app.api.problems import CODES, RequestError
from tests.api.refusals import JSON, LEASE_ID, nothing_changes, outcome, problem, raw_request
from tests.conftest import Replica, World

LISTING = st.sampled_from(
    [
        "state",
        "queue",
        "type",
        "tag",
        "worker",
        "error",
        "created_after",
        "created_before",
        "limit",
        "cursor",
        "x",
    ]
)
EXAMPLES = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

NO_JSON: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda _: b"",
    "a blank": lambda _: b" ",
    "cut off": lambda good: good[:-1],
    "single quotes": lambda good: good.replace(b'"', b"'"),
    "a comment": lambda good: good[:-1] + b"/**/}",
    "a trailing comma": lambda good: good[:-1] + b",}",
    "two values": lambda good: good + b"{}",
    "a byte order mark": lambda good: b"\xef\xbb\xbf" + good,
    "UTF-16": lambda good: good.decode().encode("utf-16"),
    "no UTF-8 in a name": lambda good: good[:-1] + b',"\xff":1}',
    "deep brackets": lambda _: b"[" * 20_000 + b"]" * 20_000,
    "deep braces": lambda _: b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
    "deep and never closed": lambda _: b"[" * 20_000,
    "one bracket too deep": lambda _: b"[" * (DEPTH_MAX + 1) + b"]" * (DEPTH_MAX + 1),
}
"""Each spoils a good body."""

NO_VALUE = {
    "NaN": b"NaN",
    "Infinity": b"Infinity",
    "-Infinity": b"-Infinity",
    "a plus sign": b"+1",
    "a leading zero": b"01",
    "no digit after the point": b"1.",
    "hexadecimal": b"0x1",
    "a trailing comma": b"[1,]",
    "an unknown escape": rb'"\x41"',
    "a cut escape": rb'"\u12"',
    "a raw line break": b'"\n"',
    "a raw NUL": b'"\x00"',
    "half a pair": rb'"\ud800"',
    "the other half": rb'"\udc00"',
    "a pair the wrong way round": rb'"\udc00\ud800"',
    "half a pair before a letter": rb'"\ud800x"',
    "half a pair before an escape": rb'"\ud800\n"',
    "halves in two strings": rb'["\ud83e","\udd93"]',
    "half a pair in a name": rb'{"\ud800":1}',
    "half a pair after a backslash": rb'"\\\ud800"',
    "a raw surrogate": b'"\xed\xa0\x80"',
    "a byte that begins nothing": b'"\xff"',
    "a cut UTF-8 sequence": b'"\xe2\x82"',
    "an overlong NUL": b'"\xc0\x80"',
    "beyond Unicode": b'"\xf4\x90\x80\x80"',
    "20,000 deep": b"[" * 20_000 + b"]" * 20_000,
    "brackets of two kinds, deep": b'[{"a":' * 10_000 + b"1" + b"}]" * 10_000,
}


def verbs(job_id: str, lease_id: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return the path and a good body of every verb that takes one."""
    lease = {"lease_id": lease_id}
    return {
        "enqueue": ("/jobs", {"queue": "q"}),
        "lease": ("/lease", {"queues": ["q"], "wait_seconds": 0}),
        "heartbeat": (f"/jobs/{job_id}/heartbeat", lease),
        "ack": (f"/jobs/{job_id}/ack", lease),
        "fail": (f"/jobs/{job_id}/fail", {**lease, "error": {"message": "boom"}}),
        "release": (f"/jobs/{job_id}/release", lease),
    }


@pytest.fixture
async def leased(queue: Replica) -> dict[str, Any]:
    """A job in work, with a second one that is ready."""
    await queue.enqueue()
    await queue.enqueue()
    return await queue.lease_one()


async def send(queue: Replica, path: str, body: bytes, **headers: str) -> httpx.Response:
    return await queue.http.post(path, content=body, headers={**JSON, **headers})


def with_value(fields: dict[str, Any], name: str, value: bytes) -> bytes:
    """Return the fields as JSON with one more, whose value is these very bytes."""
    return json.dumps(fields).encode()[:-1] + b',"%s":%s}' % (name.encode(), value)


async def test_a_body_that_is_no_json_is_malformed_to_every_verb(world: World, queue: Replica, leased):
    async with nothing_changes(world):
        answers = {
            (verb, name): outcome(await send(queue, path, spoil(json.dumps(fields).encode())))
            for verb, (path, fields) in verbs(leased["id"], leased["lease_id"]).items()
            for name, spoil in NO_JSON.items()
        }
    assert answers == dict.fromkeys(answers, "400 malformed_json")


async def test_a_value_that_is_no_json_is_malformed_also_where_it_is_only_passed_on(
    world: World, queue: Replica, leased
):
    ack, ack_fields = verbs(leased["id"], leased["lease_id"])["ack"]
    async with nothing_changes(world):
        answers = {}
        for name, value in NO_VALUE.items():
            for where, path, body in [
                ("payload", "/jobs", with_value({"queue": "q"}, "payload", value)),
                ("inside payload", "/jobs", with_value({"queue": "q"}, "payload", b'{"a":[%s]}' % value)),
                ("metadata", "/jobs", with_value({"queue": "q"}, "metadata", b'{"a":%s}' % value)),
                ("result", ack, with_value(ack_fields, "result", value)),
            ]:
                answers[name, where] = outcome(await send(queue, path, body))
    assert answers == dict.fromkeys(answers, "400 malformed_json")


async def test_nesting_is_allowed_up_to_500_and_brackets_within_text_do_not_count(queue: Replica):
    for payload in [b"[" * 499 + b"]" * 499, b'"' + b"[{" * 20_000 + b'"', rb'"\"' + b"[" * 20_000 + b'"']:
        answer = await send(queue, "/jobs", with_value({"queue": "q"}, "payload", payload))
        assert answer.status_code == 201, answer.text
        assert payload in (await queue.http.get(f"/jobs/{answer.json()['id']}")).content


async def test_a_body_that_is_not_an_object_is_invalid_to_every_verb(world: World, queue: Replica, leased):
    async with nothing_changes(world):
        for path, _ in verbs(leased["id"], leased["lease_id"]).values():
            for body in [b"null", b"[]", b'[{"queue":"q"}]', b'"q"', b"1", b"true"]:
                told = problem(await send(queue, path, body), "invalid")
                assert told["errors"][0]["field"] == "body"


async def test_a_body_of_another_media_type_is_refused(world: World, queue: Replica, leased):
    types = [
        "",
        "text/plain",
        "text/json",
        "application/x-www-form-urlencoded",
        "application/jsonx",
        "application/x-ndjson",
        "multipart/form-data; boundary=x",
    ]
    async with nothing_changes(world):
        for path, fields in verbs(leased["id"], leased["lease_id"]).values():
            body = json.dumps(fields).encode()
            problem(await queue.http.post(path, content=body), "unsupported_media_type")
            for media_type in types:
                answer = await send(queue, path, body, **{"Content-Type": media_type})
                problem(answer, "unsupported_media_type")


async def test_json_by_any_of_its_media_types_is_taken(queue: Replica):
    for media_type in [
        "application/json",
        "Application/JSON",
        "application/json; charset=utf-8",
        "application/vnd.a+json",
    ]:
        answer = await send(queue, "/jobs", b'{"queue":"q"}', **{"Content-Type": media_type})
        assert answer.status_code == 201, media_type


BAD_FIELDS: dict[str, dict[str, list[tuple[str, Any]]]] = {
    "enqueue": {
        "missing or not a name": [
            ("queue", None),
            ("queue", 1),
            *[
                (field, name)
                for field in ("queue", "type")
                for name in [
                    "",
                    "a b",
                    "a/b",
                    "a\n",
                    "\n",
                    "a\x00",
                    "a\x7f",
                    "a\u2028",
                    "-a",
                    ".a",
                    "_a",
                    "à",
                    "а",  # noqa: RUF001  # Cyrillic: the look-alike is the case
                    "ｑ",  # noqa: RUF001  # full width
                    "a\u200b",
                    "a\u202e",
                    "٣",
                    "x" * 129,
                ]
            ],
        ],
        "unknown": [
            ("payloads", 1),
            ("Queue", "q"),
            ("lease_id", LEASE_ID),
            ("callback_url", "http://127.0.0.1/"),
            ("", 1),
            ("\x00", 1),
        ],
        "priority": [
            ("priority", value)
            for value in [-1, 11, 10**30, -(10**30), 5.5, "5", "urgent", "FAST", True, [], {}]
        ],
        "max_retries": [("max_retries", value) for value in [-1, 10_001, 10**30, 1.5, "3", True, []]],
        "times": [
            ("run_at", value)
            for value in [
                "9999-12-31T23:59:59-14:00",
                "0001-01-01T00:00:00+14:00",
                "9999-12-31T23:59:59Z",
                "10000-01-01T00:00:00Z",
                "0000-01-01T00:00:00Z",
                "2030-02-30T00:00:00Z",
                "2030-01-01T25:00:00Z",
                "2030-01-01T00:00:00",
                "2030-01-01",
                "tomorrow",
                "infinity",
                "",
                1_900_000_000,
                10**30,
                True,
                [],
            ]
        ],
        "durations": [
            (field, value)
            for field in ("delay_seconds", "lease_seconds", "timeout_seconds")
            for value in [-1, -1e-9, 1e30, 10**30, -(10**30), "1", True, [], {}]
        ],
        "short durations": [("lease_seconds", 0.49), ("timeout_seconds", 0.49), ("lease_seconds", 43_200.1)],
        "backoff": [
            ("backoff", []),
            ("backoff", "fixed"),
            ("backoff.strategy", "quadratic"),
            ("backoff.jitter", "some"),
            ("backoff.initial_seconds", -1),
            ("backoff.factor", 0.5),
            ("backoff.factor", 1e30),
            ("backoff.max_seconds", -1),
            ("backoff.base", 2),
        ],
        "tags": [
            ("tags", value)
            for value in [
                "a",
                [1],
                [""],
                ["a\x00"],
                ["a\nb"],
                ["a\u2028"],
                ["x" * 129],
                ["a"] * 21,
                [None],
                {},
            ]
        ],
        "metadata": [("metadata", value) for value in [[], "a", 1, None, {"a": "x" * 4096}]],
    },
    "lease": {
        "queues": [
            ("queues", value)
            for value in [None, [], "q", [""], ["a\n"], ["a b"], ["q", "x" * 129], [1], ["q"] * 101, {"q": 1}]
        ],
        "types": [("types", value) for value in [[], "t", ["a\n"], ["\x00"], ["x" * 129], ["t"] * 101]],
        "worker": [("worker", value) for value in ["", "a\x00", "a\nb", "a\x1b[0m", "\u2029", "x" * 257, 1]],
        "max_jobs": [("max_jobs", value) for value in [0, -1, 1001, 10**30, 1.5, "1", None, True]],
        "wait_seconds": [("wait_seconds", value) for value in [-1, 30.1, 1e30, "1", None, True]],
        "lease_seconds": [("lease_seconds", value) for value in [0, 0.49, -1, 43_200.1, 1e30, "1"]],
        "unknown": [("queue", "q"), ("payload", 1)],
    },
    "heartbeat": {
        "extend_seconds": [("extend_seconds", value) for value in [-1, 43_200.1, 1e30, 10**30, "1", True]],
        "others": [("lease_id", None), ("lease_id", 1), ("percent", 1)],
    },
    "ack": {"all": [("lease_id", None), ("lease_id", 1), ("lease_id", []), ("results", 1)]},
    "fail": {
        "error": [
            ("error", None),
            ("error", "boom"),
            ("error.message", None),
            ("error.message", 1),
            ("error.message", "a\x00"),
            ("error.type", "a\x00"),
            ("error.type", "x" * 257),
            ("error.stack", "a\x00"),
            ("error.stack", []),
            ("error.code", 1),
        ],
        "retry": [("retry", value) for value in [1, "false", None, []]],
        "retry_in_seconds": [("retry_in_seconds", value) for value in [-1, 1e30, 10**30, "1", True]],
        "others": [("lease_id", None), ("reason", "x")],
    },
    "release": {
        "delay_seconds": [("delay_seconds", value) for value in [-1, 1e30, 10**30, "1", None, True]],
        "others": [("lease_id", None), ("attempt", 0)],
    },
}


def changed(fields: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    """Return the fields with one set; a None in the place of what is required leaves it out."""
    name, _, inner = path.partition(".")
    if inner:
        within = {"message": "boom"} if name == "error" else {}
        return {**fields, name: changed(within, inner, value)}
    if value is None and name in {"queue", "queues", "lease_id", "error", "message"}:
        return {each: old for each, old in fields.items() if each != name}
    return {**fields, name: value}


@pytest.mark.parametrize("verb", BAD_FIELDS)
async def test_an_unacceptable_field_is_invalid_by_its_name(world: World, queue: Replica, leased, verb):
    path, fields = verbs(leased["id"], leased["lease_id"])[verb]
    async with nothing_changes(world):
        for cases in BAD_FIELDS[verb].values():
            for name, value in cases:
                answer = await queue.http.post(path, json=changed(fields, name, value))
                told = problem(answer, "invalid")
                [error] = told["errors"]
                last = name.split(".")[-1]
                assert name.split(".")[0] in error["field"] or f"`{last}`" in error["message"], (
                    name,
                    value,
                    told,
                )


async def test_absurd_numbers_are_invalid_wherever_a_number_means_something(
    world: World, queue: Replica, leased
):
    places = {
        "enqueue": ["priority", "max_retries", "lease_seconds", "timeout_seconds"],
        "lease": ["max_jobs", "lease_seconds"],
    }
    numbers = [b"1e400", b"-1e400", b"1e-400", b"1" + b"0" * 5000, b"0." + b"1" * 5000]
    async with nothing_changes(world):
        for verb, names in places.items():
            path, fields = verbs(leased["id"], leased["lease_id"])[verb]
            for name in names:
                for number in numbers:
                    told = problem(await send(queue, path, with_value(fields, name, number)), "invalid")
                    assert told["errors"][0]["field"] == name


async def test_a_lease_looks_at_no_more_than_a_thousand_lines(world: World, queue: Replica):
    wanted = {"queues": [f"q{i}" for i in range(11)], "types": [f"t{i}" for i in range(100)]}
    async with nothing_changes(world):
        problem(await queue.http.post("/lease", json=wanted), "invalid")


async def test_run_at_and_delay_seconds_together_are_invalid(world: World, queue: Replica):
    async with nothing_changes(world):
        fields = {"queue": "q", "run_at": "2030-01-01T00:00:00Z", "delay_seconds": 1}
        problem(await queue.http.post("/jobs", json=fields), "invalid")


async def test_a_name_of_128_characters_is_taken_whole(queue: Replica):
    name = "a" + "Z9._:-" * 21 + "z"
    assert len(name) == 128
    job = await queue.enqueue(name, type=name)
    assert (job["queue"], job["type"]) == (name, name)
    assert (await queue.lease_one(name, types=[name]))["id"] == job["id"]


async def test_what_the_client_wrote_can_not_pass_for_the_name_of_another_field(queue: Replica):
    strategy = {"queue": "q", "backoff": {"strategy": "x - at `$.payload`"}}
    told = problem(await queue.http.post("/jobs", json=strategy), "invalid")
    assert told["errors"][0]["field"] == "backoff.strategy"


async def test_a_refusal_stays_short_however_long_the_mistake(queue: Replica):
    for fields in ({"x" * 100_000: 1}, {"priority": "x" * 100_000}, {"backoff": {"y" * 100_000: 1}}):
        answer = await queue.http.post("/jobs", json={"queue": "q", **fields})
        problem(answer, "invalid")
        assert len(answer.content) < 2000


BAD_QUERIES = [
    "x=1",
    "State=ready",
    "state=waiting",
    "state=",
    "state=ready,failed",
    "state=ready%00",
    "queue=",
    "queue=a%0A",
    "queue=a%00",
    "queue=%FF",
    "queue=" + "x" * 129,
    "queue=" + "&queue=".join(f"q{i}" for i in range(101)),
    "type=a%20b",
    "tag=%00",
    "tag=" + "x" * 257,
    "worker=a%00",
    "error=%00",
    "limit=0",
    "limit=-1",
    "limit=501",
    "limit=1e2",
    "limit=1e400",
    "limit=" + "9" * 5000,
    "limit=",
    "limit=ten",
    "cursor=",
    "cursor=x",
    "cursor=%C3%A9",
    "cursor=%00",
    "cursor=" + "A" * 27,
    "cursor=" + "A" * 65,
    "created_after=yesterday",
    "created_after=2030-01-01",
    "created_after=2030-01-01T00:00:00",
    "created_after=2030-02-30T00:00:00Z",
    "created_after=10000-01-01T00:00:00Z",
    "created_after=1e400",
    "created_after=NaN",
    "created_before=" + "9" * 400,
]


async def test_a_listing_with_an_unacceptable_query_is_invalid_by_its_name(queue: Replica):
    for query in BAD_QUERIES:
        told = problem(await queue.http.get(f"/jobs?{query}"), "invalid")
        assert told["errors"][0]["field"].split(".")[0] == query.split("=")[0]


@pytest.mark.parametrize(
    "query", ["created_after=0001-01-01T00:00:00%2B14:00", "created_before=9999-12-31T23:59:59-14:00"]
)
async def test_an_instant_that_has_no_date_in_utc_is_invalid(queue: Replica, query):
    problem(await queue.http.get(f"/jobs?{query}"), "invalid")


async def test_a_cursor_belongs_to_its_filters(queue: Replica):
    for _ in range(2):
        await queue.enqueue()
    cursor = (await queue.http.get("/jobs?limit=1")).json()["next_cursor"]
    assert (await queue.http.get("/jobs", params={"cursor": cursor})).status_code == 200
    told = problem(await queue.http.get("/jobs", params={"cursor": cursor, "queue": "q"}), "invalid")
    assert told["errors"][0]["field"] == "cursor"


NO_IDS = [
    "x",
    "%00",
    "%FF",
    "ffffffff-ffff-ffff-ffff-ffffffffffff",
    "00000000-0000-0000-0000-000000000000",
    "9" * 4000,
    "{short}",
    "{{{id}}}",
    "urn:uuid:{id}",
    "{id}%0A",
    "{hex}",
]


async def test_what_is_no_id_of_a_job_is_not_found_by_any_verb(world: World, queue: Replica, leased):
    job_id, lease_id = leased["id"], leased["lease_id"]
    async with nothing_changes(world):
        for written in NO_IDS:
            at = "/jobs/" + written.format(id=job_id, short=job_id[:-1], hex=job_id.replace("-", ""))
            for path, fields in verbs("ID", lease_id).values():
                if "ID" in path:
                    problem(await queue.http.post(path.replace("/jobs/ID", at), json=fields), "not_found")
            for verb in ("cancel", "retry"):
                problem(await queue.http.post(f"{at}/{verb}"), "not_found")
            problem(await queue.http.get(at), "not_found")
            problem(await queue.http.get(f"{at}/attempts"), "not_found")
            problem(await queue.http.delete(at), "not_found")


async def test_what_is_not_the_lease_is_lost(world: World, queue: Replica, leased):
    async with nothing_changes(world):
        for lease_id in ["", "x", "\x00", "x" * 100_000, LEASE_ID, leased["lease_id"][:-1], "🦓"]:
            for path, fields in verbs(leased["id"], lease_id).values():
                if "lease_id" in fields:
                    told = problem(await queue.http.post(path, json=fields), "lease_lost")
                    assert told["state"] == "active"


async def test_a_payload_or_result_may_have_the_limit_of_bytes_and_not_one_more(world: World):
    queue = await world.replica(max_payload_bytes=100)
    most, more = b'"%s"' % (b"x" * 98), b'"%s"' % (b"x" * 99)
    assert (await send(queue, "/jobs", with_value({"queue": "q"}, "payload", most))).status_code == 201
    job = await queue.lease_one()
    ack, fields = verbs(job["id"], job["lease_id"])["ack"]
    async with nothing_changes(world):
        told = problem(
            await send(queue, "/jobs", with_value({"queue": "q"}, "payload", more)), "payload_too_large"
        )
        assert "100 bytes" in told["detail"]
        problem(await send(queue, ack, with_value(fields, "result", more)), "payload_too_large")
    assert (await send(queue, ack, with_value(fields, "result", most))).json()["state"] == "completed"


async def test_a_body_may_have_the_limit_of_bytes_and_not_one_more(world: World):
    queue = await world.replica(max_body_bytes=1024)
    body = b'{"queue":"q"}'.ljust(1024)
    assert (await send(queue, "/jobs", body)).status_code == 201
    async with nothing_changes(world):
        problem(await send(queue, "/jobs", body + b" "), "body_too_large")


@pytest.mark.parametrize("more", [b"", b"\r\nExpect: 100-continue"])
async def test_a_body_that_says_it_is_too_large_is_refused_before_any_of_it_is_sent(
    world: World, queue: Replica, leased, more
):
    async with nothing_changes(world):
        for path, _ in verbs(leased["id"], leased["lease_id"]).values():
            head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 16777217"
            answer = await raw_request(queue, head.encode() + more + b"\r\nConnection: keep-alive")
            assert (answer.status, answer.json()["code"]) == (413, "body_too_large")


async def test_a_client_that_sends_all_of_its_too_large_body_gets_the_413_too(world: World, queue: Replica):
    async with nothing_changes(world):
        for _ in range(3):
            problem(await send(queue, "/jobs", b" " * (16 * 1024 * 1024 + 1)), "body_too_large")


async def test_a_chunked_body_is_refused_once_it_passes_the_limit_though_it_never_ends(world: World):
    queue = await world.replica(max_body_bytes=4096)
    head = b"POST /jobs HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked"
    async with nothing_changes(world):
        answer = await raw_request(
            queue, head, b'd\r\n{"queue":"q"}\r\n', *[b"400\r\n" + b" " * 1024 + b"\r\n"] * 4
        )
    assert (answer.status, answer.json()["code"]) == (413, "body_too_large")


async def test_a_body_that_is_cut_off_stores_nothing_and_hurts_nobody(world: World, queue: Replica):
    async with nothing_changes(world):
        for more in (b"Content-Length: 100", b"Transfer-Encoding: chunked"):
            _, writer = await asyncio.open_connection("127.0.0.1", queue.server.port)
            writer.write(
                b"POST /jobs HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n" + more + b"\r\n\r\n"
            )
            writer.write(b'd\r\n{"queue":"q"}\r\n')
            await writer.drain()
            writer.close()
            await writer.wait_closed()
        # One that came later on the same loop has been answered: the others have had their turn.
        assert (await queue.http.get("/jobs")).json()["jobs"] == []


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
NAMES = st.sampled_from(["q", "emails.eu", "a:b-c", "", "a\n", "q" * 129, "é"])
NUMBERS = st.sampled_from([0, 1, 5, 0.5, 10, 10_000, -1, 1e308, 10**30]) | st.integers() | st.floats(0, 100)


def some_of(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Objects with some of these fields, rightly filled more often than not, and now and then something else."""
    right = st.fixed_dictionaries({}, optional=fields)
    return st.one_of(
        right, right, right, st.dictionaries(st.sampled_from([*fields, "x"]), JSON_VALUES), JSON_VALUES
    )


ENQUEUES = st.fixed_dictionaries(
    {"queue": NAMES},
    optional={
        "type": NAMES,
        "payload": JSON_VALUES,
        "priority": NUMBERS | st.sampled_from(["fast", "bulk", "slow"]),
        "run_at": st.datetimes().map(lambda t: t.isoformat() + "Z") | st.text(max_size=5),
        "delay_seconds": NUMBERS,
        "lease_seconds": NUMBERS,
        "timeout_seconds": NUMBERS,
        "max_retries": NUMBERS,
        "backoff": some_of(
            strategy=st.sampled_from(["fixed", "linear", "x"]), initial_seconds=NUMBERS, factor=NUMBERS
        ),
        "tags": st.lists(st.text(max_size=5), max_size=3),
        "metadata": JSON_VALUES,
    },
)
BODIES: dict[str, st.SearchStrategy[Any]] = {
    "enqueue": ENQUEUES | some_of(queue=NAMES),
    "lease": some_of(queues=st.lists(NAMES, max_size=3), worker=st.text(max_size=5), max_jobs=NUMBERS),
    "heartbeat": some_of(lease_id=st.just("LEASE") | st.text(), extend_seconds=NUMBERS),
    "ack": some_of(lease_id=st.just("LEASE") | st.text(), result=JSON_VALUES),
    "fail": some_of(
        lease_id=st.just("LEASE") | st.text(),
        error=some_of(message=st.text(), type=st.text(), stack=st.text()),
        retry=st.booleans(),
        retry_in_seconds=NUMBERS,
    ),
    "release": some_of(lease_id=st.just("LEASE") | st.text(), delay_seconds=NUMBERS),
}


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, bytes]:
    """A verb with a body: JSON of about the right shape, that JSON damaged, or anything."""
    verb = draw(st.sampled_from(sorted(BODIES)))
    if draw(st.integers(0, 5)) == 0:
        return verb, draw(st.binary(max_size=200))
    text = json.dumps(draw(BODIES[verb]), ensure_ascii=draw(st.booleans()))
    body = text.encode(errors="surrogatepass")
    if draw(st.integers(0, 3)) == 0:
        at = draw(st.integers(0, len(body)))
        body = body[:at] + draw(st.binary(max_size=3)) + body[at + draw(st.integers(0, 2)) :]
    return verb, body


def refused_clearly(answer: httpx.Response) -> None:
    assert answer.status_code < 500, answer.text
    assert answer.json()["code"] in CODES
    problem(answer, answer.json()["code"])


@pytest.mark.slow
@EXAMPLES
@given(asked=bodies())
async def test_any_body_is_taken_or_refused_clearly(queue: Replica, asked: tuple[str, bytes]):
    verb, body = asked
    held = await queue.enqueue("in-work")
    lease = await queue.lease_one("in-work", lease_seconds=600)
    path, _ = verbs(held["id"], lease["lease_id"])[verb]
    body = body.replace(b'"LEASE"', json.dumps(lease["lease_id"]).encode())
    if verb == "lease":
        # Of two equal names the last one counts; a wait would only take time.
        body = (
            body.rstrip().removesuffix(b"}") + b',"wait_seconds":0}' if body.rstrip().endswith(b"}") else body
        )
    answer = await send(queue, path, body)
    if answer.is_error:
        refused_clearly(answer)
    elif answer.status_code == 201:
        # What was accepted is there, value for value, and can be worked on.
        job = await queue.job(answer.json()["id"])
        assert job == answer.json()
        assert json.dumps(job["payload"]) == json.dumps(json.loads(body).get("payload"))
        if job["state"] == "ready":
            taken = await queue.lease(job["queue"], max_jobs=1000)
            assert job["payload"] in [each["payload"] for each in taken if each["id"] == job["id"]]
    elif verb == "lease":
        assert set(answer.json()) == {"jobs", "directive"}


@pytest.mark.slow
@EXAMPLES
@given(
    pairs=st.lists(
        st.tuples(LISTING, st.text(max_size=8) | st.binary(max_size=8) | NUMBERS.map(str)), max_size=4
    )
)
async def test_any_query_is_answered_or_refused_clearly(queue: Replica, pairs: list[tuple[str, str | bytes]]):
    query = "&".join(
        f"{name}={quote(value if isinstance(value, bytes) else value.encode())}" for name, value in pairs
    )
    answer = await queue.http.get(f"/jobs?{query}")
    if answer.is_error:
        refused_clearly(answer)
    else:
        assert set(answer.json()) == {"jobs", "next_cursor"}


@settings(EXAMPLES, max_examples=500)
@given(value=JSON_VALUES, wrapped=st.integers(0, 30))
def test_depth_is_that_of_the_parsed_value(value: object, wrapped: int):
    for _ in range(wrapped):
        value = [value]
    assert depth(json.dumps(value).encode()) == depth_of(value)
    assert depth(json.dumps(value, ensure_ascii=False).encode()) == depth_of(value)


def depth_of(value: object) -> int:
    match value:
        case dict():
            return 1 + max(map(depth_of, value.values()), default=0)
        case list():
            return 1 + max(map(depth_of, value), default=0)
        case _:
            return 0


TEXT_PIECES = st.sampled_from(
    [
        "a",
        "é",
        "🦓",
        r"\n",
        r"\\",
        r"\"",
        r"\u0041",
        r"\u0000",
        r"\ud83e",
        r"\udd93",
        r"\uD800",
        r"\uDFFF",
        "u",
        "ud800",
    ]
)


@settings(EXAMPLES, max_examples=1000)
@given(pieces=st.lists(TEXT_PIECES, max_size=8))
def test_escaped_text_passes_when_python_can_encode_what_it_reads(pieces: list[str]):
    body = ('["' + "".join(pieces) + '"]').encode()
    try:
        json.loads(body)[0].encode()
    except UnicodeEncodeError:
        with pytest.raises(RequestError):
            check_json(body)
    else:
        check_json(body)


HOSTILE = {
    "quotes": (b"", b'"'),
    "escaped quotes in a string that never ends": (b'{"a":"', rb"\""),
    "backslashes": (b"", b"\\"),
    "brackets and quotes": (b"[" * 501, b'["'),
    "half pairs": (b"[" * 501, rb"\ud800"),
    "pairs": (b"[" * 501, rb"\ud83e\udd93"),
    "backslash u": (b"[" * 501, rb"\u"),
    "strings": (b"[" * 501, b'"a",'),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_sixteen_hostile_mebibytes_are_checked_within_the_time_of_a_test(name: str):
    begin, piece = HOSTILE[name]
    body = begin + piece * (16 * 1024 * 1024 // len(piece))
    depth(body)
    with suppress(RequestError):
        check_json(body)
