"""leaseq without its database, layer by layer: what each adds to the price of a request.

`python -m benchmarks.peers.layers LAYER PORT`, the layer one of

- uvicorn: raw ASGI that reads a body and sends canned bytes;
- protocol: the same on leaseq's protocol;
- front: everything above the store, which answers at once that the job is stored.
"""

import gc
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import uvicorn
from starlette.types import Receive, Scope, Send

from app.api.protocol import Protocol
from app.main import GARBAGE_THRESHOLD, build
from app.queue.model import Job, NewJob
from app.settings import Settings
from app.store.once import stored_job

CANNED = b"{" + b" " * 600 + b"}"
HEADERS = [(b"content-type", b"application/json"), (b"content-length", str(len(CANNED)).encode())]


async def raw(_scope: Scope, receive: Receive, send: Send) -> None:
    """Read a body and send canned bytes."""
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 201, "headers": HEADERS})
    await send({"type": "http.response.body", "body": CANNED})


async def _store_nothing(new: Sequence[NewJob]) -> list[Job]:
    now = datetime.now(UTC)
    row = {"created_at": now, "run_at": now, "expires_at": None}
    return [stored_job(job, row) for job in new]


def _front() -> Any:
    machine = build(Settings(_env_file=None, database_url="postgresql://"))
    machine.jobs.enqueue = _store_nothing  # type: ignore[method-assign]
    return machine.api.front


def main() -> None:
    """Serve until killed."""
    layer, port = sys.argv[1:]
    gc.freeze()
    gc.set_threshold(GARBAGE_THRESHOLD, 20, 50)
    uvicorn.run(
        _front() if layer == "front" else raw,
        port=int(port),
        http="httptools" if layer == "uvicorn" else Protocol,
        loop="uvloop",
        lifespan="off",
        access_log=False,
        log_level="warning",
        proxy_headers=False,
    )


if __name__ == "__main__":
    main()
