"""The room of the waiting leases, and its connection to other processes: who is called, by whom, and what is said.

The poll is set to 60 s unless a test is about it, and no lease waits longer than 30 s: who gets a job was called.
"""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import asyncpg
import pytest
from structlog.testing import capture_logs
from uuid_utils.compat import uuid7

from app.engine.leasing import LeaseRequest
from app.engine.wakeup import HINT_BYTES_MAX, Room, Waiter
from app.queue.errors import UnavailableError
from app.queue.events import AttemptEnded, JobLeased
from app.queue.model import JobRequest, LeasedJob, Outcome
from app.queue.policy import resolve
from app.store.jobs import Line
from tests.conftest import Replica, World, with_database

CHANNEL = "leaseq leaseq"
QUICK_POLL_SECONDS = 0.05

Leasing = asyncio.Task[Sequence[LeasedJob]]


def asleep(queue: Replica) -> int:
    """Count the leases that have looked, found nothing, and sleep until they are called."""
    waiters = queue.machine.service.wakeups._room._waiters
    return sum(bool(waiter._answer._callbacks) and not waiter._answer.done() for waiter in waiters)


async def waiting(
    queue: Replica,
    *queues: str,
    types: tuple[str, ...] | None = None,
    gone: "asyncio.Future[object] | None" = None,
    max_jobs: int = 1,
) -> Leasing:
    """Begin a lease, and return when it sleeps."""
    wanted = LeaseRequest(queues=queues or ("q",), types=types, wait_seconds=30, max_jobs=max_jobs)
    before = asleep(queue)
    leasing = asyncio.create_task(queue.machine.service.lease(wanted, gone or nobody_goes()))
    async with asyncio.timeout(10):
        while asleep(queue) == before:
            await asyncio.sleep(0.002)
    return leasing


def nobody_goes() -> "asyncio.Future[object]":
    return asyncio.get_running_loop().create_future()


async def store_silently(queue: Replica, name: str = "q", type_: str = "default") -> str:
    """Store a ready job of which nobody is told, as if the hint had been lost."""
    request = resolve(JobRequest(name, type_), queue.machine.settings.defaults, uuid7())
    [job] = await queue.machine.jobs.enqueue([request])
    return str(job.id)


def ids(leased: Sequence[LeasedJob]) -> list[str]:
    return [str(job.id) for job in leased]


class Ear:
    """Hears what the replicas tell each other."""

    def __init__(self) -> None:
        self.said: list[dict[str, Any]] = []

    @classmethod
    async def of(cls, world: World) -> "Ear":
        ear = cls()
        connection = await world.connect()
        await connection.add_listener(CHANNEL, lambda *said: ear.said.append(json.loads(str(said[-1]))))
        return ear

    def jobs(self, queue: str) -> int:
        """Count the jobs that were told of on one queue."""
        return sum(count for said in self.said for name, _, count in said.get("ready", []) if name == queue)

    async def hears(self, queue: str, jobs: int = 1) -> None:
        async with asyncio.timeout(10):
            while self.jobs(queue) < jobs:
                await asyncio.sleep(0.002)


# ---------------------------------------------------------------------------------------------------------------------
# The room


def called(*waiters: Waiter) -> list[bool]:
    return [waiter.called_for is not None for waiter in waiters]


async def test_as_many_are_called_as_there_are_jobs_the_longest_waiting_first():
    room = Room()
    waiters = [room.enter([Line("q")]) for _ in range(4)]
    assert room.call(Line("q", "a"), 3) == 3
    assert called(*waiters) == [True, True, True, False]
    assert room.call(Line("q", "a"), 3) == 1


async def test_who_waits_for_any_type_and_who_waits_for_this_one_stand_in_one_line():
    room = Room()
    lines = [{Line("q", "a")}, {Line("q")}, {Line("q", "b")}, {Line("q", "b"), Line("q", "a")}, {Line("q")}]
    waiters = [room.enter(line) for line in lines]
    assert room.call(Line("q", "a"), 3) == 3
    assert called(*waiters) == [True, True, False, True, False]


async def test_jobs_of_unknown_type_call_only_who_waits_for_any():
    room = Room()
    typed, untyped = room.enter([Line("q", "a")]), room.enter([Line("q")])
    assert room.call(Line("q"), 2) == 1
    assert called(typed, untyped) == [False, True]


async def test_who_waits_at_several_lines_is_called_once():
    room = Room()
    waiter = room.enter([Line("q"), Line("r")])
    assert (room.call(Line("q", "a"), 1), room.call(Line("r", "a"), 1)) == (1, 0)
    assert waiter.called_for == Line("q", "a")


async def test_who_listens_again_can_be_called_again():
    room = Room()
    waiter = room.enter([Line("q")])
    soon = asyncio.get_running_loop().time() + 10
    for _ in range(2):
        waiter.listen()
        assert room.call(Line("q", "a"), 1) == 1
        assert await waiter.called(soon, nobody_goes())


async def test_call_before_the_waiting_is_not_missed_and_time_that_is_up_is_no_call():
    room = Room()
    waiter = room.enter([Line("q")])
    long_ago = asyncio.get_running_loop().time() - 1
    assert not await waiter.called(long_ago, nobody_goes())
    waiter.listen()
    room.call(Line("q", "a"), 1)
    assert await waiter.called(asyncio.get_running_loop().time() + 10, nobody_goes())


async def test_room_that_everybody_has_left_is_empty_and_calls_nobody():
    room = Room()
    waiters = [room.enter([Line("q"), Line("q", str(number))]) for number in range(3)]
    assert (len(room), room.waiting()[Line("q")]) == (3, 3)
    for waiter in waiters:
        room.leave(waiter)
    assert (len(room), room.waiting(), room.call(Line("q", "a"), 5)) == (0, {}, 0)


async def test_everybody_sent_away_stops_waiting_without_a_call():
    room = Room()
    waiters = [room.enter([Line("q")]) for _ in range(3)]
    room.send_all_away()
    assert [
        await waiter.called(asyncio.get_running_loop().time() + 10, nobody_goes()) for waiter in waiters
    ] == [False] * 3
    assert called(*waiters) == [False] * 3


# ---------------------------------------------------------------------------------------------------------------------
# Calls that are not used


async def test_call_that_a_vanished_client_can_not_use_goes_to_the_next_in_line(queue: Replica):
    gone = nobody_goes()
    oldest, next_one = await waiting(queue, gone=gone), await waiting(queue)
    job_id = await store_silently(queue)
    queue.machine.service.wakeups.announce({Line("q", "default"): 1})
    gone.set_result(None)
    assert await oldest == []
    assert ids(await next_one) == [job_id]
    assert [str(event.job_id) for event in queue.events.of(JobLeased)] == [job_id]


async def test_second_call_of_who_has_found_a_job_goes_to_the_next_in_line(queue: Replica, world: World):
    await queue.first_round()
    oldest, next_one = await waiting(queue), await waiting(queue)
    first, second = await store_silently(queue), await store_silently(queue)
    connection = await world.connect()
    async with connection.transaction():
        await connection.execute("LOCK TABLE leases IN SHARE MODE")
        queue.machine.service.wakeups.announce({Line("q", "default"): 1})
        await world.blocked()
        # Who looks at this moment can be called again: what it is called for may be what it does not see any more.
        queue.machine.service.wakeups.announce({Line("q", "default"): 1})
    assert ids(await oldest) == [first]
    assert ids(await next_one) == [second]


async def test_lease_that_is_cut_off_during_its_claim_gives_the_job_to_the_next_in_line(
    queue: Replica, world: World
):
    await queue.first_round()
    oldest, next_one = await waiting(queue), await waiting(queue)
    connection = await world.connect()
    async with connection.transaction():
        await connection.execute("LOCK TABLE leases IN SHARE MODE")
        job_id = (await queue.enqueue())["id"]
        await world.blocked()
        oldest.cancel()
        with pytest.raises(asyncio.CancelledError):
            await oldest
    assert [(str(job.id), job.attempt) for job in await next_one] == [(job_id, 1)]
    assert [event.outcome for event in queue.events.of(AttemptEnded)] == [Outcome.RELEASED]


async def test_nothing_is_leased_for_a_client_that_has_gone_already(queue: Replica):
    job = await queue.enqueue()
    gone = nobody_goes()
    gone.set_result(None)
    assert await queue.machine.service.lease(LeaseRequest(queues=("q",)), gone) == []
    assert await queue.job(job["id"]) == job
    assert queue.machine.service.wakeups.waiters == 0


async def test_lease_that_finds_nothing_because_another_took_it_all_waits_on(queue: Replica):
    greedy, modest = await waiting(queue, max_jobs=2), await waiting(queue)
    stored = [await store_silently(queue) for _ in range(2)]
    queue.machine.service.wakeups.announce({Line("q", "default"): 1})
    assert ids(await greedy) == stored
    queue.machine.service.wakeups.announce({Line("q", "default"): 1})
    job = await queue.enqueue()
    assert ids(await modest) == [job["id"]]


async def test_lease_waits_at_as_many_lines_as_a_request_may_name(queue: Replica):
    queues, types = [f"queue-{number}" for number in range(100)], [f"type-{number}" for number in range(10)]
    leasing = await waiting(queue, *queues, types=tuple(types))
    await queue.enqueue(queues[-1], type="another")
    job = await queue.enqueue(queues[-1], type=types[-1])
    assert ids(await leasing) == [job["id"]]


# ---------------------------------------------------------------------------------------------------------------------
# What a waiting lease costs, and how it ends


async def test_waiting_lease_holds_no_connection_and_no_transaction(world: World):
    queue = await world.replica(db_pool_size=2)
    await queue.first_round()
    leasing = [await waiting(queue) for _ in range(20)]
    connection = await world.connect()
    states = await connection.fetch(
        "SELECT DISTINCT state FROM pg_stat_activity"
        " WHERE datname = current_database() AND application_name = 'leaseq'"
    )
    assert [row["state"] for row in states] == ["idle"]
    size, idle = queue.machine.service.pool_usage()
    assert (size == idle, size <= 2) == (True, True)
    jobs = [await queue.enqueue() for _ in leasing]
    taken = [ids(leased) for leased in await asyncio.gather(*leasing)]
    assert sorted(taken) == [[job["id"]] for job in jobs]


async def test_service_that_drains_answers_who_waits_refuses_new_leases_and_does_all_else(queue: Replica):
    leasing = [await waiting(queue) for _ in range(3)]
    await queue.enqueue("other")
    leased = await queue.lease_one("other")
    queue.machine.service.drain()
    assert await asyncio.gather(*leasing) == [[]] * 3

    answer = await queue.http.post("/lease", json={"queues": ["q"]})
    assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
    assert int(answer.headers["retry-after"]) > 0
    assert (await queue.http.get("/health/ready")).json()["detail"] == "The service is stopping."
    assert (await queue.verb("ack", leased)).status_code == 200
    assert (await queue.enqueue("other"))["state"] == "ready"


async def test_lease_that_looks_while_the_service_begins_to_drain_keeps_what_it_finds(
    queue: Replica, world: World
):
    await queue.first_round()
    leasing = await waiting(queue)
    connection = await world.connect()
    async with connection.transaction():
        await connection.execute("LOCK TABLE leases IN SHARE MODE")
        job = await queue.enqueue()
        await world.blocked()
        queue.machine.service.drain()
    assert ids(await leasing) == [job["id"]]


async def test_room_that_is_full_takes_the_next_lease_when_one_has_left(world: World):
    queue = await world.replica(max_lease_waiters=2)
    gone = nobody_goes()
    leasing = [await waiting(queue, gone=gone), await waiting(queue)]
    with pytest.raises(UnavailableError, match="2 waiting leases"):
        await queue.machine.service.lease(LeaseRequest(queues=("q",)), nobody_goes())
    gone.set_result(None)
    assert await leasing[0] == []
    leasing.append(await waiting(queue))
    jobs = [await queue.enqueue(), await queue.enqueue()]
    assert sorted(ids(await leasing[1]) + ids(await leasing[2])) == [job["id"] for job in jobs]


# ---------------------------------------------------------------------------------------------------------------------
# Hints between processes


async def test_job_that_is_taken_here_is_not_told_to_the_others(queue: Replica, world: World):
    ear = await Ear.of(world)
    leasing = await waiting(queue)
    await queue.enqueue()
    assert len(await leasing) == 1
    await queue.enqueue("nobody-waits-here")
    await ear.hears("nobody-waits-here")
    assert ear.jobs("q") == 0


async def test_only_what_nobody_took_here_is_told_to_the_others(world: World):
    a, b = await world.replica(), await world.replica()
    here, there = await waiting(a), [await waiting(b) for _ in range(3)]
    stored = [await store_silently(a) for _ in range(3)]
    a.machine.service.wakeups.announce({Line("q", "default"): 3})
    taken = [*ids(await here), *ids(await there[0]), *ids(await there[1])]
    assert sorted(taken) == stored
    # The last one was not called for nothing: it sleeps, and takes the next.
    last = await a.enqueue()
    assert ids(await there[2]) == [last["id"]]


async def test_many_jobs_at_once_make_one_hint(queue: Replica, world: World):
    ear = await Ear.of(world)
    for number in range(1000):
        queue.machine.service.wakeups.announce({Line("q", f"type-{number % 2}"): 1})
    await ear.hears("q", 1000)
    assert [said["ready"] for said in ear.said] == [[["q", "type-0", 500], ["q", "type-1", 500]]]


async def test_hints_of_many_enqueues_are_fewer_and_tell_of_every_job(queue: Replica, world: World):
    ear = await Ear.of(world)
    await asyncio.gather(*(queue.enqueue() for _ in range(100)))
    await ear.hears("q", 100)
    assert ear.jobs("q") == 100
    assert len(ear.said) < 100


async def test_hint_that_is_too_large_for_a_notification_lets_the_others_look_for_themselves(world: World):
    a, b = await world.replica(), await world.replica()
    ear = await Ear.of(world)
    long_names = [f"{number:0100}" for number in range(HINT_BYTES_MAX // 100)]
    leasing = await waiting(b, long_names[-1], types=("default",))
    job_id = await store_silently(a, long_names[-1])
    a.machine.service.wakeups.announce({Line(name, "default"): 1 for name in long_names})
    assert ids(await leasing) == [job_id]
    assert [said.keys() for said in ear.said] == [{"from", "look"}]


@pytest.mark.parametrize(
    "said",
    [
        "",
        "hello",
        "[]",
        "null",
        "{}",
        '{"from": "a stranger"}',
        '{"from": "a stranger", "ready": 3}',
        '{"from": "a stranger", "ready": [["q"]]}',
        '{"from": "a stranger", "ready": [["q", "default", -1]]}',
        '{"from": "a stranger", "ready": [["q", "default", "many"]]}',
        '{"from": "a stranger", "ready": [[["q"], {}, 1]]}',
        "\\ud800" + "x" * 7000,
    ],
)
async def test_stranger_who_says_nonsense_on_the_channel_is_not_listened_to(said: str, world: World):
    a, b = await world.replica(), await world.replica()
    leasing = await waiting(b)
    connection = await world.connect()
    await connection.execute("SELECT pg_notify($1, $2)", CHANNEL, said)
    job = await a.enqueue()
    assert ids(await leasing) == [job["id"]]
    assert b.machine.service.wakeups.listening.is_set()


async def test_stranger_who_calls_for_jobs_that_are_not_there_makes_nobody_give_up(world: World):
    a, b = await world.replica(), await world.replica()
    leasing = await waiting(b)
    connection = await world.connect()
    await connection.execute(
        "SELECT pg_notify($1, $2)", CHANNEL, '{"from": "a stranger", "ready": [["q", "default", 1000000]]}'
    )
    job = await a.enqueue("q")
    assert ids(await leasing) == [job["id"]]


async def test_replicas_of_another_schema_are_not_listened_to(queue: Replica, world: World):
    ear = await Ear.of(world)
    connection = await world.connect()
    said = '{"from": "a stranger", "ready": [["q", "default", 1]]}'
    await connection.execute("SELECT pg_notify($1, $2)", "leaseq another", said)
    await queue.enqueue("own")
    await ear.hears("own")
    assert ear.jobs("q") == 0


# ---------------------------------------------------------------------------------------------------------------------
# When hints are lost


async def test_job_posted_while_a_replica_can_not_listen_is_found_when_it_listens_again(
    world: World, cluster_url: str
):
    a = await world.replica()
    connection = await world.connect()
    before = await listening(connection)
    b = await world.replica()
    [ear] = await listening(connection) - before
    leasing = await waiting(b)
    # The pool's connections stay; new ones, such as one to listen again, are refused.
    admin = await asyncpg.connect(with_database(cluster_url, "postgres"))
    name = await connection.fetchval("SELECT current_database()")
    await admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
    try:
        assert await connection.fetchval("SELECT pg_terminate_backend($1, 10000)", ear)
        async with asyncio.timeout(10):
            while b.machine.service.wakeups.listening.is_set():
                await asyncio.sleep(0.002)
        job = await a.enqueue()
        assert not leasing.done()
    finally:
        await admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
        await admin.close()
    assert ids(await leasing) == [job["id"]]
    await b.machine.service.wakeups.listening.wait()


@pytest.mark.parametrize("types", [None, ("default",), ("other", "default")])
async def test_job_of_which_no_hint_came_is_found_by_the_poll(types: tuple[str, ...] | None, world: World):
    queue = await world.replica(poll_seconds=QUICK_POLL_SECONDS)
    leasing = await waiting(queue, "empty", "q", types=types)
    job_id = await store_silently(queue)
    assert ids(await leasing) == [job_id]


async def test_poll_calls_as_many_as_there_are_jobs_and_lets_the_others_sleep(world: World):
    queue = await world.replica(poll_seconds=QUICK_POLL_SECONDS)
    leasing = [await waiting(queue) for _ in range(3)]
    stored = [await store_silently(queue) for _ in range(2)]
    assert sorted(ids(await leasing[0]) + ids(await leasing[1])) == stored
    assert not leasing[2].done()
    last = await store_silently(queue)
    assert ids(await leasing[2]) == [last]


async def test_poll_that_nothing_waits_for_asks_the_database_nothing(world: World):
    queue = await world.replica()
    connection = await world.connect()
    async with connection.transaction():
        await connection.execute("LOCK TABLE ready IN ACCESS EXCLUSIVE MODE")
        await queue.machine.service.wakeups.look()


async def test_poll_that_fails_is_logged_and_tries_again(world: World):
    queue = await world.replica(poll_seconds=QUICK_POLL_SECONDS)
    await queue.first_round()
    leasing = await waiting(queue)
    connection = await world.connect()
    with capture_logs() as logged:
        async with connection.transaction():
            await connection.execute("LOCK TABLE ready IN ACCESS EXCLUSIVE MODE")
            await world.blocked()
            await connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database()"
                " AND application_name = 'leaseq' AND wait_event_type = 'Lock'"
            )
            async with asyncio.timeout(10):
                while not logged:
                    await asyncio.sleep(0.002)
        job_id = await store_silently(queue)
        assert ids(await leasing) == [job_id]
    assert {line["event"] for line in logged if line["log_level"] == "warning"} == {"poll_failed"}


async def test_job_that_another_claim_lets_go_again_goes_to_a_waiting_lease(queue: Replica, world: World):
    job = await queue.enqueue()
    connection = await world.connect()
    async with connection.transaction():
        await connection.execute("SELECT FROM ready FOR UPDATE")
        assert await queue.lease() == []
        leasing = asyncio.create_task(queue.lease(wait_seconds=30))
        async with asyncio.timeout(10):
            while not queue.machine.service.wakeups.waiters:
                await asyncio.sleep(0.002)
    assert [leased["id"] for leased in await leasing] == [job["id"]]


async def test_jobs_that_others_are_taking_are_passed_over(queue: Replica, world: World):
    jobs = [await queue.enqueue() for _ in range(6)]
    connection = await world.connect()
    async with connection.transaction():
        await connection.execute("SELECT FROM ready ORDER BY since LIMIT 5 FOR UPDATE")
        assert [job["id"] for job in await queue.lease(max_jobs=3)] == [jobs[5]["id"]]
    assert [job["id"] for job in await queue.lease(max_jobs=6)] == [job["id"] for job in jobs[:5]]


async def listening(connection: "asyncpg.Connection[asyncpg.Record]") -> set[int]:
    """Return the backends that hear hints: what they last did was to listen, to hint or to show a sign of life."""
    rows = await connection.fetch(
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'leaseq'"
        " AND (query LIKE 'LISTEN%' OR query LIKE '%pg_notify%' OR query = 'SELECT 1')"
    )
    return {row["pid"] for row in rows}


async def test_nobody_is_called_for_a_paused_queue_until_it_goes_on():
    paused = {"q"}
    room = Room(lambda: paused)
    waiter = room.enter([Line("q"), Line("open")])
    assert room.call(Line("q", "t"), 1) == 0
    assert waiter.called_for is None
    assert room.waiting() == {Line("open"): 1}
    paused.clear()
    assert room.call(Line("q", "t"), 1) == 1
    assert waiter.called_for == Line("q", "t")
