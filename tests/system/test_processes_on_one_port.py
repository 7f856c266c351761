"""Several processes behind one port, as `serve` runs them: the parent's duties, and what a client sees of them."""

import asyncio
import os
import signal
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from app.processes import POOL_SIZE_LEAST, _share
from tests.conftest import World
from tests.system.conftest import (
    PATIENCE_SECONDS,
    STOP_SIGNALS,
    Process,
    Processes,
    Service,
    is_gone,
    postmaster,
    until,
)

TWO = {"QUEUE_PROCESSES": 2}
HINTS_ONLY = {"QUEUE_POLL_SECONDS": 60, "QUEUE_MAINTENANCE_SECONDS": 60}
CONNECTIONS = 64
"""So many that each process has some, but for one time in 2 ** 63."""


def children(service: Process) -> list[int]:
    """Return the process ids of the processes that serve."""
    parent = service._child.pid
    try:
        return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
    except FileNotFoundError:
        return []


@asynccontextmanager
async def connections(service: Service, count: int = CONNECTIONS) -> AsyncIterator[list[httpx.AsyncClient]]:
    """Yield clients of which each stays with the process that its connection has come to."""
    clients = [
        httpx.AsyncClient(base_url=service.url, timeout=PATIENCE_SECONDS, trust_env=False)
        for _ in range(count)
    ]
    try:
        yield clients
    finally:
        for client in clients:
            await client.aclose()


async def scraped(http: httpx.AsyncClient) -> dict[str, float]:
    """Return the sum of the samples of each name."""
    sums: defaultdict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families((await http.get("/metrics")).text):
        for sample in family.samples:
            sums[sample.name] += sample.value
    return dict(sums)


async def leases(http: httpx.AsyncClient, wait_seconds: float) -> list[dict[str, Any]]:
    answer = await http.post("/lease", json={"queues": ["q"], "wait_seconds": wait_seconds})
    assert answer.status_code == 200, answer.text
    jobs: list[dict[str, Any]] = answer.json()["jobs"]
    return jobs


async def posts(http: httpx.AsyncClient) -> str:
    answer = await http.post("/jobs", json={"queue": "q"})
    assert answer.status_code == 201, answer.text
    job_id: str = answer.json()["id"]
    return job_id


async def serving(service: Service, count: int = 2) -> None:
    """Wait until so many processes show their gauges, as they do once they serve."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            text = (await service.http.get("/metrics")).text
            if len(children(service)) == count and text.count("leaseq_listening 1.0") == 1:
                return
            await asyncio.sleep(0.02)


async def test_connections_are_shared_out_and_every_process_shows_the_sums_of_all(
    world: World, processes: Processes
):
    service = await processes.serve(DATABASE_URL=world.database_url, QUEUE_LOG_LEVEL="debug", **TWO)
    async with connections(service) as clients:
        await asyncio.gather(*map(posts, clients))
        lines = [line for line in service.said.splitlines() if '"job_enqueued"' in line]
        by = Counter(line.partition('"process": ')[2][0] for line in lines)
        assert set(by) == {"1", "2"}, by
        assert by.total() == CONNECTIONS
        for http in clients[:8]:
            seen = await scraped(http)
            assert seen["leaseq_jobs_enqueued_total"] == CONNECTIONS
            assert seen["leaseq_http_requests_total"] == CONNECTIONS
            assert seen["leaseq_http_request_duration_seconds_count"] == CONNECTIONS
            assert seen["leaseq_database_up"] == 1
            # Read from the database at most two seconds ago, by the one that answers.
            assert seen["leaseq_jobs"] in {0, CONNECTIONS}
            assert "process_cpu_seconds_total" not in seen
    assert service.said.count("leaseq is ready at") == 1


async def test_job_posted_to_one_process_goes_to_leases_that_wait_at_any(world: World, processes: Processes):
    service = await processes.serve(DATABASE_URL=world.database_url, **TWO, **HINTS_ONLY)
    await serving(service)
    async with connections(service) as clients, connections(service, 1) as [poster]:
        waiting = [asyncio.create_task(leases(http, 30)) for http in clients]
        # The gauge is of both: each of them has some.
        await service.waiters(CONNECTIONS)
        posted = {await posts(poster) for _ in clients}
        leased = await asyncio.gather(*waiting)
        assert {job["id"] for jobs in leased for job in jobs} == posted


async def test_killed_process_is_replaced_and_what_it_counted_stays(world: World, processes: Processes):
    service = await processes.serve(DATABASE_URL=world.database_url, **TWO)
    async with connections(service) as clients:
        await asyncio.gather(*map(posts, clients))
    killed, other = children(service)
    os.kill(killed, signal.SIGKILL)
    await until(lambda: '"process_ended"' in service.said, "the parent notices")
    # The other one serves meanwhile.
    async with connections(service, 1) as [http]:
        await posts(http)
    await until(lambda: len(set(children(service)) - {killed}) == 2, "another one is started")
    assert other in children(service)
    assert '"code": 137' in service.said
    await serving(service)
    async with connections(service) as clients:
        await asyncio.gather(*map(posts, clients))
        for http in clients[:8]:
            assert (await scraped(http))["leaseq_jobs_enqueued_total"] == 2 * CONNECTIONS + 1
    service.signal(signal.SIGTERM)
    assert await service.ends() == 0


@pytest.mark.parametrize("number", STOP_SIGNALS)
async def test_signal_answers_waiting_leases_and_ends_everything(
    number: signal.Signals, processes: Processes, data_dir: Path
):
    service = await processes.serve(QUEUE_DATA_DIR=data_dir, **TWO)
    server, both, shared = postmaster(data_dir), children(service), shared_directory(service)
    assert server is not None
    assert shared.is_dir()
    async with connections(service) as clients:
        waiting = [asyncio.create_task(leases(http, 30)) for http in clients]
        await service.waiters(CONNECTIONS)
        service.signal(number)
        assert await asyncio.gather(*waiting) == [[]] * CONNECTIONS
    assert await service.ends() == 0
    assert all(map(is_gone, [*both, server]))
    assert not shared.exists()
    assert "Traceback" not in service.said


async def test_signals_again_and_again_do_not_disturb_the_stop_of_several(
    processes: Processes, data_dir: Path
):
    service = await processes.serve(QUEUE_DATA_DIR=data_dir, **TWO)
    server, both = postmaster(data_dir), children(service)
    assert server is not None

    def ended() -> bool:
        service.signal(signal.SIGTERM)
        return not service.running

    await until(ended, "the service ends")
    assert await service.ends() == 0, service.said
    assert all(map(is_gone, [*both, server]))


@pytest.mark.parametrize("number", STOP_SIGNALS)
async def test_signal_amid_the_start_of_several_leaves_nothing_running(
    number: signal.Signals, world: World, processes: Processes
):
    process = processes.start("serve", DATABASE_URL=world.database_url, QUEUE_PORT=0, **TWO)
    await until(lambda: process.said.count('"process_started"') == 2, "both are started")
    both = children(process)
    process.signal(number)
    assert await process.ends() == 128 + number
    assert all(map(is_gone, both))
    assert "Traceback" not in process.said


async def test_processes_end_by_themselves_when_their_parent_was_killed(world: World, processes: Processes):
    service = await processes.serve(DATABASE_URL=world.database_url, **TWO)
    both, shared = children(service), shared_directory(service)
    async with connections(service) as clients:
        waiting = [asyncio.create_task(leases(http, 30)) for http in clients]
        await service.waiters(CONNECTIONS)
        service.signal(signal.SIGKILL)
        assert await asyncio.gather(*waiting) == [[]] * CONNECTIONS
    await until(lambda: all(map(is_gone, both)), "they end")
    assert not shared.exists()


@pytest.mark.parametrize("before", [1, 2])
async def test_address_of_another_service_is_refused_in_one_sentence(
    before: int, world: World, processes: Processes
):
    service = await processes.serve(DATABASE_URL=world.database_url, QUEUE_PROCESSES=before)
    code, said = await processes.run("serve", DATABASE_URL=world.database_url, QUEUE_PORT=service.port, **TWO)
    assert (code, said) == (
        1,
        f"The address 127.0.0.1:{service.port} can not be served on: is it taken?\n",
    )


async def test_process_that_can_not_start_ends_the_command_with_its_sentence(
    world: World, processes: Processes
):
    role = f"leaseq_only_one_{os.getpid()}"
    admin = await asyncpg.connect(world.database_url)
    # Enough for the parent, which looks whether all migrations are there, but not for who serves.
    await admin.execute(
        f"CREATE ROLE {role} LOGIN PASSWORD 'sesame' CONNECTION LIMIT 1; GRANT USAGE ON SCHEMA leaseq TO {role};"
        f" GRANT SELECT ON ALL TABLES IN SCHEMA leaseq TO {role}"
    )
    try:
        parts = urlsplit(world.database_url)
        url = urlunsplit(parts._replace(netloc=f"{role}:sesame@{parts.netloc.rpartition('@')[2]}"))
        process = processes.start("serve", DATABASE_URL=url, QUEUE_PORT=0, QUEUE_LOG_LEVEL="error", **TWO)
        await until(lambda: not process.running or len(children(process)) == 2, "both are started")
        both = children(process)
        assert await process.ends() == 1
        assert process.said.startswith("The database is away or overloaded.")
        assert len(process.said.splitlines()) == 1, process.said
        assert all(map(is_gone, both))
    finally:
        await admin.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")
        await admin.close()


async def test_without_the_setting_there_is_one_process(world: World, processes: Processes):
    service = await processes.serve(DATABASE_URL=world.database_url)
    assert children(service) == []
    assert "process_cpu_seconds_total" in await scraped(service.http)


@pytest.mark.parametrize(("total", "shares"), [(14, [5, 5, 4]), (15, [5, 5, 5])])
def test_what_is_meant_for_all_is_shared_out(total: int, shares: list[int], world: World):
    settings = world.settings(
        processes=3,
        db_pool_size=total,
        max_lease_waiters=total,
        max_job_watchers=total,
        max_event_streams=total,
    )
    parts = [_share(settings, number) for number in (1, 2, 3)]
    assert [part.db_pool_size for part in parts] == shares
    assert [part.max_lease_waiters for part in parts] == shares
    assert [part.max_job_watchers for part in parts] == shares
    assert [part.max_event_streams for part in parts] == shares
    assert {part.processes for part in parts} == {1}


def test_no_process_has_less_than_it_needs(world: World):
    settings = world.settings(processes=3, db_pool_size=1, max_lease_waiters=1)
    parts = [_share(settings, number) for number in (1, 2, 3)]
    assert [(part.db_pool_size, part.max_lease_waiters) for part in parts] == [(POOL_SIZE_LEAST, 1)] * 3


def shared_directory(service: Service) -> Path:
    """Return where the processes of a service share their metrics."""
    environment = Path(f"/proc/{children(service)[0]}/environ").read_text().split("\0")
    [directory] = [each for each in environment if each.startswith("PROMETHEUS_MULTIPROC_DIR=")]
    return Path(directory.partition("=")[2])
