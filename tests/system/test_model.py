"""The real service against the model, step by step: whatever is done to it, both must answer and stand alike.

Two replicas serve one database over HTTP. A step is a verb through either of them, time that passes, maintenance by
hand, a worker that dies, or a replica that starts again. After every step all jobs, the counts, the attempts of what
was touched and the invariants of the tables are compared with the model (`tests/model.py`). The lists are read through
the other replica than the one that acted.
"""

import asyncio
import itertools
import os
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, NamedTuple, TypeVar

import asyncpg
import httpx
import pytest
import uvloop
from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from app.engine.maintenance import Reach
from tests.conftest import Clock, Replica, World, _execute, _recreate, with_database
from tests.invariants import broken_invariants
from tests.model import Answer, Body, Model, differences

QUEUES, TYPES, WORKERS = ("a", "b"), ("x", "y"), ("ann", "bob")
TICK_SECONDS = 0.001
"""Between two steps that put jobs in line, so that no two have the same place."""
REPLICAS = 2
EXAMPLES = 80
STEPS_MIN = 2000
MINUTES = float(os.environ.get("MODEL_MINUTES", "0"))
KEPT_TABLES = ("alembic_version", "maintenance", "changes")

FEWER_DAYS = """
DO $$ DECLARE day text; BEGIN
  FOR day IN SELECT inhrelid::regclass FROM pg_inherits
              WHERE inhparent IN ('leaseq.history'::regclass, 'leaseq.attempts'::regclass)
                AND right(inhrelid::regclass::text, 8) > to_char(now() + interval '1 day', 'YYYYMMDD')
  LOOP EXECUTE 'DROP TABLE ' || day; END LOOP;
END $$"""
"""Drops the days far ahead: a read looks at each. They are made again when time gets there."""

REPLICA = st.integers(0, REPLICAS - 1)
PICK = st.integers(0, 9)
"""Which of those that there are: rules draw no more than this, so that what they draw never hangs on a race."""
VERB = st.sampled_from(["ack", "fail", "release", "heartbeat"])
BACKOFF = st.fixed_dictionaries(
    {"jitter": st.sampled_from(["none", "equal", "full"])},
    optional={
        "strategy": st.sampled_from(["exponential", "linear", "fixed"]),
        "initial_seconds": st.sampled_from([0, 2, 3]),
        "max_seconds": st.just(5),
    },
)
UNIQUE = st.builds(
    lambda scope, on_conflict: {"key": "k", **scope, "on_conflict": on_conflict},
    st.sampled_from([{"scope": "queued"}, {}, {"scope": "window", "window_seconds": 10}]),
    st.sampled_from(["return", "reject", "replace", "replace"]),
)
JOB = st.builds(
    lambda job, when: {**job, **when},
    st.fixed_dictionaries(
        {"queue": st.sampled_from(QUEUES), "type": st.sampled_from(TYPES)},
        optional={
            "priority": st.sampled_from(["fast", "bulk", 6]),
            "max_retries": st.integers(0, 2),
            "lease_seconds": st.sampled_from([0.5, 5]),
            "timeout_seconds": st.sampled_from([1, 8]),
            "backoff": BACKOFF,
            "expires_in_seconds": st.sampled_from([3, 20]),
            "unique": UNIQUE,
        },
    ),
    # An instant is so many seconds from now.
    st.sampled_from(
        [{}, {}, {}, {"delay_seconds": 2}, {"run_at": 2.5}, {"run_at": -1}, {"delay_seconds": 0}]
    ),
)

T = TypeVar("T")


class Call(NamedTuple):
    """A request, and what the model says of it."""

    method: str
    path: str
    body: Body | None
    model: Callable[[Model, datetime], Answer]
    headers: dict[str, str] | None = None


class Given(NamedTuple):
    """A lease that a worker got."""

    job_id: str
    lease_id: str
    worker: str | None


@dataclass
class Stage:
    """The replicas, kept from example to example, and what is done to them."""

    runner: asyncio.Runner
    world: World
    connection: "asyncpg.Connection[asyncpg.Record]"
    begin: datetime
    tables: list[str]
    replicas: list[Replica] = field(default_factory=list)
    ends: list[AsyncExitStack] = field(default_factory=list)
    behind: set[int] = field(default_factory=set)
    """The replicas that have not looked since the other one acted: a hint may be on its way."""
    steps: int = 0
    examples: int = 0

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    async def start(self, number: int) -> None:
        self.ends[number : number + 1] = [AsyncExitStack()]
        replica = await self.ends[number].enter_async_context(self.world._replica())
        self.replicas[number : number + 1] = [replica]

    async def restart(self, number: int) -> None:
        await self.ends[number].aclose()
        await self.start(number)

    async def clean(self) -> None:
        """Begin anew: no rows, nothing remembered, the same instant."""
        await self.connection.execute(";".join(f"DELETE FROM {table}" for table in self.tables))
        await self.connection.execute("UPDATE changes SET number = number + 1")
        self.world.clock.set(self.begin)
        self.behind.clear()
        for replica in self.replicas:
            service = replica.machine.service
            service._cursors._lines.clear()
            await service.copies.compare()
            reaches = [name for name, value in vars(service.maintenance).items() if isinstance(value, Reach)]
            assert reaches
            for name in reaches:
                setattr(service.maintenance, name, Reach())
            replica.events.events.clear()

    async def call(self, number: int, call: Call) -> httpx.Response:
        return await self.replicas[number].http.request(
            call.method, call.path, json=call.body, headers=call.headers
        )

    async def catch_up(self, number: int) -> None:
        """Let a replica look for what it has perhaps not heard of yet, as its poll does now and then."""
        if number in self.behind:
            self.behind.discard(number)
            service = self.replicas[number].machine.service
            await service.wakeups.look(everywhere=True)
            await service.copies.compare()


class QueueMachine(RuleBasedStateMachine):
    """The steps."""

    stage: Stage
    """Set by the test that runs it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.given: list[Given] = []
        self.dead_workers: set[str | None] = set()
        self.touched: set[str] = set()
        self.names: dict[str, str] = {}
        self.keyed: dict[str, tuple[Body, str]] = {}
        """By `Idempotency-Key`: the first call under it, and its job."""
        self.last_replica = 0
        self.steps = 0

    @initialize(jobs=st.lists(JOB, min_size=1, max_size=4))
    def begin(self, jobs: list[Body]) -> None:
        self.stage.run(self.stage.clean())
        self.stage.examples += 1
        for number, job in enumerate(jobs):
            self.enqueue(number % REPLICAS, job)

    def teardown(self) -> None:
        self.everything_is_as_the_model_says()

    # Steps

    @rule(replica=REPLICA, job=JOB, key=st.sampled_from([None, None, "i", "j"]))
    def enqueue(self, replica: int, job: Body, key: str | None = None) -> None:
        self.tick()
        asked = {**job, "payload": {"n": self.steps}}
        if "run_at" in job:
            asked["run_at"] = self.now + timedelta(seconds=job["run_at"])
        self.post(replica, asked, key)

    @rule(replica=REPLICA, key=st.sampled_from(["i", "j"]), same=st.booleans())
    def enqueue_again(self, replica: int, key: str, *, same: bool) -> None:
        """Repeat a call under its `Idempotency-Key`, or misuse the key for another one."""
        asked, job_id = self.keyed.get(key, ({}, ""))
        if self.model.job(job_id) is not None:
            self.tick()
            self.post(replica, asked if same else {**asked, "max_retries": 9}, key)

    def post(self, replica: int, asked: Body, key: str | None) -> None:
        earlier = self.keyed.get(key or "")
        if earlier is not None and self.model.job(earlier[1]) is None:
            return  # its job has been deleted
        sent = {
            name: value.isoformat() if isinstance(value, datetime) else value for name, value in asked.items()
        }
        headers = {} if key is None else {"Idempotency-Key": key}
        model = lambda model, now: model.enqueue(now, asked, key)  # noqa: E731
        answer = self.do(replica, Call("POST", "/jobs", sent, model, headers))
        if "id" in answer:
            self.touch(answer["id"])
            if key is not None:
                self.keyed.setdefault(key, (asked, answer["id"]))

    @rule(
        replica=REPLICA,
        worker=st.sampled_from([*WORKERS, None]),
        queues=st.sampled_from([["a", "b"], ["b", "a"], ["a"], ["b"]]),
        types=st.sampled_from([None, None, ["x"], ["y", "x"]]),
        max_jobs=st.integers(1, 3),
        lease_seconds=st.sampled_from([None, None, 1, 10]),
        request_id=st.sampled_from([None, None, None, "r", "s"]),
        settled=st.lists(st.tuples(VERB, st.integers(0, 9)), max_size=2),
    )
    def lease(
        self,
        replica: int,
        worker: str | None,
        queues: list[str],
        types: list[str] | None,
        max_jobs: int,
        lease_seconds: float | None,
        request_id: str | None,
        settled: Sequence[tuple[str, int]],
    ) -> None:
        asked: Body = {"queues": queues, "max_jobs": max_jobs, "wait_seconds": 0}
        asked |= {} if types is None else {"types": types}
        asked |= {} if worker is None else {"worker": worker}
        asked |= {} if lease_seconds is None else {"lease_seconds": lease_seconds}
        asked |= {} if request_id is None else {"request_id": request_id}
        if items := self.items(settled):
            self.tick()
            asked["settle"] = items
        self.stage.run(self.stage.catch_up(replica))
        self.dead_workers.discard(worker)
        answer = self.do(replica, self.lease_call(asked))
        self.take(worker, answer)

    @rule(
        replica=REPLICA,
        pick=PICK,
        stale=st.booleans(),
        extend=st.sampled_from([None, 0, 3, 60]),
        tells=st.sampled_from([{}, {}, {"progress": {"percent": 5, "message": None}}, {"checkpoint": [7]}]),
    )
    def heartbeat(self, replica: int, pick: int, extend: float | None, tells: Body, *, stale: bool) -> None:
        said = tells | ({} if extend is None else {"extend_seconds": extend})
        self.say(replica, "heartbeat", pick, said, stale=stale)

    @rule(replica=REPLICA, pick=PICK, stale=st.booleans(), result=st.sampled_from([None, [1]]))
    def ack(self, replica: int, pick: int, result: Any, *, stale: bool) -> None:
        self.say(replica, "ack", pick, {} if result is None else {"result": result}, stale=stale)

    @rule(
        replica=REPLICA,
        pick=PICK,
        stale=st.booleans(),
        what=st.sampled_from(
            [{}, {}, {}, {"retry": False}, {"retry_in_seconds": 0}, {"retry_in_seconds": 4}]
        ),
    )
    def fail(self, replica: int, pick: int, what: Body, *, stale: bool) -> None:
        error = {"message": f"failure {self.steps}", "type": "Boom"}
        self.say(replica, "fail", pick, {"error": error, **what}, stale=stale)

    @rule(replica=REPLICA, pick=PICK, stale=st.booleans(), delay=st.sampled_from([0, 0, 3]))
    def release(self, replica: int, pick: int, delay: float, *, stale: bool) -> None:
        self.say(replica, "release", pick, {"delay_seconds": delay} if delay else {}, stale=stale)

    @rule(
        replica=REPLICA,
        words=st.lists(
            st.tuples(VERB, st.integers(0, 30)),
            min_size=1,
            max_size=4,
        ),
    )
    def settle(self, replica: int, words: Sequence[tuple[str, int]]) -> None:
        items = self.items(words)
        if not items:
            return
        self.tick()
        call = Call("POST", "/settle", {"items": items}, lambda model, now: model.settle(now, items))
        self.do(replica, call)

    @rule(
        replica=REPLICA,
        pick=PICK,
        verb=st.sampled_from(["cancel", "retry"]),
        likely=st.booleans(),
    )
    def cancel_or_retry(self, replica: int, pick: int, verb: str, *, likely: bool) -> None:
        if not self.model.jobs:
            return
        self.tick()
        self.do(replica, self.operate_call(verb, self.some_job(pick, verb, likely=likely)))

    @rule(replica=REPLICA, pick=PICK, likely=st.booleans())
    def delete(self, replica: int, pick: int, *, likely: bool) -> None:
        if not self.model.jobs:
            return
        job_id = self.some_job(pick, "delete", likely=likely)
        call = Call("DELETE", f"/jobs/{job_id}", None, lambda model, _: model.delete(job_id))
        self.do(replica, call)
        self.touch(job_id)

    @rule(
        replica=REPLICA,
        pick=PICK,
        likely=st.booleans(),
        changes=st.fixed_dictionaries(
            {"payload": st.just("edited")},
            optional={
                "type": st.sampled_from(TYPES),
                "priority": st.sampled_from(["fast", 2]),
                "max_retries": st.integers(0, 2),
                "delay_seconds": st.sampled_from([0, 2, 8]),
            },
        ),
    )
    def edit(self, replica: int, pick: int, changes: Body, *, likely: bool) -> None:
        if self.model.jobs:
            self.tick()
            job_id = self.some_job(pick, "edit", likely=likely)
            self.touch(job_id)
            call = Call(
                "PATCH", f"/jobs/{job_id}", changes, lambda model, now: model.edit(now, job_id, changes)
            )
            self.do(replica, call)

    @rule(
        replica=REPLICA,
        verb=st.sampled_from(["retry", "cancel", "delete"]),
        wanted=st.sampled_from(
            [
                {"queue": ["a"]},
                {"queue": ["b"]},
                {"queue": ["a", "b"], "state": ["failed", "retry", "completed"]},
            ]
        ),
        dry_run=st.booleans(),
    )
    def bulk(self, replica: int, verb: str, wanted: Body, *, dry_run: bool) -> None:
        self.tick()
        asked = {"filter": wanted, "dry_run": dry_run}
        self.touch_all()
        self.do(
            replica, Call("POST", f"/jobs/{verb}", asked, lambda model, now: model.bulk(now, verb, asked))
        )

    @rule(replica=REPLICA, queue=st.sampled_from(QUEUES), verb=st.sampled_from(["pause", "resume", "resume"]))
    def pause_or_resume(self, replica: int, queue: str, verb: str) -> None:
        path = f"/queues/{queue}/{verb}"
        self.do(
            replica, Call("POST", path, None, lambda model, _: model.pause(queue, paused=verb == "pause"))
        )

    @rule(replica=REPLICA, queue=st.sampled_from(QUEUES))
    def purge(self, replica: int, queue: str) -> None:
        if any(job.fields["queue"] == queue for job in self.model.jobs):
            self.touch_all()
            self.do(
                replica, Call("POST", f"/queues/{queue}/purge", None, lambda model, _: model.purge(queue))
            )

    @rule(
        verbs=st.lists(
            st.sampled_from(["ack", "fail", "release", "heartbeat", "cancel"]), min_size=2, max_size=2
        ),
        pick=PICK,
    )
    def at_once(self, verbs: list[str], pick: int) -> None:
        """Of two that do something to one job at once, through two replicas, each is first or second."""
        self.tick()
        given = self.some_given(pick, stale=False)
        if given is None:
            return
        calls = [
            self.operate_call(verb, given.job_id)
            if verb == "cancel"
            else self.word_call(verb, given, {"error": {"message": "m"}} if verb == "fail" else {})
            for verb in verbs
        ]
        self.do_at_once(calls)

    @rule(max_jobs=st.lists(st.integers(1, 2), min_size=2, max_size=2))
    def lease_at_once(self, max_jobs: list[int]) -> None:
        """Two workers who lease at once through two replicas get the first jobs between them."""
        for number in range(REPLICAS):
            self.stage.run(self.stage.catch_up(number))
        calls = [
            self.lease_call({"queues": list(QUEUES), "max_jobs": most, "wait_seconds": 0, "worker": worker})
            for most, worker in zip(max_jobs, WORKERS, strict=True)
        ]
        self.dead_workers -= set(WORKERS)
        first = self.model.line(self.now, QUEUES)[: sum(max_jobs)]
        answers = self.call_at_once(calls)
        assert {job["id"] for answer in answers for job in answer["jobs"]} == {job.id.value for job in first}
        for worker, call, answer in zip(WORKERS, calls, answers, strict=True):
            assert call.body is not None
            ids = {job["id"] for job in answer["jobs"]}
            expected = self.model.take(self.now, call.body, [job for job in first if job.id.value in ids])
            self.agree(expected, answer["jobs"], "what one of two leases at once got")
            self.take(worker, answer)

    @rule(passed=st.sampled_from([0.001, 0.5, 1, 3, 20]))
    def time_passes(self, passed: float) -> None:
        self.stage.world.clock.move(passed)
        note(f"{passed} s pass")

    @rule(pick=st.integers(0, 3), microseconds=st.sampled_from([-1, 0, 0, 1]))
    def time_comes(self, pick: int, microseconds: int) -> None:
        """Go to just before, at or just after an instant at which something becomes due."""
        points = self.model.turning_points() or [self.now]
        instant = points[pick % len(points)] + timedelta(microseconds=microseconds)
        if instant > self.now:
            self.stage.world.clock.set(instant)
            note(f"it is {instant:%H:%M:%S.%f} now")

    @rule(replica=REPLICA)
    def maintain(self, replica: int) -> None:
        note(f"{replica}: maintenance")
        self.stage.run(self.stage.replicas[replica].maintain())
        for job in self.model.maintain(self.now):
            self.touch(job.id.value)
        self.acted(replica)

    @rule(worker=st.sampled_from([*WORKERS, None]))
    def worker_dies(self, worker: str | None) -> None:
        self.dead_workers.add(worker)

    @precondition(lambda self: self.steps % 7 == 6)
    @rule(replica=REPLICA)
    def restart(self, replica: int) -> None:
        note(f"{replica}: restarts")
        self.stage.run(self.stage.restart(replica))

    @rule(
        replica=REPLICA,
        asked=st.fixed_dictionaries(
            {},
            optional={
                "state": st.lists(
                    st.sampled_from(["ready", "scheduled", "retry", "active", "failed", "completed"]),
                    min_size=1,
                    max_size=2,
                    unique=True,
                ),
                "queue": st.sampled_from(QUEUES).map(lambda queue: [queue]),
                "type": st.sampled_from(TYPES).map(lambda type_: [type_]),
            },
        ),
        limit=st.integers(1, 3),
    )
    def list_in_pages(self, replica: int, asked: Body, limit: int) -> None:
        found: list[Body] = []
        cursor: dict[str, str] = {}
        while True:
            page = self.get(replica, "/jobs", **asked, limit=limit, **cursor)
            found += page["jobs"]
            if page["next_cursor"] is None:
                break
            cursor = {"cursor": page["next_cursor"]}
        self.agree(self.model.listed(asked).body, found, "a list")

    # After every step

    @invariant()
    def all_is_as_the_model_says(self) -> None:
        self.steps += 1
        self.stage.steps += 1
        other = 1 - self.last_replica
        self.agree(self.model.stats().body, self.get(other, "/stats"), "the counts")
        for job_id in sorted(self.touched, key=self.short):
            job = self.model.job(job_id)
            if job is None:
                for path in (f"/jobs/{job_id}", f"/jobs/{job_id}/attempts"):
                    assert self.stage.run(self.stage.replicas[other].http.get(path)).status_code == 404
            else:
                self.agree(job.shown, self.get(other, f"/jobs/{job_id}"), "the job")
                attempts = self.get(other, f"/jobs/{job_id}/attempts")["attempts"]
                self.agree(job.all_attempts, attempts, "its attempts")
        self.touched.clear()
        assert self.stage.run(broken_invariants(self.stage.connection)) == []

    def everything_is_as_the_model_says(self) -> None:
        """A list tells of all jobs, also of those that no step has touched."""
        found = self.get(self.last_replica, "/jobs", limit=500)["jobs"]
        self.agree(self.model.listed({}).body, found, "the jobs")

    # How it is done

    @property
    def now(self) -> datetime:
        now = self.stage.world.clock()
        assert now is not None
        return now

    def tick(self) -> None:
        self.stage.world.clock.move(TICK_SECONDS)

    def do(self, replica: int, call: Call) -> Any:
        """Call, and compare the answer with the model's; return the answer's body."""
        answer = self.stage.run(self.stage.call(replica, call))
        told = self.told(replica, call, answer)
        expected = call.model(self.model, self.now)
        self.agree(expected.status, answer.status_code, answer.text)
        self.agree(expected.body, told, f"{call.method} {call.path}")
        self.acted(replica)
        return told

    def do_at_once(self, calls: Sequence[Call]) -> None:
        """Call through both replicas at once. The answers must be those of one order or the other."""
        answers = self.call_at_once(calls)
        wrong = []
        for order in itertools.permutations(range(len(calls))):
            trial = deepcopy(self.model)
            found: list[str] = []
            for number in order:
                expected = calls[number].model(trial, self.now)
                found += differences(expected.status, answers[number].get("status", 200), "status")
                # A cancel shows the job as it stands after it, perhaps after the other one too.
                if not calls[number].path.endswith("cancel"):
                    found += differences(expected.body, answers[number], calls[number].path)
            if not found:
                self.model = trial
                return
            wrong.append(found)
        raise AssertionError(self.short(f"neither order explains the answers: {wrong}"))

    def call_at_once(self, calls: Sequence[Call]) -> list[Any]:
        """Call through both replicas at once; return the answers' bodies."""

        async def both() -> list[httpx.Response]:
            return await asyncio.gather(*(self.stage.call(number, call) for number, call in enumerate(calls)))

        answers = enumerate(zip(calls, self.stage.run(both()), strict=True))
        told = [self.told(number, call, answer) for number, (call, answer) in answers]
        for number in range(REPLICAS):
            self.acted(number)
        return told

    def told(self, replica: int, call: Call, answer: httpx.Response) -> Any:
        note(
            self.short(
                f"{replica}: {call.method} {call.path} {call.body or ''} -> {answer.status_code} {answer.text}"
            )
        )
        return parsed(answer.json()) if answer.content else None

    def get(self, replica: int, path: str, **query: Any) -> Any:
        answer = self.stage.run(self.stage.replicas[replica].http.get(path, params=query))
        assert answer.status_code == 200, answer.text
        return parsed(answer.json())

    def agree(self, expected: Any, actual: Any, what: str) -> None:
        found = list(differences(expected, actual))
        assert not found, self.short(f"{what}: " + "; ".join(found))

    def acted(self, replica: int) -> None:
        self.last_replica = replica
        self.stage.behind |= set(range(REPLICAS)) - {replica}

    def lease_call(self, asked: Body) -> Call:
        return Call("POST", "/lease", asked, lambda model, now: model.lease(now, asked))

    def word_call(self, verb: str, given: Given, said: Body) -> Call:
        path = f"/jobs/{given.job_id}/{verb}"
        body = {"lease_id": given.lease_id, **said}
        self.touch(given.job_id)
        return Call(
            "POST", path, body, lambda model, now: model.word(now, verb, given.job_id, given.lease_id, said)
        )

    def operate_call(self, verb: str, job_id: str) -> Call:
        self.touch(job_id)
        path = f"/jobs/{job_id}/{verb}"
        return Call("POST", path, None, lambda model, now: getattr(model, verb)(now, job_id))

    def say(self, replica: int, verb: str, pick: int, said: Body, *, stale: bool) -> None:
        given = self.some_given(pick, stale=stale)
        if given is not None:
            self.tick()
            self.do(replica, self.word_call(verb, given, said))

    def items(self, words: Sequence[tuple[str, int]]) -> list[Body]:
        """Return items of a settle, each of another job."""
        items: dict[str, Body] = {}
        for verb, pick in words:
            # Now and then a lease that no longer stands.
            given = self.some_given(pick, stale=pick % 5 == 4)
            if given is not None:
                item = {"job_id": given.job_id, "lease_id": given.lease_id, "outcome": verb}
                items[given.job_id] = item | ({"error": {"message": "no"}} if verb == "fail" else {})
                self.touch(given.job_id)
        return list(items.values())

    def take(self, worker: str | None, answer: Body) -> None:
        for job in answer["jobs"]:
            self.given.append(Given(job["id"], job["lease_id"], worker))
            self.names.setdefault(job["lease_id"], f"lease {len(self.given)}")
            self.touch(job["id"])

    def some_given(self, pick: int, *, stale: bool) -> Given | None:
        """Return a lease of a living worker that stands, or with `stale` any that there ever was."""
        standing = {job.lease.id.value for job in self.model.jobs if job.lease is not None}
        among = [
            given
            for given in self.given
            if stale or (given.lease_id in standing and given.worker not in self.dead_workers)
        ]
        return among[pick % len(among)] if among else None

    def some_job(self, pick: int, verb: str, *, likely: bool) -> str:
        """Return a job: any, or one that most likely may be told this."""
        dead, waiting = ("failed", "cancelled", "expired"), ("ready", "scheduled", "retry")
        states = {
            "cancel": (*waiting, "active"),
            "retry": dead,
            "edit": (*waiting, *dead),
            "delete": (*dead, "completed"),
        }[verb]
        among = [job for job in self.model.jobs if job.state in states] if likely else []
        job_id: str = (among or self.model.jobs)[pick % len(among or self.model.jobs)].id.value
        return job_id

    def touch(self, job_id: str) -> None:
        self.names.setdefault(job_id, f"job {len(self.names) + 1}")
        self.touched.add(job_id)

    def touch_all(self) -> None:
        for job in self.model.jobs:
            self.touch(job.id.value)

    def short(self, text: str) -> str:
        for long, name in self.names.items():
            text = text.replace(long, name)
        return text


def parsed(value: Any, name: str = "") -> Any:
    """Return an answer with instants for what is named as one."""
    if isinstance(value, dict):
        return {key: parsed(each, key) for key, each in value.items()}
    if isinstance(value, list):
        return [parsed(each) for each in value]
    return datetime.fromisoformat(value) if name.endswith("_at") and value is not None else value


@pytest.fixture
def stage(cluster_url: str, template_url: str) -> Iterator[Stage]:
    name = f"leaseq_model_{os.getpid()}"
    url = with_database(cluster_url, name)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_recreate(cluster_url, name, template_url.rpartition("/")[2].partition("?")[0]))
        stack = AsyncExitStack()
        world = World(url, Clock(), stack, by_hand=True)

        async def build() -> Stage:
            connection = await world.connect()
            rows = await connection.fetch(
                "SELECT relname FROM pg_class WHERE relnamespace = 'leaseq'::regnamespace"
                " AND relkind IN ('r', 'p') AND NOT relispartition"
            )
            tables = [row["relname"] for row in rows if row["relname"] not in KEPT_TABLES]
            await connection.execute(FEWER_DAYS)
            stage = Stage(runner, world, connection, world.clock.move(0), tables)
            for number in range(REPLICAS):
                await stage.start(number)
            return stage

        stage = runner.run(build())
        yield stage

        async def end() -> None:
            for replica in stage.ends:
                await replica.aclose()
            await stack.aclose()

        runner.run(end())
        runner.run(_execute(cluster_url, f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.mark.slow
@pytest.mark.timeout(MINUTES * 60 + 900)
def test_the_service_and_the_model_agree_whatever_is_done(stage: Stage, capsys: pytest.CaptureFixture[str]):
    """The same steps in each run; with MODEL_MINUTES others, for so long (`make model`)."""
    machine = type("Machine", (QueueMachine,), {"stage": stage})
    began = time.monotonic()
    while True:
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=EXAMPLES,
                stateful_step_count=50,
                derandomize=MINUTES == 0,
                database=None,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
        took = time.monotonic() - began
        with capsys.disabled():
            print(f"\n{stage.steps} steps in {stage.examples} examples, {took:.0f} s")  # noqa: T201
        if took >= MINUTES * 60:
            break
    assert stage.steps >= STEPS_MIN
