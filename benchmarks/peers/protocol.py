"""protocol.mjs in Python: one JSON argument in, one JSON line out."""

import asyncio
import json
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from os import _exit
from typing import Any

WANTED: dict[str, Any] = json.loads(sys.argv[1])
PAYLOAD = b'{"to":"a@example.com","n":1}'


class Window:
    """What is done between the end of the warm-up, which begins with the first job, and the end of the time."""

    def __init__(self) -> None:
        self._jobs = self._total = 0
        self._from = self._last = float("inf")
        self._cpu_seconds = 0.0

    def add(self, count: int) -> None:
        """Count jobs that are done."""
        now = time.perf_counter()
        if self._total == 0:
            self._from = now + WANTED["warmup_seconds"]
        self._total += count
        if self._from <= now <= self._from + WANTED["seconds"]:
            self._cpu_seconds = self._cpu_seconds or time.process_time()
            self._jobs += count
            self._last = now

    @property
    def over(self) -> bool:
        """Whether there was time enough, or all is done."""
        return bool(self._total >= WANTED["count"] or time.perf_counter() > self._from + WANTED["seconds"])

    def result(self) -> dict[str, float]:
        """Return the answer."""
        return {
            "jobs": self._jobs,
            "seconds": self._last - self._from,
            "cpu_seconds": time.process_time() - self._cpu_seconds,
        }


async def repeat(step: Callable[[], Awaitable[object]]) -> dict[str, float]:
    """Call `step`, which does a job, over and over, `concurrency` times at once."""
    window = Window()

    async def loop() -> None:
        while not window.over:
            await step()
            window.add(1)

    await asyncio.gather(*(loop() for _ in range(WANTED["concurrency"])))
    return window.result()


async def watch(window: Window) -> dict[str, float]:
    """Wait until there was time enough, or all is done."""
    while not window.over:  # noqa: ASYNC110  # asking costs nothing, and an event would cost each job
        await asyncio.sleep(0.002)
    return window.result()


def answer(verb: Callable[[], Awaitable[dict[str, float]]]) -> None:
    """Run the verb, say what came of it, and leave, whatever still runs."""
    guard = threading.Timer(WANTED["limit_seconds"], _exit, (3,))
    guard.daemon = True
    guard.start()

    async def run() -> None:
        print(json.dumps(await verb()), flush=True)
        _exit(0)

    asyncio.run(run())
