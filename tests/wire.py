"""A wire to PostgreSQL that a test can cut: before a statement gets there, or before its reply gets back."""

import asyncio
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from enum import Enum
from urllib.parse import parse_qsl, urlencode, urlsplit

from app.store.database import HOT_SETTINGS

_CHUNK = 65_536
_IDLE = b"Z\x00\x00\x00\x05I"
"""What a server says after a statement outside of a transaction, or after its end: it is committed."""


class Cut(Enum):
    """Where to cut the next connection of the verbs that is spoken over."""

    BEFORE = "the statement never gets there"
    AFTER = "it is committed, but the reply never gets back"


class Wire:
    """Forwards connections to PostgreSQL. Cutting one is noticed at both ends."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        parameters = dict(parse_qsl(parts.query))
        self._host = parameters.get("host") or parts.hostname or "localhost"
        self._port = int(parameters.get("port") or parts.port or 5432)
        self._account = parts.netloc.rpartition("@")[0]
        self._database = parts.path
        self._next: Cut | None = None
        self._verbs: set[StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.cuts = 0
        self.url = ""

    def arm(self, cut: Cut) -> None:
        """Cut the connection of the next verb. Its statement must have been prepared there."""
        self._next = cut

    def cut_now(self) -> None:
        """Cut the verbs' connections. The server notices when it has done what it does."""
        for writer in list(self._verbs):
            self._cut(writer)

    def _cut(self, client: StreamWriter) -> None:
        self._next = None
        self._verbs.discard(client)
        self.cuts += 1
        client.transport.abort()

    async def _serve(self, client_in: StreamReader, client_out: StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if self._host.startswith("/"):
            opening = asyncio.open_unix_connection(f"{self._host}/.s.PGSQL.{self._port}")
        else:
            opening = asyncio.open_connection(self._host, self._port)
        server_in, server_out = await opening
        try:
            with suppress(ConnectionError):
                async with asyncio.TaskGroup() as tasks:
                    there = tasks.create_task(self._there(client_in, client_out, server_out))
                    back = tasks.create_task(self._back(server_in, client_out))
                    await asyncio.wait({there, back}, return_when=asyncio.FIRST_COMPLETED)
                    there.cancel()
                    back.cancel()
        except ExceptionGroup:
            """One of the ends has gone."""
        finally:
            self._verbs.discard(client_out)
            client_out.close()
            server_out.close()

    async def _there(
        self, client_in: StreamReader, client_out: StreamWriter, server_out: StreamWriter
    ) -> None:
        while data := await client_in.read(_CHUNK):
            if HOT_SETTINGS["plan_cache_mode"].encode() in data:
                self._verbs.add(client_out)
            elif client_out in self._verbs and self._next is Cut.BEFORE:
                self._cut(client_out)
                return
            server_out.write(data)
            await server_out.drain()

    async def _back(self, server_in: StreamReader, client_out: StreamWriter) -> None:
        while data := await server_in.read(_CHUNK):
            if client_out in self._verbs and self._next is Cut.AFTER and data.endswith(_IDLE):
                self._cut(client_out)
                return
            client_out.write(data)
            await client_out.drain()


@asynccontextmanager
async def wire_to(url: str) -> AsyncIterator[Wire]:
    """Put a wire between the database and whoever uses the wire's own `url`, for the length of the block."""
    wire = Wire(url)
    server = await asyncio.start_server(wire._serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    query = urlencode({"sslmode": "disable"})
    wire.url = f"postgresql://{wire._account}@127.0.0.1:{port}{wire._database}?{query}"
    try:
        yield wire
    finally:
        server.close()
        for task in list(wire._tasks):
            task.cancel()
        await asyncio.gather(*wire._tasks, return_exceptions=True)
