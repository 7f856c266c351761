"""What goes wrong around the service: killed processes, a PostgreSQL that goes away, replies that nobody gets.

The rule is the same everywhere: what was acknowledged stays, what was refused did not happen, and what had no answer
happened whole or not at all.
"""

import asyncio
import itertools
import random
import signal
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import asyncpg
import httpx
import pytest

from tests.conftest import Replica, World
from tests.invariants import broken_invariants
from tests.system.conftest import PATIENCE_SECONDS, Cluster, Processes, Service, until

PAUSES = """
CREATE FUNCTION leaseq.pause() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  PERFORM pg_advisory_xact_lock(1);
  RETURN NEW;
END $$;
CREATE TRIGGER pause BEFORE INSERT ON leaseq.deltas FOR EACH ROW EXECUTE FUNCTION leaseq.pause();
CREATE TRIGGER pause BEFORE UPDATE ON leaseq.leases FOR EACH ROW EXECUTE FUNCTION leaseq.pause();
"""
"""Stops every verb in the middle of its writing statement for as long as somebody holds the lock."""


# ---------------------------------------------------------------------------------------------------------------------
# A backend ends in the middle of a verb


@dataclass
class Scene:
    """Jobs in all the states that a verb may begin from, and a connection that can stop the verbs half-way."""

    queue: Replica
    connection: "asyncpg.Connection[asyncpg.Record]"
    ready: dict[str, Any]
    active: dict[str, Any]
    dead: dict[str, Any]

    async def jobs(self) -> Any:
        jobs = (await self.queue.http.get("/jobs")).json()["jobs"]
        return {job["id"]: {**job, "lease": await self._lease(job["id"])} for job in jobs}

    async def _lease(self, job_id: str) -> Any:
        rows = await self.connection.fetch("SELECT * FROM leases WHERE id = $1", job_id)
        return [dict(row) for row in rows]

    async def interrupt(self, function: str) -> None:
        """End (`pg_terminate_backend`) or interrupt (`pg_cancel_backend`) whoever waits for the lock."""
        ended = await self.connection.fetch(
            f"SELECT {function}(pid) FROM pg_stat_activity WHERE datname = current_database()"
            " AND application_name = 'leaseq' AND wait_event_type = 'Lock'"
        )
        assert len(ended) == 1


@pytest.fixture
async def scene(world: World) -> Scene:
    queue = await world.replica()
    await queue.enqueue("dead", max_retries=0)
    dead = await queue.lease_one("dead")
    await queue.fail(dead)
    ready = await queue.enqueue("ready")
    await queue.enqueue("active")
    active = await queue.lease_one("active")
    connection = await world.connect()
    await connection.execute(PAUSES)
    return Scene(queue, connection, ready, active, dead)


Call = Callable[[Scene], Awaitable[httpx.Response]]

VERBS: dict[str, tuple[Call, int]] = {
    "enqueue": (lambda scene: scene.queue.http.post("/jobs", json={"queue": "new"}), 201),
    "lease": (
        lambda scene: scene.queue.http.post("/lease", json={"queues": ["ready"], "wait_seconds": 0}),
        200,
    ),
    "heartbeat": (lambda scene: scene.queue.verb("heartbeat", scene.active, extend_seconds=300), 200),
    "ack": (lambda scene: scene.queue.verb("ack", scene.active, result=1), 200),
    "fail": (lambda scene: scene.queue.verb("fail", scene.active, error={"message": "boom"}), 200),
    "release": (lambda scene: scene.queue.verb("release", scene.active), 200),
    "cancel": (lambda scene: scene.queue.http.post(f"/jobs/{scene.ready['id']}/cancel"), 200),
    "retry": (lambda scene: scene.queue.http.post(f"/jobs/{scene.dead['id']}/retry"), 200),
    "delete": (lambda scene: scene.queue.http.delete(f"/jobs/{scene.dead['id']}"), 204),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("function", ["pg_terminate_backend", "pg_cancel_backend"])
async def test_verb_whose_backend_ends_half_way_is_refused_and_nothing_is_done(
    function: str, verb: str, scene: Scene, world: World
):
    call, success = VERBS[verb]
    before = await scene.jobs()
    await scene.connection.execute("SELECT pg_advisory_lock(1)")
    calling = asyncio.ensure_future(call(scene))
    await world.blocked()
    await scene.interrupt(function)
    refused(await calling)
    assert await scene.jobs() == before

    await scene.connection.execute("SELECT pg_advisory_unlock(1)")
    assert (await call(scene)).status_code == success
    assert await scene.jobs() != before


@pytest.mark.slow
async def test_lock_of_a_stranger_refuses_a_verb_after_a_while(scene: Scene):
    before = await scene.jobs()
    async with scene.connection.transaction():
        await scene.connection.execute("LOCK TABLE leases IN ACCESS EXCLUSIVE MODE")
        refused(await scene.queue.verb("ack", scene.active))
    assert await scene.jobs() == before
    assert (await scene.queue.verb("ack", scene.active)).status_code == 200


# ---------------------------------------------------------------------------------------------------------------------
# The reply is lost


@pytest.mark.parametrize(
    ("verb", "body", "state"),
    [
        ("ack", {"result": {"pages": 3}}, "completed"),
        ("fail", {"error": {"message": "boom"}, "retry_in_seconds": 60}, "retry"),
        ("release", {"delay_seconds": 60}, "scheduled"),
    ],
)
async def test_verb_whose_reply_was_lost_is_answered_from_the_record_when_it_comes_again(
    verb: str, body: dict[str, Any], state: str, scene: Scene, world: World
):
    await scene.connection.execute("SELECT pg_advisory_lock(1)")
    request = {"lease_id": scene.active["lease_id"], **body}
    async with httpx.AsyncClient(base_url=scene.queue.http.base_url) as vanishing:
        sending = asyncio.create_task(vanishing.post(f"/jobs/{scene.active['id']}/{verb}", json=request))
        await world.blocked()
        sending.cancel()
    await scene.connection.execute("SELECT pg_advisory_unlock(1)")
    async with asyncio.timeout(PATIENCE_SECONDS):
        while (await scene.queue.job(scene.active["id"]))["state"] != state:
            await asyncio.sleep(0.005)
    settled = await scene.queue.job(scene.active["id"])

    again = await scene.queue.verb(verb, scene.active, **body)
    assert again.status_code == 200
    assert again.json()["state"] == state
    assert await scene.queue.job(scene.active["id"]) == settled
    if verb == "ack":
        assert again.json() == settled
        assert settled["result"] == {"pages": 3}


async def test_ack_sent_on_a_socket_that_closes_at_once_can_be_sent_again(queue: Replica):
    await queue.enqueue()
    leased = await queue.lease_one()
    body = f'{{"lease_id": "{leased["lease_id"]}"}}'
    _, writer = await asyncio.open_connection("127.0.0.1", queue.server.port)
    writer.write(
        f"POST /jobs/{leased['id']}/ack HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
    )
    writer.close()
    await writer.wait_closed()
    for _ in range(2):
        answer = await queue.verb("ack", leased)
        assert (answer.status_code, answer.json()["state"]) == (200, "completed")


# ---------------------------------------------------------------------------------------------------------------------
# The process is killed


@dataclass
class History:
    """What clients asked for and what they were answered, as numbers of one clock: the order of their events."""

    events: "itertools.count[int]" = field(default_factory=itertools.count)
    attempted: set[str] = field(default_factory=set)
    enqueued: dict[str, str] = field(default_factory=dict)
    leased: list[tuple[int, str, str]] = field(default_factory=list)
    acked: dict[str, int] = field(default_factory=dict)
    acknowledgements: Counter[str] = field(default_factory=Counter)
    unknown: Counter[str] = field(default_factory=Counter)

    def check(self) -> None:
        """Check what must hold of every history; `leased` holds when a lease was asked for."""
        assert set(self.enqueued) <= self.attempted
        assert {token for _, token, _ in self.leased} <= self.attempted, "unexpected"
        leases = [lease_id for _, _, lease_id in self.leased]
        assert len(leases) == len(set(leases)), "a lease was handed out twice"
        for asked, token, _ in self.leased:
            assert asked < self.acked.get(token, asked + 1), f"{token} was leased after its ack was answered"
        assert not [token for token, count in self.acknowledgements.items() if count > 1], "acked twice"


class Client:
    """A producer or worker that goes on whatever happens to the service."""

    def __init__(self, url: str, history: History, seed: str) -> None:
        self._http = httpx.AsyncClient(base_url=url, timeout=PATIENCE_SECONDS, trust_env=False)
        self._history = history
        self._chance = random.Random(seed)
        self._seed = seed

    async def produce(self, enough: asyncio.Event) -> None:
        for number in itertools.count():
            if enough.is_set():
                break
            token = f"{self._seed}-{number}"
            self._history.attempted.add(token)
            backoff = {"strategy": "fixed", "initial_seconds": 0, "jitter": "none"}
            body = {"queue": "q", "payload": token, "max_retries": 10_000, "backoff": backoff}
            answer = await self._call("/jobs", {**body, "lease_seconds": 1})
            if answer is not None:
                assert answer.status_code == 201, answer.text
                self._history.enqueued[token] = answer.json()["id"]

    async def work(self, enough: asyncio.Event, *, diligent: bool = False) -> None:
        """Work until `enough`; ack most jobs, fail and forget some, or ack all if `diligent`."""
        while not enough.is_set():
            asked = next(self._history.events)
            answer = await self._call(
                "/lease", {"queues": ["q"], "max_jobs": self._chance.randint(1, 5), "wait_seconds": 0.2}
            )
            if answer is None:
                continue
            assert answer.status_code == 200, answer.text
            jobs = answer.json()["jobs"]
            self._history.leased += [(asked, job["payload"], job["lease_id"]) for job in jobs]
            for job in jobs:
                await self._settle(job, 0 if diligent else self._chance.random())

    async def close(self) -> None:
        await self._http.aclose()

    async def _settle(self, job: dict[str, Any], chance: float) -> None:
        lease = {"lease_id": job["lease_id"]}
        if chance < 0.8:
            answer = await self._call(f"/jobs/{job['id']}/ack", lease)
            if answer is not None and answer.status_code == 200:
                self._history.acked[job["payload"]] = next(self._history.events)
                self._history.acknowledgements[job["payload"]] += 1
        elif chance < 0.9:
            answer = await self._call(f"/jobs/{job['id']}/fail", {**lease, "error": {"message": "boom"}})
        else:
            return
        assert answer is None or answer.status_code in {200, 409}, answer.text

    async def _call(self, path: str, body: dict[str, Any]) -> httpx.Response | None:
        """Return the answer, or None where it is not known what became of the call."""
        try:
            answer = await self._http.post(path, json=body)
        except httpx.TransportError:
            self._history.unknown[path] += 1
            await asyncio.sleep(0.01)
            return None
        if answer.status_code != 503:
            return answer
        refused(answer)
        await asyncio.sleep(0.01)
        return None


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
async def test_process_killed_again_and_again_under_load_loses_nothing(
    seed: int, world: World, processes: Processes
):
    chance = random.Random(seed)
    variables = {
        "DATABASE_URL": world.database_url,
        "QUEUE_MAINTENANCE_SECONDS": 0.1,
        "QUEUE_DB_POOL_SIZE": 4,
        "QUEUE_LOG_LEVEL": "error",
    }
    service = await processes.serve(**variables)
    history = History()
    enough = asyncio.Event()
    clients = [Client(service.url, history, f"{seed}-{number}") for number in range(8)]
    running = [asyncio.create_task(client.produce(enough)) for client in clients[:3]]
    running += [asyncio.create_task(client.work(enough)) for client in clients[3:]]
    for _ in range(4):
        await asyncio.sleep(chance.uniform(0.05, 0.8))
        service.signal(signal.SIGKILL)
        assert await service.ends() == -signal.SIGKILL
        service = await processes.serve(**variables, QUEUE_PORT=service.port)
    enough.set()
    await asyncio.gather(*running)
    await drain(service, clients)

    history.check()
    assert history.unknown["/jobs"] > 0, "no enqueue was cut off"
    connection = await world.connect()
    rows = await connection.fetch("SELECT convert_from(payload, 'UTF8') AS payload FROM history")
    completed = [str(row["payload"]).strip('"') for row in rows]
    assert set(history.enqueued) <= set(completed), "lost"
    assert set(completed) <= history.attempted, "unexpected"
    assert len(completed) == len(set(completed)), "an enqueue was stored twice"
    assert service.said.count('"level": "error"') == 0, service.said


async def drain(service: Service, clients: list[Client]) -> None:
    """Work until no job is left, then close the clients."""
    empty = asyncio.Event()
    working = [asyncio.create_task(client.work(empty, diligent=True)) for client in clients]
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            jobs = (await service.http.get("/stats")).json()["jobs"]
            if not jobs["waiting"] + jobs["active"] + jobs["delayed"]:
                break
            await asyncio.sleep(0.05)
    empty.set()
    await asyncio.gather(*working)
    for client in clients:
        await client.close()


# ---------------------------------------------------------------------------------------------------------------------
# PostgreSQL goes away and comes back


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fast", "immediate"])
async def test_services_outlive_a_restart_of_postgresql(mode: str, cluster: Cluster, processes: Processes):
    variables = {"DATABASE_URL": cluster.url, "QUEUE_POLL_SECONDS": 60, "QUEUE_MAINTENANCE_SECONDS": 0.2}
    a, b = await asyncio.gather(processes.serve(**variables), processes.serve(**variables))
    job = await a.enqueue(queue="before", lease_seconds=600)
    [leased] = await a.lease(queues=["before"])
    later = await a.enqueue(queue="later", delay_seconds=1)
    await b.hears()
    waiting = asyncio.create_task(b.lease(queues=["after"], wait_seconds=30))
    await b.waiters(1)
    stored: list[str] = []
    storing = [asyncio.create_task(store(a, stored)) for _ in range(4)]
    await until(lambda: len(stored) > 20, "jobs are stored")

    await asyncio.to_thread(cluster.stop, mode)
    await asyncio.gather(*storing)
    for service in (a, b):
        await is_away(service, leased)
    assert not waiting.done()
    await asyncio.to_thread(cluster.start)

    # A waiting lease has outlived it, and hears of other processes' jobs again.
    await asyncio.gather(a.hears(), b.hears())
    after = await a.enqueue(queue="after")
    assert [found["id"] for found in await waiting] == [after["id"]]
    # So does the maintenance.
    assert [found["id"] for found in await a.lease(queues=["later"], wait_seconds=30)] == [later["id"]]
    # The lease of before stands, and nothing that was answered is lost.
    answer = await b.verb("ack", leased)
    assert (answer.status_code, answer.json()["id"]) == (200, job["id"])
    connection = await asyncpg.connect(cluster.url)
    try:
        kept = {str(row["id"]) for row in await connection.fetch("SELECT id FROM leaseq.ready")}
        assert set(stored) <= kept
        assert await broken_invariants(connection) == []
    finally:
        await connection.close()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fast", "immediate"])
async def test_groups_of_enqueues_outlive_restarts_of_postgresql(
    mode: str, cluster: Cluster, processes: Processes
):
    service = await processes.serve(DATABASE_URL=cluster.url, QUEUE_POLL_SECONDS=60)
    stored: dict[str, str] = {}
    attempted: set[str] = set()
    enough = asyncio.Event()

    def more_than(count: int) -> bool:
        return len(stored) > count

    async def produce(name: int) -> None:
        for number in itertools.count():
            if enough.is_set():
                return
            token = f"{name}-{number}"
            attempted.add(token)
            answer = await service.post("/jobs", queue="q", payload=token)
            if answer.status_code == 201:
                assert answer.json()["id"] not in stored
                stored[answer.json()["id"]] = token
            else:
                refused(answer)
                await asyncio.sleep(0.01)

    producing = [asyncio.create_task(produce(name)) for name in range(40)]
    for wanted in (200, 400):
        await until(partial(more_than, wanted), "jobs are stored in groups")
        await asyncio.to_thread(cluster.stop, mode)
        await asyncio.to_thread(cluster.start)
    await until(partial(more_than, 600), "jobs are stored again")
    enough.set()
    await asyncio.gather(*producing)

    connection = await asyncpg.connect(cluster.url)
    try:
        rows = await connection.fetch("SELECT id, convert_from(payload, 'UTF8') AS payload FROM leaseq.jobs")
        kept = {str(row["id"]): row["payload"].strip('"') for row in rows}
        assert stored.items() <= kept.items(), "lost"
        assert len(set(kept.values())) == len(kept), "stored twice"
        assert set(kept.values()) <= attempted
        assert await broken_invariants(connection) == []
    finally:
        await connection.close()


async def store(service: Service, stored: list[str]) -> None:
    """Enqueue until it is refused; tell of each job that was acknowledged."""
    while True:
        answer = await service.post("/jobs", queue="stored")
        if answer.status_code != 201:
            refused(answer)
            return
        stored.append(answer.json()["id"])


async def is_away(service: Service, leased: dict[str, Any]) -> None:
    """Check what a service says whose database is away."""
    for verb, body in (
        ("ack", {}),
        ("heartbeat", {}),
        ("fail", {"error": {"message": "boom"}}),
        ("release", {}),
    ):
        refused(await service.verb(verb, leased, **body))
    refused(await service.post("/jobs", queue="q"))
    refused(await service.post("/lease", queues=["q"], wait_seconds=0))
    for verb in ("cancel", "retry"):
        refused(await service.http.post(f"/jobs/{leased['id']}/{verb}"))
    refused(await service.http.delete(f"/jobs/{leased['id']}"))
    for path in ("/jobs", f"/jobs/{leased['id']}", f"/jobs/{leased['id']}/attempts", "/stats"):
        refused(await service.http.get(path))

    ready = await service.http.get("/health/ready")
    refused(ready)
    assert "database" in ready.json()["detail"]
    assert (await service.http.get("/health/live")).status_code == 200
    health = await service.http.get("/health")
    assert health.status_code == 503
    assert (health.json()["database"], health.json()["listening"]) == (False, False)
    assert "database" in health.json()["problem"]
    # What the database is asked for is asked at most every two seconds.
    async with asyncio.timeout(PATIENCE_SECONDS):
        while "leaseq_database_up 0.0" not in (await service.http.get("/metrics")).text:
            await asyncio.sleep(0.02)


def refused(answer: httpx.Response) -> None:
    """Check that it says clearly: not now, and when to come back."""
    assert answer.status_code == 503, answer.text
    assert answer.json()["code"] == "unavailable"
    assert int(answer.headers["retry-after"]) > 0
