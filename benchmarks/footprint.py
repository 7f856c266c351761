"""What leaseq takes: memory and processor for leases that wait, and WAL, statements, commits for each job."""

import asyncio
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from benchmarks.client import Client
from benchmarks.lab import QUEUE, Lab, Service, sql
from benchmarks.processes import cpu_seconds, raise_open_files, rss_bytes
from benchmarks.results import Findings, Series, Table, number, within

KIB = 1024
MIB = 1024 * 1024
WAIT_SECONDS = 30
CONNECT_AT_ONCE = 200
SPARE_FILES = 1000
WARM_CALLS = 200
CONCURRENCIES = (1, 8, 64)


def waiters(lab: Lab) -> Findings:
    """Leases that wait for a job that does not come."""
    count = lab.plan.waiters
    raise_open_files(count + SPARE_FILES)
    url = lab.database("leaseq")
    with lab.leaseq(url, QUEUE_MAX_LEASE_WAITERS=str(count + SPARE_FILES)) as service:
        found = asyncio.run(_wait(lab, service, count))
    what = f"{count:,} idle long-polls, "
    return Findings(
        rows=[
            within(30, what + "memory of the service for each", Series.of([found.each_kib]), " KiB"),
            within(5, what + "while they wait", Series.of([found.quiet_percent]), " % of a core"),
            *(
                within(5, f"{what}and ask again every {WAIT_SECONDS} s", Series.of([percent]), " % of a core")
                for percent in found.renewing_percent
            ),
        ],
        tables=[
            Table(
                "Memory of the service and its waiting leases",
                ("waiting", "MiB"),
                [("none", number(found.rest_mib)), (f"{count:,}", number(found.full_mib))],
            )
        ],
    )


@dataclass(frozen=True)
class _Waited:
    rest_mib: float
    full_mib: float
    each_kib: float
    quiet_percent: float
    renewing_percent: list[float]


async def _wait(lab: Lab, service: Service, count: int) -> _Waited:
    warm = await Client.connect(service.port)
    for _ in range(WARM_CALLS):
        await warm.lease(QUEUE)
    rest = rss_bytes(service.pid)
    clients: list[Client] = []

    async def wait_on(client: Client) -> None:
        while True:
            await client.lease(QUEUE, WAIT_SECONDS)

    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        tasks = []
        for first in range(0, count, CONNECT_AT_ONCE):
            lab.says(f"{first:,} wait")
            number_of_clients = min(CONNECT_AT_ONCE, count - first)
            clients += await asyncio.gather(*(Client.connect(service.port) for _ in range(number_of_clients)))
            tasks += [group.create_task(wait_on(client)) for client in clients[first:]]
        await asyncio.sleep(2)
        left = WAIT_SECONDS - (time.perf_counter() - began) - 1
        lab.says(f"{count:,} wait")
        quiet = await _busy_percent(service, max(1, min(lab.plan.quiet_seconds, left)))
        full = rss_bytes(service.pid)
        renewing = [
            await _busy_percent(service, seconds) for seconds in [lab.plan.renewal_seconds] if seconds
        ]
        for task in tasks:
            task.cancel()
    for client in (warm, *clients):
        client.close()
    return _Waited(rest / MIB, full / MIB, (full - rest) / count / KIB, quiet, renewing)


async def _busy_percent(service: Service, seconds: float) -> float:
    began, before = time.perf_counter(), cpu_seconds(service.pid)
    await asyncio.sleep(seconds)
    return (cpu_seconds(service.pid) - before) / (time.perf_counter() - began) * 100


def cost(lab: Lab) -> Findings:
    """What a job costs the database, verb by verb, at several concurrencies; and the service's memory."""
    count = lab.plan.cost_jobs
    with ExitStack() as stack:
        directory = lab.directory / "cost"
        directory.mkdir()
        counted = Lab(stack, directory, lab.plan, lab.says, shared_preload_libraries="pg_stat_statements")
        url, theirs = counted.database("leaseq"), counted.pgboss()
        for extension in ("pg_stat_statements", "pg_walinspect"):
            sql(counted.url, f"CREATE EXTENSION {extension}")
        rows = []
        with counted.leaseq(url) as service:
            rest = rss_bytes(service.pid)
            for concurrency in CONCURRENCIES:
                lab.says(f"{concurrency} at once")
                rows += asyncio.run(_lives(counted, service, count, concurrency))
            counted.wrk(service, "enqueue", queue=counted.fresh(url))
            loaded = rss_bytes(service.pid)
        for verb in ("send", "take"):
            lab.says(f"pg-boss {verb}")
            meter = _Meter(counted.url)
            done = counted.peer_run("pgboss", theirs, verb, count=count, warmup_seconds=0, seconds=60)
            rows.append((f"pg-boss {verb}", "64", *meter.per_job(done.jobs)))
    return Findings(
        tables=[
            Table(
                "Cost of a job in the database, maintenance included",
                ("verb", "at once", "WAL bytes", "statements", "commits"),
                rows,
                "Statements are counted by pg_stat_statements, BEGIN and COMMIT among them; commits are the commit"
                " records in the WAL. pg-boss's `take` is `fetch` and `complete`.",
            ),
            Table(
                "Memory of the service",
                ("when", "MiB"),
                [("at rest", number(rest / MIB)), ("after load by 64 connections", number(loaded / MIB))],
            ),
        ]
    )


class _Meter:
    """Reads the counters of a PostgreSQL that does nothing else, and tells what was added since."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._before = self._read()

    def _read(self) -> tuple[str, int]:
        [(position, calls)] = sql(
            self._url,
            "SELECT pg_current_wal_insert_lsn()::text, (SELECT coalesce(sum(calls), 0)::bigint FROM pg_stat_statements"
            " WHERE dbid <> (SELECT oid FROM pg_database WHERE datname = current_database()))",
        )
        return position, calls

    def per_job(self, jobs: int) -> tuple[str, str, str]:
        """Return WAL bytes, statements and commits for each job."""
        position, calls = self._read()
        # A new commit makes sure that all before it is flushed, hence readable.
        sql(self._url, "SELECT pg_current_xact_id()")
        [(size, commits)] = sql(
            self._url,
            "SELECT (%(until)s::pg_lsn - %(since)s::pg_lsn)::bigint,"
            " (SELECT sum(count)::bigint FROM pg_get_wal_stats(%(since)s::pg_lsn, %(until)s::pg_lsn, true)"
            "  WHERE \"resource_manager/record_type\" = 'Transaction/COMMIT')",
            since=self._before[0],
            until=position,
        )
        return number(size / jobs), number((calls - self._before[1]) / jobs), number((commits or 0) / jobs)


async def _lives(lab: Lab, service: Service, count: int, concurrency: int) -> list[tuple[str, ...]]:
    clients = [await Client.connect(service.port) for _ in range(concurrency)]
    leased: list[dict[str, Any]] = []

    async def enqueue(client: Client) -> None:
        await client.enqueue(QUEUE)

    async def lease(client: Client) -> None:
        leased.extend(await client.lease(QUEUE))

    async def ack(client: Client) -> None:
        await client.ack(leased.pop())

    rows: list[tuple[str, ...]] = []
    for name, verb in (("leaseq enqueue", enqueue), ("leaseq lease", lease), ("leaseq ack", ack)):
        meter = _Meter(lab.url)
        left = iter(range(count))

        async def loop(client: Client, verb: Any = verb, left: Any = left) -> None:
            for _ in left:
                await verb(client)

        await asyncio.gather(*map(loop, clients))
        rows.append((name, str(concurrency), *meter.per_job(count)))
    for client in clients:
        client.close()
    return rows
