"""Processes as an operator runs them: replicas, signals, the embedded server, a second program beside a service."""

import asyncio
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest

from tests.conftest import World, with_database
from tests.system.conftest import (
    PATIENCE_SECONDS,
    STOP_SIGNALS,
    Processes,
    Service,
    is_gone,
    postmaster,
    until,
)

WAITING = 20
HINTS_ONLY = {"QUEUE_POLL_SECONDS": 60, "QUEUE_MAINTENANCE_SECONDS": 60}
"""Longer than a lease may wait: who gets a job was told of it."""


async def test_job_posted_at_one_process_goes_to_a_lease_that_waits_at_another(
    world: World, processes: Processes
):
    a, b = [await processes.serve(DATABASE_URL=world.database_url, **HINTS_ONLY) for _ in range(2)]
    await b.hears()
    waiting = asyncio.create_task(b.lease(wait_seconds=30))
    await b.waiters(1)
    job = await a.enqueue()
    assert [leased["id"] for leased in await waiting] == [job["id"]]


async def test_job_posted_while_a_process_could_not_hear_is_found_when_it_listens_again(
    world: World, processes: Processes
):
    a = await processes.serve(DATABASE_URL=world.database_url, **HINTS_ONLY)
    await a.hears()
    await a.enqueue(queue="other")
    connection = await world.connect()
    others = await _listening(connection)
    b = await processes.serve(DATABASE_URL=world.database_url, **HINTS_ONLY)
    await b.hears()
    [ear] = await _listening(connection) - others
    waiting = asyncio.create_task(b.lease(wait_seconds=30))
    await b.waiters(1)
    assert await connection.fetchval("SELECT pg_terminate_backend($1, 10000)", ear)
    job = await a.enqueue()
    assert [leased["id"] for leased in await waiting] == [job["id"]]
    await b.hears()
    assert ear not in await _listening(connection)


@pytest.mark.parametrize("number", STOP_SIGNALS)
async def test_signal_answers_waiting_leases_at_once_and_lets_requests_in_flight_end(
    number: signal.Signals, world: World, processes: Processes
):
    service = await processes.serve(DATABASE_URL=world.database_url)
    await service.enqueue()
    [leased] = await service.lease()
    lock = await _locked(world)
    in_flight = asyncio.create_task(service.verb("ack", leased))
    await world.blocked()
    waiting = [asyncio.create_task(service.lease(queues=["empty"], wait_seconds=30)) for _ in range(WAITING)]
    await service.waiters(WAITING)

    service.signal(number)
    assert await asyncio.gather(*waiting) == [[]] * WAITING
    # The request in flight keeps the process: the leases were answered before its end.
    assert service.running
    assert not in_flight.done()
    await _refuses_leases(service)

    await lock.execute("COMMIT")
    answer = await in_flight
    assert answer.status_code == 200
    assert answer.json()["state"] == "completed"
    assert await service.ends() == 0
    assert "Traceback" not in service.said


async def test_request_that_does_not_end_in_time_is_cut_off_and_nothing_of_it_is_done(
    world: World, processes: Processes
):
    service = await processes.serve(DATABASE_URL=world.database_url, QUEUE_SHUTDOWN_SECONDS=1)
    await service.enqueue()
    [leased] = await service.lease()
    lock = await _locked(world)
    in_flight = asyncio.create_task(service.verb("ack", leased))
    await world.blocked()
    service.signal(signal.SIGTERM)
    with pytest.raises(httpx.HTTPError):
        (await in_flight).raise_for_status()
    assert await service.ends() == 0
    await lock.execute("COMMIT")
    assert await lock.fetchval("SELECT lease_id::text FROM leases") == leased["lease_id"]
    assert await lock.fetchval("SELECT count(*) FROM history") == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", STOP_SIGNALS)
async def test_embedded_server_ends_with_its_service_and_the_data_is_there_at_the_next_start(
    number: signal.Signals, processes: Processes, data_dir: Path
):
    service = await processes.serve(QUEUE_DATA_DIR=data_dir)
    job = await service.enqueue(payload={"kept": True})
    server = postmaster(data_dir)
    assert server is not None
    waiting = [asyncio.create_task(service.lease(queues=["empty"], wait_seconds=30)) for _ in range(WAITING)]
    await service.waiters(WAITING)
    service.signal(number)
    assert await asyncio.gather(*waiting) == [[]] * WAITING
    assert await service.ends() == 0
    assert is_gone(server)
    assert postmaster(data_dir) is None

    again = await processes.serve(QUEUE_DATA_DIR=data_dir)
    [leased] = await again.lease()
    assert (leased["id"], leased["payload"]) == (job["id"], {"kept": True})


async def test_signals_again_and_again_do_not_disturb_a_stop(processes: Processes, data_dir: Path):
    service = await processes.serve(QUEUE_DATA_DIR=data_dir)
    server = postmaster(data_dir)
    assert server is not None

    def ended() -> bool:
        service.signal(signal.SIGTERM)
        return not service.running

    await until(ended, "the service ends")
    assert await service.ends() == 0, service.said
    assert is_gone(server)


@pytest.mark.parametrize("number", STOP_SIGNALS)
async def test_signal_amid_the_start_leaves_nothing_running(
    number: signal.Signals, processes: Processes, data_dir: Path
):
    process = processes.start("serve", QUEUE_DATA_DIR=data_dir, QUEUE_PORT=0)
    await until(lambda: postmaster(data_dir), "the embedded server starts")
    server = postmaster(data_dir)
    assert server is not None
    process.signal(number)
    assert await process.ends() == 128 + number
    assert is_gone(server)
    assert "Traceback" not in process.said


async def test_embedded_server_of_a_killed_service_is_taken_over(processes: Processes, data_dir: Path):
    service = await processes.serve(QUEUE_DATA_DIR=data_dir)
    job = await service.enqueue()
    server = postmaster(data_dir)
    service.signal(signal.SIGKILL)
    await service.ends()
    again = await processes.serve(QUEUE_DATA_DIR=data_dir)
    assert postmaster(data_dir) == server
    assert [leased["id"] for leased in await again.lease()] == [job["id"]]
    again.signal(signal.SIGTERM)
    assert await again.ends() == 0
    assert postmaster(data_dir) is None


@pytest.mark.slow
async def test_programs_beside_a_service_share_its_embedded_database(processes: Processes, data_dir: Path):
    service = await processes.serve(QUEUE_DATA_DIR=data_dir, QUEUE_MAINTENANCE_SECONDS=60)
    server = postmaster(data_dir)
    job = await service.enqueue(delay_seconds=0.001)

    code, said = await processes.run("migrate", QUEUE_DATA_DIR=data_dir)
    assert code == 0, said
    code, said = await processes.run("maintain", "--once", QUEUE_DATA_DIR=data_dir)
    assert code == 0, said
    assert re.search(r"^fold +[12]$", said, re.MULTILINE), said

    assert postmaster(data_dir) == server
    assert [leased["id"] for leased in await service.lease()] == [job["id"]]


async def test_job_promoted_by_another_program_goes_to_a_waiting_lease(world: World, processes: Processes):
    service = await processes.serve(
        DATABASE_URL=world.database_url, QUEUE_POLL_SECONDS=60, QUEUE_MAINTENANCE_SECONDS=3600
    )
    await service.hears()
    waiting = asyncio.create_task(service.lease(wait_seconds=30))
    await service.waiters(1)
    # The service did its first round at its start, and is not told of this job: it is left to the other program.
    queue = await world.replica()
    await queue.machine.service.maintenance.stop()
    job = await queue.enqueue(delay_seconds=0.001)
    maintaining = processes.start("maintain", DATABASE_URL=world.database_url)
    assert [leased["id"] for leased in await waiting] == [job["id"]]
    maintaining.signal(signal.SIGTERM)
    assert await maintaining.ends() in {0, 128 + signal.SIGTERM}
    assert "Traceback" not in maintaining.said


async def test_replicas_that_start_together_on_an_empty_database_migrate_it_once(
    cluster_url: str, processes: Processes
):
    name = f"leaseq_empty_{os.getpid()}"
    admin = await asyncpg.connect(cluster_url)
    await admin.execute(f"CREATE DATABASE {name} TEMPLATE template0")
    try:
        url = with_database(cluster_url, name)
        a, b, c = await asyncio.gather(*(processes.serve(DATABASE_URL=url) for _ in range(3)))
        job = await a.enqueue()
        assert (await b.http.get(f"/jobs/{job['id']}")).status_code == 200
        assert [leased["id"] for leased in await c.lease()] == [job["id"]]
    finally:
        await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
        await admin.close()


async def test_with_a_database_url_nothing_embedded_starts(world: World, processes: Processes):
    data_dir = processes.directory / "never"
    service = await processes.serve(DATABASE_URL=world.database_url, QUEUE_DATA_DIR=data_dir)
    await service.enqueue()
    code, _ = await processes.run("migrate", DATABASE_URL=world.database_url, QUEUE_DATA_DIR=data_dir)
    assert code == 0
    assert not data_dir.exists()


async def test_lines_printed_at_the_start_work_when_pasted(world: World, processes: Processes):
    service = await processes.serve(DATABASE_URL=world.database_url)
    lines = [line.strip() for line in service.said.splitlines() if line.strip().startswith("curl ")]
    assert len(lines) == 3
    post, lease, show = [await asyncio.to_thread(_pasted, line) for line in lines]
    assert post["state"] == "ready"
    assert [job["id"] for job in lease["jobs"]] == [post["id"]]
    assert lease["jobs"][0]["payload"] == post["payload"]
    assert [(job["id"], job["state"], job["worker"]) for job in show["jobs"]] == [
        (post["id"], "active", "me")
    ]
    for page in re.findall(r"(?:docs|metrics): ([^,)\s]+)", service.said):
        assert (await service.http.get(page)).status_code == 200


async def _listening(connection: "asyncpg.Connection[asyncpg.Record]") -> set[int]:
    """Return the backends that hear hints: what they last did was to listen, to hint or to show a sign of life."""
    rows = await connection.fetch(
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'leaseq'"
        " AND (query LIKE 'LISTEN%' OR query LIKE '%pg_notify%' OR query = 'SELECT 1')"
    )
    return {row["pid"] for row in rows}


async def _locked(world: World) -> "asyncpg.Connection[asyncpg.Record]":
    """Keep the present leases from whoever would end one, until the connection that is returned commits."""
    connection = await world.connect()
    await connection.execute("BEGIN; SELECT FROM leases FOR UPDATE")
    return connection


async def _refuses_leases(service: Service) -> None:
    async with httpx.AsyncClient(base_url=service.url, timeout=PATIENCE_SECONDS) as http:
        try:
            answer = await http.post("/lease", json={"queues": ["q"], "wait_seconds": 0})
        except httpx.ConnectError:
            return
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) > 0


def _pasted(line: str) -> Any:
    answer = subprocess.run(
        ["bash", "-c", line], capture_output=True, check=True, text=True, timeout=PATIENCE_SECONDS
    )
    return httpx.Response(200, text=answer.stdout).json()
