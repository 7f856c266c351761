"""The least that can answer wrk: canned replies. What wrk reaches here is what the load generator can do.

The port is the only argument.
"""

import asyncio
import sys
from typing import cast

import uvloop

_ID = "0198f2c1-9a4e-7c3d-8f21-5b6a7c8d9e0f"
_JOB = (
    f'{{"id":"{_ID}","queue":"bench","type":"default","payload":{{"to":"a@example.com","n":1}},"attempt":1,'
    f'"max_retries":3,"priority":5,"lease_id":"{_ID}","lease_expires_at":"2026-01-01T00:00:00.000000Z",'
    '"created_at":"2026-01-01T00:00:00.000000Z","run_at":"2026-01-01T00:00:00.000000Z","tags":[],"metadata":{},'
    '"traceparent":null,"last_error":null}'
)
_SETTLED = f'{{"job_id":"{_ID}","status":200,"state":"completed"}}'


def _reply(status: str, body: str) -> bytes:
    return (
        f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    ).encode()


class _Trivial(asyncio.Protocol):
    LEASED = _reply("200 OK", f'{{"jobs":[{_JOB}],"settled":[{_SETTLED}]}}')
    STORED = _reply("201 Created", _JOB)
    ACKED = _reply("200 OK", _JOB)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        # wrk sends one whole request, and the next one after the reply.
        if data.startswith(b"POST /lease"):
            self._transport.write(self.LEASED)
        else:
            self._transport.write(self.ACKED if data.startswith(b"POST /jobs/") else self.STORED)


async def _serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(_Trivial, "127.0.0.1", port)
    await server.serve_forever()


uvloop.run(_serve(int(sys.argv[1])))
