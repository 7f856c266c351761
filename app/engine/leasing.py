"""Claims: leases that want the same at the same time share one statement.

What a claim takes is handed out in the order in which its requests came, each up to its `max_jobs`.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from typing import NamedTuple, TypeVar

from uuid_utils.compat import uuid4

from app.engine.batching import Batcher
from app.engine.cursors import Cursors
from app.queue.errors import UnavailableError
from app.store.jobs import NOTHING, Claim, Jobs, Line, RequestName, Slot

JOBS_PER_CLAIM = 1000
"""Requests share a claim up to so many jobs."""

NAMED_MAX = 2
"""Leases with a `request_id` share no claim: so many are under way at a time, and leave the pool to the others."""
NAMED_WAIT_SECONDS = 5.0

Item = TypeVar("Item")


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


class _Named(NamedTuple):
    """A request with a name, and the loop's time until which it waits for its turn."""

    request: LeaseRequest
    request_id: str
    until: float


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
        self._twins: dict[object, Batcher[_Named, Claim]] = {}
        """Requests with a name, by their names: those of one name take turns."""
        self._named = asyncio.Semaphore(NAMED_MAX)

    async def claim(self, wanted: LeaseRequest) -> Claim:
        """Take up to `max_jobs` that are ready now. Raises UnavailableError."""
        if wanted.request_id is not None:
            named = _Named(wanted, wanted.request_id, _wait_until())
            return await _submit(self._twins, wanted.request_id, self._one_by_one, named)
        return await _submit(self._batchers, (wanted.queues, wanted.types), self._together, wanted)

    async def replay(self, request_id: str) -> Claim:
        """Return the leases that stand under this name; take none. Raises UnavailableError."""
        async with self._turn(_wait_until()):
            return await self._jobs.lease_named(RequestName(request_id), (), ())

    async def drained(self) -> None:
        """Wait until everything in line has been taken, also for those who have gone."""
        for batcher in list(self._batchers.values()):
            await batcher.drained()
        for twins in list(self._twins.values()):
            await twins.drained()

    def _together(self) -> Batcher[LeaseRequest, Claim]:
        return Batcher(
            self._take,
            weight=lambda request: request.max_jobs,
            orphaned=self._orphaned,
            batch_max=JOBS_PER_CLAIM,
        )

    def _one_by_one(self) -> Batcher[_Named, Claim]:
        return Batcher(self._take_named, orphaned=self._orphaned, batch_max=1)

    @asynccontextmanager
    async def _turn(self, until: float) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout_at(until):
                await self._named.acquire()
        except TimeoutError:
            message = "Too many leases with a request_id are in line already; come back a little later."
            raise UnavailableError(message) from None
        try:
            yield
        finally:
            self._named.release()

    async def _take_named(self, requests: Sequence[_Named]) -> list[Claim]:
        [(request, request_id, until)] = requests
        name = RequestName(request_id)
        async with self._turn(until):
            lines = self._open_lines(request)
            if not lines:
                return [await self._jobs.lease_named(name, (), ())]
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


def _wait_until() -> float:
    return asyncio.get_running_loop().time() + NAMED_WAIT_SECONDS


async def _submit(
    batchers: dict[object, Batcher[Item, Claim]],
    kind: object,
    new: Callable[[], Batcher[Item, Claim]],
    item: Item,
) -> Claim:
    """Submit `item` to the batcher of its kind; there is one only while it has something to do."""
    batcher = batchers.get(kind)
    if batcher is None:
        batcher = batchers[kind] = new()
    try:
        return await batcher.submit(item)
    finally:
        if batcher.idle and batchers.get(kind) is batcher:
            del batchers[kind]
