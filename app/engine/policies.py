"""What this process knows of the queues' policies: a copy of all of them (see `copies.py`), asked by every request."""

from uuid import UUID

from app.queue.errors import InvalidRequestError
from app.queue.model import JobDefaults, JobRequest, Keeping, NewJob, Queue
from app.queue.policy import defaults_of, keeping_of, resolve, spread
from app.store.queues import StoredQueues


class Policies:
    """The copy, and what follows from it.

    `environment` is what a job gets, and `keeping` how long it is kept, where no policy says otherwise. With `strict`, only queues that have a policy (an
    empty one will do) take jobs.
    """

    def __init__(
        self,
        stored: StoredQueues,
        environment: JobDefaults,
        keeping: Keeping,
        *,
        strict: bool,
    ) -> None:
        self._stored = stored
        self._environment = environment
        self._strict = strict
        self.environment_keeping = keeping
        self.shortest = self.longest = keeping
        """The shortest and the longest that any queue keeps its jobs."""
        self._queues: dict[str, Queue] = {}
        self._defaults: dict[tuple[str, str | None], JobDefaults] = {}
        self.paused: frozenset[str] = frozenset()
        """The queues that leases pass over."""
        self.keeping_no_payload: tuple[str, ...] = ()
        """The queues whose completed jobs leave payload, tags and metadata behind."""

    async def load(self) -> frozenset[str]:
        """Read all policies anew; return the queues that are not paused any more. Raises UnavailableError."""
        queues = {queue.name: queue for queue in await self._stored.all()}
        before = self.paused
        self._queues, self._defaults = queues, {}
        self.paused = frozenset(queue.name for queue in queues.values() if queue.paused)
        self.shortest, self.longest = spread(
            [self.environment_keeping, *(self.keeping(name) for name in queues)]
        )
        self.keeping_no_payload = tuple(
            queue.name for queue in queues.values() if not queue.policy.keep_payload
        )
        return before - self.paused

    @property
    def pauses(self) -> dict[str, bool]:
        """Whether each queue is paused, of those that have a policy."""
        return {name: queue.paused for name, queue in self._queues.items()}

    def keeping(self, queue: str) -> Keeping:
        """Return how long a queue keeps its jobs that have ended."""
        known = self._queues.get(queue)
        return (
            self.environment_keeping if known is None else keeping_of(known.policy, self.environment_keeping)
        )

    def keeping_their_own(self, after: str, limit: int) -> list[str]:
        """Return the next queues by name that keep their jobs for another time than the environment says."""
        return sorted(
            name for name in self._queues if name > after and self.keeping(name) != self.environment_keeping
        )[:limit]

    def resolve(self, request: JobRequest, job_id: UUID) -> NewJob:
        """Return the job as it is to be stored: by its own words, else its type's, its queue's, the environment's.

        Raises InvalidRequestError where its queue, or that of its dead letters, takes none.
        """
        job = resolve(request, self.defaults(request.queue, request.type), job_id)
        self.check_known("queue", job.queue)
        if job.dead_letter_queue is not None:
            self.check_known("dead_letter_queue", job.dead_letter_queue)
        return job

    def check_known(self, field: str, queue: str) -> None:
        """Raise InvalidRequestError where this queue takes no jobs because it has no policy."""
        if self._strict and queue not in self._queues:
            raise InvalidRequestError(
                field,
                f"there is no queue {queue}, and this service makes none by itself: PUT /queues/{queue} does",
            )

    def defaults(self, queue: str, type_: str) -> JobDefaults:
        """Return what a job of this queue and type gets where it names nothing."""
        known = self._queues.get(queue)
        if known is None:
            return self._environment
        # Types without a word of their own share their queue's: clients may make up as many as they like.
        place = queue, type_ if type_ in known.policy.types else None
        found = self._defaults.get(place)
        if found is None:
            found = self._defaults[place] = defaults_of(known.policy, type_, self._environment)
        return found
