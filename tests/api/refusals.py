"""What tests of refused requests share: a socket with no manners, a problem's shape, and «nothing has changed»."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from app.api.problems import CODES, MEDIA_TYPE, TYPE_PREFIX
from tests.conftest import Replica, World

LEASE_ID = "7f3d2c52-7a4e-4a2b-9d6e-0d8b2a2f6c11"
JSON = {"Content-Type": "application/json"}
TABLES = (
    "jobs",
    "ready",
    "scheduled",
    "held",
    "leases",
    "dead",
    "history",
    "attempts",
    "notes",
    "unique_keys",
    "idempotency_keys",
)
STATES = ["scheduled", "ready", "held", "active", "retry", "completed", "failed", "cancelled", "expired"]
COUNTED = (
    f"SELECT queue, {', '.join(f'coalesce(sum({state}), 0)' for state in STATES)}"
    f" FROM (SELECT queue, {', '.join(STATES)} FROM counts UNION ALL SELECT queue, {', '.join(STATES)} FROM deltas)"
    f" AS c GROUP BY queue HAVING {' OR '.join(f'sum({state}) <> 0' for state in STATES)}"
)


def problem(answer: httpx.Response, code: str) -> dict[str, Any]:
    """Return the answer's problem, once it is all that the contract promises of one with this code."""
    assert answer.headers["content-type"] == MEDIA_TYPE, answer.text
    told: dict[str, Any] = answer.json()
    status, title = CODES[code]
    assert (told["code"], answer.status_code) == (code, status), answer.text
    assert told["type"] == TYPE_PREFIX + code
    assert (told["status"], told["title"]) == (status, title)
    assert told["detail"]
    assert told["request_id"] == answer.headers["x-request-id"]
    assert "Traceback" not in answer.text
    return told


def outcome(answer: httpx.Response) -> str:
    """Return status and code in a few words, for tables of cases: `400 malformed_json`, `201`."""
    if answer.is_success:
        return str(answer.status_code)
    return f"{answer.status_code} {problem(answer, answer.json()['code'])['code']}"


@asynccontextmanager
async def nothing_changes(world: World) -> AsyncIterator[None]:
    """Let no row of any table be different after the block, and no count: maintenance may fold them meanwhile."""
    connection = await world.connect()

    async def everything() -> dict[str, str]:
        return {
            table: await connection.fetchval(
                f"SELECT count(*) || md5(coalesce(string_agg(t::text, ',' ORDER BY t::text), '')) FROM {table} AS t"
            )
            for table in (*TABLES, f"({COUNTED})")
        }

    before = await everything()
    yield
    assert await everything() == before


@dataclass(frozen=True)
class RawAnswer:
    """An answer as it came over the socket."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(self.body)
        return told


async def raw_request(queue: Replica, head: bytes, *body: bytes) -> RawAnswer:
    """Send bytes as they are, never more than these, and read one answer.

    `head` is the request line and headers without the empty line; what is still unsent when the answer comes stays
    unsent. Asks for a connection that ends with the answer, unless `head` says otherwise.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", queue.server.port)
    try:
        async with asyncio.timeout(20):
            ending = b"" if b"\nconnection:" in head.lower() else b"\r\nConnection: close"
            writer.write(head + ending + b"\r\n\r\n")
            writer.writelines(body)
            answer = await reader.readuntil(b"\r\n\r\n")
            status_line, *lines = answer.decode("latin-1").strip().split("\r\n")
            headers = {
                name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
            }
            is_head = head.startswith(b"HEAD ")
            content = b"" if is_head else await reader.readexactly(int(headers["content-length"]))
            return RawAnswer(int(status_line.split()[1]), headers, content)
    finally:
        writer.transport.abort()
