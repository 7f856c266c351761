"""How long ended jobs are kept, the days they are kept in, and the time that an outage took from leases."""

import asyncio
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any

import asyncpg
import pytest

from app.queue.events import MaintenanceFailed
from app.store.partitions import DAYS_AHEAD
from tests.conftest import Clock, Replica, World
from tests.store.conftest import holding, idle_replica

DAY = 86_400.0
MICROSECOND = timedelta(microseconds=1)


async def acked(queue: Replica, **fields: Any) -> str:
    job = await queue.enqueue(**fields)
    assert (await queue.verb("ack", await queue.lease_one())).status_code == 200
    job_id: str = job["id"]
    return job_id


async def failed(queue: Replica) -> str:
    job = await queue.enqueue()
    assert await queue.fail(await queue.lease_one(), retry=False) == {"state": "failed"}
    job_id: str = job["id"]
    return job_id


async def days(world: World, table: str) -> list[str]:
    connection = await world.connect()
    return [
        row["relname"].removeprefix(f"{table}_")
        for row in await connection.fetch(
            "SELECT c.relname FROM pg_inherits JOIN pg_class AS c ON c.oid = inhrelid"
            f" WHERE inhparent = '{table}'::regclass ORDER BY 1"
        )
    ]


def named(day: date) -> str:
    return f"{day:%Y%m%d}"


async def status(queue: Replica, job_id: str) -> int:
    return (await queue.http.get(f"/jobs/{job_id}")).status_code


class TestDays:
    @pytest.mark.parametrize("table", ["history", "attempts"])
    async def test_are_made_two_weeks_ahead(self, world: World, queue: Replica, clock: Clock, table: str):
        clock.set("2031-05-10T12:00:00+00:00")
        await queue.machine.jobs.prepare()
        wanted = [named(date(2031, 5, 9) + timedelta(days=n)) for n in range(DAYS_AHEAD + 2)]
        assert [day for day in await days(world, table) if day.startswith("2031")] == wanted
        assert len(wanted) == 16

    async def test_that_are_there_are_not_made_again(self, queue: Replica, clock: Clock):
        clock.move(20 * DAY)
        assert await queue.machine.jobs.retain_days(100 * DAY, 100 * DAY) > 0
        assert await queue.machine.jobs.retain_days(100 * DAY, 100 * DAY) == 0

    @pytest.mark.parametrize("outcome", ["acked", "failed"])
    async def test_that_are_missing_are_made_when_a_job_ends_in_one(
        self, world: World, queue: Replica, clock: Clock, outcome: str
    ):
        now = clock.move(20 * DAY)
        assert named(now.date()) not in await days(world, "history")
        job_id = await (acked(queue) if outcome == "acked" else failed(queue))
        assert [attempt["outcome"] for attempt in await queue.attempts(job_id)] == [outcome]
        assert named(now.date()) in await days(world, "history")

    async def test_that_are_missing_are_made_when_a_lease_is_reaped_in_one(
        self, queue: Replica, clock: Clock
    ):
        job = await queue.enqueue()
        await queue.lease_one()
        clock.move(20 * DAY)
        assert await queue.machine.service.maintenance.reap() == 1
        assert (await queue.job(job["id"]))["state"] == "retry"

    async def test_begin_at_midnight_in_utc_whatever_the_servers_time_zone(self, world: World, clock: Clock):
        connection = await world.connect()
        database = await connection.fetchval("SELECT current_database()")
        await connection.execute(f"ALTER DATABASE {database} SET timezone TO 'Pacific/Auckland'")
        clock.set("2031-05-10T00:00:00+00:00")
        other = await idle_replica(world)
        on_the_day = await acked(other)
        clock.set("2031-05-10T23:59:59.999999+00:00")
        at_its_end = await acked(other)
        clock.set("2031-05-11T00:00:00+00:00")
        on_the_next = await acked(other)
        rows = await connection.fetch(
            "SELECT tableoid::regclass::text AS day, id::text FROM history ORDER BY id"
        )
        assert [(row["day"].split("_")[1], row["id"]) for row in rows] == [
            ("20310510", on_the_day),
            ("20310510", at_its_end),
            ("20310511", on_the_next),
        ]

    async def test_have_the_indexes_of_their_table(self, world: World):
        await idle_replica(world)
        connection = await world.connect()
        indexes = await connection.fetch(
            "SELECT count(*) AS n, parent.relname FROM pg_inherits AS i"
            " JOIN pg_class AS child ON child.oid = i.inhrelid AND child.relkind = 'i'"
            " JOIN pg_class AS parent ON parent.oid = i.inhparent GROUP BY 2 ORDER BY 2"
        )
        made = len(await days(world, "history"))
        assert [(row["relname"], row["n"]) for row in indexes] == [
            ("attempts_by_job", made),
            ("history_by_id", made),
            ("history_by_queue", made),
        ]


class TestCompletedJobs:
    async def test_go_with_their_day_when_its_end_is_as_long_ago_as_the_retention(
        self, world: World, queue: Replica, clock: Clock
    ):
        clock.set("2031-05-10T12:00:00+00:00")
        job_id = await acked(queue)
        end = datetime(2031, 5, 11, tzinfo=UTC) + timedelta(days=7)
        clock.set(end - MICROSECOND)
        await queue.machine.jobs.retain_days(7 * DAY, 30 * DAY)
        assert await status(queue, job_id) == 200
        clock.set(end)
        await queue.machine.jobs.retain_days(7 * DAY, 30 * DAY)
        assert await status(queue, job_id) == 404
        assert "20310510" not in await days(world, "history")

    async def test_that_are_gone_are_not_counted_and_those_of_other_days_still_are(
        self, queue: Replica, clock: Clock
    ):
        clock.set("2031-05-10T12:00:00+00:00")
        for _ in range(2):
            await acked(queue)
        clock.set("2031-05-12T12:00:00+00:00")
        kept = await acked(queue)
        assert (await queue.stats())["completed"] == 3
        clock.set("2031-05-18T12:00:00+00:00")
        await queue.machine.jobs.retain_days(7 * DAY, 30 * DAY)
        assert (await queue.stats())["completed"] == 1
        assert await status(queue, kept) == 200

    async def test_that_are_gone_are_unknown_to_every_verb(self, queue: Replica, clock: Clock):
        clock.set("2031-05-10T12:00:00+00:00")
        await queue.enqueue()
        leased = await queue.lease_one()
        await queue.verb("ack", leased)
        clock.set("2031-06-10T12:00:00+00:00")
        await queue.machine.jobs.retain_days(7 * DAY, 30 * DAY)
        assert (await queue.verb("ack", leased)).status_code == 404
        assert (await queue.http.get(f"/jobs/{leased['id']}/attempts")).status_code == 404
        assert (await queue.http.post(f"/jobs/{leased['id']}/retry")).status_code == 404
        assert (await queue.http.delete(f"/jobs/{leased['id']}")).status_code == 404

    async def test_go_by_the_settings_in_a_round_of_maintenance(self, world: World, clock: Clock):
        clock.set("2031-05-10T12:00:00+00:00")
        job_id = await acked(await idle_replica(world, retention_seconds=DAY, dead_retention_seconds=DAY))
        clock.set("2031-05-12T00:00:00+00:00")
        later = await idle_replica(world, retention_seconds=DAY, dead_retention_seconds=DAY)
        await later.maintain()
        assert await status(later, job_id) == 404

    async def test_of_a_busy_day_wait_for_the_next_round_and_hold_no_other_day_up(
        self, world: World, queue: Replica, clock: Clock
    ):
        ids = []
        for day in (10, 11):
            clock.set(f"2031-05-{day}T12:00:00+00:00")
            ids.append(await acked(queue))
        clock.set("2031-06-10T12:00:00+00:00")
        async with holding(world, "LOCK TABLE history_20310510 IN ACCESS SHARE MODE"):
            await queue.machine.jobs.retain_days(7 * DAY, 7 * DAY)
            assert "20310510" in await days(world, "history")
            assert "20310511" not in await days(world, "history")
            assert "20310511" not in await days(world, "attempts")
        assert queue.events.of(MaintenanceFailed) == []
        await queue.machine.jobs.retain_days(7 * DAY, 7 * DAY)
        assert [await status(queue, job_id) for job_id in ids] == [404, 404]

    async def test_deleted_while_their_day_is_dropped_are_taken_off_the_counts_once(
        self, world: World, queue: Replica, clock: Clock
    ):
        clock.set("2031-05-10T12:00:00+00:00")
        await queue.machine.jobs.retain_days(7 * DAY, 7 * DAY)
        # Of the days that there are now this is the first, hence the first to be dropped.
        clock.set("2031-05-09T12:00:00+00:00")
        job_id = await acked(queue)
        clock.set("2031-06-10T12:00:00+00:00")
        await queue.machine.jobs.prepare()
        async with holding(world, "SELECT FROM history WHERE id = $1 FOR UPDATE", job_id):
            deleting = asyncio.create_task(queue.http.delete(f"/jobs/{job_id}"))
            await world.blocked(1)
            dropping = asyncio.create_task(queue.machine.jobs.retain_days(7 * DAY, 7 * DAY))
            await world.blocked(2)
        assert (await deleting).status_code == 204
        await dropping
        await queue.machine.jobs.retain_days(7 * DAY, 7 * DAY)
        assert (await queue.stats())["completed"] == 0

    async def test_of_one_day_dropped_by_two_processes_at_once_are_taken_off_the_counts_once(
        self, world: World, queue: Replica, clock: Clock
    ):
        other = await idle_replica(world)
        clock.set("2031-05-10T12:00:00+00:00")
        await acked(queue)
        clock.set("2031-06-10T12:00:00+00:00")
        await asyncio.gather(
            *(replica.machine.jobs.retain_days(7 * DAY, 7 * DAY) for replica in (queue, other))
        )
        await queue.machine.jobs.retain_days(7 * DAY, 7 * DAY)
        assert (await queue.stats())["completed"] == 0


class TestAttempts:
    @pytest.mark.parametrize(("completed_days", "dead_days"), [(1, 30), (30, 1)])
    async def test_are_kept_as_long_as_the_longest_retention(
        self, world: World, clock: Clock, completed_days: int, dead_days: int
    ):
        settings = {
            "retention_seconds": completed_days * DAY,
            "dead_retention_seconds": dead_days * DAY,
        }
        clock.set("2031-05-10T12:00:00+00:00")
        queue = await idle_replica(world, **settings)
        await failed(queue)
        end = datetime(2031, 5, 11, tzinfo=UTC) + timedelta(days=30)
        for instant, kept in ((end - MICROSECOND, True), (end, False)):
            clock.set(instant)
            # A process makes and drops days when it starts, then every ten minutes.
            await (await idle_replica(world, **settings)).maintain()
            assert ("20310510" in await days(world, "attempts")) is kept


class TestDeadJobs:
    async def test_are_kept_exactly_as_long_as_their_retention(self, queue: Replica, clock: Clock):
        clock.set("2031-05-10T12:00:00+00:00")
        job_id = await failed(queue)
        end = clock.move(30 * DAY)
        assert (await queue.maintain())["retain"] == 0
        assert await status(queue, job_id) == 200
        clock.set(end + MICROSECOND)
        assert (await queue.maintain())["retain"] == 1
        assert await status(queue, job_id) == 404
        assert (await queue.http.post(f"/jobs/{job_id}/retry")).status_code == 404

    async def test_go_the_oldest_first_in_bounded_steps_and_the_counts_follow(
        self, queue: Replica, clock: Clock
    ):
        clock.set("2031-05-10T12:00:00+00:00")
        ids = []
        for _ in range(3):
            clock.move(1)
            ids.append(await failed(queue))
        cancelled = await queue.enqueue()
        clock.move(1)
        await queue.http.post(f"/jobs/{cancelled['id']}/cancel")
        clock.move(31 * DAY)
        retain = queue.machine.jobs.retain_dead
        assert await retain(30 * DAY, 2) == 2
        assert [await status(queue, job_id) for job_id in ids] == [404, 404, 200]
        counts = await queue.stats()
        assert (counts["failed"], counts["cancelled"]) == (1, 1)
        assert [await retain(30 * DAY, 2), await retain(30 * DAY, 2)] == [2, 0]
        counts = await queue.stats()
        assert (counts["failed"], counts["cancelled"]) == (0, 0)

    async def test_outlive_the_completed_ones(self, queue: Replica, clock: Clock):
        dead, done = await failed(queue), await acked(queue)
        clock.move(10 * DAY)
        await queue.machine.jobs.retain_days(7 * DAY, 30 * DAY)
        await queue.maintain()
        assert [await status(queue, job_id) for job_id in (dead, done)] == [200, 404]


class TestOutage:
    """Measured by the database's own clock, which no test moves: the reaper's last sign of life is set back instead."""

    async def leases(self, world: World) -> Sequence[asyncpg.Record]:
        connection = await world.connect()
        return await connection.fetch("SELECT id, expires_at, deadline_at FROM leases ORDER BY id")

    async def reaped(self, world: World, seconds_ago: float) -> datetime:
        """Say that the last reaper was at work so long ago."""
        connection = await world.connect()
        ran_at: datetime = await connection.fetchval(
            "INSERT INTO maintenance (task, ran_at) VALUES ('reap', clock_timestamp() - $1 * interval '1 second')"
            " ON CONFLICT (task) DO UPDATE SET ran_at = excluded.ran_at RETURNING ran_at",
            seconds_ago,
        )
        return ran_at

    async def test_gives_the_leases_that_stood_then_the_lost_time_back(self, world: World, queue: Replica):
        await queue.enqueue()
        await queue.lease_one()
        [before] = await self.leases(world)
        ran_at = await self.reaped(world, 60)
        connection = await world.connect()
        earliest = await connection.fetchval("SELECT clock_timestamp()")
        assert await queue.machine.jobs.survive_outage(5, 300) == 1
        latest = await connection.fetchval("SELECT clock_timestamp()")
        [after] = await self.leases(world)
        assert earliest - ran_at <= after["expires_at"] - before["expires_at"] <= latest - ran_at

    async def test_gives_back_five_minutes_at_most(self, world: World, queue: Replica):
        await queue.enqueue()
        await queue.lease_one()
        [before] = await self.leases(world)
        await self.reaped(world, 3600)
        assert await queue.machine.jobs.survive_outage(5, 300) == 1
        [after] = await self.leases(world)
        assert after["expires_at"] - before["expires_at"] == timedelta(seconds=300)

    async def test_gives_nothing_back_past_the_time_limit_of_an_attempt(self, world: World, queue: Replica):
        await queue.enqueue(timeout_seconds=40)
        await queue.lease_one()
        await self.reaped(world, 3600)
        await queue.machine.jobs.survive_outage(5, 300)
        [after] = await self.leases(world)
        assert after["expires_at"] == after["deadline_at"]

    async def test_gives_nothing_to_a_lease_that_had_run_out_before(self, world: World, queue: Replica):
        for _ in range(2):
            await queue.enqueue()
        await queue.lease(max_jobs=2)
        ran_at = await self.reaped(world, 3600)
        connection = await world.connect()
        over, standing = [row["id"] for row in await self.leases(world)]
        for job_id, expires_at in ((over, ran_at), (standing, ran_at + MICROSECOND)):
            await connection.execute("UPDATE leases SET expires_at = $1 WHERE id = $2", expires_at, job_id)
        assert await queue.machine.jobs.survive_outage(5, 300) == 1
        assert [row["expires_at"] for row in await self.leases(world)] == [
            ran_at,
            ran_at + MICROSECOND + timedelta(seconds=300),
        ]

    async def test_is_over_once_a_reaper_has_made_up_for_it(self, world: World, queue: Replica):
        await queue.enqueue()
        await queue.lease_one()
        await self.reaped(world, 7200)
        assert await queue.machine.jobs.survive_outage(3600, 300) == 1
        assert await queue.machine.jobs.survive_outage(3600, 300) == 0

    async def test_is_made_up_for_once_when_two_reapers_come_back_at_once(self, world: World, queue: Replica):
        other = await idle_replica(world)
        await queue.enqueue()
        await queue.lease_one()
        [before] = await self.leases(world)
        await self.reaped(world, 7200)
        async with holding(world, "SELECT FROM maintenance WHERE task = 'reap' FOR UPDATE"):
            reaping = [
                asyncio.create_task(replica.machine.jobs.survive_outage(3600, 300))
                for replica in (queue, other)
            ]
            await world.blocked(2)
        assert sorted(await asyncio.gather(*reaping)) == [0, 1]
        [after] = await self.leases(world)
        assert after["expires_at"] - before["expires_at"] == timedelta(seconds=300)

    async def test_is_not_what_an_ordinary_pause_of_the_reaper_is(self, world: World, queue: Replica):
        await queue.enqueue()
        await queue.lease_one()
        [before] = await self.leases(world)
        await self.reaped(world, 60)
        assert await queue.machine.jobs.survive_outage(3600, 300) == 0
        assert await self.leases(world) == [before]

    async def test_is_not_where_no_reaper_ever_was(self, world: World, queue: Replica):
        connection = await world.connect()
        await connection.execute("DELETE FROM maintenance")
        await queue.enqueue()
        await queue.lease_one()
        assert await queue.machine.jobs.survive_outage(0, 300) == 0
        assert await connection.fetchval("SELECT count(*) FROM maintenance WHERE task = 'reap'") == 1

    async def test_costs_no_worker_its_job(self, world: World, queue: Replica):
        """The first round of the reaper after an outage, as a worker sees it whose lease ran out meanwhile."""
        await queue.enqueue()
        leased = await queue.lease_one()
        connection = await world.connect()
        await connection.execute("UPDATE leases SET expires_at = clock_timestamp() - interval '1 minute'")
        await self.reaped(world, 4 * 3600)
        assert (await queue.maintain())["reap"] == 0
        assert (await queue.verb("heartbeat", leased)).status_code == 200
        assert (await queue.verb("ack", leased)).status_code == 200
