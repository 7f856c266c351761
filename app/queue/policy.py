"""The decisions: pure functions of what is known, the present instant and a random number.

The store locks the rows, asks here, and writes the answer; no statement decides by itself what becomes of a job.
"""

from collections.abc import Iterable
from dataclasses import replace
from datetime import datetime, timedelta
from typing import TypeVar
from uuid import UUID

from app.queue.errors import InvalidRequestError
from app.queue.lifecycle import Event, State, next_state
from app.queue.model import (
    NOTHING_NAMED,
    Backoff,
    BackoffRequest,
    BackoffStrategy,
    Failure,
    Jitter,
    JobDefaults,
    JobPolicy,
    JobRequest,
    Keeping,
    Lease,
    NewJob,
    Outcome,
    QueuePolicy,
    Verdict,
    WorkError,
)

T = TypeVar("T")

RETRIES_EXHAUSTED = "retries_exhausted"
NOT_RETRYABLE = "not_retryable"
CANCELLED = "cancelled"

DEADLINE_TOO_EARLY = "must not be before the job is due"


def resolve(request: JobRequest, defaults: JobDefaults, job_id: UUID) -> NewJob:
    """Return the job with every default filled in: fixed at enqueue, later changes of a default touch it not.

    Raises InvalidRequestError when its dead letters would go to the queue that they come from.
    """
    delay_seconds = request.delay_seconds
    if delay_seconds is None and request.run_at is None:
        delay_seconds = defaults.delay_seconds
    expires_at, expires_in_seconds = request.expires_at, request.expires_in_seconds
    if expires_at is None and expires_in_seconds is None and defaults.expires_in_seconds is not None:
        expires_at, expires_in_seconds = _default_deadline(
            defaults.expires_in_seconds, request.run_at, delay_seconds
        )
    dead_letter_queue = request.dead_letter_queue or defaults.dead_letter_queue
    if dead_letter_queue is not None:
        check_dead_letter_queue(request.queue, dead_letter_queue)
    return NewJob(
        id=job_id,
        queue=request.queue,
        type=request.type,
        payload=request.payload,
        priority=defaults.priority if request.priority is None else request.priority,
        run_at=request.run_at,
        delay_seconds=delay_seconds,
        lease_seconds=defaults.lease_seconds if request.lease_seconds is None else request.lease_seconds,
        timeout_seconds=defaults.timeout_seconds
        if request.timeout_seconds is None
        else request.timeout_seconds,
        max_retries=defaults.max_retries if request.max_retries is None else request.max_retries,
        backoff=merge_backoff(request.backoff, defaults.backoff),
        tags=request.tags,
        metadata=request.metadata,
        traceparent=request.traceparent,
        expires_at=expires_at,
        expires_in_seconds=expires_in_seconds,
        unique=request.unique,
        dead_letter_queue=dead_letter_queue,
        on_conflict=request.on_conflict,
    )


def _default_deadline(
    seconds: float, run_at: datetime | None, delay_seconds: float | None
) -> tuple[datetime | None, float]:
    """Return where a default start deadline lies: so long after the job may start, and never before now and as long."""
    return None if run_at is None else run_at + timedelta(seconds=seconds), seconds + (delay_seconds or 0)


def check_dead_letter_queue(queue: str, dead_letter_queue: str) -> None:
    """Raise InvalidRequestError when a queue's dead letters would go to itself: they would never come to rest."""
    if dead_letter_queue == queue:
        raise InvalidRequestError("dead_letter_queue", "can not be the queue itself")


def defaults_of(policy: QueuePolicy, type_: str, environment: JobDefaults) -> JobDefaults:
    """Return what a job of this queue and type gets: the type's word goes before the queue's, this before the rest."""
    defaults = _under(policy, environment)
    named = policy.types.get(type_)
    return defaults if named is None else _under(named, defaults)


def keeping_of(policy: QueuePolicy, environment: Keeping) -> Keeping:
    """Return how long a queue keeps its jobs that have ended."""
    completed, dead = policy.retention_seconds, policy.dead_retention_seconds
    return Keeping(
        completed_seconds=environment.completed_seconds if completed is None else completed,
        dead_seconds=environment.dead_seconds if dead is None else dead,
    )


def spread(keepings: Iterable[Keeping]) -> tuple[Keeping, Keeping]:
    """Return the shortest of each, and the longest of each."""
    completed, dead = zip(*((each.completed_seconds, each.dead_seconds) for each in keepings), strict=True)
    return (
        Keeping(completed_seconds=min(completed), dead_seconds=min(dead)),
        Keeping(completed_seconds=max(completed), dead_seconds=max(dead)),
    )


def check_policy(name: str, policy: QueuePolicy) -> None:
    """Raise InvalidRequestError when a queue of this name can not have this policy."""
    for each in (policy, *policy.types.values()):
        if each.dead_letter_queue is not None:
            check_dead_letter_queue(name, each.dead_letter_queue)


def _under(policy: JobPolicy, defaults: JobDefaults) -> JobDefaults:
    """Return the defaults with what the policy names put over them."""

    def over(named: T | None, otherwise: T) -> T:
        return otherwise if named is None else named

    return JobDefaults(
        lease_seconds=over(policy.lease_seconds, defaults.lease_seconds),
        max_retries=over(policy.max_retries, defaults.max_retries),
        backoff=merge_backoff(policy.backoff, defaults.backoff),
        timeout_seconds=over(policy.timeout_seconds, defaults.timeout_seconds),
        priority=over(policy.priority, defaults.priority),
        delay_seconds=over(policy.delay_seconds, defaults.delay_seconds),
        expires_in_seconds=over(policy.expires_in_seconds, defaults.expires_in_seconds),
        dead_letter_queue=over(policy.dead_letter_queue, defaults.dead_letter_queue),
    )


def needs_clock(request: JobRequest) -> bool:
    """Whether only the present instant can tell if the request's start deadline is too early."""
    return request.expires_at is not None or (
        request.expires_in_seconds is not None and request.run_at is not None
    )


def check_deadline(request: JobRequest, now: datetime) -> None:
    """Raise InvalidRequestError for a start deadline before the instant at which the job is due."""
    due_at = now + timedelta(seconds=request.delay_seconds or 0)
    if request.run_at is not None:
        due_at = max(due_at, request.run_at)
    if request.expires_at is not None and request.expires_at < due_at:
        raise InvalidRequestError("expires_at", DEADLINE_TOO_EARLY)
    if (
        request.expires_in_seconds is not None
        and now + timedelta(seconds=request.expires_in_seconds) < due_at
    ):
        raise InvalidRequestError("expires_in_seconds", DEADLINE_TOO_EARLY)


def merge_backoff(request: BackoffRequest, default: Backoff) -> Backoff:
    """Return `default` with the fields that the request names."""
    if request is NOTHING_NAMED:
        return default
    return Backoff(
        strategy=default.strategy if request.strategy is None else request.strategy,
        initial_seconds=default.initial_seconds
        if request.initial_seconds is None
        else request.initial_seconds,
        factor=default.factor if request.factor is None else request.factor,
        max_seconds=default.max_seconds if request.max_seconds is None else request.max_seconds,
        jitter=default.jitter if request.jitter is None else request.jitter,
    )


def backoff_seconds(backoff: Backoff, failures: int, chance: float) -> float:
    """Return the delay after the given number of failures (1 for the first).

    `chance` is a number in [0, 1); jitter spreads what max_seconds has capped, so it never exceeds the cap.
    """
    match backoff.strategy:
        case BackoffStrategy.EXPONENTIAL:
            try:
                delay = backoff.initial_seconds * backoff.factor ** (failures - 1)
            except OverflowError:
                delay = backoff.max_seconds if backoff.initial_seconds > 0 else 0.0
        case BackoffStrategy.LINEAR:
            delay = backoff.initial_seconds * failures
        case BackoffStrategy.FIXED:
            delay = backoff.initial_seconds
    delay = min(delay, backoff.max_seconds)
    match backoff.jitter:
        case Jitter.NONE:
            return delay
        case Jitter.EQUAL:
            return delay / 2 + chance * delay / 2
        case Jitter.FULL:
            return chance * delay


def decide_failure(lease: Lease, failure: Failure, now: datetime, chance: float) -> Verdict:
    """Decide what becomes of a job whose worker reports a failure."""
    return _after_failed_attempt(lease, failure, Outcome.FAILED, now, chance)


def decide_expiry(lease: Lease, now: datetime, chance: float) -> Verdict:
    """Decide what becomes of a job whose lease ran out: a failed attempt, by silence or by its time limit."""
    if lease.deadline_at is not None and lease.expires_at >= lease.deadline_at:
        seconds = (lease.deadline_at - lease.leased_at).total_seconds()
        outcome = Outcome.TIMED_OUT
        message = f"the attempt reached its time limit of {seconds:g} seconds"
    else:
        outcome = Outcome.LEASE_EXPIRED
        message = f"the lease expired at {lease.expires_at:%Y-%m-%dT%H:%M:%S.%fZ} without a heartbeat"
    failure = Failure(WorkError(message=message, type=outcome.value))
    return _after_failed_attempt(lease, failure, outcome, now, chance)


def decide_release(lease: Lease, delay_seconds: float, now: datetime) -> Verdict:
    """Decide where a job goes that its worker gives back: the attempt is not counted."""
    if lease.cancel_requested:
        return _cancelled(lease, now)
    given_back = Verdict(
        lease=lease,
        state=next_state(State.ACTIVE, Event.RELEASE),
        outcome=Outcome.RELEASED,
        attempt=lease.attempt - 1,
        decided_at=now,
    )
    if delay_seconds <= 0:
        return given_back
    return replace(
        given_back,
        state=next_state(State.ACTIVE, Event.RELEASE_LATER),
        run_at=now + timedelta(seconds=delay_seconds),
    )


def _after_failed_attempt(
    lease: Lease, failure: Failure, outcome: Outcome, now: datetime, chance: float
) -> Verdict:
    if lease.cancel_requested:
        return replace(_cancelled(lease, now), error=failure.error)
    failures = lease.attempt - lease.budget_start
    if failure.retry and failures <= lease.max_retries:
        delay = failure.retry_in_seconds
        if delay is None:
            delay = backoff_seconds(lease.backoff, failures, chance)
        return Verdict(
            lease=lease,
            state=next_state(State.ACTIVE, Event.RETRY_LATER),
            outcome=outcome,
            attempt=lease.attempt,
            decided_at=now,
            run_at=now + timedelta(seconds=delay),
            error=failure.error,
        )
    return Verdict(
        lease=lease,
        state=next_state(State.ACTIVE, Event.GIVE_UP),
        outcome=outcome,
        attempt=lease.attempt,
        decided_at=now,
        reason=RETRIES_EXHAUSTED if failure.retry else NOT_RETRYABLE,
        error=failure.error,
    )


def _cancelled(lease: Lease, now: datetime) -> Verdict:
    return Verdict(
        lease=lease,
        state=next_state(State.ACTIVE, Event.CANCEL),
        outcome=Outcome.CANCELLED,
        attempt=lease.attempt,
        decided_at=now,
        reason=CANCELLED,
    )
