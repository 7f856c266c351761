"""Claims: leases that want the same at the same time share one statement.

What a claim takes is handed out in the order in which its requests came, each up to its `max_jobs`.
"""

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from uuid_utils.compat import uuid4

from app.engine.batching import Batcher
from app.engine.cursors import Cursors
from app.store.jobs import NOTHING, Claim, Jobs, Line, RequestName, Slot

JOBS_PER_CLAIM = 1000
"""What there is in queues that are all paused."""


class LeaseRequest(NamedTuple):
    """What a worker asks for; None where it named nothing."""

    queues: tuple[str, ...]
    types: tuple[str, ...] | None = None
    worker: str | None = None
    max_jobs: int = 1
    wait_seconds: float = 20.0
    lease_seconds: float | None = None
    request_id: str | None = None
    """Its name: asked again under it, a worker gets the same leases."""

    @property
    def lines(self) -> set[Line]:
        """Where the request waits: at whole queues, or at their types."""
        return {Line(queue, type_) for queue in self.queues for type_ in self.types or (None,)}


class Claims:
    """Takes jobs for requests, of queues that are not `paused` at that moment.

    `orphaned` gets what was taken for a request that has been cancelled meanwhile.
    """

    def __init__(
        self,
        jobs: Jobs,
        cursors: Cursors,
        paused: Callable[[], Collection[str]],
        orphaned: Callable[[Claim], None],
    ) -> None:
        self._jobs = jobs
        self._paused = paused
        self._cursors = cursors
        self._orphaned = orphaned
        self._batchers: dict[object, Batcher[LeaseRequest, Claim]] = {}

    async def claim(self, wanted: LeaseRequest) -> Claim:
        """Take up to `max_jobs` that are ready now. Raises UnavailableError."""
        # A named one shares no claim: it is a transaction of its own. Twins of it take turns.
        named = wanted.request_id is not None
        kind = wanted.request_id if named else (wanted.queues, wanted.types)
        batcher = self._batchers.get(kind)
        if batcher is None:
            batcher = self._batchers[kind] = Batcher(
                self._take_named if named else self._take,
                weight=lambda request: request.max_jobs,
                orphaned=self._orphaned,
                batch_max=1 if named else JOBS_PER_CLAIM,
            )
        try:
            return await batcher.submit(wanted)
        finally:
            if batcher.idle and self._batchers.get(kind) is batcher:
                del self._batchers[kind]

    async def replay(self, request_id: str) -> Claim:
        """Return the leases that stand under this name; take none. Raises UnavailableError."""
        return await self._jobs.lease_named(RequestName(request_id), (), ())

    async def drained(self) -> None:
        """Wait until everything in line has been taken, also for those who have gone."""
        for batcher in list(self._batchers.values()):
            await batcher.drained()

    async def _take_named(self, requests: Sequence[LeaseRequest]) -> list[Claim]:
        [request] = requests
        name = RequestName(request.request_id or "")
        lines = self._open_lines(request)
        if not lines:
            return [await self.replay(name.request_id)]
        with self._cursors.claiming(lines) as look:
            claim = await self._jobs.lease_named(name, look.stretches, _slots(request))
            if claim.delivery is None or not claim.delivery.is_replay:
                look.found(claim)
        return [claim]

    async def _take(self, requests: Sequence[LeaseRequest]) -> list[Claim]:
        lines = self._open_lines(requests[0])
        if not lines:
            return [NOTHING for _ in requests]
        room = [_slots(request) for request in requests]
        slots = [slot for each in room for slot in each]
        with self._cursors.claiming(lines) as look:
            claim = await self._jobs.lease(look.stretches, slots)
            look.found(claim)
        by_lease = {job.lease_id: job for job in claim.jobs}
        answers = []
        for each in room:
            taken = [by_lease[slot.lease_id] for slot in each if slot.lease_id in by_lease]
            answers.append(Claim(taken, claim.contended and not taken, claim.claimed_at))
        return answers

    def _open_lines(self, request: LeaseRequest) -> list[Line]:
        paused = self._paused()
        return [line for line in request.lines if line.queue not in paused]


def _slots(request: LeaseRequest) -> list[Slot]:
    return [Slot(uuid4(), request.lease_seconds, request.worker) for _ in range(request.max_jobs)]
