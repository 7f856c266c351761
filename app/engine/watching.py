"""Requests that wait for the end of a job.

They wait in memory: no connection, no transaction. They are called by what ends in this process, at once; for what
ends elsewhere one query looks after all the jobs that are watched, each LOOK_SECONDS, while somebody watches. So
losing every notification costs nothing here.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from uuid import UUID

from app.engine.running import Component
from app.queue.errors import UnavailableError
from app.queue.events import JobDeleted, JobEvent, QueueEvent, told
from app.queue.lifecycle import TERMINAL
from app.queue.model import Job
from app.store.database import Database
from app.store.jobs import Jobs
from app.store.reads import Reads

LOOK_SECONDS = 0.5

COME_BACK_SECONDS = 5


class Watching(Component):
    """Who waits for the end of which job, in this process; an observer of what ends here."""

    def __init__(self, database: Database, jobs: Jobs, watchers_max: int) -> None:
        super().__init__()
        self._reads = Reads(database)
        self._jobs = jobs
        self._watchers_max = watchers_max
        self._watched: dict[UUID, set[asyncio.Event]] = {}
        self._somebody = asyncio.Event()
        self._draining = False
        self.watchers = 0

    def on(self, event: QueueEvent) -> None:
        """Call who waits for the job that has ended, if one has."""
        if not self._watched or not isinstance(event, JobEvent) or event.job_id not in self._watched:
            return
        happening = told(event)
        if isinstance(event, JobDeleted) or (happening is not None and happening.state in TERMINAL):
            self._call(event.job_id)

    async def ended(self, job_id: UUID, wait_seconds: float, gone: "asyncio.Future[object]") -> Job:
        """Return the job once it has ended, or as it stands after `wait_seconds`, at a stop, or when `gone` is done.

        Raises JobNotFoundError, also when it is deleted meanwhile; UnavailableError when too many wait already.
        """
        if self.watchers >= self._watchers_max:
            message = (
                f"{self._watchers_max} requests wait for the end of a job already; come back a little later."
            )
            raise UnavailableError(message, COME_BACK_SECONDS)
        until = asyncio.get_running_loop().time() + wait_seconds
        # Entered before the first look: what ends in between calls.
        with self._entered(job_id, gone) as call:
            while True:
                call.clear()
                job = await self._reads.require(job_id)
                if job.state in TERMINAL or self._draining or gone.done():
                    return job
                try:
                    async with asyncio.timeout_at(until):
                        await call.wait()
                except TimeoutError:
                    return await self._reads.require(job_id)

    def send_all_away(self) -> None:
        """Answer everybody with the job as it stands now, and from now on whoever comes."""
        self._draining = True
        for job_id in self._watched:
            self._call(job_id)

    @contextmanager
    def _entered(self, job_id: UUID, gone: "asyncio.Future[object]") -> Iterator[asyncio.Event]:
        call = asyncio.Event()

        def leave(_gone: "asyncio.Future[object]") -> None:
            call.set()

        self._watched.setdefault(job_id, set()).add(call)
        self.watchers += 1
        self._somebody.set()
        gone.add_done_callback(leave)
        try:
            yield call
        finally:
            gone.remove_done_callback(leave)
            self.watchers -= 1
            calls = self._watched[job_id]
            calls.discard(call)
            if not calls:
                del self._watched[job_id]

    def _call(self, job_id: UUID) -> None:
        for call in self._watched.get(job_id, ()):
            call.set()

    async def _run(self) -> None:
        while True:
            if not self._watched:
                self._somebody.clear()
                await self._somebody.wait()
            await asyncio.sleep(LOOK_SECONDS)
            # Who waits in vain while the database is away learns it from the look at the end of the wait.
            with suppress(UnavailableError):
                await self.look()

    async def look(self) -> None:
        """Call who waits for jobs that have ended, wherever that was. Raises UnavailableError."""
        watched = list(self._watched)
        if watched:
            living = await self._jobs.living(watched)
            for job_id in watched:
                if job_id not in living:
                    self._call(job_id)
