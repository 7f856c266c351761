"""What happens below the routes: connections that are kept, heads without bodies, clients that go away."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from tests.conftest import Replica

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def connected(queue: Replica) -> AsyncIterator[Connection]:
    """Open one connection, to be kept for several requests."""
    reader, writer = await asyncio.open_connection("127.0.0.1", queue.server.port)
    try:
        async with asyncio.timeout(20):
            yield reader, writer
    finally:
        writer.transport.abort()


async def head_of(reader: asyncio.StreamReader) -> dict[str, str]:
    """Read an answer's head; its first line is under ''."""
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
    return {"": first} | {
        name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
    }


async def answer_of(reader: asyncio.StreamReader) -> tuple[str, bytes]:
    head = await head_of(reader)
    return head[""], await reader.readexactly(int(head["content-length"]))


async def test_a_head_is_answered_at_once_and_the_next_request_of_its_connection_too(queue: Replica):
    async with connected(queue) as (reader, writer):
        for _ in range(2):
            writer.write(b"HEAD /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await head_of(reader))[""].startswith("HTTP/1.1 ")
            writer.write(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            status, body = await answer_of(reader)
            assert status == "HTTP/1.1 200 OK"
            assert json.loads(body)


async def test_a_client_that_asks_before_it_sends_is_told_to_go_on_then_answered(queue: Replica):
    body = b'{"queue": "q"}'
    head = (
        b"POST /jobs HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nExpect: 100-continue\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body)
    )
    async with connected(queue) as (reader, writer):
        for _ in range(2):
            writer.write(head)
            assert (await head_of(reader))[""] == "HTTP/1.1 100 Continue"
            writer.write(body)
            status, job = await answer_of(reader)
            assert status == "HTTP/1.1 201 Created"
            assert json.loads(job)["queue"] == "q"


async def test_requests_that_come_in_one_piece_are_answered_in_order(queue: Replica):
    def post(number: int) -> bytes:
        body = b'{"queue": "q", "payload": %d}' % number
        return (
            b"POST /jobs HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        )

    async with connected(queue) as (reader, writer):
        writer.write(b"".join(map(post, range(5))))
        assert [json.loads((await answer_of(reader))[1])["payload"] for _ in range(5)] == list(range(5))


async def test_a_client_that_goes_away_after_a_large_body_leaves_its_place_in_line(queue: Replica):
    body = json.dumps({"queues": ["q"], "wait_seconds": 30, "worker": "w"}).encode().ljust(200_000)
    async with connected(queue) as (_, writer):
        writer.write(
            b"POST /lease HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        while not queue.machine.service.wakeups.waiters:
            await asyncio.sleep(0.002)
    async with asyncio.timeout(10):
        while queue.machine.service.wakeups.waiters:
            await asyncio.sleep(0.002)
    job = await queue.enqueue()
    assert (await queue.job(job["id"]))["state"] == "ready"


async def test_leases_on_one_connection_leave_nothing_behind(queue: Replica):
    """The future that tells of a vanished client lives as long as its connection."""
    connections: set[Any] = queue.server.server_state.connections
    for _ in range(3):
        waiting = asyncio.create_task(queue.lease(wait_seconds=30))
        while not queue.machine.service.wakeups.waiters:
            await asyncio.sleep(0.002)
        await queue.enqueue()
        await waiting
    assert connections
    for connection in connections:
        assert not connection._gone._callbacks
