"""The decisions, as pure functions: no database, no clock."""

import dataclasses
import math
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.queue.lifecycle import State
from app.queue.model import (
    Backoff,
    BackoffRequest,
    BackoffStrategy,
    Failure,
    Jitter,
    JobDefaults,
    JobRequest,
    Lease,
    Outcome,
    WorkError,
)
from app.queue.policy import (
    backoff_seconds,
    decide_expiry,
    decide_failure,
    decide_release,
    merge_backoff,
    resolve,
)

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
PLAIN = Backoff(jitter=Jitter.NONE)
BOOM = Failure(WorkError("boom", "Oops"))

backoffs = st.builds(
    Backoff,
    strategy=st.sampled_from(BackoffStrategy),
    initial_seconds=st.floats(0, 30 * 86_400),
    factor=st.floats(1, 1000),
    max_seconds=st.floats(0, 365 * 86_400),
    jitter=st.sampled_from(Jitter),
)
failures = st.integers(1, 10_001)
chances = st.floats(0, 1, exclude_max=True)


def lease(**changes: Any) -> Lease:
    """Return the first of four attempts, leased 30 s ago for 30 s."""
    fields: dict[str, Any] = {
        "job_id": UUID(int=1),
        "lease_id": UUID(int=2),
        "queue": "q",
        "type": "default",
        "worker": "w",
        "attempt": 1,
        "leased_at": NOW - timedelta(seconds=30),
        "expires_at": NOW,
        "deadline_at": None,
        "cancel_requested": False,
        "priority": 5,
        "ready_at": NOW - timedelta(seconds=60),
        "max_retries": 3,
        "budget_start": 0,
        "backoff": PLAIN,
    }
    return Lease(**{**fields, **changes})


class TestBackoff:
    def test_exponential_without_jitter_is_1_2_4(self):
        assert [backoff_seconds(PLAIN, n, 0.7) for n in (1, 2, 3, 4)] == [1, 2, 4, 8]

    def test_linear_is_a_multiple_of_the_initial_delay(self):
        linear = dataclasses.replace(PLAIN, strategy=BackoffStrategy.LINEAR, initial_seconds=2.5)
        assert [backoff_seconds(linear, n, 0.7) for n in (1, 2, 3)] == [2.5, 5, 7.5]

    def test_fixed_never_changes(self):
        fixed = dataclasses.replace(PLAIN, strategy=BackoffStrategy.FIXED, initial_seconds=7)
        assert [backoff_seconds(fixed, n, 0.7) for n in (1, 2, 3)] == [7, 7, 7]

    def test_the_factor_and_the_initial_delay_are_the_jobs_own(self):
        tripling = dataclasses.replace(PLAIN, initial_seconds=0.5, factor=3)
        assert [backoff_seconds(tripling, n, 0) for n in (1, 2, 3)] == [0.5, 1.5, 4.5]

    @pytest.mark.parametrize("strategy", BackoffStrategy)
    def test_no_delay_exceeds_max_seconds(self, strategy: BackoffStrategy):
        capped = dataclasses.replace(PLAIN, strategy=strategy, initial_seconds=4, max_seconds=5)
        assert [backoff_seconds(capped, n, 0.7) for n in (2, 100)] == (
            [4, 4] if strategy is BackoffStrategy.FIXED else [5, 5]
        )

    @pytest.mark.parametrize("factor", [1000.0, 1000])
    def test_a_delay_too_large_to_compute_is_the_cap(self, factor: float):
        growing = dataclasses.replace(PLAIN, factor=factor)
        assert backoff_seconds(growing, 10_000, 0.5) == 3600

    @pytest.mark.parametrize("failed", [1, 1000, 2000, 10_000])
    def test_nothing_to_begin_with_stays_nothing(self, failed: int):
        assert backoff_seconds(dataclasses.replace(PLAIN, initial_seconds=0), failed, 0.5) == 0

    @pytest.mark.parametrize(
        ("jitter", "least", "most"), [(Jitter.NONE, 8, 8), (Jitter.EQUAL, 4, 8), (Jitter.FULL, 0, 8)]
    )
    def test_jitter_spreads_between_its_ends(self, jitter: Jitter, least: float, most: float):
        spread = dataclasses.replace(PLAIN, jitter=jitter)
        assert backoff_seconds(spread, 4, 0) == least
        assert backoff_seconds(spread, 4, 0.5) == (least + most) / 2
        assert backoff_seconds(spread, 4, math.nextafter(1, 0)) == pytest.approx(most)

    @given(backoffs, failures, chances)
    def test_every_delay_is_a_number_between_nothing_and_the_cap(
        self, backoff: Backoff, failed: int, chance: float
    ):
        whole = backoff_seconds(dataclasses.replace(backoff, jitter=Jitter.NONE), failed, chance)
        delay = backoff_seconds(backoff, failed, chance)
        least = {Jitter.NONE: whole, Jitter.EQUAL: whole / 2, Jitter.FULL: 0}[backoff.jitter]
        assert least <= delay <= whole <= backoff.max_seconds

    @given(backoffs, st.integers(1, 10_000))
    def test_without_jitter_no_delay_is_shorter_than_the_one_before(self, backoff: Backoff, failed: int):
        plain = dataclasses.replace(backoff, jitter=Jitter.NONE)
        assert backoff_seconds(plain, failed, 0) <= backoff_seconds(plain, failed + 1, 0)


class TestFailure:
    @pytest.mark.parametrize(("attempt", "delay"), [(1, 1), (2, 2), (3, 4)])
    def test_a_failure_within_the_budget_is_retried_after_its_backoff(self, attempt: int, delay: int):
        verdict = decide_failure(lease(attempt=attempt), BOOM, NOW, 0.5)
        assert (verdict.state, verdict.outcome) == (State.RETRY, Outcome.FAILED)
        assert verdict.run_at == NOW + timedelta(seconds=delay)
        assert (verdict.attempt, verdict.reason, verdict.error) == (attempt, None, BOOM.error)

    def test_the_failure_after_the_last_retry_is_a_dead_letter(self):
        verdict = decide_failure(lease(attempt=4), BOOM, NOW, 0.5)
        assert (verdict.state, verdict.reason) == (State.FAILED, "retries_exhausted")
        assert (verdict.attempt, verdict.run_at, verdict.error) == (4, None, BOOM.error)

    def test_without_retries_the_first_failure_is_the_last(self):
        assert decide_failure(lease(max_retries=0), BOOM, NOW, 0.5).state is State.FAILED

    def test_a_worker_may_give_up_for_good_at_once(self):
        verdict = decide_failure(lease(), Failure(BOOM.error, retry=False), NOW, 0.5)
        assert (verdict.state, verdict.reason) == (State.FAILED, "not_retryable")

    def test_retry_in_seconds_takes_the_place_of_the_backoff(self):
        verdict = decide_failure(lease(), Failure(BOOM.error, retry_in_seconds=90), NOW, 0.5)
        assert verdict.run_at == NOW + timedelta(seconds=90)

    def test_retry_in_seconds_nought_is_at_once(self):
        verdict = decide_failure(lease(), Failure(BOOM.error, retry_in_seconds=0), NOW, 0.5)
        assert (verdict.state, verdict.run_at) == (State.RETRY, NOW)

    def test_retry_in_seconds_does_not_lengthen_the_budget(self):
        verdict = decide_failure(lease(attempt=4), Failure(BOOM.error, retry_in_seconds=1), NOW, 0.5)
        assert verdict.state is State.FAILED

    def test_a_fresh_budget_begins_at_the_attempt_of_the_manual_retry(self):
        again = [decide_failure(lease(attempt=n, budget_start=4), BOOM, NOW, 0.5) for n in (5, 6, 7, 8)]
        assert [verdict.state for verdict in again] == [State.RETRY, State.RETRY, State.RETRY, State.FAILED]
        assert [verdict.run_at for verdict in again[:3]] == [NOW + timedelta(seconds=n) for n in (1, 2, 4)]
        assert again[3].attempt == 8

    @given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 60))
    def test_a_budget_allows_exactly_max_retries(self, max_retries: int, start: int, failed: int):
        verdict = decide_failure(
            lease(attempt=start + failed, budget_start=start, max_retries=max_retries), BOOM, NOW, 0.5
        )
        assert (verdict.state is State.RETRY) is (failed <= max_retries)


class TestExpiry:
    def test_a_silent_lease_is_a_failed_attempt(self):
        verdict = decide_expiry(lease(), NOW, 0.5)
        assert (verdict.state, verdict.outcome) == (State.RETRY, Outcome.LEASE_EXPIRED)
        assert verdict.run_at == NOW + timedelta(seconds=1)
        assert verdict.error is not None
        assert verdict.error.type == "lease_expired"
        assert "2026-03-01T12:00:00.000000Z" in verdict.error.message

    def test_after_the_last_retry_a_silent_lease_is_a_dead_letter(self):
        verdict = decide_expiry(lease(attempt=4), NOW, 0.5)
        assert (verdict.state, verdict.reason) == (State.FAILED, "retries_exhausted")

    @pytest.mark.parametrize(
        ("until_deadline", "outcome"),
        [
            (timedelta(microseconds=1), Outcome.LEASE_EXPIRED),
            (timedelta(0), Outcome.TIMED_OUT),
            (timedelta(microseconds=-1), Outcome.TIMED_OUT),
        ],
    )
    def test_an_attempt_timed_out_when_its_lease_had_reached_the_time_limit(
        self, until_deadline: timedelta, outcome: Outcome
    ):
        verdict = decide_expiry(lease(deadline_at=NOW + until_deadline), NOW, 0.5)
        assert verdict.outcome is outcome
        assert verdict.error is not None
        assert verdict.error.type == outcome.value

    def test_a_timed_out_attempt_says_what_its_limit_was(self):
        verdict = decide_expiry(lease(deadline_at=NOW), NOW + timedelta(seconds=5), 0.5)
        assert verdict.error == WorkError("the attempt reached its time limit of 30 seconds", "timed_out")


class TestRelease:
    def test_a_released_job_is_ready_and_its_attempt_uncounted(self):
        verdict = decide_release(lease(attempt=3), 0, NOW)
        assert (verdict.state, verdict.outcome, verdict.attempt) == (State.READY, Outcome.RELEASED, 2)
        assert (verdict.run_at, verdict.error) == (None, None)

    def test_a_delayed_release_waits_as_scheduled_not_as_retry(self):
        verdict = decide_release(lease(attempt=3), 0.5, NOW)
        assert (verdict.state, verdict.attempt) == (State.SCHEDULED, 2)
        assert verdict.run_at == NOW + timedelta(seconds=0.5)

    def test_a_release_needs_no_budget(self):
        assert decide_release(lease(attempt=4, max_retries=0), 0, NOW).state is State.READY


class TestCancelRequested:
    asked = lease(cancel_requested=True)

    @pytest.mark.parametrize(
        "verdict",
        [
            decide_failure(asked, BOOM, NOW, 0.5),
            decide_failure(asked, Failure(BOOM.error, retry=False), NOW, 0.5),
            decide_failure(asked, Failure(BOOM.error, retry_in_seconds=9), NOW, 0.5),
            decide_failure(dataclasses.replace(asked, attempt=4), BOOM, NOW, 0.5),
            decide_expiry(asked, NOW, 0.5),
            decide_expiry(dataclasses.replace(asked, deadline_at=NOW), NOW, 0.5),
            decide_release(asked, 0, NOW),
            decide_release(asked, 60, NOW),
        ],
    )
    def test_goes_before_whatever_else_ends_the_attempt(self, verdict: Any):
        assert (verdict.state, verdict.outcome, verdict.reason) == (
            State.CANCELLED,
            Outcome.CANCELLED,
            "cancelled",
        )
        assert verdict.run_at is None
        assert verdict.attempt == verdict.lease.attempt

    def test_keeps_the_error_of_the_attempt_that_it_ended(self):
        assert decide_failure(self.asked, BOOM, NOW, 0.5).error == BOOM.error
        assert decide_release(self.asked, 0, NOW).error is None


class TestDefaults:
    defaults = JobDefaults(
        lease_seconds=11, max_retries=7, backoff=Backoff(initial_seconds=5), timeout_seconds=99
    )

    def test_what_nobody_named_comes_from_the_defaults(self):
        job = resolve(JobRequest(queue="q"), self.defaults, UUID(int=5))
        assert (job.id, job.lease_seconds, job.max_retries, job.timeout_seconds) == (UUID(int=5), 11, 7, 99)
        assert job.backoff == self.defaults.backoff

    def test_what_a_producer_names_wins_also_when_it_is_nought(self):
        request = JobRequest(queue="q", max_retries=0, lease_seconds=1, timeout_seconds=2)
        job = resolve(request, self.defaults, UUID(int=5))
        assert (job.lease_seconds, job.max_retries, job.timeout_seconds) == (1, 0, 2)

    @pytest.mark.parametrize("named", [field.name for field in dataclasses.fields(BackoffRequest)])
    def test_a_partial_backoff_is_merged_field_by_field(self, named: str):
        other = Backoff(BackoffStrategy.LINEAR, 0, 1, 0, Jitter.FULL)
        request = BackoffRequest(**{named: getattr(other, named)})
        merged = merge_backoff(request, self.defaults.backoff)
        assert merged == dataclasses.replace(self.defaults.backoff, **{named: getattr(other, named)})
