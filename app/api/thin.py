"""Thin routes: all that have a body, and so the verbs that producers and workers call all day.

FastAPI's own route spends more time on a request than the database does on the job. A thin route is a plain
Starlette route: read the body, decode it with msgspec, call the handler, send bytes. Its place in OpenAPI is made
from the same msgspec types that it decodes and encodes (see `openapi.py`); errors go through the same handlers.

The busy ones are called past FastAPI's middleware (see `front.py`), the others through it.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from uuid import UUID

import msgspec
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from app.api.body import are_lines, decode, read_body
from app.api.protocol import GONE
from app.queue.errors import JobNotFoundError

NO_LEASE = UUID(int=0)

# One spelling of an id: what names a job by another names none.
_CANONICAL = re.compile("[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")

_ENCODER = msgspec.json.Encoder()


class Call:
    """A request, as far as the handlers look at it."""

    __slots__ = ("_scope", "body", "headers")

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self.body = b""
        self.headers: dict[bytes, bytes] = dict(scope["headers"])

    @property
    def request_id(self) -> str:
        """The id that the front gave it."""
        request_id: str = self._scope["state"]["request_id"]
        return request_id

    @property
    def gone(self) -> "asyncio.Future[object]":
        """Done once the client has gone."""
        gone: asyncio.Future[object] = self._scope[GONE]
        return gone

    @property
    def job_id(self) -> UUID:
        """The job that its path names. Raises JobNotFoundError."""
        return job_id_of(self.path("job_id"))

    @property
    def query(self) -> str:
        """What stands behind the question mark."""
        query: bytes = self._scope["query_string"]
        return query.decode("latin-1")

    def path(self, name: str) -> str:
        """The part of the path that the route calls `name`."""
        part: str = self._scope["path_params"][name]
        return part


class Reply(NamedTuple):
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
    handle: Callable[[Call, Any], Awaitable[Reply]]
    headers: tuple[str, ...] = ()
    """The request headers that it looks at."""
    takes_many: bool = False
    """Whether a body may hold many jobs, or their results."""
    method: str = "POST"
    busy: bool = False
    """Whether it is called past FastAPI's middleware. Then it is a POST."""
    line: Any = None
    """The msgspec type of a line, where the body may be lines of JSON too; the handler gets such a body as bytes."""
    query: Mapping[str, Any] = field(default_factory=dict)
    """The parameters behind the path that it looks at, each with its type."""
    body_is_optional: bool = False
    """Whether no body at all means an empty object."""


def encode(value: object) -> bytes:
    """Return `value` as JSON."""
    return _ENCODER.encode(value)


def job_id_of(text: str) -> UUID:
    """Return the job id in a path. Raises JobNotFoundError for what is none: there can be no such job."""
    if _CANONICAL.fullmatch(text) is None:
        raise JobNotFoundError
    return UUID(text)


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
        self._body_is_optional = operation.body_is_optional
        self._takes_lines = operation.line is not None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        call = Call(scope)
        takes_lines = self._takes_lines and are_lines(call.headers)
        if self._body_is_optional and b"content-type" not in call.headers:
            # Only who sends a body says what it is; whoever does not say it sends none.
            await read_body({**call.headers, b"content-type": b"application/json"}, receive, 0)
            body = b"{}"
        else:
            body = await read_body(call.headers, receive, self._body_bytes_max, takes_lines=takes_lines)
        call.body = body
        reply = await self._handle(call, body if takes_lines else decode(self._decoder, body))
        await send(
            {
                "type": "http.response.start",
                "status": reply.status,
                "headers": [
                    *([(b"content-type", b"application/json")] if reply.body else []),
                    (b"content-length", str(len(reply.body)).encode()),
                    *reply.headers,
                ],
            }
        )
        await send({"type": "http.response.body", "body": reply.body})


class ThinRoute(Route):
    """A route of the app; where it is busy `front.py` calls its endpoint directly."""

    def __init__(self, operation: Operation, body_bytes_max: int) -> None:
        self.operation = operation
        self.served = Endpoint(operation, body_bytes_max)
        super().__init__(operation.path, self.served, methods=[operation.method], name=operation.name)
