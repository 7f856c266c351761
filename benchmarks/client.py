"""A small HTTP client for what wrk can not do: time single calls, and wait by the thousand."""

import asyncio
import json
import time
from typing import Any

from benchmarks.processes import BenchmarkError
from benchmarks.results import quantile

PAYLOAD = {"to": "a@example.com", "n": 1}
OK_BELOW = 300


class Client:
    """One kept-alive connection; one call at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def connect(cls, port: int) -> "Client":
        """Connect over loopback."""
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def post(self, path: str, body: object) -> Any:
        """Post JSON and return the reply's. Raises BenchmarkError unless the answer is a success."""
        data = json.dumps(body).encode()
        self._writer.write(
            f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(data)}\r\n\r\n".encode()
            + data
        )
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(head.split("content-length:", 1)[1].split("\r\n", 1)[0])
        reply = await self._reader.readexactly(length)
        status = int(head.split(" ", 2)[1])
        if status >= OK_BELOW:
            message = f"POST {path} was answered with {status}: {reply[:500].decode(errors='replace')}"
            raise BenchmarkError(message)
        return json.loads(reply)

    async def enqueue(self, queue: str) -> None:
        """Store one job."""
        await self.post("/jobs", {"queue": queue, "payload": PAYLOAD})

    async def lease(self, queue: str, wait_seconds: float = 0) -> list[dict[str, Any]]:
        """Lease at most one job."""
        words = {"queues": [queue], "wait_seconds": wait_seconds, "worker": "bench"}
        jobs: list[dict[str, Any]] = (await self.post("/lease", words))["jobs"]
        return jobs

    async def ack(self, job: dict[str, Any]) -> None:
        """Finish a job."""
        await self.post(f"/jobs/{job['id']}/ack", {"lease_id": job["lease_id"]})

    def close(self) -> None:
        """Close the connection."""
        self._writer.close()


async def paced(
    port: int, queue: str, *, rate: float, seconds: float, slices: int, concurrency: int
) -> list[tuple[float, float]]:
    """Enqueue, lease and ack `rate` times a second; return p50 and p99 of the leases' ms in each slice of time."""
    began = time.perf_counter()
    found: list[list[float]] = [[] for _ in range(slices)]
    pause_seconds = concurrency / rate

    async def loop(number: int) -> None:
        client = await Client.connect(port)
        due = began + pause_seconds * number / concurrency
        while True:
            await asyncio.sleep(max(0, due - time.perf_counter()))
            place = int((time.perf_counter() - began) / seconds * slices)
            if place >= slices:
                client.close()
                return
            await client.enqueue(queue)
            asked = time.perf_counter()
            jobs = await client.lease(queue)
            found[place].append((time.perf_counter() - asked) * 1000)
            for job in jobs:
                await client.ack(job)
            due = max(due + pause_seconds, time.perf_counter())

    await asyncio.gather(*map(loop, range(concurrency)))
    return [(quantile(each, 0.5), quantile(each, 0.99)) for each in found if each]
