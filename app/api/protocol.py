"""HTTP/1.1 by httptools, whose refusals are problems too, and whose answers leave in one piece."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.api.problems import MEDIA_TYPE, bad_request

CHUNKED = b"transfer-encoding: chunked"
GONE = "leaseq.gone"
"""Where a request's scope has the future that is done once its client has gone."""
CUT = "leaseq.cut"
"""Where it has what ends its connection at once, whatever is still to be sent."""


class Joined:
    """A transport for one answer: it holds the answer's head until its body comes.

    uvicorn writes them apart: two system calls, and two packets for the client to read.
    """

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self._held = b""
        self._begun = False

    def write(self, data: bytes) -> None:
        """Write `data`, with the head if that is held."""
        if self._held:
            held, self._held = self._held, b""
            self._transport.write(held + data)
        elif self._begun or CHUNKED in data:  # of a stream, the next part may be long in coming
            self._transport.write(data)
        else:
            self._held = data
        self._begun = True

    def close(self) -> None:
        """Close the connection when all is written."""
        if self._held:
            held, self._held = self._held, b""
            self._transport.write(held)
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class Protocol(HttpToolsProtocol):
    """uvicorn's protocol; what it can not read as HTTP reaches no route, and is refused here."""

    def connection_made(self, transport: Any) -> None:
        """Take a connection."""
        super().connection_made(transport)
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
        self.scope[CUT] = self.transport.abort  # type: ignore[literal-required]
        # To a HEAD no body is written, and "100 Continue" must not wait for one.
        if self.cycle is not None and self.scope["method"] != "HEAD" and not self.expect_100_continue:
            cycle: Any = self.cycle
            cycle.transport = Joined(self.transport)

    def on_message_complete(self) -> None:
        """Go on reading after a large body too: else nobody would notice when the client goes."""
        super().on_message_complete()
        if not self.pipeline:
            self.flow.resume_reading()

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
