"""Thin routes: the verbs that producers and workers call all day.

FastAPI's own route spends more time on a request than the database does on the job. A thin route is a plain
Starlette route: read the body, decode it with msgspec, call the handler, send bytes. Its place in OpenAPI is made
from the same msgspec types that it decodes and encodes (see `openapi.py`); errors go through the same handlers.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import msgspec
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from app.api.body import decode, read_body
from app.queue.errors import JobNotFoundError

NO_LEASE = UUID(int=0)

_ENCODER = msgspec.json.Encoder()


@dataclass(frozen=True, slots=True)
class Reply:
    """What a handler answers."""

    body: bytes
    status: int = 200
    headers: tuple[tuple[bytes, bytes], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One thin route, with what OpenAPI says of it."""

    path: str
    name: str
    tag: str
    summary: str
    description: str
    request: Any
    """The msgspec type of the body."""
    reply: Any
    """The msgspec type of a good answer."""
    statuses: dict[int, str]
    """The good answers' statuses, each with what it means."""
    problems: tuple[str, ...]
    """The codes of the problems that it may answer, beside those that any request may."""
    example: dict[str, Any]
    handle: Callable[[Request, Any], Awaitable[Reply]]
    headers: tuple[str, ...] = ()
    """The request headers that it looks at."""
    takes_many: bool = False
    """Whether a body may hold many jobs' results."""


def encode(value: object) -> bytes:
    """Return `value` as JSON."""
    return _ENCODER.encode(value)


def job_id_of(text: str) -> UUID:
    """Return the job id in a path. Raises JobNotFoundError for what is none: there can be no such job."""
    try:
        job_id = UUID(text)
    except ValueError:
        raise JobNotFoundError from None
    if str(job_id) != text.lower():
        raise JobNotFoundError
    return job_id


def lease_id_of(text: str) -> UUID:
    """Return the lease id, or for what is none one that no job ever has."""
    try:
        return UUID(text)
    except ValueError:
        return NO_LEASE


class Endpoint:
    """Reads, decodes, handles, answers: an ASGI application. Raises QueueError for what it can not do."""

    def __init__(self, operation: Operation, body_bytes_max: int) -> None:
        self.path = operation.path
        self._handle = operation.handle
        self._decoder = msgspec.json.Decoder(operation.request)
        self._body_bytes_max = body_bytes_max

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        body = await read_body(scope, receive, self._body_bytes_max)
        reply = await self._handle(Request(scope, receive, send), decode(self._decoder, body))
        await send(
            {
                "type": "http.response.start",
                "status": reply.status,
                "headers": [
                    (b"content-type", b"application/json"),
                    (b"content-length", str(len(reply.body)).encode()),
                    *reply.headers,
                ],
            }
        )
        await send({"type": "http.response.body", "body": reply.body})


class ThinRoute(Route):
    """A route of the app whose endpoint `front.py` calls directly."""

    def __init__(self, operation: Operation, body_bytes_max: int) -> None:
        self.operation = operation
        self.served = Endpoint(operation, body_bytes_max)
        super().__init__(operation.path, self.served, methods=["POST"], name=operation.name)
