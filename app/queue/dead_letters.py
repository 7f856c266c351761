"""Where a dead letter's copy goes, and what it says of where it came from."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple
from uuid import UUID

from app.queue.lifecycle import State
from app.queue.model import Verdict


class Copy(NamedTuple):
    """A copy that is to be made of a job that has failed for good."""

    of: UUID
    queue: str
    source: bytes
    """Where it comes from, as JSON: what the job's readers get to see, and by `chain` all queues that it has been in."""


def copy_of(verdict: Verdict) -> Copy | None:
    """Return the copy that a verdict calls for; None where there is none to make.

    A copy never goes to a queue that it has been in: dead letters that go round would never come to rest.
    """
    lease = verdict.lease
    if verdict.state is not State.FAILED or lease.dead_letter_queue is None:
        return None
    chain = [*_chain(lease.source), lease.queue]
    if lease.dead_letter_queue in chain:
        return None
    source = {
        "queue": lease.queue,
        "job_id": str(lease.job_id),
        "attempts": verdict.attempt,
        "error": None if verdict.error is None else _named(asdict(verdict.error)),
        "failed_at": f"{verdict.decided_at:%Y-%m-%dT%H:%M:%S.%fZ}",
        "chain": chain,
    }
    return Copy(lease.job_id, lease.dead_letter_queue, json.dumps(source).encode())


def _chain(source: bytes | None) -> list[str]:
    chain: list[str] = [] if source is None else json.loads(source).get("chain", [])
    return chain


def _named(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
