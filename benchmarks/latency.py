"""How long a lease takes: when idle, before a long line of jobs, and while an old transaction pins the horizon."""

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import psycopg

from app.engine.cursors import Cursors
from app.store.database import HOT_SETTINGS, Database, statement
from app.store.jobs import BEGINNING, Jobs, Line, Slot
from benchmarks.client import Client, paced
from benchmarks.lab import QUEUE, Lab, fill, in_turn, sql, tidy
from benchmarks.results import Findings, Plot, Row, Series, Table, at_most, number, quantile, within

PAUSE_SECONDS = 0.03
WAIT_SECONDS = 20
TRAFFIC_A_SECOND = 300
TRAFFIC_CONCURRENCY = 8
SLICES = 40
WITHOUT_PART = 10
"""The run without a pinned horizon is this much shorter: it has no trend. So is the peer's."""
POINTS = 200
NOISE = 1.3
WHOLE = Line(QUEUE)


def pick_up(lab: Lab) -> Findings:
    """From the POST of a job to the reply of the worker that waits, in an idle system, one after the other."""
    ours, theirs = lab.database("leaseq"), lab.database("graphile")
    count = lab.plan.pick_ups
    with lab.leaseq(ours) as service:
        found = in_turn(
            lab,
            {
                "leaseq": lambda: asyncio.run(_pick_up(service.port, count)),
                "graphile-worker": lambda: list[float](
                    lab.peer("graphile", theirs, "pick_up", count=count, pause_ms=PAUSE_SECONDS * 1000)[
                        "latencies"
                    ]
                ),
            },
        )
    mine, others = found["leaseq"], found["graphile-worker"]

    def at(rounds: Sequence[Sequence[float]], share: float) -> Series:
        return Series.of(quantile(each, share) for each in rounds)

    what = "`POST /jobs` to a waiting worker's reply, idle, "
    against = "graphile-worker, `addJob` to task start, "
    return Findings(
        rows=[
            within(5, what + "p50", at(mine, 0.5), " ms"),
            within(20, what + "p99", at(mine, 0.99), " ms"),
            at_most(1, what + "p50", at(mine, 0.5), against + "p50", at(others, 0.5)),
            at_most(1, what + "p99", at(mine, 0.99), against + "p99", at(others, 0.99)),
        ],
        plots=[
            Plot(
                "pick-up",
                "Pick-up latency, idle system",
                "ms",
                "share of jobs picked up",
                {
                    name: _distribution([each for one in rounds for each in one])
                    for name, rounds in found.items()
                },
                log_across=True,
            )
        ],
    )


async def _pick_up(port: int, count: int) -> list[float]:
    worker, producer = await Client.connect(port), await Client.connect(port)
    latencies = []

    async def wait() -> tuple[float, dict[str, Any]]:
        [job] = await worker.lease(QUEUE, WAIT_SECONDS)
        return time.perf_counter(), job

    for _ in range(count):
        waiting = asyncio.create_task(wait())
        await asyncio.sleep(PAUSE_SECONDS)
        began = time.perf_counter()
        await producer.enqueue(QUEUE)
        ended, job = await waiting
        latencies.append((ended - began) * 1000)
        await worker.ack(job)
    worker.close()
    producer.close()
    return latencies


def _distribution(values: Sequence[float]) -> list[tuple[float, float]]:
    return [(quantile(values, share / POINTS), share / POINTS) for share in range(POINTS + 1)]


def backlog(lab: Lab) -> Findings:
    """A lease before few ready jobs and before many: what it reads, and how long it takes."""
    few, many = lab.database("leaseq_few"), lab.database("leaseq_many")
    for url in (few, many):
        with lab.leaseq(url):  # which brings its tables
            pass
    least, *sizes = lab.plan.backlogs
    fill(few, least)
    tidy(few)
    filled = 0
    table, p50s, p99s = [], [], []
    for size in sizes:
        lab.says(f"{size:,} ready jobs: filling")
        fill(many, size - filled)
        tidy(many)
        filled = size
        with lab.leaseq(few) as small, lab.leaseq(many) as large:
            runs = in_turn(
                lab,
                {"few": _leases(small.port, lab.plan.leases), "many": _leases(large.port, lab.plan.leases)},
            )
        buffers = {count: buffers_of_a_lease(url) for count, url in ((least, few), (size, many))}
        p50 = {name: Series.of(quantile(each, 0.5) for each in rounds) for name, rounds in runs.items()}
        p99 = {name: Series.of(quantile(each, 0.99) for each in rounds) for name, rounds in runs.items()}
        if size == sizes[0]:
            table.append((f"{least:,}", str(buffers[least]), p50["few"].text(), p99["few"].text()))
            p50s.append((float(least), p50["few"].median))
            p99s.append((float(least), p99["few"].median))
        table.append((f"{size:,}", str(buffers[size]), p50["many"].text(), p99["many"].text()))
        p50s.append((float(size), p50["many"].median))
        p99s.append((float(size), p99["many"].median))
    what, against = f"lease at {size:,} ready jobs, ", f"at {least:,}"
    ratio = p99["many"].over(p99["few"])
    return Findings(
        rows=[
            at_most(
                1.3,
                what + "buffers touched",
                Series.of([buffers[size]]),
                against,
                Series.of([buffers[least]]),
                unit="",
            ),
            Row(
                what + "p99",
                p99["many"].text(" ms"),
                against,
                p99["few"].text(" ms"),
                ratio.text(" ×"),  # noqa: RUF001
                "≤ 1.3 ×, and the spreads meet",  # noqa: RUF001
                ratio.median <= 1 or (ratio.median <= NOISE and p99["many"].overlaps(p99["few"])),
            ),
        ],
        tables=[Table("A lease by backlog", ("ready jobs", "buffers", "p50 ms", "p99 ms"), table)],
        plots=[
            Plot(
                "backlog",
                "A lease over HTTP by backlog",
                "ready jobs",
                "ms",
                {"p50": p50s, "p99": p99s},
                log_across=True,
            )
        ],
    )


def _leases(port: int, count: int) -> Callable[[], list[float]]:
    async def run() -> list[float]:
        client = await Client.connect(port)
        latencies = []
        for _ in range(count):
            began = time.perf_counter()
            [job] = await client.lease(QUEUE)
            latencies.append((time.perf_counter() - began) * 1000)
            await client.ack(job)
            await client.enqueue(QUEUE)
        client.close()
        return latencies

    return lambda: asyncio.run(run())


READY = """
WITH new AS MATERIALIZED (
  SELECT uuidv7() AS id, %(queue)s || n %% %(queues)s AS queue, %(type)s::text AS type,
         CASE WHEN %(mixed)s THEN n %% 11 ELSE 5 END AS priority, n
    FROM generate_series(1, %(count)s::int) AS n
), body AS (
  INSERT INTO leaseq.jobs (id, created_at, queue, type, priority, run_at, lease_seconds, max_retries, backoff,
                           budget_start, tags, metadata, payload)
  SELECT id, now(), queue, type, priority, now(), 30, 3,
         '{"strategy": "fixed", "initial_seconds": 1, "factor": 2, "max_seconds": 9, "jitter": "none"}', 0, '[]', '{}', '1'
    FROM new
)
INSERT INTO leaseq.ready (id, queue, type, priority, attempt, noted, since)
SELECT id, queue, type, priority, 0, false, now() - interval '1 second' + n * interval '1 microsecond' FROM new"""
SCHEDULED = """
INSERT INTO leaseq.scheduled (id, queue, type, priority, attempt, noted, run_at, is_retry)
SELECT uuidv7(), 'later', 'default', 5, 0, false, now() + interval '1 day' + n * interval '1 ms', false
  FROM generate_series(1, %(count)s::int) AS n"""
DEAD = """
INSERT INTO leaseq.dead (id, created_at, queue, type, priority, run_at, lease_seconds, max_retries, backoff, budget_start,
                         tags, metadata, payload, state, attempt, reason, finished_at)
SELECT uuidv7(), now(), %(queue)s, 'default', 5, now(), 30, 3, '{}', 0, '[]', '{}', '1', 'failed', 4,
       'retries_exhausted', now()
  FROM generate_series(1, %(count)s::int) AS n"""


def flat(lab: Lab) -> Findings:
    """What a lease reads as everything around it grows: one database, more and more in it, and never analysed."""
    url, million = lab.database("leaseq_flat"), lab.plan.flat
    with lab.leaseq(url):  # which brings its tables
        pass
    fill(url, 10_000)
    tidy(url)

    def ready(**values: object) -> None:
        sql(
            url,
            READY,
            **{"queue": "other-", "queues": 1, "type": "default", "mixed": False, "count": million} | values,
        )

    def scheduled() -> None:
        for _ in range(10):
            sql(url, SCHEDULED, count=million)

    def rare() -> None:
        ready(queue="typed-", type="common")
        ready(queue="typed-", type="rare", count=1)

    steps: list[tuple[str, Callable[[], object], Line]] = [
        ("10,000 ready jobs, vacuumed and analysed", lambda: None, Line(QUEUE)),
        (f"… and {10 * million:,} scheduled", scheduled, Line(QUEUE)),
        (
            f"… and {million:,} dead in this queue",
            lambda: sql(url, DEAD, queue=QUEUE, count=million),
            Line(QUEUE),
        ),
        (f"… and {million:,} in 1,000 other queues", lambda: ready(queues=1000), Line("other-7")),
        (f"… and one of a rare type behind {million:,} of another", rare, Line("typed-0", "rare")),
        (
            f"… and {million:,} of mixed priorities",
            lambda: ready(queue="mixed-", mixed=True),
            Line("mixed-0"),
        ),
        ("the first queue again", lambda: None, Line(QUEUE)),
    ]
    rows = []
    for name, grow, line in steps:
        lab.says(name)
        grow()
        promote = asyncio.run(_explain(url, statement("promote", "leaseq"), [None, 500, BEGINNING]))
        where = line.queue if line.type is None else f"{line.queue}, type {line.type}"
        rows.append((name, where, str(buffers_of_a_lease(url, line)), str(promote)))
    return Findings(
        tables=[
            Table(
                "A lease while everything around it grows: buffers touched",
                ("in the database", "lease from", "lease of 1", "look for due jobs"),
                rows,
                "Nothing is analysed after the first line: the statistics are wrong by a factor of a thousand.",
            )
        ]
    )


def pinned(lab: Lab) -> Findings:
    """A lease while an old transaction keeps PostgreSQL from cleaning up, against the same without; then a peer."""
    seconds, slices = lab.plan.pinned_seconds, SLICES
    few = max(1, slices // WITHOUT_PART)
    peer_seconds = seconds / WITHOUT_PART

    def traffic(*, pin: bool) -> tuple[list[tuple[float, float]], int]:
        url = lab.database("leaseq_pinned")
        with lab.leaseq(url) as service, _pinned(url, really=pin):
            lab.says("leaseq, " + ("pinned" if pin else "without"))
            found = asyncio.run(
                paced(
                    service.port,
                    QUEUE,
                    rate=TRAFFIC_A_SECOND,
                    seconds=seconds if pin else seconds / WITHOUT_PART,
                    slices=slices if pin else few,
                    concurrency=TRAFFIC_CONCURRENCY,
                )
            )
            asyncio.run(_enqueue(service.port, 3))
            return found, buffers_of_a_lease(url)

    def peer(*, pin: bool) -> list[tuple[float, float]]:
        url = lab.pgboss("pgboss_pinned")
        with _pinned(url, really=pin):
            lab.says("pg-boss, " + ("pinned" if pin else "without"))
            answer = lab.peer(
                "pgboss",
                url,
                "traffic",
                rate=TRAFFIC_A_SECOND,
                seconds=peer_seconds if pin else peer_seconds / WITHOUT_PART,
                slices=slices if pin else few,
                concurrency=TRAFFIC_CONCURRENCY,
            )
        return [(p50, p99) for p50, p99 in answer["slices"] if p50 is not None]

    (without, buffers_without), theirs_without = traffic(pin=False), peer(pin=False)
    (held, buffers_held), theirs_held = traffic(pin=True), peer(pin=True)
    ours, base = _end(held), _middle(without)
    what = f"lease after {seconds} s of traffic with a pinned xmin horizon, "

    def line(found: Sequence[tuple[float, float]], of_seconds: float) -> list[tuple[float, float]]:
        step = of_seconds / slices
        return [((place + 1) * step, p50) for place, (p50, _) in enumerate(found)]

    return Findings(
        rows=[
            at_most(1.5, what + "p50", Series.of([ours[0]]), "without", Series.of([base[0]])),
            at_most(
                1.5,
                what + "buffers touched",
                Series.of([buffers_held]),
                "without",
                Series.of([buffers_without]),
                unit="",
            ),
        ],
        tables=[
            Table(
                f"A lease at the end of {seconds} s of {TRAFFIC_A_SECOND} jobs/s with a pinned xmin horizon, ms",
                ("system", "p50 without", "p50 pinned", "ratio", "p99 without", "p99 pinned"),
                [
                    _pinned_row("leaseq, over HTTP", base, ours),
                    _pinned_row("pg-boss, in-process", _middle(theirs_without), _end(theirs_held)),
                ],
                f"pg-boss has {peer_seconds:.0f} s only: its leases soon take all there is. The end is the last tenth. Without runs for {seconds // WITHOUT_PART} s: it has no trend.",
            )
        ],
        plots=[
            Plot(
                "pinned",
                f"Lease with a pinned xmin horizon, {TRAFFIC_A_SECOND} jobs a second",
                "seconds since the horizon was pinned",
                "p50 of a lease, ms",
                {"leaseq": line(held, seconds), "pg-boss": line(theirs_held, peer_seconds)},
                log_up=True,
            )
        ],
    )


async def _enqueue(port: int, count: int) -> None:
    client = await Client.connect(port)
    for _ in range(count):
        await client.enqueue(QUEUE)
    client.close()


@contextmanager
def _pinned(url: str, *, really: bool) -> Iterator[None]:
    with psycopg.connect(url) as connection:
        if really:
            connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
            connection.execute("SELECT 1")
        yield
        connection.rollback()


def _end(found: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return _middle(found[-max(1, len(found) // WITHOUT_PART) :])


def _middle(found: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return Series.of(p50 for p50, _ in found).median, Series.of(p99 for _, p99 in found).median


def _pinned_row(name: str, without: tuple[float, float], held: tuple[float, float]) -> tuple[str, ...]:
    ratio = f"{number(held[0] / without[0])} ×"  # noqa: RUF001
    return (name, number(without[0]), number(held[0]), ratio, number(without[1]), number(held[1]))


def buffers_of_a_lease(url: str, line: Line = WHOLE) -> int:
    """Lease a job or two as the service does, then explain that statement, as its sessions would plan it."""

    async def run() -> int:
        seen: list[Any] = []
        database = Database(url, schema="leaseq", pool_size=1)
        await database.start()
        try:
            jobs, cursors = Jobs(database), Cursors()
            # The first lease learns where the line begins.
            with cursors.claiming([line]) as look:
                look.found(await jobs.lease(look.stretches, [Slot(uuid4(), None, None)]))
            async with database.hot.acquire() as connection:
                connection.add_query_logger(seen.append)
            await jobs.lease(cursors.ahead([line]), [Slot(uuid4(), None, None)])
            await asyncio.sleep(0)  # the logger is called soon
        finally:
            await database.close()
        # The pool logs statements of its own.
        [lease] = [each for each in seen if "leaseq" in each.query]
        return await _explain(url, lease.query, lease.args)

    return asyncio.run(run())


async def _explain(url: str, text: str, values: Sequence[object]) -> int:
    connection = await asyncpg.connect(url, server_settings=HOT_SETTINGS)
    try:
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute(f"PREPARE lease AS {text}")
        execute = f"EXECUTE lease ({', '.join(map(_literal, values))})" if values else "EXECUTE lease"
        found = await connection.fetchval(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {execute}")
        await transaction.rollback()
    finally:
        await connection.close()
    root = json.loads(found)[0]["Plan"]
    return int(root["Shared Hit Blocks"]) + int(root["Shared Read Blocks"])


def _literal(value: object) -> str:
    match value:
        case None:
            return "NULL"
        case int() | float():
            return str(value)
        case list():
            return f"'{{{','.join('NULL' if each is None else _word(each) for each in value)}}}'"
        case _:
            return f"'{value}'"


def _word(value: object) -> str:
    return str(value) if isinstance(value, UUID | int | float) else f'"{value}"'
