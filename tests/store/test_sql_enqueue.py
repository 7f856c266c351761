"""`enqueue()` in SQL: the rules of POST /jobs, in the application's own transaction."""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from app.store.database import Database
from app.store.migrate import downgrade, upgrade
from tests.conftest import NEVER_SECONDS, Replica, World

Application = Any
"""A connection of an application: what it runs is a transaction of its own, or part of one."""


@pytest.fixture
async def application(world: World, queue: Replica) -> Application:
    """An application beside a service that has started."""
    assert queue.server.started
    connection = await world.connect()
    await connection.execute("RESET search_path")
    return connection


async def enqueue(
    application: Application, queue: str = "q", *, schema: str = "leaseq", **arguments: Any
) -> str:
    arguments = {"queue": queue, **arguments}
    named = ", ".join(f"{name} => ${place}" for place, name in enumerate(arguments, 1))
    quoted = '"' + schema.replace('"', '""') + '"'
    return str(await application.fetchval(f"SELECT {quoted}.enqueue({named})", *arguments.values()))


def in_sql(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that say what a body of POST /jobs says."""
    arguments = dict(body)
    for name in ("payload", "metadata", "backoff"):
        if name in arguments:
            arguments[name] = json.dumps(arguments[name])
    for name in ("run_at", "expires_at"):
        if name in arguments:
            arguments[name] = datetime.fromisoformat(arguments[name])
    if "priority" in arguments:
        arguments["priority"] = str(arguments["priority"])
    for name, value in arguments.pop("unique", {}).items():
        arguments[name if name == "on_conflict" else f"unique_{name}"] = value
    return arguments


async def stored(connection: Any, job_id: str) -> dict[str, Any]:
    """Return all that the tables say of a job but its id and its birth; instants count from that."""
    body = dict(await connection.fetchrow("SELECT * FROM leaseq.jobs WHERE id = $1", job_id))
    places = [
        (table, dict(row))
        for table in ("ready", "scheduled")
        for row in await connection.fetch(f"SELECT * FROM leaseq.{table} WHERE id = $1", job_id)
    ]
    created_at = body.pop("created_at")
    for row in (body, *(row for _, row in places)):
        assert str(row.pop("id")) == job_id
        for name, value in row.items():
            # What was given as an instant is far from now.
            if isinstance(value, datetime) and value < datetime(2140, 1, 1, tzinfo=UTC):
                row[name] = value - created_at
    return {"body": {**body, "backoff": json.loads(body["backoff"])}, "places": places}


FAR = "2150-01-01T00:00:00Z"
FARTHER = "2160-06-30T12:00:00.123456+02:00"
ACCEPTED: list[dict[str, Any]] = [
    {},
    {
        "type": "welcome",
        "payload": {"to": "a@example.com", "n": [1, 2.5, -0.0, 1e300, None, True, "ä\u0000\U0001f600"]},
    },
    *({"priority": priority} for priority in ("fast", "normal", "bulk", 0, 7, 10)),
    {"run_at": FAR},
    {"run_at": "2001-01-01T00:00:00Z"},
    *({"delay_seconds": seconds} for seconds in (0, 0.25, 3600, 3_162_240_000)),
    {"lease_seconds": 0.5, "timeout_seconds": 2_592_000, "max_retries": 0},
    {"lease_seconds": 43_200, "timeout_seconds": 0.5, "max_retries": 10_000},
    {"backoff": {"strategy": "linear"}},
    {"backoff": {"initial_seconds": 0, "factor": 1, "max_seconds": 31_622_400, "jitter": "none"}},
    {
        "backoff": {
            "strategy": "fixed",
            "initial_seconds": 2_592_000,
            "factor": 1000,
            "max_seconds": 0,
            "jitter": "full",
        }
    },
    {"backoff": {"strategy": None, "jitter": None}},
    {"expires_in_seconds": 60},
    {"expires_at": FAR, "run_at": FAR},
    {"expires_at": FARTHER, "run_at": FAR},
    {"expires_in_seconds": 60, "delay_seconds": 60},
    {"tags": ["b", "a", "b", "ü", "x" * 128]},
    {"tags": [str(number) for number in range(20)]},
    {"tags": []},
    {"metadata": {"a": [1, {"b": "c"}], "n": 1.0}},
    {"dead_letter_queue": "dead"},
    {"queue": "x" * 128, "type": "A.b_c:d-9"},
    {"queue": "free", "unique": {"key": "ü 1"}},
    {"queue": "free", "unique": {"key": "x" * 256, "scope": "queued", "on_conflict": "reject"}},
    {
        "queue": "free",
        "unique": {"key": "2", "scope": "window", "window_seconds": 9, "on_conflict": "replace"},
    },
    *({"queue": queue, "type": type_} for queue in ("policed", "lazy") for type_ in ("default", "rare")),
    {"queue": "policed", "type": "rare", "run_at": FAR},
    {"queue": "policed", "type": "rare", "delay_seconds": 1, "max_retries": 1, "priority": "bulk"},
    {"queue": "policed", "backoff": {"factor": 7}, "dead_letter_queue": "other", "expires_in_seconds": 9999},
    {"queue": "lazy", "expires_at": FAR},
]
POLICIES = {
    "policed": {
        "priority": "fast",
        "lease_seconds": 77,
        "timeout_seconds": 99,
        "max_retries": 9,
        "backoff": {"strategy": "fixed", "initial_seconds": 4},
        "expires_in_seconds": 500,
        "dead_letter_queue": "dead",
        "types": {
            "rare": {"priority": 0, "delay_seconds": 33, "backoff": {"initial_seconds": 8, "jitter": "none"}},
            "other": {"max_retries": 1},
        },
    },
    "lazy": {"delay_seconds": 60, "expires_in_seconds": 5, "types": {"rare": {"lease_seconds": 5}}},
}


async def test_it_stores_what_post_jobs_stores(world: World, queue: Replica, application: Application):
    for name, policy in POLICIES.items():
        assert (await queue.http.put(f"/queues/{name}", json=policy)).status_code == 201
    reader = await world.connect()
    for case in ACCEPTED:
        body = {"queue": "q", **case}
        posted = await queue.http.post(
            "/jobs", content=json.dumps(body), headers={"Content-Type": "application/json"}
        )
        assert posted.status_code == 201, (case, posted.text)
        expected = await stored(reader, posted.json()["id"])
        if "unique" in body:  # only one of them may hold the key
            assert (await queue.http.post(f"/jobs/{posted.json()['id']}/cancel")).status_code == 200
            assert (await queue.http.delete(f"/jobs/{posted.json()['id']}")).status_code == 204
        assert await stored(reader, await enqueue(application, **in_sql(body))) == expected, case


BACKOFFS_REFUSED: list[Any] = [
    [],
    "fixed",
    1,
    {"strategy": "quadratic"},
    {"jitter": "some"},
    {"initial_seconds": -1},
    {"initial_seconds": 2_592_001},
    {"initial_seconds": "1"},
    {"factor": 0.5},
    {"factor": 1001},
    {"factor": True},
    {"max_seconds": 31_622_401},
    {"max_seconds": -1},
    {"max_seconds": []},
    {"delay": 1},
]
REFUSED: list[tuple[dict[str, Any], str]] = [
    *(({name: value}, name) for name in ("queue", "type") for value in ("", "-a", "a b", "ä", "a/b", "x" * 129, "a\n")),
    *(({"dead_letter_queue": value}, "dead_letter_queue") for value in ("", "a b", "x" * 129, "q")),
    *(({"priority": value}, "priority") for value in ("urgent", "", "FAST", 11, -1, 1.5)),
    *(({"delay_seconds": value}, "delay_seconds") for value in (-1, 3_162_240_001)),
    *(({"lease_seconds": value}, "lease_seconds") for value in (0, 0.49, 43_201)),
    *(({"timeout_seconds": value}, "timeout_seconds") for value in (0, 2_592_001)),
    *(({"max_retries": value}, "max_retries") for value in (-1, 10_001)),
    *(({"expires_in_seconds": value}, "expires_in_seconds") for value in (0, -1, 3_162_240_001)),
    ({"run_at": FAR, "delay_seconds": 1}, "run_at"),
    ({"expires_at": FAR, "expires_in_seconds": 1}, "expires_at"),
    ({"run_at": "2200-01-01T00:00:00Z"}, "run_at"),
    ({"expires_at": "2200-01-01T00:00:00Z"}, "expires_at"),
    ({"expires_at": "2001-01-01T00:00:00Z"}, "deadline"),
    ({"expires_in_seconds": 1, "delay_seconds": 2}, "deadline"),
    ({"expires_in_seconds": 1, "run_at": FAR}, "deadline"),
    ({"expires_at": FAR, "run_at": FARTHER}, "deadline"),
    ({"tags": [str(number) for number in range(21)]}, "tags"),
    *(({"tags": ["good", tag]}, "tags") for tag in ("", "x" * 129, "a\nb", "a\x85b", "a\u2028b", "\x7f", None)),
    ({"metadata": []}, "metadata"),
    ({"metadata": "a"}, "metadata"),
    ({"metadata": 1}, "metadata"),
    ({"metadata": {"a": "x" * 4096}}, "metadata"),
    ({"payload": "x" * 262_143}, "payload"),
    *(({"backoff": wrong}, "backoff") for wrong in BACKOFFS_REFUSED),
]  # fmt: skip


async def test_it_refuses_what_post_jobs_refuses(queue: Replica, application: Application):
    for case, field in REFUSED:
        body = {"queue": "q", **case}
        answer = await queue.http.post("/jobs", json=body)
        assert answer.status_code in {413, 422}, (case, answer.text)
        with pytest.raises(asyncpg.InvalidParameterValueError, match=field):
            await enqueue(application, **in_sql(body))
    assert await queue.stats() == dict.fromkeys(await queue.stats(), 0)


DEEP = "[" * 499 + "]" * 499
JSON_ACCEPTED = [
    "1.0",
    "1e3",
    "12345678901234567890.000",
    '{"b": 1, "a": 2, "b": 3}',
    '"\\u0000 \\ud83d\\ude00 \\\\ud800 \\" [["',
    '"😀"',
    DEEP,
    '{"a":"' + "[" * 600 + '"}',
]
JSON_REFUSED = [
    "",
    "{",
    "NaN",
    "'a'",
    "[1,]",
    '{"a":1}x',
    "\ufeff1",
    '"\\ud800"',
    '"\\ud83d\\\\\\ude00"',
    '"\\ude00\\ud83d"',
    f"[{DEEP}]",
]


async def test_payload_and_metadata_come_back_value_for_value_whatever_type_they_have(
    queue: Replica, application: Application
):
    for text in JSON_ACCEPTED:
        typed = "$1::text, metadata => '{\"n\": 1.0}'", "$1::json, metadata => '{\"n\": 1.0}'"
        ids = [
            str(await application.fetchval(f"SELECT leaseq.enqueue('q', payload => {each})", text))
            for each in typed
        ]
        for job_id in ids:
            shown = (await queue.http.get(f"/jobs/{job_id}")).text
            assert f'"payload":{text},' in shown
            assert '"metadata":{"n": 1.0}' in shown
        posted = await queue.http.post(
            "/jobs", content=f'{{"queue":"q","payload":{text}}}', headers={"Content-Type": "application/json"}
        )
        assert posted.status_code == 201, text
    job_id = await application.fetchval("SELECT leaseq.enqueue('q', payload => '{\"a\": 1.50}'::jsonb)")
    assert '"payload":{"a": 1.50},' in (await queue.http.get(f"/jobs/{job_id}")).text


async def test_what_is_no_json_for_every_reader_is_refused(queue: Replica, application: Application):
    for text in JSON_REFUSED:
        with pytest.raises((asyncpg.InvalidTextRepresentationError, asyncpg.InvalidParameterValueError)):
            await enqueue(application, payload=text)
        with pytest.raises((asyncpg.InvalidTextRepresentationError, asyncpg.InvalidParameterValueError)):
            await enqueue(application, metadata=f'{{"a":{text}}}')
        posted = await queue.http.post(
            "/jobs",
            content=f'{{"queue":"q","payload":{text}}}'.encode(),
            headers={"Content-Type": "application/json"},
        )
        assert posted.status_code in {400, 422}, text
    assert (await queue.stats())["waiting"] == 0


async def test_nothing_named_is_the_default_and_a_null_payload_is_null(
    queue: Replica, application: Application
):
    assert await application.fetchval("SELECT leaseq.enqueue('q', 'welcome', '{\"a\": 1}') IS NOT NULL")
    job = await queue.lease_one()
    assert (job["type"], job["payload"]) == ("welcome", {"a": 1})
    for form in ("text", "json", "jsonb"):
        await application.fetchval(f"SELECT leaseq.enqueue('q', payload => NULL::{form})")
        assert (await queue.lease_one())["payload"] is None
    for arguments in ("NULL", "'q', NULL"):
        with pytest.raises(asyncpg.InvalidParameterValueError, match="must be 1 to 128 letters"):
            await application.fetchval(f"SELECT leaseq.enqueue({arguments})")


async def test_a_traceparent_is_kept_and_a_malformed_one_ignored(queue: Replica, application: Application):
    trace = f"00-{'ab' * 16}-{'cd' * 8}-01"
    await enqueue(application, traceparent=trace)
    await enqueue(application, traceparent=trace.upper())
    assert [job["traceparent"] for job in await queue.lease(max_jobs=2)] == [trace, None]


async def test_a_rollback_leaves_nothing(queue: Replica, application: Application):
    transaction = application.transaction()
    await transaction.start()
    await enqueue(application)
    await enqueue(application, delay_seconds=60, unique_key="k")
    await transaction.rollback()
    assert await queue.lease() == []
    assert (await queue.http.get("/jobs")).json()["jobs"] == []
    assert await application.fetchval("SELECT count(*) FROM leaseq.unique_keys") == 0


async def waiting(replica: Replica, count: int = 1) -> None:
    async with asyncio.timeout(10):
        while replica.machine.service.wakeups.waiters < count:
            await asyncio.sleep(0.002)


async def test_a_waiting_worker_gets_the_job_at_the_commit(queue: Replica, application: Application):
    """Nobody polls here: it is handed over by a hint, or not at all."""
    worker = asyncio.create_task(queue.lease(wait_seconds=20))
    await waiting(queue)
    async with application.transaction():
        job_id = await enqueue(application, payload='"by hint"')
        assert await queue.lease() == []
        assert not worker.done()
    [job] = await worker
    assert (job["id"], job["payload"]) == (job_id, "by hint")


@pytest.mark.parametrize("count", [1, 60])
async def test_a_commit_that_comes_late_is_not_missed(world: World, application: Application, count: int):
    """Its jobs are older than those that were leased meanwhile, so they stand behind the cursors; nobody polls."""
    queue = await world.replica(poll_seconds=NEVER_SECONDS)
    async with application.transaction():
        late = [await enqueue(application) for _ in range(count)]
        # A cursor stays a little behind what it has passed.
        await application.execute("SELECT pg_sleep(0.2)")
        young = await queue.enqueue()
        assert (await queue.lease_one())["id"] == young["id"]
        worker = asyncio.create_task(queue.lease(wait_seconds=20, max_jobs=1000))
        await waiting(queue)
    leased = [job["id"] for job in await worker]
    while len(leased) < count:
        more = await queue.lease(wait_seconds=20, max_jobs=1000)
        assert more
        leased += [job["id"] for job in more]
    assert leased == late


async def test_a_delayed_job_starts_on_time(queue: Replica, application: Application):
    job_id = await enqueue(application, delay_seconds=30)
    assert (await queue.job(job_id))["state"] == "scheduled"
    queue.clock.move(31)
    await queue.maintain()
    assert (await queue.lease_one())["id"] == job_id


async def test_ids_are_of_version_7_and_in_order(application: Application):
    begun = datetime.now(UTC) - timedelta(seconds=60)
    ids = [UUID(await enqueue(application)) for _ in range(50)]
    assert ids == sorted(ids)
    for job_id in ids:
        assert (job_id.version, job_id.variant) == (7, "specified in RFC 4122")
        assert begun < datetime.fromtimestamp((job_id.int >> 80) / 1000, UTC) < begun + timedelta(seconds=120)


async def test_a_queue_that_must_exist_must(world: World, application: Application):
    strict = await world.replica(create_queues=False)
    for arguments in ({}, {"dead_letter_queue": "nowhere"}):
        with pytest.raises(asyncpg.InvalidParameterValueError, match="there is no queue"):
            await enqueue(application, "known" if arguments else "unknown", **arguments)
        assert (await strict.http.put("/queues/known", json={})).status_code < 300
    assert (await strict.job(await enqueue(application, "known")))["queue"] == "known"


async def test_the_environments_defaults_and_limits_are_those_of_the_last_start(
    world: World, application: Application
):
    later = await world.replica(max_retries=17, lease_seconds=18, backoff_seconds=19, max_payload_bytes=20)
    job = await later.job(await enqueue(application))
    assert (job["max_retries"], job["lease_seconds"], job["backoff"]["initial_seconds"]) == (17, 18, 19)
    with pytest.raises(asyncpg.InvalidParameterValueError, match="at most 20 bytes"):
        await enqueue(application, payload=f'"{"x" * 19}"')


class TestUniqueKeys:
    """As with POST /jobs: `return` by default, the holder's scope says how long it holds."""

    async def test_a_holder_is_returned_until_it_has_ended(self, queue: Replica, application: Application):
        first = await enqueue(application, unique_key="k")
        assert await enqueue(application, unique_key="k") == first
        assert await enqueue(application, "other", unique_key="k") != first
        job = await queue.lease_one()
        assert await enqueue(application, unique_key="k") == first
        await queue.verb("ack", job)
        assert await enqueue(application, unique_key="k") != first

    async def test_a_queued_holder_holds_until_its_first_lease(
        self, queue: Replica, application: Application
    ):
        first = await enqueue(application, unique_key="k", unique_scope="queued")
        assert await enqueue(application, unique_key="k", unique_scope="queued") == first
        job = await queue.lease_one()
        second = await enqueue(application, unique_key="k", unique_scope="queued")
        assert second != first
        await queue.verb("release", job)
        assert await enqueue(application, unique_key="k", unique_scope="queued") == second

    async def test_a_window_holds_whatever_becomes_of_the_job(self, queue: Replica, application: Application):
        window: dict[str, Any] = {"unique_key": "k", "unique_scope": "window", "unique_window_seconds": 3600}
        first = await enqueue(application, **window)
        await queue.verb("ack", await queue.lease_one())
        assert await enqueue(application, **window) == first
        await application.execute("UPDATE leaseq.unique_keys SET until = now() - interval '1 second'")
        assert await enqueue(application, **window) != first

    async def test_reject_raises_and_names_the_holder(self, queue: Replica, application: Application):
        first = await enqueue(application, unique_key="k")
        with pytest.raises(asyncpg.UniqueViolationError, match="unique key") as refused:
            await enqueue(application, unique_key="k", on_conflict="reject")
        assert first in str(refused.value.detail)
        assert (await queue.stats())["waiting"] == 1

    @pytest.mark.parametrize("before", ["ready", "scheduled", "retry"])
    @pytest.mark.parametrize("after", ["ready", "scheduled"])
    async def test_replace_gives_a_waiting_holder_the_new_fields(
        self, queue: Replica, application: Application, before: str, after: str
    ):
        first = await enqueue(
            application, unique_key="k", payload="1", delay_seconds=60 if before == "scheduled" else 0
        )
        old = await queue.job(first)
        if before == "retry":
            await queue.fail(await queue.lease_one(), retry_in_seconds=60)
        replaced = await enqueue(
            application,
            type="new",
            payload="2",
            priority="fast",
            tags=["t"],
            unique_key="k",
            on_conflict="replace",
            delay_seconds=90 if after == "scheduled" else 0,
        )
        assert replaced == first
        job = await queue.job(first)
        assert (job["type"], job["payload"], job["priority"], job["tags"]) == ("new", 2, 10, ["t"])
        assert job["created_at"] == old["created_at"]
        expected = {"ready": "ready", "scheduled": "retry" if before == "retry" else "scheduled"}[after]
        assert job["state"] == expected
        if after == "ready":
            assert (await queue.lease_one())["attempt"] == (2 if before == "retry" else 1)

    async def test_replace_leaves_a_job_alone_that_a_worker_has(
        self, queue: Replica, application: Application
    ):
        first = await enqueue(application, unique_key="k", payload="1")
        await queue.lease_one()
        assert await enqueue(application, unique_key="k", payload="2", on_conflict="replace") == first
        assert (await queue.job(first))["payload"] == 1

    async def test_of_two_transactions_the_second_waits_and_finds_the_first_ones_job(
        self, world: World, queue: Replica, application: Application
    ):
        other = await world.connect()
        async with application.transaction():
            first = await enqueue(application, unique_key="k")
            second = asyncio.create_task(enqueue(other, unique_key="k"))
            await waits_for_a_lock(world, other)
        assert await second == first
        assert (await queue.stats())["waiting"] == 1

    async def test_of_two_transactions_the_second_takes_the_key_when_the_first_rolls_back(
        self, world: World, queue: Replica, application: Application
    ):
        other = await world.connect()
        transaction = application.transaction()
        await transaction.start()
        first = await enqueue(application, unique_key="k")
        second = asyncio.create_task(enqueue(other, unique_key="k"))
        await waits_for_a_lock(world, other)
        await transaction.rollback()
        assert await second != first
        assert (await queue.lease_one())["id"] == await second

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"unique_key": ""}, "unique_key"),
            ({"unique_key": "x" * 257}, "unique_key"),
            ({"unique_key": "a\nb"}, "control"),
            ({"unique_scope": "queued"}, "go with a unique_key"),
            ({"on_conflict": "return"}, "go with a unique_key"),
            ({"unique_key": "k", "unique_scope": "always"}, "unique_scope"),
            ({"unique_key": "k", "unique_scope": "window"}, "unique_window_seconds"),
            ({"unique_key": "k", "unique_window_seconds": 5.0}, "unique_window_seconds"),
            (
                {"unique_key": "k", "unique_scope": "window", "unique_window_seconds": 0.0},
                "unique_window_seconds",
            ),
            ({"unique_key": "k", "on_conflict": "ignore"}, "on_conflict"),
        ],
    )
    async def test_what_makes_no_sense_is_refused(
        self, application: Application, arguments: dict[str, Any], words: str
    ):
        with pytest.raises(asyncpg.InvalidParameterValueError, match=words):
            await enqueue(application, **arguments)

    async def test_the_keys_are_those_of_post_jobs(self, queue: Replica, application: Application):
        unique: dict[str, Any] = {"queue": "q", "unique": {"key": "k", "scope": "unfinished"}}
        first = (await queue.http.post("/jobs", json=unique)).json()["id"]
        assert await enqueue(application, unique_key="k") == first
        second = await enqueue(application, unique_key="l")
        unique["unique"]["key"] = "l"
        answer = await queue.http.post("/jobs", json=unique)
        assert (answer.status_code, answer.json()["id"], answer.json()["duplicate"]) == (200, second, True)

    async def test_a_transaction_that_holds_a_key_keeps_only_its_rivals_waiting(
        self, queue: Replica, application: Application
    ):
        async with application.transaction():
            await enqueue(application, unique_key="k")
            rival = await queue.http.post("/jobs", json={"queue": "q", "unique": {"key": "k"}})
            assert rival.status_code == 503
            await queue.enqueue(unique={"key": "l"})
            await queue.enqueue()
        assert (await queue.stats())["waiting"] == 3


async def waits_for_a_lock(world: World, connection: Application) -> None:
    watcher = await world.connect()
    async with asyncio.timeout(10):
        while not await watcher.fetchval(
            "SELECT wait_event_type = 'Lock' FROM pg_stat_activity WHERE pid = $1",
            connection.get_server_pid(),
        ):
            await asyncio.sleep(0.002)


@pytest.fixture
async def role(application: Application) -> AsyncIterator[str]:
    """A role that may do nothing yet."""
    name = f"leaseq_producer_{os.getpid()}"
    await application.execute(f"DROP ROLE IF EXISTS {name}")
    await application.execute(f"CREATE ROLE {name}")
    yield name
    await application.execute("RESET ROLE")
    await application.execute(f"DROP OWNED BY {name}")
    await application.execute(f"DROP ROLE {name}")


async def test_a_role_needs_no_more_than_execute_and_nobody_has_it_unasked(
    queue: Replica, application: Application, role: str
):
    await application.execute(f"GRANT USAGE ON SCHEMA leaseq TO {role}")
    await application.execute(f"SET ROLE {role}")
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await enqueue(application)
    await application.execute(
        f"RESET ROLE; GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA leaseq TO {role}; SET ROLE {role}"
    )
    first = await enqueue(application, unique_key="k")
    assert await enqueue(application, unique_key="k", on_conflict="replace", payload="2") == first
    await application.fetchval("SELECT leaseq.enqueue('q', payload => '3'::jsonb)")
    assert [job["payload"] for job in await queue.lease(max_jobs=5)] == [2, 3]
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await application.fetch("SELECT FROM leaseq.jobs")


async def test_nobodys_own_tables_and_functions_are_taken_for_ours(
    queue: Replica, application: Application, role: str
):
    await application.execute(
        f"GRANT USAGE ON SCHEMA leaseq TO {role}; GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA leaseq TO {role};"
        f"SET ROLE {role};"
        "CREATE TEMP TABLE defaults (name text, value jsonb); CREATE TEMP TABLE jobs (id uuid);"
        "SET search_path = pg_temp, leaseq"
    )
    job_id = await enqueue(application)
    assert await application.fetchval("SELECT count(*) FROM pg_temp.jobs") == 0
    assert (await queue.lease_one())["id"] == job_id


async def test_before_the_first_start_it_says_so(world: World):
    database = Database(world.database_url, schema="Fresh; one")
    try:
        await upgrade(database)
    finally:
        await database.close()
    connection = await world.connect()
    with pytest.raises(
        asyncpg.ObjectNotInPrerequisiteStateError, match="leaseq has not run on this schema yet"
    ):
        await enqueue(connection, schema="Fresh; one")


async def test_in_a_schema_of_another_name_it_reaches_that_ones_workers(world: World):
    name = "its own %s $$ na'me"
    queue = await world.replica(schema_name=name, migrate=True, poll_seconds=NEVER_SECONDS)
    connection = await world.connect()
    worker = asyncio.create_task(queue.lease(wait_seconds=20))
    await waiting(queue)
    job_id = await enqueue(connection, schema=name)
    assert [job["id"] for job in await worker] == [job_id]


async def test_a_downgrade_takes_it_away(world: World):
    functions = "SELECT count(*) FROM pg_proc WHERE pronamespace = 'leaseq'::regnamespace"
    connection = await world.connect()
    database = Database(world.database_url, schema="leaseq")
    try:
        assert await connection.fetchval(functions) == 3
        await downgrade(database, "0002")
        assert await connection.fetchval(functions) == 0
        await upgrade(database)
        assert await connection.fetchval(functions) == 3
    finally:
        await database.close()
