"""HTTP/1.1 by httptools, whose refusals are problems too, and whose answers leave in one piece."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.api.problems import MEDIA_TYPE, bad_request

CHUNKED = b"transfer-encoding: chunked"
GONE = "leaseq.gone"
"""Where a request's scope has the future that is done once its client has gone."""


class Joined:
    """A transport that holds an answer's head until its body comes.

    uvicorn writes them apart: two system calls, and two packets for the client to read.
    """

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self._held = b""

    def write(self, data: bytes) -> None:
        """Write `data`, with what is held before it."""
        if self._held:
            held, self._held = self._held, b""
            self._transport.write(held + data)
        elif CHUNKED in data:  # a stream: what comes next may be long in coming
            self._transport.write(data)
        else:
            self._held = data

    def close(self) -> None:
        """Close the connection when all is written."""
        self._flush()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def _flush(self) -> None:
        if self._held:
            held, self._held = self._held, b""
            self._transport.write(held)


class Protocol(HttpToolsProtocol):
    """uvicorn's protocol; what it can not read as HTTP reaches no route, and is refused here."""

    def connection_made(self, transport: Any) -> None:
        """Take a connection."""
        super().connection_made(transport)
        self._joined: Any = Joined(transport)
        self._gone: asyncio.Future[None] = self.loop.create_future()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell whoever waits that the client has gone."""
        super().connection_lost(exc)
        if not self._gone.done():
            self._gone.set_result(None)

    def on_headers_complete(self) -> None:
        """Take a request. Its task runs in a later turn of the loop."""
        super().on_headers_complete()
        self.scope[GONE] = self._gone  # type: ignore[literal-required]  # a server may add keys of its own
        if self.cycle is not None:
            self.cycle.transport = self._joined

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no request, and close the connection."""
        body = bad_request(msg)
        head = (
            "HTTP/1.1 400 Bad Request\r\n"
            f"content-type: {MEDIA_TYPE}\r\n"
            f"content-length: {len(body)}\r\n"
            "connection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()
