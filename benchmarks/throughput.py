"""How many jobs a second: enqueue, take and finish, in batches; by concurrency; and what else there is."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

from benchmarks.lab import Lab, Run, Service, in_turn, rates
from benchmarks.results import Findings, Plot, Series, Table, at_least, number

BATCH = 100
BATCH_CONNECTIONS = 8
# More than anybody takes in a second: a run must not be short of jobs.
TAKEN_A_SECOND_MAX = 30_000
PGBOSS_TAKES_MAX = 10_000
PGBOSS_TAKES_IN_BATCHES_MAX = 90_000
TAKEN_IN_BATCHES_MAX = 120_000
STOCK = 5_000
"""What lies ready before a whole life begins, so that no lease comes back empty."""
ENDLESS = 10**9
TWO = {"QUEUE_PROCESSES": "2"}
PROCESSES = {"leaseq": "one process", "leaseq, 2 processes": "two processes"}


def enqueue(lab: Lab) -> Findings:
    """One job a request, durable, against pg-boss and against FastAPI without any database."""
    ours, theirs = lab.database("leaseq"), lab.pgboss()
    others = lab.database("leaseq_two")
    with lab.leaseq(ours) as service, lab.leaseq(others, **TWO) as pair, lab.echo() as echo:

        def post(to: Service, url: str) -> Run:
            return lab.wrk(to, "enqueue", queue=lab.fresh(url))

        def send() -> Run:
            lab.fresh_pgboss(theirs)
            return lab.peer_run("pgboss", theirs, "send")

        runs = in_turn(
            lab,
            {
                "leaseq": lambda: post(service, ours),
                "pg-boss": send,
                "leaseq, 2 processes": lambda: post(pair, others),
                "echo": lambda: lab.wrk(echo, "enqueue"),
            },
        )
    rows = []
    for name, processes in PROCESSES.items():
        what = f"durable `POST /jobs`, one job a request, 64 connections, {processes}"
        posted = rates(runs[name])
        rows += [
            at_least(5, what, posted, "pg-boss `send`, 64 at once", rates(runs["pg-boss"])),
        ]
        if name == "leaseq":  # the echo has one process too
            against = "FastAPI + Pydantic echo, no database"
            rows.append(at_least(1.5, "the same", posted, against, rates(runs["echo"])))
    return Findings(
        rows=rows,
        tables=[_latencies(runs), _shares("enqueue", runs)],
    )


def work(lab: Lab) -> Findings:
    """Take and finish one by one: in two calls, and with ack and next in one, against pg-boss."""
    ours, theirs = lab.database("leaseq"), lab.pgboss()
    jobs = TAKEN_A_SECOND_MAX * (lab.plan.seconds + lab.plan.warmup_seconds)
    others = lab.database("leaseq_two")
    with lab.leaseq(ours) as service, lab.leaseq(others, **TWO) as pair:

        def take() -> Run:
            lab.fresh_pgboss(theirs, PGBOSS_TAKES_MAX * (lab.plan.seconds + lab.plan.warmup_seconds))
            return lab.peer_run("pgboss", theirs, "take")

        def load(of: Service, mode: str) -> Callable[[], Run]:
            url = ours if of is service else others
            return lambda: lab.wrk(of, mode, queue=lab.fresh(url, jobs))

        runs = in_turn(
            lab,
            {
                "lease, then ack": load(service, "work"),
                "pg-boss": take,
                "ack and lease in one": load(service, "settle"),
                "lease, then ack, 2 processes": load(pair, "work"),
                "ack and lease in one, 2 processes": load(pair, "settle"),
            },
        )
    theirs_rate = rates(runs["pg-boss"])
    against = "pg-boss `fetch` + `complete`, 64 at once"
    rows = []
    for suffix, processes in (("", PROCESSES["leaseq"]), (", 2 processes", PROCESSES["leaseq, 2 processes"])):
        what = f"lease 1, then ack 1, two calls, 64 connections, {processes}"
        rows.append(at_least(2, what, rates(runs["lease, then ack" + suffix]), against, theirs_rate))
        what = f"ack and next in one call, 64 connections, {processes}"
        rows.append(at_least(3, what, rates(runs["ack and lease in one" + suffix]), against, theirs_rate))
    return Findings(
        rows=rows,
        tables=[_latencies(runs), _shares("work", runs)],
    )


def batch(lab: Lab) -> Findings:
    """The whole life of jobs in batches of 100, and taking and finishing alone."""
    ours, theirs = lab.database("leaseq"), lab.pgboss()
    seconds = lab.plan.seconds + lab.plan.warmup_seconds
    with lab.leaseq(ours) as service:

        def settle() -> Run:
            queue = lab.fresh(ours, TAKEN_IN_BATCHES_MAX * seconds)
            return lab.wrk(service, "settle", queue=queue, connections=BATCH_CONNECTIONS, batch=BATCH)

        def take() -> Run:
            lab.fresh_pgboss(theirs, PGBOSS_TAKES_IN_BATCHES_MAX * seconds)
            return lab.peer_run("pgboss", theirs, "take", concurrency=BATCH_CONNECTIONS, batch=BATCH)

        def live() -> Run:
            queue = lab.fresh(ours, STOCK)
            return lab.wrk(service, "life", queue=queue, connections=BATCH_CONNECTIONS, batch=BATCH)

        def live_there() -> Run:
            lab.fresh_pgboss(theirs, STOCK)
            return lab.peer_run("pgboss", theirs, "live", concurrency=BATCH_CONNECTIONS, batch=BATCH)

        runs = in_turn(
            lab,
            {
                "leaseq": live,
                "pg-boss": live_there,
                "leaseq, lease and settle": settle,
                "pg-boss, fetch and complete": take,
            },
        )
    at_once = f"{BATCH_CONNECTIONS} at once"
    return Findings(
        rows=[
            at_least(
                1,
                f"full life in batches of {BATCH}, {BATCH_CONNECTIONS} connections",
                rates(runs["leaseq"]),
                f"pg-boss `insert` + `fetch` + `complete` at the same size, {at_once}",
                rates(runs["pg-boss"]),
            ),
            at_least(
                1,
                f"of it, lease {BATCH} and settle {BATCH} in one call",
                rates(runs["leaseq, lease and settle"]),
                f"pg-boss `fetch` + `complete`, {at_once}",
                rates(runs["pg-boss, fetch and complete"]),
            ),
        ],
        tables=[_latencies(runs), _shares("batch", runs)],
    )


def prices(lab: Lab) -> Findings:
    """What each layer adds to the price of a `POST /jobs`, in processor time."""
    ours = lab.database("leaseq")
    with ExitStack() as stack:
        services = {name: stack.enter_context(lab.layers(name)) for name in ("uvicorn", "protocol", "front")}
        services["leaseq"] = stack.enter_context(lab.leaseq(ours))
        services["echo"] = stack.enter_context(lab.echo())

        def load(service: Service) -> Callable[[], Run]:
            return lambda: lab.wrk(service, "enqueue", queue=lab.fresh(ours))

        runs = in_turn(lab, {name: load(service) for name, service in services.items()})

    def microseconds(name: str, party: str) -> Series:
        return Series.of(run.shares[party] * run.seconds / run.requests * 1e6 for run in runs[name])

    price = {name: microseconds(name, name) for name in services}
    rows = [("uvicorn with httptools and uvloop, raw ASGI", price["uvicorn"].text(), "")]
    for layer, what in (
        ("protocol", "our protocol: an answer in one write"),
        ("front", "front, ids, metrics, decoding, checks, events, encoding: all but the database"),
        ("leaseq", "group commit, asyncpg, hints, maintenance: the whole service"),
    ):
        before = {"protocol": "uvicorn", "front": "protocol", "leaseq": "front"}[layer]
        rows.append((what, price[layer].text(), f"{price[layer].median - price[before].median:+.0f}"))
    rows.append(("PostgreSQL, for the same requests", microseconds("leaseq", "PostgreSQL").text(), ""))
    rows.append(("for comparison: FastAPI + Pydantic echo", price["echo"].text(), ""))
    return Findings(
        tables=[
            Table(
                "Price list of a `POST /jobs`, 64 connections, µs of processor time a request",
                ("up to and with", "in all", "added"),
                rows,
                "Each line is a server of its own under the same load. Processor time is steadier than rates, but"
                " still moves with the machine's caches and clock: read the differences, not the digits.",
            )
        ]
    )


def curve(lab: Lab) -> Findings:
    """Throughput by concurrency."""
    ours, theirs = lab.database("leaseq"), lab.pgboss()
    names = ("leaseq POST /jobs", "pg-boss send", "leaseq ack and lease in one", "pg-boss fetch + complete")
    lines: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    seconds = lab.plan.seconds + lab.plan.warmup_seconds
    with lab.leaseq(ours) as service:
        for count in lab.plan.curve:
            lab.says(f"{count} at once")
            queue = lab.fresh(ours)
            runs = [lab.wrk(service, "enqueue", queue=queue, connections=count)]
            lab.fresh_pgboss(theirs)
            runs.append(lab.peer_run("pgboss", theirs, "send", concurrency=count))
            queue = lab.fresh(ours, TAKEN_A_SECOND_MAX * seconds)
            runs.append(lab.wrk(service, "settle", queue=queue, connections=count))
            lab.fresh_pgboss(theirs, PGBOSS_TAKES_MAX * seconds)
            runs.append(lab.peer_run("pgboss", theirs, "take", concurrency=count))
            for name, run in zip(names, runs, strict=True):
                lines[name].append((count, run.rate))
    if not lab.plan.curve:
        return Findings()
    return Findings(
        tables=[
            Table(
                "Throughput by concurrency, jobs/s",
                ("at once", *names),
                [
                    (str(count), *(number(lines[name][place][1]) for name in names))
                    for place, count in enumerate(lab.plan.curve)
                ],
            )
        ],
        plots=[
            Plot(
                "throughput",
                "Throughput by concurrency",
                "requests at once",
                "jobs a second",
                lines,
                log_across=True,
            )
        ],
    )


def generator(lab: Lab) -> Findings:
    """Whether wrk could do more than leaseq asks of it: the same load against canned replies."""
    ours = lab.database("leaseq")
    seconds = lab.plan.seconds + lab.plan.warmup_seconds
    rows = []
    with lab.leaseq(ours) as service, lab.trivial() as trivial:
        for mode, jobs in (("enqueue", 0), ("work", TAKEN_A_SECOND_MAX), ("settle", TAKEN_A_SECOND_MAX)):
            lab.says(mode)
            served = lab.wrk(service, mode, queue=lab.fresh(ours, jobs * seconds))
            canned = lab.wrk(trivial, mode, warm=False)
            rows.append(
                (
                    mode,
                    f"{number(served.requests / served.seconds)}/s",
                    _percent(served.shares["generator"]),
                    _percent(served.shares["leaseq"]),
                    f"{number(canned.requests / canned.seconds)}/s",
                    f"{number(canned.requests / canned.seconds / (served.requests / served.seconds))} ×",  # noqa: RUF001
                )
            )
    return Findings(
        tables=[
            Table(
                "The load generator is not the bottleneck",
                ("load", "wrk to leaseq", "wrk's core", "leaseq's core", "wrk to canned replies", "reserve"),
                rows,
                "Canned replies come from a program that does nothing else; wrk runs the same script on them.",
            )
        ]
    )


def others(lab: Lab) -> Findings:
    """More peers, each in its own way, for information."""
    seconds = lab.plan.seconds + lab.plan.warmup_seconds
    with lab.redis(durable=False) as fleeting, lab.redis(durable=True) as durable:
        ours, pgboss = lab.database("leaseq"), lab.pgboss()
        with lab.leaseq(ours) as service:

            def send() -> Run:
                lab.fresh_pgboss(pgboss)
                return lab.peer_run("pgboss", pgboss, "send")

            def take() -> Run:
                lab.fresh_pgboss(pgboss, PGBOSS_TAKES_MAX * seconds)
                return lab.peer_run("pgboss", pgboss, "take")

            sending = {
                "leaseq, over HTTP": lambda: lab.wrk(service, "enqueue", queue=lab.fresh(ours)),
                "pg-boss": send,
            }
            taking = {
                "leaseq, over HTTP": lambda: lab.wrk(
                    service, "settle", queue=lab.fresh(ours, TAKEN_A_SECOND_MAX * seconds)
                ),
                "pg-boss": take,
            }
            for name, peer, redis in (
                ("graphile-worker", "graphile", None),
                ("pgqueuer", "pgqueuer", None),
                ("procrastinate", "procrastinate", None),
                ("BullMQ, Redis without persistence", "bullmq", fleeting),
                ("BullMQ, Redis with appendfsync always", "bullmq", durable),
            ):
                sending[name] = _peer(lab, peer, redis, "send", ENDLESS)
                taking[name] = _peer(lab, peer, redis, "take", TAKEN_A_SECOND_MAX * seconds)
            sent, took = in_turn(lab, sending), in_turn(lab, taking)
    return Findings(
        tables=[
            Table(
                "Other queues, jobs/s, 64 at once, for information",
                ("system", "enqueue one by one", "take and finish"),
                [(name, rates(sent[name]).text(), rates(took[name]).text()) for name in sent],
                "The peers are called in-process; each takes jobs as its own worker does, with its defaults but for"
                " the concurrency. A worker that fetches or finishes many jobs at a time (pgqueuer, BullMQ) is not one"
                " by one.",
            )
        ]
    )


def _peer(lab: Lab, peer: str, redis: str | None, verb: str, count: int) -> Callable[[], Run]:
    def run() -> Run:
        # What earlier runs left must not be in the way.
        url = redis or lab.database(peer)
        return lab.peer_run(peer, url, verb, queue=lab.new_queue(), count=count, batch=BATCH)

    return run


def _latencies(runs: Mapping[str, Sequence[Run]]) -> Table:
    return Table(
        "Requests under this load",
        ("load", "p50 ms", "p99 ms", "jobs a request"),
        [
            (
                name,
                Series.of(run.p50_ms for run in each).text(),
                Series.of(run.p99_ms for run in each).text(),
                Series.of(run.jobs / run.requests for run in each).text(),
            )
            for name, each in runs.items()
            if each[0].requests
        ],
    )


def _shares(title: str, runs: Mapping[str, Sequence[Run]]) -> Table:
    parties = ("generator", "leaseq", "echo", "PostgreSQL", "others")
    return Table(
        f"Processor time during {title}, of one core",
        ("run", "wrk or peer", *parties[1:]),
        [
            (
                name,
                *(
                    _percent(Series.of(run.shares[party] for run in each).median)
                    if party in each[0].shares
                    else "—"
                    for party in parties
                ),
            )
            for name, each in runs.items()
        ],
        "«others» have no part in this: where their share is not small, the figures are not to be trusted. A peer's"
        " share is its own, with its load in it.",
    )


def _percent(share: float) -> str:
    return f"{share * 100:.0f} %"
