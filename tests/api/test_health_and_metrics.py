"""What probes and Prometheus see: readiness, the parts' health, counters, gauges, and what a scrape costs."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import event
from uuid_utils.compat import uuid7

from app.queue.events import JobEnqueued, JobPromoted, MaintenanceRan
from app.queue.lifecycle import State
from app.queue.model import JobRequest
from app.queue.policy import resolve
from app.telemetry import OTHER_QUEUES, QUEUE_LABELS_MAX, Metrics
from tests.api.refusals import LEASE_ID, problem
from tests.conftest import Clock, Replica, World

Labels = tuple[tuple[str, str], ...]
BOOM = {"message": "boom"}


class Scrape:
    """The samples of one scrape."""

    def __init__(self, text: str) -> None:
        self.samples: dict[str, dict[Labels, float]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                self.samples.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value

    def __call__(self, name: str, **labels: str) -> float:
        """Return one sample's value; 0 where there is none."""
        return self.samples.get(name, {}).get(tuple(sorted(labels.items())), 0.0)

    def values_of(self, label: str) -> set[str]:
        """Return every value that a label has anywhere."""
        return {
            value for of in self.samples.values() for labels in of for name, value in labels if name == label
        }


async def scrape(queue: Replica) -> Scrape:
    answer = await queue.http.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    return Scrape(answer.text)


@asynccontextmanager
async def without_database(world: World, cluster_url: str) -> AsyncIterator[None]:
    """Let the database end every connection and take no new one, as in a failover, for the length of the block."""
    name = world.database_url.partition("?")[0].rpartition("/")[2]
    admin = await asyncpg.connect(cluster_url)
    try:
        await admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        await admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1", name)
        while await admin.fetchval("SELECT count(*) FROM pg_stat_activity WHERE datname = $1", name):
            await asyncio.sleep(0.005)
        yield
    finally:
        await admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
        await admin.close()


async def last_maintained(world: World, queue: Replica, seconds_ago: int) -> None:
    """Let the only round of maintenance, that of the start, have been so long ago."""
    await queue.first_round()
    connection = await world.connect()
    await connection.execute("UPDATE maintenance SET ran_at = now() - make_interval(secs => $1)", seconds_ago)


async def test_a_process_that_serves_is_live_and_ready(queue: Replica):
    for path in ("/health/live", "/health/ready"):
        answer = await queue.http.get(path)
        assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


async def test_a_stopping_process_is_live_but_not_ready(queue: Replica):
    queue.machine.service.drain()
    answer = await queue.http.get("/health/ready")
    assert "stopping" in problem(answer, "unavailable")["detail"]
    assert int(answer.headers["retry-after"]) > 0
    assert (await queue.http.get("/health/live")).status_code == 200
    health = await queue.http.get("/health")
    assert health.status_code == 503
    assert (health.json()["status"], health.json()["database"]) == ("unavailable", True)


async def test_without_the_database_a_process_is_live_but_not_ready_and_says_why(
    world: World, queue: Replica, cluster_url: str
):
    async with without_database(world, cluster_url):
        answer = await queue.http.get("/health/ready")
        assert "database" in problem(answer, "unavailable")["detail"]
        assert int(answer.headers["retry-after"]) > 0
        assert (await queue.http.get("/health/live")).status_code == 200
        health = await queue.http.get("/health")
        assert health.status_code == 503
        told = health.json()
        assert (told["database"], told["jobs"], told["workers"]) == (False, None, [])
        assert told["problem"]


async def test_without_the_database_every_verb_answers_503_with_retry_after(
    world: World, queue: Replica, cluster_url: str
):
    lease = {"lease_id": LEASE_ID}
    async with without_database(world, cluster_url):
        answers = [
            await queue.http.post("/jobs", json={"queue": "q"}),
            await queue.http.post("/lease", json={"queues": ["q"], "wait_seconds": 0}),
            await queue.http.post(f"/jobs/{LEASE_ID}/heartbeat", json=lease),
            await queue.http.post(f"/jobs/{LEASE_ID}/ack", json=lease),
            await queue.http.post(f"/jobs/{LEASE_ID}/fail", json={**lease, "error": BOOM}),
            await queue.http.post(f"/jobs/{LEASE_ID}/release", json=lease),
            await queue.http.post(f"/jobs/{LEASE_ID}/cancel"),
            await queue.http.post(f"/jobs/{LEASE_ID}/retry"),
            await queue.http.delete(f"/jobs/{LEASE_ID}"),
            await queue.http.get("/jobs"),
            await queue.http.get(f"/jobs/{LEASE_ID}"),
            await queue.http.get(f"/jobs/{LEASE_ID}/attempts"),
            await queue.http.get("/stats"),
        ]
    for answer in answers:
        problem(answer, "unavailable")
        assert int(answer.headers["retry-after"]) > 0


async def test_a_scrape_without_the_database_says_so_and_keeps_the_counters(
    world: World, queue: Replica, cluster_url: str
):
    await queue.enqueue()
    async with without_database(world, cluster_url):
        seen = await scrape(queue)
    assert seen("leaseq_database_up") == 0
    assert seen("leaseq_jobs_enqueued_total", queue="q") == 1
    assert "leaseq_jobs" not in seen.samples


async def test_once_the_database_is_back_the_process_is_ready_and_listens_again_by_itself(
    world: World, queue: Replica, cluster_url: str
):
    async with without_database(world, cluster_url):
        assert (await queue.http.get("/health/ready")).status_code == 503
    async with asyncio.timeout(30):
        while (await queue.http.get("/health/ready")).status_code != 200:
            await asyncio.sleep(0.05)
        await queue.machine.service.wakeups.listening.wait()
    other = await world.replica()
    waiting = asyncio.create_task(queue.lease(wait_seconds=30))
    while queue.machine.service.wakeups.waiters == 0:
        await asyncio.sleep(0.005)
    job = await other.enqueue()
    assert [each["id"] for each in await waiting] == [job["id"]]


async def test_health_shows_the_parts_the_backlog_and_the_last_word_of_each_worker(
    world: World, queue: Replica, clock: Clock
):
    now = datetime.now(UTC)
    await last_maintained(world, queue, 300)
    clock.set(now - timedelta(seconds=300))
    for _ in range(3):
        await queue.enqueue()
    first = await queue.lease_one(worker="first", lease_seconds=600)
    clock.move(10)
    await queue.lease_one(worker="second", lease_seconds=600)
    clock.move(10)
    await queue.verb("heartbeat", first)
    answer = await queue.http.get("/health")
    assert answer.status_code == 200
    told = answer.json()
    assert (told["status"], told["problem"], told["database"], told["listening"]) == ("ok", None, True, True)
    seen = [
        (each["name"], each["active"], datetime.fromisoformat(each["last_seen_at"]))
        for each in told["workers"]
    ]
    assert seen == [("first", 1, now - timedelta(seconds=280)), ("second", 1, now - timedelta(seconds=290))]
    assert (told["jobs"]["active"], told["jobs"]["waiting"]) == (2, 1)
    assert told["oldest_ready_seconds"]["q"] == 20
    assert told["maintenance_seconds_ago"] >= 300


async def test_counters_follow_what_happens_to_jobs(queue: Replica):
    for _ in range(8):
        await queue.enqueue(max_retries=1, backoff={"jitter": "none"})
    jobs = await queue.lease(max_jobs=6, lease_seconds=30)
    acked, failed, dead, released, cancelled, expired = jobs
    await queue.verb("ack", acked)
    await queue.verb("ack", acked)
    await queue.fail(failed)
    await queue.fail(dead, retry=False)
    await queue.verb("release", released)
    await queue.http.post(f"/jobs/{cancelled['id']}/cancel")
    await queue.fail(cancelled)
    queue.clock.move(31)
    await queue.maintain()
    [waiting, *_] = (await queue.http.get("/jobs?state=ready")).json()["jobs"]
    await queue.http.post(f"/jobs/{waiting['id']}/cancel")
    again = await queue.lease(max_jobs=10, lease_seconds=30)
    assert {job["id"] for job in again} >= {failed["id"]}
    queue.clock.move(31)
    await queue.maintain()
    lost = len(again)
    last_tries = sum(job["attempt"] == 2 for job in again)

    seen = await scrape(queue)
    assert seen("leaseq_jobs_enqueued_total", queue="q") == 8
    assert seen("leaseq_jobs_completed_total", queue="q") == 1
    assert seen("leaseq_attempts_failed_total", queue="q", outcome="failed") == 2
    assert seen("leaseq_attempts_failed_total", queue="q", outcome="lease_expired") == 1 + lost
    assert seen("leaseq_leases_expired_total", queue="q") == 1 + lost
    assert seen("leaseq_jobs_retried_total", queue="q") == 2 + lost - last_tries
    assert seen("leaseq_jobs_dead_lettered_total", queue="q") == 1 + last_tries
    assert seen("leaseq_jobs_released_total", queue="q") == 1
    assert seen("leaseq_jobs_cancelled_total", queue="q") == 2
    assert expired["id"] not in {job["id"] for job in again if job["attempt"] == 1}


async def test_an_attempt_that_reached_its_time_limit_counts_as_timed_out(queue: Replica):
    await queue.enqueue(timeout_seconds=5)
    await queue.lease_one()
    queue.clock.move(6)
    await queue.maintain()
    seen = await scrape(queue)
    assert seen("leaseq_attempts_failed_total", queue="q", outcome="timed_out") == 1
    assert seen("leaseq_jobs_retried_total", queue="q") == 1


async def test_waiting_and_running_are_measured_by_the_databases_clock(queue: Replica, clock: Clock):
    clock.set(datetime.now(UTC))
    await queue.enqueue()
    clock.move(7)
    job = await queue.lease_one()
    clock.move(3)
    await queue.verb("ack", job)
    seen = await scrape(queue)
    assert seen("leaseq_lease_wait_seconds_count", queue="q") == 1
    assert seen("leaseq_lease_wait_seconds_sum", queue="q") == pytest.approx(7, abs=1e-3)
    assert seen("leaseq_run_seconds_sum", queue="q") == pytest.approx(3, abs=1e-3)


async def test_gauges_show_the_jobs_by_queue_and_state_and_the_age_of_the_oldest_ready(
    world: World, queue: Replica, clock: Clock
):
    now = datetime.now(UTC)
    await last_maintained(world, queue, 900)
    clock.set(now - timedelta(seconds=900))
    await queue.enqueue("a", priority="bulk")
    clock.set(now)
    for _ in range(2):
        await queue.enqueue("a", priority="fast")
    await queue.enqueue("a", delay_seconds=60)
    await queue.enqueue("b")
    await queue.verb("ack", await queue.lease_one("b"))
    await queue.lease_one("a")
    seen = await scrape(queue)
    jobs = {labels: value for labels, value in seen.samples["leaseq_jobs"].items() if value}
    assert jobs == {
        (("queue", "a"), ("state", "ready")): 2,
        (("queue", "a"), ("state", "active")): 1,
        (("queue", "a"), ("state", "scheduled")): 1,
        (("queue", "b"), ("state", "completed")): 1,
    }
    assert seen("leaseq_oldest_ready_seconds", queue="a") >= 900
    assert set(seen.samples["leaseq_oldest_ready_seconds"]) == {(("queue", "a"),)}
    assert seen("leaseq_maintenance_lag_seconds") >= 900
    assert seen("leaseq_database_up") == 1


async def test_gauges_show_waiting_leases_the_pool_and_the_process(queue: Replica):
    waiting = [asyncio.create_task(queue.lease(wait_seconds=30)) for _ in range(3)]
    while queue.machine.service.wakeups.waiters < 3:
        await asyncio.sleep(0.005)
    seen = await scrape(queue)
    assert seen("leaseq_lease_waiters") == 3
    assert seen("leaseq_listening") == 1
    pool = seen.samples["leaseq_database_pool_connections"]
    assert set(pool) == {(("state", "idle"),), (("state", "used"),)}
    assert 1 <= sum(pool.values()) <= queue.machine.settings.db_pool_size
    assert seen("process_cpu_seconds_total") > 0
    assert seen("process_resident_memory_bytes") > 0
    queue.machine.service.drain()
    await asyncio.gather(*waiting)


async def test_maintenance_is_measured_task_by_task(queue: Replica):
    await queue.maintain()
    seen = await scrape(queue)
    tasks = Counter(ran.task for ran in queue.events.of(MaintenanceRan))
    assert tasks["reap"] > 0
    for task, count in tasks.items():
        assert seen("leaseq_maintenance_seconds_count", task=task) == count


async def test_requests_are_timed_by_route_and_neither_long_polls_nor_probes_are(queue: Replica):
    job = await queue.enqueue()
    await queue.lease()
    await queue.job(job["id"])
    for path in ("/health", "/health/live", "/health/ready", "/metrics", f"/{LEASE_ID}", "/x?y=1"):
        await queue.http.get(path)
    seen = await scrape(queue)
    timed = {name: of for name, of in seen.samples.items() if name.startswith("leaseq_http_request")}
    assert timed
    handlers = {
        dict(labels)["handler"] for of in timed.values() for labels in of if "handler" in dict(labels)
    }
    assert handlers == {"/jobs", "/jobs/{job_id}", "/lease", "none"}
    [totals] = [of for name, of in timed.items() if name == "leaseq_http_requests_total"]
    assert totals[("handler", "/jobs"), ("method", "POST"), ("status", "2xx")] == 1
    assert totals[("handler", "/lease"), ("method", "POST"), ("status", "2xx")] == 1
    seconds = timed["leaseq_http_request_duration_seconds_count"]
    assert {dict(labels)["handler"] for labels in seconds} == {"/jobs", "/jobs/{job_id}", "none"}


async def test_no_label_takes_its_value_from_what_a_client_makes_up(queue: Replica):
    job = await queue.enqueue(type="made-up", tags=["made-up"])
    await queue.lease_one(worker="made-up")
    for method in ("GET", "PUT", "PROPFIND", "MKCOL"):
        await queue.http.request(method, f"/made-up/{job['id']}")
    seen = await scrape(queue)
    for of in seen.samples.values():
        for labels in of:
            assert "made-up" not in str(labels)
            assert job["id"] not in str(labels)


def test_queues_beyond_five_hundred_share_one_label():
    metrics = Metrics()
    for number in range(600):
        metrics.on(JobEnqueued(job_id=uuid7(), queue=f"q{number}", type="t", state=State.READY))
    counts = {f"p{number}": {State.READY: 1} for number in range(600)}
    metrics.show_database(counts, dict.fromkeys(counts, 5.0), 1.0)
    seen = _shown(metrics)
    assert len(seen.values_of("queue")) == QUEUE_LABELS_MAX + 1
    assert seen("leaseq_jobs_enqueued_total", queue=OTHER_QUEUES) == 100
    assert seen("leaseq_jobs", queue=OTHER_QUEUES, state="ready") == 600


def test_the_oldest_job_of_the_queues_that_share_a_label_is_the_oldest_of_them_all():
    metrics = Metrics()
    names = [f"q{number}" for number in range(QUEUE_LABELS_MAX + 3)]
    counts = {name: {State.READY: 1} for name in names}
    ages = dict.fromkeys(names, 1.0) | {names[-2]: 1000.0}
    metrics.show_database(counts, ages, 1.0)
    assert _shown(metrics)("leaseq_oldest_ready_seconds", queue=OTHER_QUEUES) == 1000


def test_a_gauge_of_a_queue_that_has_gone_goes_too():
    metrics = Metrics()
    metrics.show_database({"gone": {State.READY: 1}}, {"gone": 5.0}, 1.0)
    metrics.show_database({}, {}, 1.0)
    seen = _shown(metrics)
    assert "leaseq_jobs" not in seen.samples
    assert "leaseq_oldest_ready_seconds" not in seen.samples


def test_events_that_are_no_metric_are_no_error():
    Metrics().on(JobPromoted(job_id=uuid4(), queue="q", type="t"))


async def test_a_scrape_reads_as_many_rows_with_ten_thousand_jobs_as_with_a_hundred(
    world: World, queue: Replica
):
    asked: list[tuple[str, tuple[Any, ...]]] = []

    def note(_conn: Any, _cursor: Any, text: str, values: Any, _context: Any, _many: Any) -> None:
        asked.append((text, tuple(values)))

    async def fill(count: int) -> None:
        defaults = queue.machine.settings.defaults
        wanted = [JobRequest(queue="q", priority=number % 11) for number in range(count)]
        await queue.machine.jobs.enqueue([resolve(each, defaults, uuid7()) for each in wanted])
        await queue.maintain()

    event.listen(queue.machine.database.reading.sync_engine, "before_cursor_execute", note)
    await fill(100)
    await scrape(queue)
    connection = await world.connect()
    await connection.execute("SET enable_seqscan = off")
    statements = list(asked)
    assert len(statements) == 2

    async def rows_read() -> list[int]:
        plans = [
            json.loads(await connection.fetchval(f"EXPLAIN (ANALYZE, FORMAT JSON) {text}", *values))[0][
                "Plan"
            ]
            for text, values in statements
        ]
        return [sum(_leaf_rows(plan)) for plan in plans]

    few = await rows_read()
    await fill(10_000)
    assert await rows_read() == few


def _leaf_rows(plan: dict[str, Any]) -> list[int]:
    """Return how many rows each scan of a table has looked at."""
    if "Relation Name" in plan:
        return [round(plan["Actual Loops"] * (plan["Actual Rows"] + plan.get("Rows Removed by Filter", 0)))]
    return [rows for inner in plan.get("Plans", []) for rows in _leaf_rows(inner)]


def _shown(metrics: Metrics) -> Scrape:
    return Scrape(generate_latest(metrics.registry).decode())
