"""Why a job is not running: the facts, of the database and of this process, and what they mean."""

from contextlib import suppress
from uuid import UUID

from app.engine.cursors import Cursors
from app.engine.workers import Workers
from app.queue.errors import JobNotFoundError, UnavailableError
from app.queue.explain import Reason, explain
from app.queue.lifecycle import State
from app.store.jobs import Line
from app.store.reads import Reads
from app.store.standing import Standing


class Explaining:
    """Explains how jobs stand."""

    def __init__(self, reads: Reads, standing: Standing, cursors: Cursors, workers: Workers) -> None:
        self._reads = reads
        self._standing = standing
        self._cursors = cursors
        self._workers = workers

    async def explain(self, job_id: UUID) -> tuple[State, list[Reason]]:
        """Return the job's state, and why it is not running. Raises JobNotFoundError, UnavailableError."""
        job = await self._reads.require(job_id)
        # Who asks here is written down now and then: what is to be said is how things stand now.
        with suppress(UnavailableError):
            await self._workers.write()
        facts = await self._standing.of(job_id, self._cursors.ahead([Line(job.queue)]))
        if facts is None:
            raise JobNotFoundError
        return facts.state, explain(facts)
