"""The stream of what happens: what it tells, to whom, from where on, and what a bad listener costs."""

import asyncio
import json
import shutil
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime
from typing import Any
from uuid import uuid4

import pytest

from app.api import watch
from app.engine import streams
from app.engine.wakeup import HINT_BYTES_MAX
from app.queue.events import TOLD, JobEnqueued
from app.queue.lifecycle import State
from tests.conftest import Replica, World

UNKNOWN = "0198f2c1-9a4e-7c3d-8f21-5b6a7c8d9e0f"


class Listener:
    """One who listens, and remembers what he has been told."""

    def __init__(self, lines: AsyncIterator[str]) -> None:
        self._lines = lines
        self.id = ""
        """From where to resume."""
        self.comments = 0
        self.fields: dict[str, str] = {}

    async def block(self) -> dict[str, str]:
        """Read up to the next empty line; nothing at the end of the stream."""
        fields: dict[str, str] = {}
        async for line in self._lines:
            if not line:
                self.id = fields.get("id", self.id)
                return fields
            name, _, value = line.partition(": ")
            if name:
                assert name not in fields
                fields[name] = value
            else:
                assert value == "keep-alive"
                self.comments += 1
        return {}

    async def next(self) -> tuple[str, dict[str, Any]]:
        """Return the next event."""
        async with asyncio.timeout(10):
            while "event" not in (fields := await self.block()):
                assert fields, "the stream has ended"
        return fields["event"], json.loads(fields["data"])

    async def names(self, count: int) -> list[str]:
        return [(await self.next())[0] for _ in range(count)]

    async def at_end(self) -> bool:
        async with asyncio.timeout(10):
            while fields := await self.block():
                assert "event" not in fields
        return True


@asynccontextmanager
async def listening(queue: Replica, query: str = "", last_id: str | None = None) -> AsyncIterator[Listener]:
    """Listen for the length of the block; it begins when the service has heard of it."""
    headers = {} if last_id is None else {"Last-Event-ID": last_id}
    async with queue.http.stream("GET", f"/events{query}", headers=headers) as answer:
        assert answer.status_code == 200, await answer.aread()
        listener = Listener(answer.aiter_lines())
        head = await listener.block()
        assert set(head) == {"retry", "id"}
        yield listener


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0.002)


async def until_believed(*others: Replica) -> None:
    """Wait until these know that somebody listens elsewhere."""
    await until(lambda: all(other.machine.service.streams._others for other in others))


def happen(queue: Replica, count: int, name: str = "q") -> None:
    """Let so many events happen, at once."""
    for _ in range(count):
        event = JobEnqueued(job_id=uuid4(), queue=name, type="t", state=State.READY)
        queue.machine.service.streams.on(event)


async def test_everything_that_happens_to_a_job_is_told(queue: Replica):
    async with listening(queue) as listener:
        job = await queue.enqueue(type="t", backoff={"initial_seconds": 0}, payload="secret", max_retries=1)

        async def told(name: str, state: str) -> None:
            event, data = await listener.next()
            assert event == name
            assert event in TOLD
            assert data.pop("at")[-1] == "Z"
            assert data == {"id": job["id"], "queue": "q", "type": "t", "state": state}

        await told("job.enqueued", "ready")
        await queue.verb("release", await queue.lease_one())
        await told("job.leased", "active")
        await told("job.released", "ready")
        await queue.verb("release", await queue.lease_one(), delay_seconds=5)
        await told("job.leased", "active")
        await told("job.released", "scheduled")
        queue.clock.move(6)
        await queue.maintain()
        await queue.fail(await queue.lease_one(), "secret")
        await told("job.leased", "active")
        await told("job.retry", "retry")
        queue.clock.move(6)
        await queue.maintain()
        await queue.lease_one()
        await told("job.leased", "active")
        queue.clock.move(31)
        await queue.maintain()
        await told("job.failed", "failed")
        await queue.http.post(f"/jobs/{job['id']}/retry")
        await told("job.retry", "ready")
        await queue.http.post(f"/jobs/{job['id']}/cancel")
        await told("job.cancelled", "cancelled")
        await queue.http.post(f"/jobs/{job['id']}/retry")
        await told("job.retry", "ready")
        leased = await queue.lease_one()
        await told("job.leased", "active")
        await queue.verb("heartbeat", leased, progress={"percent": 40, "message": "secret"})
        await told("job.progress", "active")
        await queue.verb("ack", leased, result="secret")
        await told("job.completed", "completed")
        job = await queue.enqueue(type="t", delay_seconds=60, expires_in_seconds=90)
        await told("job.enqueued", "scheduled")
        queue.clock.move(100)
        await queue.maintain()
        await told("job.expired", "expired")


async def test_a_cancelled_attempt_is_told_as_a_cancel(queue: Replica):
    job = await queue.enqueue()
    leased = await queue.lease_one()
    async with listening(queue) as listener:
        await queue.http.post(f"/jobs/{job['id']}/cancel")
        await queue.fail(leased)
        event, data = await listener.next()
    assert (event, data["state"]) == ("job.cancelled", "cancelled")


async def test_the_stream_is_one_that_proxies_pass_on(queue: Replica):
    async with queue.http.stream("GET", "/events") as answer:
        assert answer.headers["content-type"] == "text/event-stream"
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["x-accel-buffering"] == "no"
        assert answer.headers["transfer-encoding"] == "chunked"
        assert answer.headers["x-request-id"]


@pytest.mark.parametrize(
    ("query", "numbers"),
    [
        ("?queue=a", [0, 1]),
        ("?queue=a&queue=b", [0, 1, 2, 3]),
        ("?type=x", [0, 2, 4]),
        ("?type=y&queue=b&queue=c", [3, 5]),
        ("?id={2}", [2]),
        ("?id={2}&id={5}", [2, 5]),
        ("?id={2}&queue=a&queue=c&id={5}", [5]),
        ("?id={U}", []),
        ("", [0, 1, 2, 3, 4, 5]),
    ],
)
async def test_filters_choose_by_queue_type_and_id(queue: Replica, query: str, numbers: list[int]):
    # Ids are known once the jobs are there: it is their leases that are listened to.
    jobs = [await queue.enqueue(name, type=type_) for name in "abc" for type_ in "xy"]
    for number, job in enumerate(jobs):
        query = query.replace(f"{{{number}}}", job["id"])
    async with listening(queue) as everything, listening(queue, query.replace("{U}", UNKNOWN)) as listener:
        await queue.lease("a", "b", "c", max_jobs=6)
        assert await everything.names(6) == ["job.leased"] * 6
        told = [(await listener.next())[1]["id"] for _ in numbers]
        assert told == [jobs[number]["id"] for number in numbers]
        queue.machine.service.drain()
        assert await listener.at_end()


@pytest.mark.parametrize("query", ["?queue=", "?queue=a%20b", "?type=%00", "?id=x", "?state=ready", "?id="])
async def test_what_no_filter_can_be_is_refused(queue: Replica, query: str):
    answer = await queue.http.get(f"/events{query}")
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid")


async def test_who_was_cut_off_goes_on_where_he_was(queue: Replica):
    async with listening(queue) as listener:
        await queue.enqueue()
        await listener.next()
    missed = [await queue.enqueue() for _ in range(3)]
    async with listening(queue, last_id=listener.id) as again:
        told = [(await again.next())[1]["id"] for _ in range(3)]
        later = await queue.enqueue()
        told.append((await again.next())[1]["id"])
    assert told == [job["id"] for job in (*missed, later)]


async def test_who_was_cut_off_before_anything_happened_goes_on_too(queue: Replica):
    async with listening(queue) as listener:
        pass
    job = await queue.enqueue()
    async with listening(queue, last_id=listener.id) as again:
        assert (await again.next())[1]["id"] == job["id"]


async def test_who_comes_anew_is_told_of_what_happens_from_now_on(queue: Replica):
    async with listening(queue):
        await queue.enqueue()
        async with listening(queue) as listener:
            job = await queue.enqueue()
            assert (await listener.next())[1]["id"] == job["id"]


async def test_what_is_not_in_the_ring_any_more_can_not_be_resumed(
    world: World, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(streams, "KEPT_MAX", 4)
    queue = await world.replica()
    async with listening(queue) as listener:
        pass
    happen(queue, 4)
    async with listening(queue, last_id=listener.id) as again:
        assert await again.names(4) == ["job.enqueued"] * 4
    happen(queue, 5)
    async with listening(queue, last_id=again.id) as reset:
        assert await reset.next() == ("reset", {"reason": "resume"})
        happen(queue, 1)
        assert await reset.names(1) == ["job.enqueued"]
    happen(queue, 1)
    async with listening(queue, last_id=reset.id) as again:
        assert await again.names(1) == ["job.enqueued"]


@pytest.mark.parametrize(
    "last_id", ["", "x", "-1", "{process}-", "{process}-99999", "{process}-٣", "{process}-" + "9" * 30]
)
async def test_an_id_that_never_was_begins_with_a_reset(queue: Replica, last_id: str):
    async with listening(queue) as listener:
        pass
    process = listener.id.partition("-")[0]
    headers = {b"Last-Event-ID": last_id.replace("{process}", process).encode()}
    async with queue.http.stream("GET", "/events", headers=headers) as answer:
        again = Listener(answer.aiter_lines())
        assert await again.next() == ("reset", {"reason": "resume"})


async def test_the_ids_of_another_process_or_of_one_before_a_restart_begin_with_a_reset(world: World):
    before = await world.replica()
    async with listening(before) as listener:
        happen(before, 3)
        await listener.names(3)
    restarted = await world.replica()
    async with listening(restarted, last_id=listener.id) as again:
        assert await again.next() == ("reset", {"reason": "resume"})


async def test_when_nobody_has_listened_for_a_while_nothing_is_kept(
    queue: Replica, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(streams, "LINGER_SECONDS", 0)
    monkeypatch.setattr(streams, "ANNOUNCE_SECONDS", 0.01)
    ring = queue.machine.service.streams.ring
    happen(queue, 3)
    assert ring.last == 0
    async with listening(queue) as listener:
        happen(queue, 3)
        await listener.names(3)
    await until(lambda: not queue.machine.service.streams._recording.is_set())
    last = ring.last
    happen(queue, 3)
    assert ring.last == last
    async with listening(queue, last_id=listener.id) as again:
        assert await again.next() == ("reset", {"reason": "resume"})
        happen(queue, 1)
        assert await again.names(1) == ["job.enqueued"]


async def test_a_silent_stream_says_that_it_is_alive_and_how_far_it_is(
    queue: Replica, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(watch, "KEEP_ALIVE_SECONDS", 0.01)
    async with listening(queue, "?queue=other") as listener:
        while listener.comments < 2:
            assert set(await listener.block()) == {"id"}
        begin = listener.id
        happen(queue, 3)
        async with asyncio.timeout(10):
            while listener.id == begin:
                assert set(await listener.block()) == {"id"}
    # What was left out is behind him.
    happen(queue, 1, "other")
    async with listening(queue, "?queue=other", last_id=listener.id) as again:
        assert await again.names(1) == ["job.enqueued"]


async def test_more_listeners_than_the_setting_allows_are_told_to_come_back(world: World):
    queue = await world.replica(max_event_streams=1)
    async with listening(queue) as listener:
        answer = await queue.http.get("/events")
        assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
        assert int(answer.headers["retry-after"]) > 0
        happen(queue, 1)
        assert await listener.names(1) == ["job.enqueued"]
    await until(lambda: queue.machine.service.streams.count == 0)
    async with listening(queue):
        pass


async def test_a_client_that_goes_away_leaves_at_once(queue: Replica):
    async with listening(queue):
        assert queue.machine.service.streams.count == 1
    await until(lambda: queue.machine.service.streams.count == 0)


async def test_a_stop_ends_every_stream(queue: Replica):
    async with listening(queue) as listener, listening(queue, "?queue=other") as other:
        queue.server.stop()
        assert await listener.at_end()
        assert await other.at_end()
        await queue.serving


@asynccontextmanager
async def deaf(queue: Replica) -> AsyncIterator[asyncio.StreamReader]:
    """A listener who does not read: everything between him and his stream is full."""
    client = socket.socket()
    # A few of the largest segments: with less the kernel would wait for its timers when he reads again.
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 18)
    client.connect(("127.0.0.1", queue.server.port))
    reader, writer = await asyncio.open_connection(sock=client, limit=16_384)
    try:
        writer.write(b"GET /events HTTP/1.1\r\nHost: x\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        connections: Any = queue.server.server_state.connections
        async with asyncio.timeout(30):
            turns_full = 0
            while turns_full < 20:  # what the kernel still takes it takes in these turns
                if queue.machine.service.streams._news._waiters:
                    happen(queue, 256, "q" * 128)
                await asyncio.sleep(0)
                turns_full = turns_full + 1 if any(each.flow.write_paused for each in connections) else 0
        yield reader
    finally:
        writer.transport.abort()


async def test_a_reader_who_is_too_slow_falls_out_of_the_ring_and_is_told_so(queue: Replica):
    async with deaf(queue) as reader, listening(queue) as listener:
        ring = queue.machine.service.streams.ring
        for _ in range(2 * streams.KEPT_MAX // 200):
            happen(queue, 200)
            assert await listener.names(200) == ["job.enqueued"] * 200  # nobody waits for the other
        assert ring.last - ring.first + 1 == streams.KEPT_MAX == len(ring._slots)
        async with asyncio.timeout(30):
            while b'data: {"reason":"slow"}\n' not in await reader.readuntil(b"\n"):
                pass
            happen(queue, 1, "later")
            while b'"queue":"later"' not in await reader.readuntil(b"\n"):
                pass
        metrics = (await queue.http.get("/metrics")).text
    assert 'leaseq_event_stream_resets_total{reason="slow"} 1.0\n' in metrics


async def test_a_stop_does_not_wait_for_a_reader_who_does_not_read(
    queue: Replica, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(streams, "CUT_SECONDS", 0)
    async with deaf(queue):
        # The time that requests may take to end is much longer than this test may last.
        queue.server.config.timeout_graceful_shutdown = 3600
        queue.server.stop()
        async with asyncio.timeout(20):
            await queue.serving


async def test_what_happens_in_another_process_is_told_too(queue: Replica, world: World):
    elsewhere = await world.replica()
    async with listening(queue) as listener, listening(queue, "?queue=other") as other:
        await until_believed(elsewhere)
        before = time.time()
        job = await elsewhere.enqueue(type="t")
        event, data = await listener.next()
        at = data.pop("at")
        assert (event, data) == (
            "job.enqueued",
            {"id": job["id"], "queue": "q", "type": "t", "state": "ready"},
        )
        assert abs(datetime.fromisoformat(at).timestamp() - before) < 60  # the same minute
        await elsewhere.enqueue("other")
        assert (await listener.next())[1]["queue"] == "other"
        assert (await other.next())[1]["queue"] == "other"
    # It can be resumed as what happens here.
    job = await elsewhere.enqueue()
    async with listening(queue, last_id=listener.id) as again:
        assert (await again.next())[1]["id"] == job["id"]


async def test_a_process_that_comes_later_asks_who_listens(queue: Replica, world: World):
    async with listening(queue) as listener:
        elsewhere = await world.replica()
        await until_believed(elsewhere)
        job = await elsewhere.enqueue()
        assert (await listener.next())[1]["id"] == job["id"]


async def test_all_that_fits_is_told_in_order_in_hints_that_postgresql_takes(queue: Replica, world: World):
    elsewhere = await world.replica()
    async with listening(queue) as listener:
        await until_believed(elsewhere)
        for number in range(streams.BATCH_EVENTS_MAX // 3):
            happen(elsewhere, 1, f"{'q' * 100}{number}")
        for number in range(streams.BATCH_EVENTS_MAX // 3):
            event, data = await listener.next()
            assert (event, data["queue"]) == ("job.enqueued", f"{'q' * 100}{number}")
    assert HINT_BYTES_MAX < 8000  # PostgreSQL's own limit


@pytest.mark.parametrize("limit", ["BATCH_EVENTS_MAX", "BATCH_HINTS_MAX"])
async def test_what_is_too_much_between_processes_is_a_reset(
    queue: Replica, world: World, monkeypatch: pytest.MonkeyPatch, limit: str
):
    monkeypatch.setattr(streams, limit, 2)
    elsewhere = await world.replica()
    async with listening(queue, "?queue=other") as listener:
        await until_believed(elsewhere)
        happen(elsewhere, 500)
        assert await listener.next() == ("reset", {"reason": "missing"})
        happen(elsewhere, 1, "other")
        assert await listener.names(1) == ["job.enqueued"]


async def test_nothing_is_said_to_others_while_none_of_them_listens(queue: Replica, world: World):
    elsewhere = await world.replica()
    connection = await world.connect()
    said: list[dict[str, Any]] = []
    await connection.add_listener("leaseq leaseq", lambda *message: said.append(json.loads(str(message[3]))))
    async with listening(queue) as listener:
        await until_believed(elsewhere)
        await queue.enqueue()
        await listener.next()
        await elsewhere.enqueue()
        await listener.next()
        # The test's own connection may hear it a moment later.
        await until(lambda: any("told" in word.get("events", ()) for word in said))
    kinds = [next(iter(word["events"])) for word in said if "events" in word]
    assert kinds.count("told") == 1
    assert set(kinds) == {"told", "listening"}


async def test_a_process_is_not_believed_for_ever(
    queue: Replica, world: World, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(streams, "BELIEF_SECONDS", 0)
    elsewhere = await world.replica()
    async with listening(queue):
        await until_believed(elsewhere)
        happen(elsewhere, 1)
        await until(lambda: not elsewhere.machine.service.streams._others)
    assert elsewhere.machine.service.streams._idle


@pytest.mark.parametrize("loses", ["who listens", "who tells"])
async def test_a_lost_connection_is_a_reset(queue: Replica, world: World, loses: str):
    elsewhere = await world.replica()
    connection = await world.connect()
    async with listening(queue) as listener:
        await until_believed(elsewhere)
        loser = queue if loses == "who listens" else elsewhere
        event = loser.machine.service.wakeups.listening
        # Both listen; the later connection is the one of elsewhere.
        order = "backend_start" if loses == "who listens" else "backend_start DESC"
        await connection.execute(
            "SELECT pg_terminate_backend(pid) FROM (SELECT pid FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name = 'leaseq' AND query ~ 'LISTEN|pg_notify'"
            f" ORDER BY {order} LIMIT 1) AS one"
        )
        assert await listener.next() == ("reset", {"reason": "missing"})
        await event.wait()
        await until_believed(elsewhere)
        happen(elsewhere, 1)
        assert await listener.names(1) == ["job.enqueued"]


@pytest.mark.parametrize(
    "word",
    [
        7,
        [],
        {"told": 7},
        {"told": [[]]},
        {"told": [["job.enqueued\nx", UNKNOWN, "q", "t", "ready", 1]]},
        {"told": [["job.enqueued", "x", "q", "t", "ready", 1]]},
        {"told": [["job.enqueued", UNKNOWN, "q", "t", "unready", 1]]},
        {"told": [["job.enqueued", UNKNOWN, "q", "t", "ready", float("inf")]]},
        {"told": [["job.enqueued", UNKNOWN, "q", "t", "ready", "x"]]},
    ],
)
async def test_words_that_make_no_sense_are_passed_over(queue: Replica, world: World, word: object):
    connection = await world.connect()
    async with listening(queue) as listener:
        for said in (word, {"told": [["job.failed", UNKNOWN, "q\nx", "t", "failed", 1.5]]}):
            message = json.dumps({"from": "a stranger", "events": said})
            await connection.execute("SELECT pg_notify('leaseq leaseq', $1)", message)
        expected = {
            "id": UNKNOWN,
            "queue": "q\nx",
            "type": "t",
            "state": "failed",
            "at": "1970-01-01T00:00:01.500000Z",
        }
        assert await listener.next() == ("job.failed", expected)


async def test_metrics_show_listeners_and_leave_their_time_out(queue: Replica):
    async with listening(queue):
        assert "\nleaseq_event_streams 1.0\n" in (await queue.http.get("/metrics")).text
    await until(lambda: queue.machine.service.streams.count == 0)
    metrics = (await queue.http.get("/metrics")).text
    assert "\nleaseq_event_streams 0.0\n" in metrics
    assert 'leaseq_http_requests_total{handler="/events",method="GET",status="2xx"} 1.0\n' in metrics
    assert 'leaseq_http_request_duration_seconds_count{handler="/events",method="GET"} 0.0\n' in metrics


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
async def test_curl_shows_events_as_they_happen(queue: Replica):
    process = await asyncio.create_subprocess_exec(
        "curl", "-sN", f"{queue.http.base_url}/events", stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(10):
            await process.stdout.readuntil(b"\n\n")
            job = await queue.enqueue()
            block = (await process.stdout.readuntil(b"\n\n")).decode()
        assert "event: job.enqueued\n" in block
        assert job["id"] in block
    finally:
        process.kill()
        await process.wait()


async def test_many_listeners_hear_all_of_it_in_order(queue: Replica):
    async with AsyncExitStack() as stack:
        listeners = [await stack.enter_async_context(listening(queue)) for _ in range(5)]
        jobs = await asyncio.gather(*(queue.enqueue() for _ in range(300)))
        told = [[(await listener.next())[1]["id"] for _ in jobs] for listener in listeners]
    assert all(ids == told[0] for ids in told)
    assert set(told[0]) == {job["id"] for job in jobs}
