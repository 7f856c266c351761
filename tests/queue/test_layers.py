"""What a job gets that names nothing: its type's, else its queue's, else the environment's; backoff field by field."""

from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest

from app.queue.errors import InvalidRequestError
from app.queue.model import (
    Backoff,
    BackoffRequest,
    BackoffStrategy,
    Jitter,
    JobDefaults,
    JobPolicy,
    JobRequest,
    NewJob,
    QueuePolicy,
)
from app.queue.policy import check_policy, defaults_of, resolve

ENVIRONMENT = JobDefaults(lease_seconds=30, max_retries=3, backoff=Backoff(initial_seconds=2))
NOON = datetime(2026, 11, 25, 12, tzinfo=UTC)


def resolved(request: JobRequest, policy: QueuePolicy) -> NewJob:
    return resolve(request, defaults_of(policy, request.type, ENVIRONMENT), UUID(int=1))


def test_a_queue_without_a_policy_leaves_everything_to_the_environment():
    assert defaults_of(QueuePolicy(), "t", ENVIRONMENT) == ENVIRONMENT


@pytest.mark.parametrize(
    ("field", "of_environment", "of_queue", "of_type", "of_job"),
    [
        ("priority", 5, 1, 10, 7),
        ("lease_seconds", 30, 60, 90, 120),
        ("timeout_seconds", None, 10, 20, 30),
        ("max_retries", 3, 0, 9, 4),
        ("delay_seconds", None, 5, 6, 0),
        ("dead_letter_queue", None, "a", "b", "c"),
    ],
)
def test_the_nearest_layer_that_names_a_field_decides(field, of_environment, of_queue, of_type, of_job):
    queue = QueuePolicy(**{field: of_queue})
    both = QueuePolicy(**{field: of_queue}, types={"t": JobPolicy(**{field: of_type})})
    only_type = QueuePolicy(types={"t": JobPolicy(**{field: of_type})})
    asked = JobRequest("q", "t")

    assert getattr(resolved(asked, QueuePolicy()), field) == of_environment
    assert getattr(resolved(asked, queue), field) == of_queue
    assert getattr(resolved(asked, both), field) == of_type
    assert getattr(resolved(asked, only_type), field) == of_type
    assert getattr(resolved(JobRequest("q", "other"), both), field) == of_queue
    assert getattr(resolved(asked._replace(**{field: of_job}), both), field) == of_job


def test_a_backoff_is_merged_field_by_field_through_all_layers():
    policy = QueuePolicy(
        backoff=BackoffRequest(strategy=BackoffStrategy.LINEAR, max_seconds=100),
        types={"t": JobPolicy(backoff=BackoffRequest(max_seconds=50, factor=3))},
    )
    asked = JobRequest("q", "t", backoff=BackoffRequest(jitter=Jitter.NONE))

    assert resolved(asked, policy).backoff == Backoff(
        strategy=BackoffStrategy.LINEAR, initial_seconds=2, factor=3, max_seconds=50, jitter=Jitter.NONE
    )


class TestDeadline:
    policy = QueuePolicy(expires_in_seconds=60)

    def test_counts_from_now(self):
        job = resolved(JobRequest("q"), self.policy)
        assert (job.expires_at, job.expires_in_seconds) == (None, 60)

    def test_counts_from_the_end_of_the_delay(self):
        assert resolved(JobRequest("q", delay_seconds=5), self.policy).expires_in_seconds == 65

    def test_counts_from_run_at_or_now_whichever_is_later(self):
        job = resolved(JobRequest("q", run_at=NOON), self.policy)
        assert (job.expires_at, job.expires_in_seconds) == (NOON + timedelta(seconds=60), 60)

    def test_is_the_jobs_own_where_it_names_one(self):
        assert resolved(JobRequest("q", expires_in_seconds=7), self.policy).expires_in_seconds == 7
        job = resolved(JobRequest("q", expires_at=NOON), self.policy)
        assert (job.expires_at, job.expires_in_seconds) == (NOON, None)


def test_a_job_that_names_its_start_is_not_delayed_by_its_queue():
    assert resolved(JobRequest("q", run_at=NOON), QueuePolicy(delay_seconds=5)).delay_seconds is None


def test_a_queue_is_not_its_own_dead_letter_queue():
    for policy in (
        QueuePolicy(dead_letter_queue="q"),
        QueuePolicy(types={"t": JobPolicy(dead_letter_queue="q")}),
    ):
        with pytest.raises(InvalidRequestError, match="dead_letter_queue"):
            check_policy("q", policy)
    check_policy("q", QueuePolicy(dead_letter_queue="q2"))
    with pytest.raises(InvalidRequestError, match="dead_letter_queue"):
        resolved(JobRequest("q", dead_letter_queue="q"), QueuePolicy())
