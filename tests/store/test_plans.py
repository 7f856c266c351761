"""The plans of the hot statements, whatever the planner believes: index look-ups, as many as the batch is large."""

import asyncio
import hashlib
import json
import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from uuid_utils.compat import uuid7

from app.engine.cursors import Cursors
from app.store.database import HOT_SETTINGS, Database, statement
from app.store.jobs import _KEPT, _LINE, BEGINNING, CLAIM_SLACKS, END, Jobs, Line, columns
from app.store.redriving import Standing, StoredDeadLetters
from app.store.schedules import FIRST, ScheduleStore
from tests.conftest import TEMPLATE, _recreate, with_database
from tests.store import conftest as store

BATCH = 10
CLAIM_SLACK = CLAIM_SLACKS[0]
LEASES = 1000
HOT_TABLES = {"ready", "jobs", "leases", "scheduled", "held", "notes", "dead", "deltas"}

SEED = """
INSERT INTO jobs (id, created_at, queue, type, priority, run_at, lease_seconds, max_retries, backoff, budget_start, tags,
                  metadata, payload)
SELECT md5('{place}' || n)::uuid, now(), 'q', 'default', 5, now(), 30, 3,
       '{{"strategy": "fixed", "initial_seconds": 1, "factor": 2, "max_seconds": 9, "jitter": "none"}}', 0, '[]', '{{}}',
       'null'
  FROM generate_series(1, $1::int) AS n"""
PLACES = {
    "ready": """
        INSERT INTO ready (id, queue, type, priority, attempt, noted, since, expires_at)
        SELECT md5('ready' || n)::uuid, 'q', 'default', 5, 0, false, now() - interval '1 day' + n * interval '1 ms',
               CASE WHEN n % 2 = 0 THEN now() + n * interval '1 day' END
          FROM generate_series(1, $1::int) AS n""",
    "scheduled": """
        INSERT INTO scheduled (id, queue, type, priority, attempt, noted, run_at, is_retry, expires_at)
        SELECT md5('scheduled' || n)::uuid, 'q', 'default', 5, 0, false, now() - interval '1 s' * (100 - n), false,
               CASE WHEN n % 2 = 0 THEN now() + n * interval '1 day' END
          FROM generate_series(1, $1::int) AS n""",
    "leases": """
        INSERT INTO leases (id, queue, type, priority, attempt, noted, lease_id, since, leased_at, expires_at,
                            lease_seconds, cancel_requested)
        SELECT md5('leases' || n)::uuid, 'q', 'default', 5, 1, false, md5('lease' || n)::uuid, now(), now(),
               now() - interval '1 s' * (100 - n), 30, false
          FROM generate_series(1, $1::int) AS n""",
}


@dataclass(frozen=True)
class Seeded:
    """A database in a certain condition, to look at and leave as it is."""

    url: str
    ready: int

    async def explain(self, name: str, *values: object) -> "Plan":
        """Run the statement `sql/<name>.sql` as the verbs do, and take everything back."""
        return await self.explain_text(statement(name, "leaseq"), *values)

    async def explain_text(self, text: str, *values: object) -> "Plan":
        """Run a statement as the verbs do, with its one generic plan, and take everything back."""
        connection = await asyncpg.connect(self.url, server_settings=HOT_SETTINGS)
        try:
            transaction = connection.transaction()
            await transaction.start()
            await connection.execute(f"PREPARE hot AS {text}")
            found = await connection.fetchval(
                "EXPLAIN (ANALYZE, BUFFERS, TIMING OFF, FORMAT JSON)"
                f" EXECUTE hot ({', '.join(map(literal, values))})"
            )
            await transaction.rollback()
        finally:
            await connection.close()
        return Plan(json.loads(found)[0]["Plan"])


class Plan:
    """What EXPLAIN ANALYZE said."""

    def __init__(self, root: dict[str, Any]) -> None:
        self.root = root
        self.nodes = list(_nodes(root))

    @property
    def buffers(self) -> int:
        hit: int = self.root["Shared Hit Blocks"]
        read: int = self.root["Shared Read Blocks"]
        return hit + read

    @property
    def rows(self) -> int:
        rows: float = self.root["Actual Rows"]
        return round(rows)

    def scans(self) -> list[tuple[str, str, int]]:
        """Return the scans of tables: the kind, the table, and how many rows were read in all, at least."""
        return [
            (node["Node Type"], node["Relation Name"], _rows(node))
            for node in self.nodes
            if "Relation Name" in node and "Scan" in node["Node Type"]
        ]

    def assert_reads_only_what_it_takes(self, rows_max: int) -> None:
        scans = self.scans()
        assert scans
        for kind, table, rows in scans:
            assert kind in {"Index Scan", "Index Only Scan", "Tid Scan"}, (kind, table)
            assert rows <= rows_max, (kind, table, rows)
        for node in self.nodes:
            # A sort or a hash over a table would show as a large one; a function scan is over the values given.
            assert node["Node Type"] == "Function Scan" or node["Actual Rows"] <= max(rows_max, 1), node[
                "Node Type"
            ]


def _rows(node: dict[str, Any]) -> int:
    each: float = node["Actual Rows"] + node.get("Rows Removed by Filter", 0)
    loops: int = node["Actual Loops"]
    # What EXPLAIN says is the mean of the loops, before PostgreSQL 18 rounded to a whole number.
    rounded = 0.5 if isinstance(node["Actual Rows"], int) and loops > 1 else 0
    return round((each - rounded) * loops)


def _nodes(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield node
    for child in node.get("Plans", ()):
        yield from _nodes(child)


def literal(value: object) -> str:
    """Write a value as SQL: EXECUTE takes no parameters."""
    match value:
        case None:
            return "NULL"
        case bool() | int() | float():
            return str(value)
        case bytes():
            return f"'\\x{value.hex()}'"
        case list():
            return "'{" + ",".join(map(_element, value)) + "}'"
        case _:
            return f"'{value}'"


def _element(value: object) -> str:
    if value is None:
        return "NULL"
    text = f"\\x{value.hex()}" if isinstance(value, bytes) else str(value)
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def make(cluster_url: str, name: str, *, ready: int, scheduled: int, steps: Sequence[str]) -> Seeded:
    """Clone the template and take `steps`: fill, forget (delete all), vacuum (statistics of what is there)."""
    url = with_database(cluster_url, name)

    async def work() -> None:
        await _recreate(cluster_url, name, TEMPLATE)
        connection = await asyncpg.connect(
            url, server_settings={"search_path": "leaseq"}, command_timeout=100
        )
        try:
            for table in HOT_TABLES:
                await connection.execute(f"ALTER TABLE {table} SET (autovacuum_enabled = off)")
            for step in steps:
                if step == "fill":
                    for place, count in (("ready", ready), ("scheduled", scheduled), ("leases", LEASES)):
                        await connection.execute(SEED.format(place=place), count)
                        await connection.execute(PLACES[place], count)
                elif step == "forget":
                    for table in ("jobs", *PLACES):
                        await connection.execute(f"DELETE FROM {table}")
                else:
                    await connection.execute("VACUUM (ANALYZE)")
        finally:
            await connection.close()

    asyncio.run(work())
    return Seeded(url, ready)


def database_name(condition: str) -> str:
    return f"leaseq_plans_{condition}_{os.getpid()}"


async def drop(cluster_url: str, name: str) -> None:
    connection = await asyncpg.connect(cluster_url)
    try:
        await connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
    finally:
        await connection.close()


CONDITIONS: dict[str, dict[str, Any]] = {
    "empty_never_analysed": {"ready": 0, "scheduled": 0, "steps": ()},
    "small_never_analysed": {"ready": 1000, "scheduled": 1000, "steps": ("fill",)},
    "filled_after_a_vacuum_of_nothing": {
        "ready": 20_000,
        "scheduled": 20_000,
        "steps": ("fill", "forget", "vacuum", "fill"),
    },
    "large_never_analysed": {"ready": 100_000, "scheduled": 100_000, "steps": ("fill",)},
    "large": {"ready": 100_000, "scheduled": 100_000, "steps": ("fill", "vacuum")},
}


@pytest.fixture(scope="module")
def databases(cluster_url: str, template_url: str) -> Iterator[dict[str, Seeded]]:
    """The databases that are looked at here."""
    assert TEMPLATE in template_url
    yield {
        condition: make(cluster_url, database_name(condition), **how) for condition, how in CONDITIONS.items()
    }
    for condition in CONDITIONS:
        asyncio.run(drop(cluster_url, database_name(condition)))


@pytest.fixture(params=CONDITIONS)
def seeded(request: pytest.FixtureRequest, databases: dict[str, Seeded]) -> Seeded:
    return databases[request.param]


async def asked(seeded: Seeded, work: Callable[[Jobs], Awaitable[object]]) -> list[Any]:
    """Return the text and the values of the statement that a verb runs, by having it run once."""
    records: list[Any] = []
    database = Database(seeded.url, schema="leaseq", pool_size=1)
    await database.start()
    try:
        async with database.hot.acquire() as connection:
            connection.add_query_logger(records.append)
        await work(Jobs(database))
        await asyncio.sleep(0)
    finally:
        await database.close()
    [record] = [record for record in records if "leaseq" in record.query]
    return [record.query, *record.args]


async def claim(
    databases: dict[str, Seeded],
    queues: Sequence[str],
    max_jobs: int = BATCH,
    types: Sequence[str] | None = None,
) -> list[Any]:
    """Return what a lease asks; it is asked where there is nothing to take."""
    empty = databases["empty_never_analysed"]
    return await asked(empty, lambda jobs: store.claim(jobs, max_jobs, queues, types))


def seeds(place: str, count: int = BATCH) -> list[UUID]:
    return [
        UUID(hex=hashlib.md5(f"{place}{n}".encode(), usedforsecurity=False).hexdigest())
        for n in range(1, count + 1)
    ]


def tokens(count: int = BATCH) -> list[UUID]:
    return [
        UUID(hex=hashlib.md5(f"lease{n}".encode(), usedforsecurity=False).hexdigest())
        for n in range(1, count + 1)
    ]


class TestLease:
    @pytest.mark.parametrize("types", [None, ["default", "other"]], ids=["any_type", "types"])
    @pytest.mark.parametrize("queues", [["q"], ["a", "b", "q", "z"]], ids=["queue", "queues"])
    async def test_reads_the_heads_of_its_lines(
        self, databases: dict[str, Seeded], seeded: Seeded, queues: list[str], types: list[str] | None
    ):
        plan = await seeded.explain_text(*await claim(databases, queues, types=types))
        plan.assert_reads_only_what_it_takes(BATCH + CLAIM_SLACK)
        assert plan.rows == (BATCH if seeded.ready else 1)

    @pytest.mark.parametrize("types", [None, ["default"]], ids=["any_type", "types"])
    @pytest.mark.parametrize("queue", ["q", "without_jobs"])
    async def test_costs_the_same_at_100_000_ready_jobs_as_at_1_000(
        self, databases: dict[str, Seeded], queue: str, types: list[str] | None
    ):
        lease = await claim(databases, [queue], 1, types)
        few = await databases["small_never_analysed"].explain_text(*lease)
        for condition in ("large", "large_never_analysed"):
            many = await databases[condition].explain_text(*lease)
            assert many.buffers <= 1.5 * few.buffers

    async def test_finds_a_rare_type_behind_100_000_others_as_fast_as_the_common_one(
        self, databases: dict[str, Seeded]
    ):
        connection = await asyncpg.connect(databases["large"].url, server_settings={"search_path": "leaseq"})
        try:
            await connection.execute(
                "UPDATE ready SET type = 'rare', since = now() + interval '1 hour' WHERE id = $1",
                seeds("ready")[-1],
            )
        finally:
            await connection.close()
        rare, common = [
            await databases["large"].explain_text(*await claim(databases, ["q"], 1, [type_]))
            for type_ in ("rare", "default")
        ]
        rare.assert_reads_only_what_it_takes(1 + CLAIM_SLACK)
        assert any(scan[1:] == ("ready", 1) for scan in rare.scans())
        assert rare.buffers <= 1.5 * common.buffers

    @pytest.mark.parametrize("type_", [None, "default"])
    async def test_a_named_lease_foresees_by_look_ups(self, seeded: Seeded, type_: str | None):
        stretches = columns(Cursors().ahead([Line("q", type_)]))
        foresee = statement("foresee", "leaseq", line=_LINE[type_ is None])
        plan = await seeded.explain_text(foresee, None, "", "r", *stretches)
        plan.assert_reads_only_what_it_takes(1)

    async def test_a_replay_looks_its_leases_up(self, seeded: Seeded):
        plan = await seeded.explain("standing", seeds("leases"), tokens())
        plan.assert_reads_only_what_it_takes(BATCH)
        assert plan.rows == (BATCH if seeded.ready else 0)


class TestSettling:
    async def test_an_ack_looks_its_jobs_up(self, seeded: Seeded):
        ack = statement("ack", "leaseq", shown="*", kept=_KEPT, then="", then_value="")
        plan = await seeded.explain_text(ack, None, seeds("leases"), tokens(), [b"1"] * BATCH, ["q"])
        plan.assert_reads_only_what_it_takes(BATCH)
        assert plan.rows == (BATCH if seeded.ready else 0)

    async def test_a_heartbeat_looks_its_lease_up(self, seeded: Seeded):
        nothing = [None]
        plan = await seeded.explain(
            "heartbeat", None, seeds("leases", 1), tokens(1), nothing, nothing, nothing, nothing
        )
        plan.assert_reads_only_what_it_takes(1)
        assert plan.rows == (1 if seeded.ready else 0)

    async def test_heartbeats_that_tell_something_look_only_their_own_notes_up(self, seeded: Seeded):
        def each(value: object) -> list[object]:
            return [value] * BATCH

        plan = await seeded.explain(
            "heartbeat", None, seeds("leases"), tokens(), each(None), each(50), each("half"), each(b"[1]")
        )
        plan.assert_reads_only_what_it_takes(BATCH)
        assert plan.rows == (BATCH if seeded.ready else 0)

    async def test_fail_and_release_look_their_jobs_up(self, seeded: Seeded):
        plan = await seeded.explain("lock_leases", None, seeds("leases"), tokens())
        plan.assert_reads_only_what_it_takes(BATCH)
        assert plan.rows == (BATCH if seeded.ready else 0)

    @pytest.mark.parametrize("state", ["ready", "retry", "failed"])
    async def test_verdicts_are_written_by_look_ups(self, seeded: Seeded, state: str):
        def each(value: object) -> list[object]:
            return [value] * BATCH

        due_at = datetime.now(UTC) if state == "retry" else None
        plan = await seeded.explain(
            "conclude",
            None,
            seeds("leases"),
            each(state),
            each(1),
            each(due_at),
            each("because"),
            each(b"{}"),
            each(None),
            each("group"),
            each("failed"),
            each("fail"),
        )
        plan.assert_reads_only_what_it_takes(BATCH)

    async def test_a_repeated_verb_looks_its_attempt_up(self, databases: dict[str, Seeded], seeded: Seeded):
        [job_id], [lease_id] = seeds("leases", 1), tokens(1)
        repeat = await asked(
            databases["empty_never_analysed"], lambda jobs: jobs.recorded({job_id: lease_id})
        )
        (await seeded.explain_text(*repeat)).assert_reads_only_what_it_takes(1)


class TestOperating:
    @pytest.mark.parametrize("place", PLACES)
    async def test_a_cancel_looks_its_job_up(self, seeded: Seeded, place: str):
        plan = await seeded.explain("cancel", None, seeds(place, 1), ["ready", "scheduled", "active"])
        plan.assert_reads_only_what_it_takes(1)
        assert plan.rows == (1 if seeded.ready else 0)

    async def test_retry_and_delete_look_their_job_up(self, databases: dict[str, Seeded], seeded: Seeded):
        delete = await asked(databases["empty_never_analysed"], lambda jobs: jobs.delete([uuid4()]))
        (await seeded.explain_text(*delete)).assert_reads_only_what_it_takes(0)
        (await seeded.explain("dead_keys", None, [uuid4()], ["failed"])).assert_reads_only_what_it_takes(0)
        (await seeded.explain("retry", None, [uuid4()], ["failed"])).assert_reads_only_what_it_takes(0)

    async def test_unique_keys_and_calls_are_looked_up(self, seeded: Seeded):
        queues, keys, ids = ["q"] * BATCH, [f"k{n}" for n in range(BATCH)], [uuid4() for _ in range(BATCH)]
        scopes, nothing, owners, hashes = ["unfinished"] * BATCH, [None] * BATCH, [""] * BATCH, [b""] * BATCH
        for name, *values in (
            ("key_holders", None, queues, keys),
            ("give_keys", None, queues, keys, ids, scopes, nothing, nothing),
            ("lock_keys", "", "", BATCH),
            ("drop_keys", queues, keys),
            ("earlier_calls", None, owners, queues, keys, 86_400.0),
            ("keep_calls", None, owners, queues, keys, hashes, ["{}"] * BATCH),
            ("sweep_requests", None, BATCH, 86_400.0),
        ):
            (await seeded.explain(name, *values)).assert_reads_only_what_it_takes(BATCH)

    async def test_a_replacement_looks_its_job_up(self, seeded: Seeded):
        for place in ("ready", "scheduled"):
            [job_id] = seeds(place, 1)
            plan = await seeded.explain(
                "replace", None, [job_id], ["t"], [5], [None], [None], [30.0], [None], [3], ["{}"], [None], ["[]"],
                [b"{}"], [b"null"], [None], [None], ["unfinished"], [None], [None],
            )  # fmt: skip
            plan.assert_reads_only_what_it_takes(1)
            assert plan.rows == (1 if seeded.ready else 0)


class TestEditing:
    @pytest.mark.parametrize("place", ["ready", "scheduled"])
    async def test_an_edit_looks_its_jobs_up(self, seeded: Seeded, place: str):
        def each(value: object) -> list[object]:
            return [value] * BATCH

        ids = seeds(place)
        for name, values in (("lock_places", [ids]), ("editable", [None, ids])):
            plan = await seeded.explain(name, *values)
            plan.assert_reads_only_what_it_takes(BATCH)
            assert plan.rows == (BATCH if seeded.ready else 0)
        plan = await seeded.explain(
            "edit",
            None,
            ids,
            each("other"),
            each(1),
            each(None),
            each(30),
            each(None),
            each(3),
            each("{}"),
            each(None),
            each(None),
            each(b"1"),
            each(None),
            each(None),
        )
        plan.assert_reads_only_what_it_takes(BATCH)
        assert plan.rows == (BATCH if seeded.ready else 0)


class TestRedriving:
    async def test_copies_are_looked_for_from_where_the_last_step_ended(
        self, databases: dict[str, Seeded], seeded: Seeded
    ):
        now = datetime.now(UTC)
        behind = Standing(5, now, UUID(int=0))

        def look(jobs: Jobs) -> Awaitable[object]:
            return StoredDeadLetters(jobs._database, jobs).copies("q", None, behind, now, BATCH)

        copies = await asked(databases["empty_never_analysed"], look)
        # All that is ready stands before it.
        (await seeded.explain_text(*copies)).assert_reads_only_what_it_takes(1)

    async def test_copies_are_moved_and_removed_by_look_ups(self, seeded: Seeded):
        ids = seeds("ready")
        anew = [uuid4() for _ in ids]
        each = ["r"] * BATCH
        statements: list[tuple[str, list[object]]] = [
            ("lock_copies", [ids]),
            ("move_ready", [ids, "r"]),
            ("take_home", [None, ids, anew, each]),
        ]
        for name, values in statements:
            plan = await seeded.explain(name, *values)
            plan.assert_reads_only_what_it_takes(BATCH)
            assert plan.rows == (BATCH if seeded.ready else 0)


class TestMaintaining:
    async def test_a_promotion_reads_what_is_due(self, seeded: Seeded):
        plan = await seeded.explain("promote", None, BATCH, BEGINNING)
        plan.assert_reads_only_what_it_takes(BATCH)

    async def test_a_promotion_costs_the_same_at_100_000_scheduled_jobs_as_at_1_000(
        self, databases: dict[str, Seeded]
    ):
        few = await databases["small_never_analysed"].explain("promote", None, BATCH, BEGINNING)
        many = await databases["large"].explain("promote", None, BATCH, BEGINNING)
        assert many.buffers <= 1.5 * few.buffers

    async def test_an_expiry_reads_what_is_past_its_deadline(self, seeded: Seeded):
        plan = await seeded.explain("expire", END, BATCH, BEGINNING)
        plan.assert_reads_only_what_it_takes(2 * BATCH)
        assert plan.rows == (2 * BATCH if seeded.ready else 1)

    async def test_an_expiry_reads_no_job_that_may_still_be_started(self, seeded: Seeded):
        plan = await seeded.explain("expire", None, BATCH, BEGINNING)
        plan.assert_reads_only_what_it_takes(1)
        # A look at each of the three indexes, and the count of what there was.
        assert plan.buffers <= 12

    async def test_the_reaper_reads_what_has_expired(self, seeded: Seeded):
        plan = await seeded.explain("lock_expired", None, BATCH, BEGINNING)
        plan.assert_reads_only_what_it_takes(BATCH)
        assert plan.rows == (BATCH if seeded.ready else 1)

    async def test_the_reaper_reads_no_lease_that_still_stands(self, seeded: Seeded):
        plan = await seeded.explain("lock_expired", datetime(2020, 1, 1, tzinfo=UTC), BATCH, BEGINNING)
        plan.assert_reads_only_what_it_takes(0)

    @pytest.mark.parametrize("type_", [None, "default"])
    async def test_the_poll_looks_no_further_than_the_leases_that_wait(
        self, databases: dict[str, Seeded], seeded: Seeded, type_: str | None
    ):
        stretches = Cursors().ahead([Line("q", type_)])
        poll = await asked(
            databases["empty_never_analysed"], lambda jobs: jobs.look(stretches, [3] * len(stretches))
        )
        plan = await seeded.explain_text(*poll)
        plan.assert_reads_only_what_it_takes(3)
        assert plan.rows == (3 if seeded.ready else 0)


class TestSchedules:
    """Schedules of which a few are due, half of them with a unique key, whatever was known of them before."""

    @pytest.mark.parametrize(
        "known", ["never_analysed", "analysed_empty", "analysed_when_all_were_due", "analysed"]
    )
    async def test_what_is_due_is_found_by_the_index_of_what_is_due(
        self, databases: dict[str, Seeded], known: str
    ):
        seeded = databases["empty_never_analysed"]
        texts = await schedule_statements(seeded.url)
        connection = await asyncpg.connect(
            seeded.url, server_settings={"search_path": "leaseq", **HOT_SETTINGS}
        )
        transaction = connection.transaction()
        await transaction.start()
        try:
            if known == "analysed_empty":
                await connection.execute("ANALYZE schedules")
            await connection.execute(SCHEDULES, 10_000, 1)
            if known == "analysed_when_all_were_due":
                await connection.execute("UPDATE schedules SET next_fire_at = now() - interval '1 day'")
                await connection.execute("ANALYZE schedules")
            await connection.execute("DELETE FROM schedules")
            await connection.execute(SCHEDULES, 10_000, 2 * BATCH)
            if known == "analysed":
                await connection.execute("ANALYZE schedules")
            for number, (text, *values) in enumerate(texts):
                await connection.execute(f"PREPARE due{number} AS {text}")
                found = await connection.fetchval(
                    "EXPLAIN (ANALYZE, BUFFERS, TIMING OFF, FORMAT JSON)"
                    f" EXECUTE due{number} ({', '.join(map(literal, values))})"
                )
                plan = Plan(json.loads(found)[0]["Plan"])
                assert plan.rows == (1 if "extract" in text else BATCH)
                plan.assert_reads_only_what_it_takes(2 * BATCH + 1)
                assert {node["Index Name"] for node in plan.nodes if "Index Name" in node} == {
                    "schedules_due"
                }
        finally:
            await transaction.rollback()
            await connection.close()


SCHEDULES = """
INSERT INTO schedules (name, definition, payload, paused, created_at, anchored_at, next_fire_at, job_ids)
SELECT 's' || n,
       CASE WHEN n % 2 = 0 THEN '{"job": {"queue": "q"}}' ELSE '{"job": {"queue": "q", "unique": {"key": "k"}}}' END::jsonb,
       'null', false, now(), now(), now() + (n - $2::int) * interval '1 minute', '{}'
  FROM generate_series(1, $1::int) AS n"""


async def schedule_statements(url: str) -> list[list[Any]]:
    """Return the text and the values of the statements that look for schedules that are due, by having them run."""
    records: list[Any] = []
    database = Database(url, schema="leaseq", pool_size=1)
    await database.start()
    try:
        async with database.hot.acquire() as connection:
            connection.add_query_logger(records.append)
        schedules = ScheduleStore(database, Jobs(database))
        await schedules.fire(BATCH, lambda *_: None, lambda _: pytest.fail("none is due"))
        await schedules.due_with_key(BATCH, FIRST)
        for keyed in (False, True):
            await schedules.next_due_seconds(keyed=keyed)
        await asyncio.sleep(0)
    finally:
        await database.close()
    return [[record.query, *record.args] for record in records if "leaseq" in record.query]


async def test_an_explanation_counts_what_is_before_a_job_no_further_than_it_says(seeded: Seeded):
    last = seeds("ready", max(seeded.ready, 1))[-1]
    stretches = columns(Cursors().ahead([Line("q")]))
    plan = await seeded.explain("explain", None, last, *stretches, BATCH, 60.0)
    hot = [scan for scan in plan.scans() if scan[1] in HOT_TABLES]
    assert hot
    for kind, table, rows in hot:
        assert kind in {"Index Scan", "Index Only Scan"}, (kind, table)
        assert rows <= BATCH + 1, (kind, table, rows)
    assert plan.rows == (1 if seeded.ready else 0)


async def test_an_enqueue_reads_no_table(seeded: Seeded):
    def each(value: object) -> list[object]:
        return [value] * BATCH

    plan = await seeded.explain(
        "enqueue",
        None,
        [uuid7() for _ in range(BATCH)],
        each("q"),
        each("default"),
        each(5),
        each(None),
        each(None),
        each(30),
        each(None),
        each(3),
        each("{}"),
        each(None),
        each("[]"),
        each(b"{}"),
        each(b"null"),
        *[each(None)] * 7,
    )
    assert plan.scans() == []
    assert plan.rows == BATCH


async def test_these_tests_would_see_a_scan(databases: dict[str, Seeded]):
    """The statement of a naive queue, under the settings that PostgreSQL comes with."""
    connection = await asyncpg.connect(databases["large"].url)
    try:
        found = await connection.fetchval(
            "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) SELECT id FROM leaseq.ready ORDER BY attempt, id LIMIT 1"
        )
    finally:
        await connection.close()
    with pytest.raises(AssertionError):
        Plan(json.loads(found)[0]["Plan"]).assert_reads_only_what_it_takes(BATCH)
