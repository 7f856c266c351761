"""Schedules where clocks change, where processes die, and where several decide at once."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from app.queue.errors import UnavailableError
from app.queue.events import MaintenanceFailed, ScheduleRan
from app.store.schedules import JOBS_REMEMBERED, RUN_RETENTION_SECONDS, RUNS_KEPT
from tests.conftest import Clock, Replica, World
from tests.wire import Cut, wire_to

NOON = datetime(2026, 6, 1, 12, tzinfo=UTC)


@pytest.fixture
def noon(clock: Clock) -> Clock:
    clock.set(NOON)
    return clock


@pytest.fixture
async def queue(world: World, noon: Clock) -> Replica:  # noqa: ARG001  # the clock stands before the first round
    replica = await world.replica()
    await replica.first_round()
    return replica


async def put(queue: Replica, name: str = "s", **fields: Any) -> dict[str, Any]:
    body = {"job": {"queue": "q"}, "every_seconds": 60, **fields}
    if "cron" in fields:
        del body["every_seconds"]
    answer = await queue.http.put(f"/schedules/{name}", json=body)
    assert answer.status_code in {200, 201}, answer.text
    schedule: dict[str, Any] = answer.json()
    return schedule


async def runs(queue: Replica, name: str = "s") -> list[dict[str, Any]]:
    """Return the runs, oldest first."""
    answer = await queue.http.get(f"/schedules/{name}/runs", params={"limit": 500})
    assert answer.status_code == 200, answer.text
    listed: list[dict[str, Any]] = answer.json()["runs"]
    return listed[::-1]


async def fire(queue: Replica) -> int:
    return await queue.machine.service.maintenance.fire()


CHANGES = [
    # Zone, the change in UTC, an expression, and when it fires in the three hours around it, in local time.
    ("Europe/Berlin", "2026-03-29T01:00", "30 2 * * *", ["03:00+0200"]),
    (
        "Europe/Berlin",
        "2026-03-29T01:00",
        "*/30 1-3 * * *",
        ["01:00+0100", "01:30+0100", "03:00+0200", "03:30+0200"],
    ),
    ("Europe/Berlin", "2026-10-25T01:00", "30 2 * * *", ["02:30+0200"]),
    (
        "Europe/Berlin",
        "2026-10-25T01:00",
        "*/30 2-3 * * *",
        ["02:00+0200", "02:30+0200", "03:00+0100", "03:30+0100"],
    ),
    ("America/New_York", "2026-03-08T07:00", "30 2 * * *", ["03:00-0400"]),
    ("America/New_York", "2026-11-01T06:00", "30 1 * * *", ["01:30-0400"]),
    ("Australia/Lord_Howe", "2026-10-03T15:30", "15 2 * * *", ["02:30+1100"]),
    ("Australia/Lord_Howe", "2026-04-04T15:00", "45 1 * * *", ["01:45+1100"]),
]


@pytest.mark.parametrize(("zone", "change", "expression", "expected"), CHANGES)
async def test_clocks_change(
    world: World, clock: Clock, zone: str, change: str, expression: str, expected: list[str]
):
    at = datetime.fromisoformat(f"{change}+00:00")
    clock.set(at - timedelta(minutes=91))
    queue = await world.replica()
    await put(queue, cron=expression, timezone=zone)
    for tick in range(28):
        clock.move(420)
        await fire(queue)
        if tick == 13:
            # A new process takes over in the middle of it.
            await queue.machine.service.stop()
            queue = await world.replica()
    fired = await runs(queue)
    times = [datetime.fromisoformat(run["fire_at"]).astimezone(ZoneInfo(zone)) for run in fired]
    assert [f"{time:%H:%M%z}" for time in times] == expected
    # Seven minutes late at most is later than 60 s: those are noted as missed, each once.
    assert {run["outcome"] for run in fired} <= {"fired", "skipped"}
    assert sum(run["fires"] for run in fired) == len(expected)


@pytest.mark.parametrize(("zone", "change", "expression", "expected"), CHANGES)
async def test_clocks_change_and_nobody_is_late(
    world: World, clock: Clock, zone: str, change: str, expression: str, expected: list[str]
):
    at = datetime.fromisoformat(f"{change}+00:00")
    clock.set(at - timedelta(minutes=91))
    queue = await world.replica()
    await put(queue, cron=expression, timezone=zone)
    for _ in range(190):
        clock.move(60)
        await fire(queue)
    fired = await runs(queue)
    times = [datetime.fromisoformat(run["fire_at"]).astimezone(ZoneInfo(zone)) for run in fired]
    assert [f"{time:%H:%M%z}" for time in times] == expected
    assert {(run["outcome"], run["reason"], run["fires"]) for run in fired} == {("fired", None, 1)}
    assert len({run["job_id"] for run in fired}) == len(await queue.lease(max_jobs=100)) == len(expected)


class TestOnceOnly:
    async def test_two_replicas_fire_each_schedule_once(self, world: World, queue: Replica, noon: Clock):
        other = await world.replica()
        for number in range(30):
            await put(queue, f"s{number:02}")
        noon.move(60)
        services = [replica.machine.service for replica in (queue, other)]
        steps = [service.schedules.fire(3) for _ in range(8) for service in services]
        assert sum(await asyncio.gather(*steps)) + await fire(queue) == 30
        assert (await queue.stats())["waiting"] == 30
        ran = queue.events.of(ScheduleRan) + other.events.of(ScheduleRan)
        assert sorted(event.schedule for event in ran) == [f"s{number:02}" for number in range(30)]

    async def test_what_another_decides_at_that_moment_is_left_to_it(
        self, world: World, queue: Replica, noon: Clock
    ):
        other = await world.replica()
        await put(queue, "a")
        await put(queue, "b")
        noon.move(60)
        stranger = await world.connect()
        async with stranger.transaction():
            await stranger.execute("SELECT FROM schedules WHERE name = 'a' FOR UPDATE")
            assert await fire(other) == 1
            assert [len(await runs(queue, name)) for name in "ab"] == [0, 1]
        assert await fire(other) == 1

    async def test_a_fire_that_was_decided_before_is_not_repeated_whatever_its_schedule_says(
        self, world: World, queue: Replica, noon: Clock
    ):
        await put(queue)
        noon.move(60)
        await fire(queue)
        connection = await world.connect()
        await connection.execute("UPDATE schedules SET next_fire_at = $1", NOON + timedelta(seconds=60))
        noon.move(30)
        await fire(queue)
        assert len(await runs(queue)) == 1
        assert (await queue.stats())["waiting"] == 1
        assert (await queue.http.get("/schedules/s")).json()["next_fires_at"][0] == "2026-06-01T12:02:00Z"

    async def test_a_put_waits_for_the_decision_and_changes_what_comes_after_it(
        self, world: World, queue: Replica, noon: Clock
    ):
        other = await world.replica()
        await put(queue)
        noon.move(60)
        stranger = await world.connect()
        held = stranger.transaction()
        await held.start()
        # The decision gets as far as its job, and waits there.
        await stranger.execute("LOCK TABLE jobs IN EXCLUSIVE MODE")
        deciding = asyncio.create_task(fire(other))
        await world.blocked()
        putting = asyncio.create_task(put(queue, job={"queue": "new"}))
        await world.blocked(2)
        await held.rollback()
        assert await deciding == 1
        assert (await putting)["next_fires_at"][0] == "2026-06-01T12:02:00Z"
        noon.move(60)
        await fire(queue)
        assert [len(await queue.lease(name)) for name in ("q", "new")] == [1, 1]

    async def test_a_schedule_that_is_deleted_while_it_is_decided_leaves_no_runs(
        self, world: World, queue: Replica, noon: Clock
    ):
        other = await world.replica()
        await put(queue)
        noon.move(60)
        stranger = await world.connect()
        held = stranger.transaction()
        await held.start()
        await stranger.execute("LOCK TABLE jobs IN EXCLUSIVE MODE")
        deciding = asyncio.create_task(fire(other))
        await world.blocked()
        deleting = asyncio.create_task(queue.http.delete("/schedules/s"))
        await world.blocked(2)
        await held.rollback()
        await deciding
        assert (await deleting).status_code == 204
        assert await stranger.fetchval("SELECT count(*) FROM schedule_runs") == 0
        assert len(await queue.lease()) == 1

    async def test_two_puts_of_a_new_schedule_make_one(self, world: World, queue: Replica):
        other = await world.replica()
        body = {"job": {"queue": "q"}, "every_seconds": 60}
        answers = await asyncio.gather(
            *(replica.http.put("/schedules/s", json=body) for replica in (queue, other) * 4)
        )
        assert sorted(answer.status_code for answer in answers) == [*[200] * 7, 201]

    async def test_triggers_at_once_are_all_noted(self, world: World, queue: Replica):
        other = await world.replica()
        await put(queue)
        answers = await asyncio.gather(
            *(replica.http.post("/schedules/s/trigger") for replica in (queue, other) * 4)
        )
        assert {answer.status_code for answer in answers} == {201}
        noted = [run["job_id"] for run in await runs(queue)]
        assert sorted(noted) == sorted(answer.json()["id"] for answer in answers)


class TestDeath:
    async def test_a_process_that_dies_before_its_commit_has_decided_nothing(
        self, world: World, queue: Replica, noon: Clock
    ):
        doomed = await world.replica()
        await put(queue)
        noon.move(60)
        stranger = await world.connect()
        held = stranger.transaction()
        await held.start()
        await stranger.execute("LOCK TABLE jobs IN EXCLUSIVE MODE")
        deciding = asyncio.create_task(fire(doomed))
        await world.blocked()
        # The run is noted, the job is about to be stored: here the process is killed.
        await stranger.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        with pytest.raises(UnavailableError):
            await deciding
        await held.rollback()
        assert await runs(queue) == []
        assert await fire(queue) == 1
        assert [run["outcome"] for run in await runs(queue)] == ["fired"]
        assert len(await queue.lease(max_jobs=5)) == 1

    @pytest.mark.parametrize("cut", Cut)
    async def test_a_connection_that_dies_around_the_commit_loses_and_doubles_nothing(
        self, world: World, queue: Replica, noon: Clock, cut: Cut
    ):
        wire = await world.stack.enter_async_context(wire_to(world.database_url))
        doomed = await world.replica(database_url=wire.url, db_pool_size=1)
        await doomed.first_round()
        await put(queue)
        # Its connection has prepared every statement.
        noon.move(60)
        assert await fire(doomed) == 1
        noon.move(60)
        wire.arm(cut)
        with pytest.raises(UnavailableError):
            await fire(doomed)
        assert wire.cuts == 1
        await fire(doomed)
        await fire(queue)
        assert [run["outcome"] for run in await runs(queue)] == ["fired", "fired"]
        assert len(await queue.lease(max_jobs=5)) == 2

    async def test_a_new_process_goes_on_where_the_last_one_ended(
        self, world: World, queue: Replica, noon: Clock
    ):
        await put(queue, overlap="skip")
        noon.move(60)
        await fire(queue)
        await queue.machine.service.stop()
        noon.move(60)
        another = await world.replica()
        await fire(another)
        # It knows of the job that has not ended, too.
        assert [(run["outcome"], run["reason"]) for run in await runs(another)] == [
            ("fired", None),
            ("skipped", "overlap"),
        ]


class TestOnTime:
    async def test_it_is_fired_between_the_rounds_by_whoever_is_left(self, world: World):
        world.on_time = True
        first = await world.replica()
        second = await world.replica(maintenance_seconds=0.2)
        await put(first, every_seconds=1)
        await first.machine.service.maintenance.stop()
        [ran, *_] = await second.events.wait_for(ScheduleRan)
        assert ran.outcome == "fired"

    async def test_a_failure_is_told_and_it_goes_on(self, world: World):
        world.on_time = True
        queue = await world.replica(maintenance_seconds=0.1)
        await put(queue, every_seconds=1)
        connection = await world.connect()
        await connection.execute("ALTER TABLE schedule_runs RENAME TO away")
        while "schedules" not in {event.task for event in queue.events.of(MaintenanceFailed)}:
            await queue.events.wait_for(MaintenanceFailed, len(queue.events.of(MaintenanceFailed)) + 1)
        await connection.execute("ALTER TABLE away RENAME TO schedule_runs")
        assert await queue.events.wait_for(ScheduleRan, len(queue.events.of(ScheduleRan)) + 1)


class TestKeeping:
    async def test_the_newest_runs_are_kept(self, world: World, queue: Replica, noon: Clock):
        connection = await world.connect()
        for name in ("a", "b"):
            await put(queue, name)
        await connection.execute(
            "INSERT INTO schedule_runs (schedule, fire_at, triggered, decided_at, outcome, fires)"
            " SELECT 'a', $1::timestamptz - n * interval '1 second', false, $1::timestamptz, 'skipped', 1"
            " FROM generate_series(0, $2::int - 1) AS n",
            NOON,
            RUNS_KEPT + 70,
        )
        assert await queue.machine.service.schedules.retain_runs("") == (70, "b")
        kept = await connection.fetchrow("SELECT count(*), min(fire_at), max(fire_at) FROM schedule_runs")
        assert tuple(kept or ()) == (RUNS_KEPT, NOON - timedelta(seconds=RUNS_KEPT - 1), NOON)
        assert await queue.machine.service.schedules.retain_runs("b") == (0, "")
        noon.move(RUN_RETENTION_SECONDS)
        assert await queue.machine.service.schedules.retain_runs("") == (RUNS_KEPT, "b")

    async def test_maintenance_removes_them(self, queue: Replica, noon: Clock):
        await put(queue)
        noon.move(60)
        await fire(queue)
        noon.move(RUN_RETENTION_SECONDS)
        queue.machine.service.maintenance._runs_due_at = 0
        await queue.maintain()
        # What was missed since then was decided only now, however long it was due.
        first, *_ = await runs(queue)
        assert (first["fire_at"], first["reason"]) == ("2026-06-01T12:02:00Z", "missed")

    async def test_so_many_jobs_are_remembered(self, world: World, queue: Replica, noon: Clock):
        await put(queue)
        for _ in range(JOBS_REMEMBERED + 5):
            noon.move(60)
            await fire(queue)
        connection = await world.connect()
        remembered = await connection.fetchval("SELECT job_ids FROM schedules")
        newest = [run["job_id"] for run in (await runs(queue))[-JOBS_REMEMBERED:]]
        assert [str(job_id) for job_id in remembered] == newest
