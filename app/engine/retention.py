"""What is past its retention goes: whole days past the longest that any queue has, row by row where queues have less."""

from collections.abc import Awaitable, Callable, Iterable
from datetime import timedelta
from uuid import UUID

from app.engine.policies import Policies
from app.queue.model import Keeping
from app.store.jobs import Jobs
from app.store.retained import Retained

BATCH = 500
STEPS_PER_ROUND = 20
QUEUES_PER_ROUND = 20
"""So many queues have their turn in one round; with more, what is past waits for its queue's turn."""


class Retention:
    """Removes what is past its retention, a bounded step at a time; any number of processes may do it at once."""

    def __init__(self, jobs: Jobs, retained: Retained, policies: Policies) -> None:
        self._jobs = jobs
        self._retained = retained
        self._policies = policies
        self._after_name = ""
        self._turn: dict[str, UUID] = {}
        """The queues whose turn it is, and after which of their completed jobs to go on."""

    async def rows(self) -> int:
        """Remove rows that are past their queue's retention; return how many."""
        longest = self._policies.longest
        removed = await _while_full(lambda: self._jobs.retain_dead(longest.dead_seconds, BATCH))
        now = await self._jobs.now()
        if not self._turn:
            names = await self._next_queues()
            self._turn = dict.fromkeys(names, UUID(int=0))
            dead_before = {
                name: now - timedelta(seconds=keeping.dead_seconds)
                for name, keeping in self._keepings(names)
                if keeping.dead_seconds < longest.dead_seconds
            }
            if dead_before:
                removed += await _while_full(lambda: self._retained.remove_dead(dead_before, BATCH))
        before = {
            name: now - timedelta(seconds=keeping.completed_seconds)
            for name, keeping in self._keepings(self._turn)
            if keeping.completed_seconds < longest.completed_seconds
        }
        for _ in range(STEPS_PER_ROUND):
            before = {name: instant for name, instant in before.items() if name in self._turn}
            if not before:
                self._turn = {}
                break
            gone, self._turn = await self._retained.remove_completed(before, self._turn, BATCH)
            removed += gone
        return removed

    async def days(self) -> int:
        """Make the days ahead, and drop those past the longest retention; return how many days were touched."""
        longest = self._policies.longest
        # What a job's attempts were like may be asked as long as any job is kept, in whatever state.
        attempts_seconds = max(longest.completed_seconds, longest.dead_seconds)
        return await self._jobs.retain_days(longest.completed_seconds, attempts_seconds)

    async def _next_queues(self) -> list[str]:
        """Return the queues whose turn it is next: of all that keep anything, where most keep less than the longest."""
        if self._policies.longest == self._policies.environment_keeping:
            names = self._policies.keeping_their_own(self._after_name, QUEUES_PER_ROUND)
        else:
            names = await self._retained.queues(self._after_name, QUEUES_PER_ROUND)
        self._after_name = names[-1] if len(names) == QUEUES_PER_ROUND else ""
        return names

    def _keepings(self, names: Iterable[str]) -> list[tuple[str, Keeping]]:
        return [(name, self._policies.keeping(name)) for name in names]


async def _while_full(step: Callable[[], Awaitable[int]]) -> int:
    total = 0
    for _ in range(STEPS_PER_ROUND):
        changed = await step()
        total += changed
        if changed < BATCH:
            break
    return total
