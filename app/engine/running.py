"""What it means to run: start once, stop and wait, own every task."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Coroutine
from typing import Any

import structlog

RESTART_SECONDS = 1.0
CANCEL_AGAIN_SECONDS = 1.0

log = structlog.get_logger(__name__)


class Component(ABC):
    """A part of the machine with one task of its own.

    `start` and `stop` may be called any number of times, in any order; `stop` returns when the task has ended.
    """

    def __init__(self) -> None:
        self._task: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()

    async def start(self) -> None:
        """Begin to run, unless it runs already."""
        async with self._turn:
            if self._task is None:
                self._task = asyncio.create_task(self._keep_running(), name=type(self).__name__)

    async def stop(self) -> None:
        """End the task and wait for its end."""
        async with self._turn:
            if self._task is not None:
                await _end(self._task)
                self._task = None

    async def _keep_running(self) -> None:
        while True:
            try:
                await self._run()
            except Exception:
                # A part of the machine that has quietly ended is worse than one that fails aloud and begins again.
                log.exception("component_failed", component=type(self).__name__)
                await asyncio.sleep(RESTART_SECONDS)

    @abstractmethod
    async def _run(self) -> None:
        """Run until cancelled."""


class TaskOwner:
    """Keeps the tasks that must outlive the request that began them, until they have ended."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        """Run `work` to its end; a failure is logged."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    async def settle(self, within_seconds: float) -> None:
        """Wait for what still runs, at most `within_seconds`, then end it."""
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=within_seconds)
            for task in late:
                await _end(task)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("background_work_failed", error=repr(error))


async def _end(task: "asyncio.Task[Any]") -> None:
    # Told again until it has ended: a cancellation that meets an error at the same moment is lost.
    while not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=CANCEL_AGAIN_SECONDS)
