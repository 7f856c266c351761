"""What leaseq promises, written a second time: plain Python without database, network or concurrency.

It knows nothing of `app`; tests/system/test_model.py drives both and compares. A method is a verb: it takes the instant
at which it happens and returns the answer that the service must give.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, NamedTuple

Body = dict[str, Any]

WAITING, DELAYED, DEAD = ("ready",), ("scheduled", "retry"), ("failed", "cancelled", "expired")
TERMINAL = (*DEAD, "completed")
COUNTED_AS = {"ready": "waiting", "scheduled": "delayed", "retry": "delayed"}
BACKOFF = {
    "strategy": "exponential",
    "initial_seconds": 1,
    "factor": 2,
    "max_seconds": 3600,
    "jitter": "equal",
}
LEASE_SECONDS = 30
MAX_RETRIES = 3


class Answer(NamedTuple):
    """What the service must say: at least these fields of the body."""

    status: int
    body: Any


class Seen:
    """A value that the service chooses, such as an id: any (between two instants, if given), and then always the same."""

    def __init__(self, low: datetime | None = None, high: datetime | None = None) -> None:
        self.value: Any = None
        self._low, self._high = low, high

    def is_(self, value: Any) -> bool:
        """Whether `value` may be it. The first that may be is it."""
        if self.value is None and (
            self._low is None or self._high is None or self._low <= value <= self._high
        ):
            self.value = value
        return bool(value is not None and self.value == value)

    @property
    def latest(self) -> Any:
        """What it is, or may be at most."""
        return self._high if self.value is None else self.value

    def __repr__(self) -> str:
        return f"<{self._low} to {self._high}>" if self.value is None else repr(self.value)


ANYTHING = ...
"""A text that is for people, and so is not compared."""


def differences(expected: Any, actual: Any, where: str = "") -> Iterator[str]:
    """Tell where `actual` is not what is expected. What it has besides is ignored; what it leaves out is None."""
    if expected is ANYTHING:
        return
    if isinstance(expected, Mapping) and isinstance(actual, Mapping):
        for name, value in expected.items():
            yield from differences(value, actual.get(name), f"{where}.{name}")
    elif isinstance(expected, list) and isinstance(actual, list) and len(expected) == len(actual):
        for place, (one, other) in enumerate(zip(expected, actual, strict=True)):
            yield from differences(one, other, f"{where}[{place}]")
    elif not (expected.is_(actual) if isinstance(expected, Seen) else expected == actual):
        yield f"{where}: {expected!r} expected, not {actual!r}"


@dataclass(eq=False)
class Lease:
    id: Seen
    worker: str | None
    leased_at: datetime
    expires_at: datetime
    deadline_at: datetime | None
    seconds: float
    cancel_requested: bool = False


@dataclass(eq=False)
class Job:
    id: Seen
    number: int
    fields: Body
    """What was asked for, defaults filled in, under the API's names."""
    backoff: Body
    created_at: datetime
    run_at: datetime
    state: str
    since: datetime
    """Its place in line."""
    due_at: Any = None
    attempt: int = 0
    budget_start: int = 0
    lease: Lease | None = None
    worker: str | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    reason: str | None = None
    last_error: Body | None = None
    result: Any = None
    expires_at: datetime | None = None
    unique: Body | None = None
    progress: Body | None = None
    checkpoint: Any = None
    attempts: list[Body] = field(default_factory=list)
    recorded: dict[str, tuple[str, Body]] = field(default_factory=dict)
    """By lease: the verb that ended it, and its answer."""

    @property
    def shown(self) -> Body:
        """The job as `GET /jobs/{id}` shows it."""
        lease = self.lease
        return {
            **self.fields,
            "id": self.id,
            "backoff": self.backoff,
            "state": self.state,
            "attempt": self.attempt,
            "retry_count": max(self.attempt - self.budget_start - 1, 0),
            "created_at": self.created_at,
            "run_at": self.due_at if self.state in DELAYED else self.run_at,
            "started_at": lease.leased_at if lease else self.started_at,
            "finished_at": self.finished_at,
            "worker": lease.worker if lease else self.worker,
            "cancel_requested": lease is not None and lease.cancel_requested,
            "reason": self.reason,
            "last_error": self.last_error,
            "result": self.result,
            "expires_at": self.expires_at,
            "unique": self.unique,
            "progress": self.progress,
            "checkpoint": self.checkpoint,
        }

    @property
    def handed_out(self) -> Body:
        """The job as a lease reply carries it."""
        assert self.lease is not None
        names = ("queue", "type", "payload", "priority", "max_retries", "tags", "metadata")
        return {
            **{name: self.fields[name] for name in names},
            "id": self.id,
            "attempt": self.attempt,
            "lease_id": self.lease.id,
            "lease_expires_at": self.lease.expires_at,
            "created_at": self.created_at,
            "run_at": self.run_at,
            "last_error": self.last_error,
            "checkpoint": self.checkpoint,
        }

    @property
    def started(self) -> bool:
        """Whether a worker has ever had it."""
        return self.attempt > 0 or bool(self.attempts)

    def missed(self, now: datetime) -> bool:
        """Whether its start deadline has passed before its first attempt that counts."""
        return self.attempt == 0 and self.expires_at is not None and self.expires_at <= now

    @property
    def all_attempts(self) -> list[Body]:
        """As `GET /jobs/{id}/attempts` shows them."""
        running = [] if self.lease is None else [self.attempt_now()]
        return [*self.attempts, *running]

    def attempt_now(self, **ended: Any) -> Body:
        """Return the running attempt, with how it ended."""
        assert self.lease is not None
        began = {"attempt": self.attempt, "worker": self.lease.worker, "started_at": self.lease.leased_at}
        return {**began, "ended_at": None, "outcome": None, "error": None, **ended}


class Model:
    """All jobs, in the order of their creation."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.paused: set[str] = set()
        self._created = 0
        self._keys: dict[tuple[str, str], Job] = {}
        """By queue and unique key: the job that took it last."""
        self._calls: dict[str, tuple[Body, Job]] = {}
        """By `Idempotency-Key`: the first call's body, and its job."""
        self._requests: dict[str, list[tuple[Job, Lease]]] = {}
        """By `request_id`: what the last lease under it got."""

    def job(self, job_id: str) -> Job | None:
        return next((job for job in self.jobs if job.id.value == job_id), None)

    # Producing

    def enqueue(self, now: datetime, asked: Body, key: str | None = None) -> Answer:
        if key in self._calls:
            first, job = self._calls[key]
            return (
                Answer(200, {**job.shown, "duplicate": True})
                if first == asked
                else refused(409, "idempotency_conflict")
            )
        answer, stored = self._enqueue(now, asked)
        if key is not None and stored is not None:
            self._calls[key] = asked, stored
        return answer

    def _enqueue(self, now: datetime, asked: Body) -> tuple[Answer, Job | None]:
        unique = asked.get("unique")
        holder = None if unique is None else self._holder(now, asked["queue"], unique["key"])
        if holder is None:
            self._created += 1
            job = Job(Seen(), self._created, {}, {}, created_at=now, run_at=now, state="ready", since=now)
            self.jobs.append(job)
            self._fill(now, job, asked)
            return Answer(201, job.shown), job
        assert unique is not None
        wish = unique.get("on_conflict", "return")
        if wish == "reject":
            return refused(409, "duplicate"), None
        if wish == "return" or holder.state not in (*WAITING, *DELAYED):
            return Answer(200, {**holder.shown, "duplicate": True}), holder
        self._fill(now, holder, asked)
        return Answer(200, {**holder.shown, "duplicate": True, "replaced": True}), holder

    def _fill(self, now: datetime, job: Job, asked: Body) -> None:
        """Give a job that no worker has the fields that were asked for, and the place that comes of them."""
        job.fields = {
            "queue": asked["queue"],
            "type": asked.get("type", "default"),
            "payload": asked.get("payload"),
            "priority": priority_of(asked.get("priority", 5)),
            "lease_seconds": asked.get("lease_seconds", LEASE_SECONDS),
            "timeout_seconds": asked.get("timeout_seconds"),
            "max_retries": asked.get("max_retries", MAX_RETRIES),
            "tags": asked.get("tags", []),
            "metadata": asked.get("metadata", {}),
        }
        job.backoff = {**BACKOFF, **asked.get("backoff", {})}
        job.expires_at = now + seconds(asked["expires_in_seconds"]) if "expires_in_seconds" in asked else None
        due_at = max(now, asked.get("run_at") or now, now + seconds(asked.get("delay_seconds") or 0))
        job.run_at = due_at
        self._delay(now, job, due_at)
        if unique := asked.get("unique"):
            window = unique.get("window_seconds")
            scope = unique.get("scope", "unfinished")
            job.unique = {"key": unique["key"], "scope": scope, "window_seconds": window}
            self._keys[asked["queue"], unique["key"]] = job

    def _delay(self, now: datetime, job: Job, due_at: datetime) -> None:
        """Let a job that waits be due then. One that is ready and stays it keeps its place."""
        if due_at > now:
            job.state = "retry" if job.state == "retry" else "scheduled"
        elif job.state != "ready":
            job.state, job.since = "ready", now
        job.due_at = due_at

    def _holder(self, now: datetime, queue: str, key: str) -> Job | None:
        job = self._keys.get((queue, key))
        if job is None or job not in self.jobs or job.unique is None:
            return None
        living = job.state not in TERMINAL
        holds = {
            "queued": living and job.lease is None and not job.started,
            "unfinished": living,
            "window": job.created_at + seconds(job.unique["window_seconds"] or 0) > now,
        }
        return job if holds[job.unique["scope"]] else None

    # Working

    def lease(self, now: datetime, asked: Body) -> Answer:
        settled = {"settled": self._settled(now, asked["settle"])} if asked.get("settle") else {}
        earlier = self._requests.get(asked.get("request_id", ""), [])
        standing = [job for job, lease in earlier if job.lease is lease]
        if standing:
            return Answer(200, {"jobs": [job.handed_out for job in standing], **settled})
        taken = self.line(now, asked["queues"], asked.get("types"))[: asked.get("max_jobs", 1)]
        told = self.take(now, asked, taken)
        if "request_id" in asked:
            self._requests[asked["request_id"]] = [(job, job.lease) for job in taken if job.lease is not None]
        return Answer(200, {"jobs": told, **settled})

    def take(self, now: datetime, asked: Body, taken: Sequence[Job]) -> list[Body]:
        """Lease these jobs; return what the reply carries."""
        for job in taken:
            length = asked.get("lease_seconds") or job.fields["lease_seconds"]
            limit = job.fields["timeout_seconds"]
            job.lease = Lease(
                id=Seen(),
                worker=asked.get("worker"),
                leased_at=now,
                expires_at=now + seconds(length if limit is None else min(length, limit)),
                deadline_at=None if limit is None else now + seconds(limit),
                seconds=length,
            )
            job.state = "active"
            job.attempt += 1
        return [job.handed_out for job in taken]

    def line(self, now: datetime, queues: Sequence[str], types: Sequence[str] | None = None) -> list[Job]:
        """Return the jobs that may be leased, in the order in which they must be."""
        ready = [
            job
            for job in self.jobs
            if job.state == "ready"
            and not job.missed(now)
            and job.fields["queue"] in queues
            and job.fields["queue"] not in self.paused
            and (types is None or job.fields["type"] in types)
        ]
        return sorted(ready, key=lambda job: (-job.fields["priority"], job.since))

    def word(self, now: datetime, verb: str, job_id: str, lease_id: str, said: Body) -> Answer:
        """Take what a worker says of a job: heartbeat, ack, fail or release."""
        job = self.job(job_id)
        if job is None:
            return refused(404, "not_found")
        if job.lease is None or job.lease.id.value != lease_id:
            recorded_verb, recorded = job.recorded.get(lease_id, (None, {}))
            if recorded_verb != verb:
                return refused(409, "lease_lost", job.state)
            return Answer(200, job.shown if verb == "ack" else recorded)
        verbs: dict[str, Callable[[datetime, Job, Lease, Body], Answer]] = {
            "heartbeat": self._heartbeat,
            "ack": self._ack,
            "fail": self._fail,
            "release": self._release,
        }
        answer = verbs[verb](now, job, job.lease, said)
        if verb != "heartbeat":
            job.recorded[lease_id] = (verb, answer.body)
        return answer

    def settle(self, now: datetime, items: Sequence[Body]) -> Answer:
        return Answer(200, {"results": self._settled(now, items)})

    def _settled(self, now: datetime, items: Sequence[Body]) -> list[Body]:
        results = []
        for item in items:
            verb = item["outcome"]
            status, body = self.word(now, verb, item["job_id"], item["lease_id"], item)
            if status != 200:
                said = {"error": body}
            else:
                said = {"state": body["state"]} if verb == "ack" else {"state": "active", **body}
            results.append({"job_id": item["job_id"], "status": status, **said})
        return results

    def _heartbeat(self, now: datetime, job: Job, lease: Lease, said: Body) -> Answer:
        wanted = now + seconds(said.get("extend_seconds", lease.seconds))
        lease.expires_at = max(lease.expires_at, min(wanted, lease.deadline_at or wanted))
        job.progress = said.get("progress", job.progress)
        job.checkpoint = said.get("checkpoint", job.checkpoint)
        told = {"lease_expires_at": lease.expires_at, "cancel_requested": lease.cancel_requested}
        return Answer(200, {**told, "directive": "continue"})

    def _ack(self, now: datetime, job: Job, lease: Lease, said: Body) -> Answer:
        self._end_attempt(job, now, "acked")
        self._end(job, now, "completed", lease=lease)
        job.result = said.get("result")
        job.progress = job.checkpoint = None
        return Answer(200, job.shown)

    def _fail(self, now: datetime, job: Job, lease: Lease, said: Body) -> Answer:
        return self._failed(
            now,
            job,
            lease,
            outcome="failed",
            error=said["error"],
            retry=said.get("retry", True),
            retry_in=said.get("retry_in_seconds"),
        )

    def _failed(
        self,
        now: datetime,
        job: Job,
        lease: Lease,
        *,
        outcome: str,
        error: Body,
        retry: bool = True,
        retry_in: float | None = None,
    ) -> Answer:
        self._end_attempt(job, now, "cancelled" if lease.cancel_requested else outcome, error)
        failures = job.attempt - job.budget_start
        job.last_error = error
        if lease.cancel_requested:
            return self._end(job, now, "cancelled", "cancelled", lease)
        if not retry:
            return self._end(job, now, "failed", "not_retryable", lease)
        if failures > job.fields["max_retries"]:
            return self._end(job, now, "failed", "retries_exhausted", lease)
        job.state = "retry"
        job.due_at = delayed(now, job.backoff, failures) if retry_in is None else now + seconds(retry_in)
        return Answer(200, {"state": "retry", "run_at": job.due_at})

    def _release(self, now: datetime, job: Job, lease: Lease, said: Body) -> Answer:
        if lease.cancel_requested:
            self._end_attempt(job, now, "cancelled")
            return self._end(job, now, "cancelled", "cancelled", lease)
        self._end_attempt(job, now, "released")
        job.attempt -= 1
        delay = said.get("delay_seconds", 0)
        if delay == 0:
            job.state = "ready"  # at its old place
            return Answer(200, {"state": "ready", "run_at": None})
        job.state, job.due_at = "scheduled", now + seconds(delay)
        return Answer(200, {"state": "scheduled", "run_at": job.due_at})

    def _end_attempt(self, job: Job, now: datetime, outcome: str, error: Body | None = None) -> None:
        job.attempts.append(job.attempt_now(ended_at=now, outcome=outcome, error=error))
        job.lease = None

    def _end(
        self, job: Job, now: datetime, state: str, reason: str | None = None, lease: Lease | None = None
    ) -> Answer:
        job.state, job.reason, job.finished_at = state, reason, now
        if lease is not None:
            job.worker, job.started_at = lease.worker, lease.leased_at
        return Answer(200, {"state": state, "run_at": None})

    # Operating

    def cancel(self, now: datetime, job_id: str) -> Answer:
        job = self.job(job_id)
        if job is None:
            return refused(404, "not_found")
        if job.lease is not None:
            job.lease.cancel_requested = True
        elif job.state not in TERMINAL:
            self._end(job, now, "cancelled", "cancelled")
        elif job.state != "cancelled":
            return refused(409, "wrong_state", job.state)
        return Answer(200, job.shown)

    def retry(self, now: datetime, job_id: str) -> Answer:
        job = self.job(job_id)
        if job is None:
            return refused(404, "not_found")
        if job.state not in DEAD:
            return refused(409, "wrong_state", job.state)
        if job.unique is not None and self._needs_key(now, job):
            key = job.fields["queue"], job.unique["key"]
            holder = self._holder(now, *key)
            if holder is not None and holder is not job:
                return refused(409, "duplicate")
            self._keys[key] = job
        job.state, job.since, job.run_at, job.budget_start = "ready", now, now, job.attempt
        job.reason = job.worker = job.started_at = job.finished_at = None
        if job.attempt > 0 or (job.expires_at is not None and job.expires_at <= now):
            job.expires_at = None
        return Answer(200, job.shown)

    def _needs_key(self, now: datetime, job: Job) -> bool:
        """Whether a dead job that comes back would hold its key."""
        assert job.unique is not None
        if job.unique["scope"] == "window":
            return bool(job.created_at + seconds(job.unique["window_seconds"]) > now)
        return job.unique["scope"] == "unfinished" or not job.started

    def edit(self, now: datetime, job_id: str, changes: Body) -> Answer:
        job = self.job(job_id)
        if job is None:
            return refused(404, "not_found")
        if job.state in ("active", "completed"):
            return refused(409, "wrong_state", job.state)
        if "delay_seconds" in changes:
            due_at = now + seconds(changes["delay_seconds"])
            if job.state in DEAD or (
                job.attempt == 0 and job.expires_at is not None and job.expires_at < due_at
            ):
                return refused(422, "invalid")
            # Whoever gets another time gets another place, too.
            job.since = now
            self._delay(now, job, due_at)
            job.run_at = due_at
        job.fields |= {name: changes[name] for name in ("payload", "type", "max_retries") if name in changes}
        if "priority" in changes:
            job.fields["priority"] = priority_of(changes["priority"])
        return Answer(200, job.shown)

    def bulk(self, now: datetime, verb: str, asked: Body) -> Answer:
        """Take a verb for all jobs that match, the oldest first."""
        allowed = {"retry": DEAD, "cancel": (*WAITING, *DELAYED, "active"), "delete": TERMINAL}[verb]
        wanted = asked["filter"]
        matching = [
            job
            for job in self.jobs
            if job.state in allowed
            and job.state in wanted.get("state", allowed)
            and job.fields["queue"] in wanted.get("queue", [job.fields["queue"]])
        ]
        changed = 0
        for job in [] if asked.get("dry_run") else matching:
            then = now + timedelta(microseconds=changed) if verb == "retry" else now
            answer = (
                self.delete(job.id.value) if verb == "delete" else getattr(self, verb)(then, job.id.value)
            )
            if answer.status < 300:
                changed += 1
                if verb == "retry":
                    job.run_at = now
        return Answer(200, {"matched": len(matching), "changed": changed, "next_cursor": None})

    def purge(self, queue: str) -> Answer:
        gone = [
            job for job in self.jobs if job.fields["queue"] == queue and job.state in (*WAITING, *DELAYED)
        ]
        self.jobs = [job for job in self.jobs if job not in gone]
        return Answer(200, {"matched": len(gone), "changed": len(gone), "more": False})

    def pause(self, queue: str, *, paused: bool) -> Answer:
        (self.paused.add if paused else self.paused.discard)(queue)
        return Answer(200, {"name": queue, "paused": paused})

    def delete(self, job_id: str) -> Answer:
        job = self.job(job_id)
        if job is None:
            return refused(404, "not_found")
        if job.state not in TERMINAL:
            return refused(409, "wrong_state", job.state)
        self.jobs.remove(job)
        return Answer(204, None)

    # Time

    def maintain(self, now: datetime) -> set[Job]:
        """Do what is due; return the jobs that this has touched."""
        touched = set()
        for job in self.jobs:
            lease = job.lease
            if lease is None or lease.expires_at > now:
                continue
            outcome = "timed_out" if lease.deadline_at == lease.expires_at else "lease_expired"
            self._failed(now, job, lease, outcome=outcome, error={"type": outcome, "message": ANYTHING})
            touched.add(job)
        for job in self.jobs:
            if job.state in (*WAITING, *DELAYED) and job.missed(now):
                self._end(job, now, "expired", "expired")
                touched.add(job)
        # Delays are drawn by the service; what it shows after this step tells them.
        due = [job for job in self.jobs if job.state in DELAYED and latest(job.due_at) <= now]
        for place, job in enumerate(sorted(due, key=lambda job: (latest(job.due_at), job.number)), 1):
            job.state, job.since = "ready", now + timedelta(microseconds=place)
            touched.add(job)
        return touched

    def turning_points(self) -> list[datetime]:
        """Return the instants at which something becomes due."""
        leases = [job.lease.expires_at for job in self.jobs if job.lease is not None]
        delays = [latest(job.due_at) for job in self.jobs if job.state in DELAYED]
        deadlines = [
            job.expires_at
            for job in self.jobs
            if job.state in (*WAITING, *DELAYED) and job.expires_at is not None
        ]
        return sorted({*leases, *delays, *deadlines})

    # Looking

    def listed(self, asked: Mapping[str, Any]) -> Answer:
        """Return a list of the jobs with these states, queues and types, newest first."""
        found = [
            job.shown
            for job in reversed(self.jobs)
            if job.state in asked.get("state", [job.state])
            and job.fields["queue"] in asked.get("queue", [job.fields["queue"]])
            and job.fields["type"] in asked.get("type", [job.fields["type"]])
        ]
        return Answer(200, found)

    def stats(self) -> Answer:
        names = ("active", "waiting", "delayed", "completed", "failed", "cancelled", "expired")
        queues: dict[str, dict[str, int]] = {}
        for job in self.jobs:
            counts = queues.setdefault(job.fields["queue"], dict.fromkeys(names, 0))
            counts[COUNTED_AS.get(job.state, job.state)] += 1
        total = {name: sum(counts[name] for counts in queues.values()) for name in names}
        return Answer(200, {"jobs": total, "queues": queues})


def refused(status: int, code: str, state: str | None = None) -> Answer:
    return Answer(status, {"code": code, "status": status, "state": state})


def delayed(now: datetime, backoff: Body, failures: int) -> Any:
    """Return when the retry after so many failures is due: an instant, or one within the jitter's bounds."""
    initial = backoff["initial_seconds"]
    delay = {
        "exponential": initial * backoff["factor"] ** (failures - 1),
        "linear": initial * failures,
        "fixed": initial,
    }[backoff["strategy"]]
    delay = min(delay, backoff["max_seconds"])
    shortest = {"none": delay, "equal": delay / 2, "full": 0}[backoff["jitter"]]
    if shortest == delay:
        return now + seconds(delay)
    return Seen(now + seconds(shortest), now + seconds(delay))


def latest(instant: Any) -> datetime:
    """Return the instant, or what is known of it."""
    known: datetime = instant.latest if isinstance(instant, Seen) else instant
    return known


def priority_of(asked: Any) -> int:
    named: int = {"fast": 10, "normal": 5, "bulk": 1}.get(asked, asked)
    return named


def seconds(count: float) -> timedelta:
    return timedelta(seconds=count)
