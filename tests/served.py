"""leaseq as a process of its own, the way that people run it, with what it says on standard error."""

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[1]
START_SECONDS_MAX = 60


def environment(**variables: str) -> dict[str, str]:
    """Return this process's environment with no setting of leaseq but the given ones."""
    own = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("QUEUE_") and name != "DATABASE_URL"
    }
    return {**own, "PYTHONPATH": str(ROOT), **variables}


@dataclass
class Served:
    """A running process, and a client that talks to it."""

    http: httpx.AsyncClient
    log_file: Path

    @property
    def log(self) -> str:
        """All that it has said on standard error."""
        return self.log_file.read_text()

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Its log lines; each must be a JSON object."""
        return [json.loads(line) for line in self.log.splitlines()]


@asynccontextmanager
async def served(directory: Path, database_url: str, **variables: str) -> AsyncIterator[Served]:
    """Run `python -m app serve` in `directory` for the length of the block; it must end well by itself."""
    log_file = directory / "stderr"
    with log_file.open("wb") as stderr:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "app", "serve"),
            cwd=directory,
            env=environment(DATABASE_URL=database_url, QUEUE_PORT="0", QUEUE_MIGRATE="false", **variables),
            stdout=asyncio.subprocess.PIPE,
            stderr=stderr,
        )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(START_SECONDS_MAX):
            while not (ready := re.search(rb"ready at (\S+)", await process.stdout.readline())):
                assert not process.stdout.at_eof(), log_file.read_text()
        async with httpx.AsyncClient(base_url=ready[1].decode(), timeout=30) as http:
            yield Served(http, log_file)
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(30):
            assert await process.wait() == 0, log_file.read_text()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
