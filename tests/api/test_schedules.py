"""Schedules through HTTP, with time moved by hand."""

import asyncio
from typing import Any

import httpx
import pytest

from app.engine.maintenance import STEPS_PER_ROUND
from app.engine.schedules import BLOCKED_MAX
from app.queue.events import MaintenanceFailed, ScheduleRan
from tests.conftest import Clock, Replica, World
from tests.store.conftest import holding, idle_replica, logged

NOON = "2026-06-01T12:00:00+00:00"


@pytest.fixture
def noon(clock: Clock) -> Clock:
    clock.set(NOON)
    return clock


@pytest.fixture
async def queue(world: World, noon: Clock) -> Replica:  # noqa: ARG001  # the clock stands before the first round
    return await world.replica()


async def put(queue: Replica, name: str = "s", **fields: Any) -> dict[str, Any]:
    body = {"job": {"queue": "q"}, **fields}
    if "cron" not in fields and "every_seconds" not in fields:
        body["every_seconds"] = 60
    answer = await queue.http.put(f"/schedules/{name}", json=body)
    assert answer.status_code in {200, 201}, answer.text
    schedule: dict[str, Any] = answer.json()
    return schedule


async def show(queue: Replica, name: str = "s") -> dict[str, Any]:
    answer = await queue.http.get(f"/schedules/{name}")
    assert answer.status_code == 200, answer.text
    schedule: dict[str, Any] = answer.json()
    return schedule


async def runs(queue: Replica, name: str = "s", **query: Any) -> list[dict[str, Any]]:
    answer = await queue.http.get(f"/schedules/{name}/runs", params=query)
    assert answer.status_code == 200, answer.text
    listed: list[dict[str, Any]] = answer.json()["runs"]
    return listed


async def outcomes(queue: Replica, name: str = "s") -> list[tuple[str, str, str | None, int]]:
    """Return what became of the fires, oldest first: at what time of day, what, why, for how many."""
    return [
        (run["fire_at"][11:19], run["outcome"], run["reason"], run["fires"])
        for run in reversed(await runs(queue, name))
    ]


async def post(queue: Replica, verb: str, name: str = "s", status: int = 200) -> dict[str, Any]:
    answer = await queue.http.post(f"/schedules/{name}/{verb}")
    assert answer.status_code == status, answer.text
    reply: dict[str, Any] = answer.json()
    return reply


class TestPut:
    async def test_a_new_schedule_answers_201_with_everything(self, queue: Replica):
        answer = await queue.http.put(
            "/schedules/nightly",
            json={
                "cron": "30 3 * * MON-FRI",
                "timezone": "Europe/Berlin",
                "overlap": "skip",
                "missed": "once",
                "job": {
                    "queue": "q",
                    "type": "t",
                    "payload": {"a": 1},
                    "backoff": {"factor": 3},
                    "tags": ["x"],
                },
            },
        )
        assert answer.status_code == 201
        assert answer.headers["location"] == "/schedules/nightly"
        assert answer.json() == {
            "name": "nightly",
            "cron": "30 3 * * MON-FRI",
            "every_seconds": None,
            "timezone": "Europe/Berlin",
            "job": {
                "queue": "q",
                "type": "t",
                "payload": {"a": 1},
                "backoff": {"factor": 3.0},
                "tags": ["x"],
            },
            "overlap": "skip",
            "missed": "once",
            "paused": False,
            "created_at": "2026-06-01T12:00:00Z",
            "next_fires_at": [f"2026-06-{day:02}T01:30:00Z" for day in (2, 3, 4, 5, 8)],
            "last_run": None,
        }
        assert await show(queue, "nightly") == answer.json()

    async def test_the_defaults_are_utc_allow_and_skip(self, queue: Replica):
        schedule = await put(queue, every_seconds=90)
        assert schedule | {"next_fires_at": schedule["next_fires_at"][:2]} == {
            "name": "s",
            "cron": None,
            "every_seconds": 90.0,
            "timezone": "UTC",
            "job": {"queue": "q", "payload": None},
            "overlap": "allow",
            "missed": "skip",
            "paused": False,
            "created_at": "2026-06-01T12:00:00Z",
            "next_fires_at": ["2026-06-01T12:01:30Z", "2026-06-01T12:03:00Z"],
            "last_run": None,
        }

    async def test_what_it_shows_may_be_put_again(self, queue: Replica):
        shown = await put(
            queue,
            job={
                "queue": "q",
                "type": "t",
                "payload": [1],
                "priority": 7,
                "delay_seconds": 5,
                "lease_seconds": 60,
                "timeout_seconds": 90,
                "max_retries": 0,
                "backoff": {"strategy": "fixed", "initial_seconds": 9},
                "expires_in_seconds": 3600,
                "dead_letter_queue": "dead",
                "unique": {"key": "k", "scope": "window", "window_seconds": 9.0, "on_conflict": "reject"},
                "tags": ["a", "b"],
                "metadata": {"by": "hand"},
            },
        )
        again = await put(queue, job=shown["job"])
        assert again == shown

    async def test_a_replaced_schedule_answers_200(self, queue: Replica):
        await put(queue)
        answer = await queue.http.put("/schedules/s", json={"every_seconds": 60, "job": {"queue": "other"}})
        assert answer.status_code == 200
        assert answer.json()["job"]["queue"] == "other"

    async def test_a_new_job_keeps_the_rhythm(self, queue: Replica, noon: Clock):
        before = await put(queue, every_seconds=60)
        noon.move(30)
        after = await put(queue, every_seconds=60, job={"queue": "other"}, overlap="skip")
        assert after["next_fires_at"] == before["next_fires_at"]
        assert after["created_at"] == before["created_at"]
        noon.move(30)
        await queue.maintain()
        assert len(await queue.lease("other")) == 1

    @pytest.mark.parametrize(
        ("changed", "first"),
        [
            ({"every_seconds": 120}, "12:03:30"),
            ({"every_seconds": 60, "timezone": "Asia/Tokyo"}, "12:02:30"),
            ({"cron": "*/2 * * * *"}, "12:02:00"),
        ],
    )
    async def test_a_new_rhythm_begins_anew(
        self, queue: Replica, noon: Clock, changed: dict[str, Any], first: str
    ):
        await put(queue, every_seconds=60)
        noon.move(90)
        after = await put(queue, **changed)
        assert after["next_fires_at"][0] == f"2026-06-01T{first}Z"
        await queue.maintain()
        # What the old rhythm had due comes to nothing.
        assert await runs(queue) == []

    async def test_numbers_in_the_payload_come_back_as_they_were_sent(self, queue: Replica, noon: Clock):
        payload = '{"big":123456789012345678901234567890,"exact":0.10000000000000000001,"e":1E400}'
        job = f'{{"queue":"q","payload":{payload},"metadata":{{"n":1E400,"z":"\\u0000"}}}}'
        body = f'{{"every_seconds":60,"job":{job}}}'
        headers = {"content-type": "application/json"}
        answer = await queue.http.put("/schedules/s", content=body, headers=headers)
        assert payload in answer.text
        assert '{"n":1E400,"z":"\\u0000"}' in answer.text
        noon.move(60)
        await queue.maintain()
        leased = await queue.http.post("/lease", json={"queues": ["q"], "wait_seconds": 0})
        assert payload in leased.text
        assert '{"n":1E400,"z":"\\u0000"}' in leased.text

    @pytest.mark.parametrize(
        ("field", "body"),
        [
            ("cron", {}),
            ("cron", {"cron": "* * * * *", "every_seconds": 60}),
            ("cron", {"cron": "* * * *"}),
            ("cron", {"cron": "0 * * * * *"}),
            ("cron", {"cron": "@daily"}),
            ("cron", {"cron": ""}),
            ("cron", {"cron": "60 * * * *"}),
            ("cron", {"cron": "* * * * FUN"}),
            ("cron", {"cron": "*/0 * * * *"}),
            ("cron", {"cron": "5-1 * * * *"}),
            ("cron", {"cron": "0 0 30 2 *"}),
            ("cron", {"cron": "0 0 31 4,6,9,11 *"}),
            ("cron", {"cron": "* * * * *\n"}),
            ("cron", {"cron": "0\u00a00 * * *"}),
            ("cron", {"cron": "0 0 " + "1," * 200 + "1 * *"}),
            ("every_seconds", {"every_seconds": 0.5}),
            ("every_seconds", {"every_seconds": 1e300}),
            ("timezone", {"cron": "0 3 * * *", "timezone": "Europe/Atlantis"}),
            ("timezone", {"every_seconds": 60, "timezone": "../../etc/passwd"}),
            ("timezone", {"every_seconds": 60, "timezone": "Europe"}),
            ("timezone", {"every_seconds": 60, "timezone": ""}),
            ("timezone", {"every_seconds": 60, "timezone": "\x00"}),
            ("overlap", {"every_seconds": 60, "overlap": "wait"}),
            ("missed", {"every_seconds": 60, "missed": "all"}),
            ("body", {"every_seconds": 60, "unknown": 1}),
            ("job.queue", {"every_seconds": 60, "job": {"queue": "-"}}),
            ("job.queue", {"every_seconds": 60, "job": {"queue": "q\n"}}),
            ("job.max_retries", {"every_seconds": 60, "job": {"queue": "q", "max_retries": -1}}),
            ("job.tags", {"every_seconds": 60, "job": {"queue": "q", "tags": ["a\nb"]}}),
            ("job.metadata", {"every_seconds": 60, "job": {"queue": "q", "metadata": []}}),
            (
                "job.unique.window_seconds",
                {"every_seconds": 60, "job": {"queue": "q", "unique": {"key": "k", "scope": "window"}}},
            ),
            ("job.dead_letter_queue", {"every_seconds": 60, "job": {"queue": "q", "dead_letter_queue": "q"}}),
            ("job.run_at", {"every_seconds": 60, "job": {"queue": "q", "run_at": "2030-01-01T00:00:00Z"}}),
            (
                "job.expires_at",
                {"every_seconds": 60, "job": {"queue": "q", "expires_at": "2030-01-01T00:00:00Z"}},
            ),
            ("job", {"every_seconds": 60, "job": {"queue": "q", "unknown": 1}}),
        ],
    )
    async def test_what_is_wrong_is_named(self, queue: Replica, field: str, body: dict[str, Any]):
        answer = await queue.http.put("/schedules/s", json={"job": {"queue": "q"}, **body})
        assert answer.status_code == 422, answer.text
        problem = answer.json()
        assert (problem["code"], problem["errors"][0]["field"]) == ("invalid", field)
        assert (await queue.http.get("/schedules/s")).status_code == 404

    async def test_a_payload_that_is_too_large_is_refused(self, queue: Replica):
        body = {"every_seconds": 60, "job": {"queue": "q", "payload": "x" * 300_000}}
        answer = await queue.http.put("/schedules/s", json=body)
        assert (answer.status_code, answer.json()["code"]) == (413, "payload_too_large")

    @pytest.mark.parametrize("name", ["-", "a%20b", "a%00b", "x" * 129, "%C3%A4"])
    async def test_a_name_that_is_none(self, queue: Replica, name: str):
        body = {"every_seconds": 60, "job": {"queue": "q"}}
        answer = await queue.http.put(f"/schedules/{name}", json=body)
        assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, "name")
        for method, path in [
            ("GET", ""),
            ("DELETE", ""),
            ("POST", "/pause"),
            ("POST", "/resume"),
            ("POST", "/trigger"),
            ("GET", "/runs"),
        ]:
            missing = await queue.http.request(method, f"/schedules/{name}{path}")
            assert (missing.status_code, missing.json()["code"]) == (404, "not_found")


async def test_what_is_not_there_is_404(queue: Replica):
    for method, path in [
        ("GET", ""),
        ("DELETE", ""),
        ("POST", "/pause"),
        ("POST", "/resume"),
        ("POST", "/trigger"),
        ("GET", "/runs"),
    ]:
        answer = await queue.http.request(method, f"/schedules/none{path}")
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


class TestFiring:
    async def test_it_fires_when_it_is_due_and_not_before(self, queue: Replica, noon: Clock):
        await put(
            queue, cron="5 12 * * *", job={"queue": "q", "type": "t", "payload": [1], "priority": "fast"}
        )
        noon.move(299.999)
        await queue.maintain()
        assert await runs(queue) == []
        noon.move(0.001)
        await queue.maintain()
        [run] = await runs(queue)
        assert run == {
            "fire_at": "2026-06-01T12:05:00Z",
            "decided_at": "2026-06-01T12:05:00Z",
            "outcome": "fired",
            "reason": None,
            "fires": 1,
            "job_id": run["job_id"],
        }
        job = await queue.job(run["job_id"])
        assert (job["state"], job["type"], job["payload"], job["priority"]) == ("ready", "t", [1], 10)
        schedule = await show(queue)
        assert schedule["last_run"] == run
        assert schedule["next_fires_at"][0] == "2026-06-02T12:05:00Z"

    async def test_it_fires_once_however_often_it_is_looked_at(self, queue: Replica, noon: Clock):
        await put(queue)
        noon.move(60)
        for _ in range(3):
            await queue.maintain()
        assert len(await runs(queue)) == 1
        assert (await queue.stats())["waiting"] == 1

    async def test_an_interval_is_anchored_at_its_creation(self, queue: Replica, noon: Clock):
        noon.move(7)
        await put(queue, every_seconds=100)
        for _ in range(3):
            noon.move(103)  # a little late each time: that does not add up
            await queue.maintain()
        assert [run[0] for run in await outcomes(queue)] == ["12:01:47", "12:03:27", "12:05:07"]

    async def test_its_job_may_be_delayed(self, queue: Replica, noon: Clock):
        await put(queue, job={"queue": "q", "delay_seconds": 30})
        noon.move(60)
        await queue.maintain()
        assert await queue.lease() == []
        noon.move(30)
        await queue.maintain()
        assert len(await queue.lease()) == 1

    async def test_it_calls_a_waiting_lease_on_time(self, world: World):
        world.on_time = True
        queue = await world.replica()
        await put(queue, every_seconds=1)
        # No round of maintenance comes for an hour.
        [job] = await queue.lease(wait_seconds=20)
        assert job["id"] == (await runs(queue))[-1]["job_id"]

    async def test_several_that_are_due_are_fired_one_after_the_other(self, queue: Replica, noon: Clock):
        await put(queue, every_seconds=20)
        noon.move(60)
        await queue.maintain()
        assert [run[:2] for run in await outcomes(queue)] == [
            ("12:00:20", "fired"),
            ("12:00:40", "fired"),
            ("12:01:00", "fired"),
        ]

    async def test_it_is_told(self, queue: Replica, noon: Clock):
        await put(queue)
        noon.move(60)
        await queue.maintain()
        [ran] = queue.events.of(ScheduleRan)
        assert (ran.schedule, ran.outcome, ran.reason, ran.fires) == ("s", "fired", None, 1)
        page = (await queue.http.get("/metrics")).text
        assert 'leaseq_schedule_runs_total{outcome="fired"} 1.0' in page
        assert 'leaseq_jobs_enqueued_total{queue="q"} 1.0' in page


class TestRefused:
    """Its queue does not take the job."""

    async def test_at_once_the_put_is_refused(self, queue: Replica):
        await queue.http.put("/queues/q", json={"delay_seconds": 60})
        body = {"every_seconds": 60, "job": {"queue": "q", "expires_in_seconds": 30}}
        answer = await queue.http.put("/schedules/s", json=body)
        assert answer.status_code == 422
        assert answer.json()["errors"][0]["field"] == "job.expires_in_seconds"

    async def test_a_queue_that_must_exist(self, world: World):
        strict = await world.replica(create_queues=False)
        answer = await strict.http.put("/schedules/s", json={"every_seconds": 60, "job": {"queue": "q"}})
        assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, "job.queue")

    async def test_later_the_run_has_failed_and_the_rhythm_goes_on(self, queue: Replica, noon: Clock):
        await put(queue, job={"queue": "q", "expires_in_seconds": 30})
        await put(queue, "other", job={"queue": "other"})
        await queue.http.put("/queues/q", json={"delay_seconds": 60})
        noon.move(60)
        await queue.maintain()
        assert await outcomes(queue) == [("12:01:00", "failed", "invalid", 1)]
        assert (await runs(queue))[0]["job_id"] is None
        assert await outcomes(queue, "other") == [("12:01:00", "fired", None, 1)]
        answer = await queue.http.post("/schedules/s/trigger")
        assert answer.json()["errors"][0]["field"] == "job.expires_in_seconds"
        await queue.http.put("/queues/q", json={})
        noon.move(60)
        await queue.maintain()
        assert (await runs(queue))[0]["outcome"] == "fired"

    async def test_defaults_are_those_of_the_instant_when_it_fires(self, queue: Replica, noon: Clock):
        await put(queue)
        await queue.http.put("/queues/q", json={"max_retries": 7, "priority": 9})
        noon.move(60)
        await queue.maintain()
        job = await queue.job((await runs(queue))[0]["job_id"])
        assert (job["max_retries"], job["priority"]) == (7, 9)


class TestUnknownRhythm:
    """A rhythm that this replica can not tell, such as of a zone that its database of time zones does not have."""

    @pytest.fixture
    async def strange(self, queue: Replica, world: World) -> None:
        """Store a schedule `s` that another replica may have taken, and a plain one."""
        await put(queue, cron="* * * * *", timezone="US/Pacific")
        await put(queue, "other")
        await forget_zone(world)

    @pytest.mark.usefixtures("strange")
    async def test_it_fails_by_itself_and_fires_no_more(self, queue: Replica, noon: Clock):
        for _ in range(2):
            noon.move(60)
            await queue.maintain()
        assert await outcomes(queue) == [("12:01:00", "failed", "rhythm", 1)]
        assert [run[1] for run in await outcomes(queue, "other")] == ["fired", "fired"]
        told = [ran.reason for ran in queue.events.of(ScheduleRan) if ran.schedule == "s"]
        assert told == ["rhythm"]

    @pytest.mark.usefixtures("strange")
    async def test_with_a_unique_key_too(self, queue: Replica, noon: Clock, world: World):
        await put(queue, cron="* * * * *", timezone="US/Pacific", job={"queue": "q", "unique": {"key": "k"}})
        await forget_zone(world)
        noon.move(60)
        await queue.maintain()
        assert await outcomes(queue) == [("12:01:00", "failed", "rhythm", 1)]

    @pytest.mark.usefixtures("strange")
    async def test_it_is_shown_without_fire_times(self, queue: Replica):
        shown = (await queue.http.get("/schedules")).json()["schedules"]
        assert [(each["name"], len(each["next_fires_at"])) for each in shown] == [("other", 5), ("s", 0)]
        assert (await show(queue))["timezone"] == "US/Pacific-New"

    @pytest.mark.usefixtures("strange")
    async def test_pause_resume_and_trigger_answer(self, queue: Replica, noon: Clock):
        await post(queue, "pause")
        noon.move(60)
        assert (await post(queue, "resume"))["next_fires_at"] == []
        await post(queue, "trigger", status=201)
        await queue.maintain()
        assert [run[1:] for run in await outcomes(queue)] == [
            ("failed", "rhythm", 1),
            ("triggered", None, 1),
        ]

    @pytest.mark.usefixtures("strange")
    async def test_put_anew_it_goes_on(self, queue: Replica, noon: Clock):
        noon.move(60)
        await queue.maintain()
        assert (await put(queue, cron="* * * * *"))["next_fires_at"][0] == "2026-06-01T12:02:00Z"
        noon.move(60)
        await queue.maintain()
        assert (await runs(queue))[0]["outcome"] == "fired"

    @pytest.mark.parametrize("resume", [False, True])
    @pytest.mark.usefixtures("strange")
    async def test_once_the_zone_is_known_the_same_put_or_a_resume_begins_anew(
        self, queue: Replica, noon: Clock, world: World, *, resume: bool
    ):
        noon.move(60)
        await queue.maintain()
        await forget_zone(world, "US/Pacific")
        if resume:
            await post(queue, "pause")
            shown = await post(queue, "resume")
        else:
            shown = await put(queue, cron="* * * * *", timezone="US/Pacific")
        assert shown["next_fires_at"][0] == "2026-06-01T12:02:00Z"


class TestUnreadable:
    """What is stored of it can not be read: other rules wrote it."""

    @pytest.fixture
    async def strange(self, queue: Replica, world: World) -> None:
        """Store a schedule `s` that says what nobody here knows, and a plain one."""
        await put(queue)
        await put(queue, "other")
        connection = await world.connect()
        await connection.execute(
            """UPDATE schedules SET definition = definition || '{"missed": "all"}' WHERE name = 's'"""
        )

    @pytest.mark.usefixtures("strange")
    async def test_it_fails_by_itself_and_fires_no_more(self, queue: Replica, noon: Clock):
        for _ in range(2):
            noon.move(60)
            await queue.maintain()
        assert await outcomes(queue) == [("12:01:00", "failed", "rhythm", 1)]
        assert [run[1] for run in await outcomes(queue, "other")] == ["fired", "fired"]

    @pytest.mark.usefixtures("strange")
    async def test_it_is_shown_without_fire_times(self, queue: Replica):
        shown = (await queue.http.get("/schedules")).json()["schedules"]
        assert [(each["name"], len(each["next_fires_at"])) for each in shown] == [("other", 5), ("s", 0)]
        assert (await show(queue))["cron"] is None

    @pytest.mark.usefixtures("strange")
    async def test_nothing_is_made_of_it_and_it_stays_as_it_is(self, queue: Replica, world: World):
        connection = await world.connect()
        stored = "SELECT definition::text FROM schedules WHERE name = 's'"
        before = await connection.fetchval(stored)
        for verb in ("pause", "resume", "trigger"):
            answer = await queue.http.post(f"/schedules/s/{verb}")
            assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, "name")
        assert await connection.fetchval(stored) == before
        assert await runs(queue) == []

    @pytest.mark.usefixtures("strange")
    async def test_put_anew_it_goes_on(self, queue: Replica, noon: Clock):
        noon.move(60)
        await queue.maintain()
        assert (await put(queue))["next_fires_at"][0] == "2026-06-01T12:02:00Z"
        noon.move(60)
        await queue.maintain()
        assert (await runs(queue))[0]["outcome"] == "fired"

    @pytest.mark.usefixtures("strange")
    async def test_it_may_be_deleted(self, queue: Replica):
        assert (await queue.http.delete("/schedules/s")).status_code == 204


async def forget_zone(world: World, known_as: str = "US/Pacific-New") -> None:
    """Let the schedule `s` name a zone that there was until 2020, or another one."""
    connection = await world.connect()
    await connection.execute(
        "UPDATE schedules SET definition = jsonb_set(definition, '{timezone}', to_jsonb($1::text)) WHERE name = 's'",
        known_as,
    )


class TestUnique:
    """Its jobs have a unique key, which another job may hold."""

    async def test_return_skips_and_names_the_holder(self, queue: Replica, noon: Clock):
        await put(queue, job={"queue": "q", "unique": {"key": "k"}})
        for _ in range(2):
            noon.move(60)
            await queue.maintain()
        second, first = await runs(queue)
        assert await outcomes(queue) == [
            ("12:01:00", "fired", None, 1),
            ("12:02:00", "skipped", "duplicate", 1),
        ]
        assert second["job_id"] == first["job_id"]
        assert (await queue.stats())["waiting"] == 1

    async def test_reject_fails(self, queue: Replica, noon: Clock):
        holder = await queue.enqueue(unique={"key": "k"})
        await put(queue, job={"queue": "q", "unique": {"key": "k", "on_conflict": "reject"}})
        noon.move(60)
        await queue.maintain()
        [run] = await runs(queue)
        assert (run["outcome"], run["reason"], run["job_id"]) == ("failed", "duplicate", None)
        answer = await queue.http.post("/schedules/s/trigger")
        assert (answer.status_code, answer.json()["code"]) == (409, "duplicate")
        # A trigger that was refused is noted as a fire is.
        again, _ = await runs(queue)
        assert (again["outcome"], again["reason"], again["job_id"]) == ("failed", "duplicate", None)
        assert [ran.outcome for ran in queue.events.of(ScheduleRan)] == ["failed", "failed"]
        assert [job["id"] for job in await queue.lease(max_jobs=5)] == [holder["id"]]

    async def test_replace_fires_into_the_job_that_waits(self, queue: Replica, noon: Clock):
        holder = await queue.enqueue(unique={"key": "k"}, payload=1)
        await put(queue, job={"queue": "q", "payload": 2, "unique": {"key": "k", "on_conflict": "replace"}})
        noon.move(60)
        await queue.maintain()
        [run] = await runs(queue)
        assert (run["outcome"], run["job_id"]) == ("fired", holder["id"])
        assert (await queue.job(holder["id"]))["payload"] == 2

    async def test_a_trigger_answers_the_holder(self, queue: Replica):
        holder = await queue.enqueue(unique={"key": "k"})
        await put(queue, job={"queue": "q", "unique": {"key": "k"}})
        answer = await queue.http.post("/schedules/s/trigger")
        assert (answer.status_code, answer.json()["id"], answer.json()["duplicate"]) == (
            200,
            holder["id"],
            True,
        )
        assert await outcomes(queue) == [("12:00:00", "skipped", "duplicate", 1)]

    async def test_a_key_that_a_stranger_holds_keeps_no_other_schedule_waiting(
        self, queue: Replica, noon: Clock, world: World
    ):
        await put(queue, "a", job={"queue": "q", "unique": {"key": "k"}})
        await put(queue, "b", job={"queue": "q", "unique": {"key": "other"}})
        await put(queue, "c")
        stranger = await world.connect()
        held = stranger.transaction()
        await held.start()
        await stranger.execute(
            "INSERT INTO unique_keys (queue, key, job_id, scope) VALUES ('q', 'k', gen_random_uuid(), 'unfinished')"
        )
        noon.move(60)
        await queue.machine.service.maintenance.run_once()
        assert [await outcomes(queue, name) for name in "abc"] == [
            [],
            *[[("12:01:00", "fired", None, 1)]] * 2,
        ]
        await held.rollback()
        await queue.maintain()
        assert await outcomes(queue, "a") == [("12:01:00", "fired", None, 1)]

    async def test_keys_that_are_held_are_tried_once_a_round(self, world: World, noon: Clock):
        queue = await idle_replica(world, db_pool_size=1)
        for number in range(4):
            await put(queue, f"k{number}", job={"queue": "q", "unique": {"key": f"k{number}"}})
        await put(queue, "often", every_seconds=1)
        noon.move(60)
        async with holding(world, HOLD, 4), logged(queue) as ran:
            await queue.machine.service.maintenance.run_once()
        assert ran.count("claim_keys") == 4
        assert "promote" in ran
        assert len(await runs(queue, "often")) == STEPS_PER_ROUND

    async def test_however_many_are_held_the_round_goes_on_and_the_next_one_tries_the_others(
        self, world: World, noon: Clock
    ):
        queue = await idle_replica(world, db_pool_size=1)
        for number in range(BLOCKED_MAX + 2):
            await put(queue, f"k{number}", job={"queue": "q", "unique": {"key": f"k{number}"}})
        noon.move(60)
        async with holding(world, HOLD, BLOCKED_MAX + 1), logged(queue) as ran:
            await queue.machine.service.maintenance.run_once()
            assert ran.count("claim_keys") == BLOCKED_MAX
            await queue.machine.service.maintenance.run_once()
        # The last one's key is free.
        assert len(await runs(queue, f"k{BLOCKED_MAX + 1}")) == 1
        await queue.maintain()
        assert [len(await runs(queue, f"k{number}")) for number in range(BLOCKED_MAX + 2)] == [1] * (
            BLOCKED_MAX + 2
        )

    async def test_several_fires_that_are_due_are_decided_in_one_round(self, queue: Replica, noon: Clock):
        await put(queue, every_seconds=20, job={"queue": "q", "unique": {"key": "k"}})
        noon.move(60)
        await queue.maintain()
        assert [run[1] for run in await outcomes(queue)] == ["fired", "skipped", "skipped"]

    async def test_a_key_that_is_held_keeps_no_plain_schedule_from_its_instant(self, world: World):
        world.on_time = True
        queue = await world.replica()
        async with holding(world, HOLD, 1):
            await put(queue, "keyed", every_seconds=1, job={"queue": "q", "unique": {"key": "k0"}})
            await queue.events.wait_for(MaintenanceFailed)
            # No round of maintenance comes for an hour, nor does the keyed one try again before.
            await put(queue, "plain", every_seconds=1)
            assert {ran.schedule for ran in await queue.events.wait_for(ScheduleRan, 2)} == {"plain"}


HOLD = """
INSERT INTO unique_keys (queue, key, job_id, scope)
SELECT 'q', 'k' || n, gen_random_uuid(), 'unfinished' FROM generate_series(0, $1::int - 1) AS n"""


class TestMissed:
    async def test_a_minute_late_is_in_time(self, queue: Replica, noon: Clock):
        await put(queue, cron="5 12 * * *")
        noon.move(360)
        await queue.maintain()
        assert await outcomes(queue) == [("12:05:00", "fired", None, 1)]

    async def test_later_is_missed(self, queue: Replica, noon: Clock):
        await put(queue, cron="5 12 * * *")
        noon.move(360.001)
        await queue.maintain()
        assert await outcomes(queue) == [("12:05:00", "skipped", "missed", 1)]
        assert (await queue.stats())["waiting"] == 0

    async def test_skip_notes_all_that_was_missed_in_one_run(self, queue: Replica, noon: Clock):
        await put(queue, every_seconds=60)
        noon.move(600)
        await queue.maintain()
        # The last two are not late.
        assert await outcomes(queue) == [
            ("12:01:00", "skipped", "missed", 8),
            ("12:09:00", "fired", None, 1),
            ("12:10:00", "fired", None, 1),
        ]

    async def test_once_fires_one_job_for_all_that_was_missed(self, queue: Replica, noon: Clock):
        await put(queue, every_seconds=300, missed="once")
        noon.move(1900)
        await queue.maintain()
        assert await outcomes(queue) == [("12:05:00", "fired", "missed", 6)]
        assert (await queue.stats())["waiting"] == 1
        assert (await show(queue))["next_fires_at"][0] == "2026-06-01T12:35:00Z"

    @pytest.mark.parametrize(("missed", "jobs"), [("skip", 0), ("once", 1)])
    async def test_a_year_is_decided_at_once(self, queue: Replica, noon: Clock, missed: str, jobs: int):
        await put(queue, cron="* * * * *", missed=missed)
        noon.move(365 * 86_400 + 30)
        await queue.maintain()
        first, *rest = await outcomes(queue)
        assert first == ("12:01:00", "fired" if jobs else "skipped", "missed", 1000)
        assert [run[:2] for run in rest] == [("12:00:00", "fired")]
        assert (await queue.stats())["waiting"] == jobs + 1

    async def test_nothing_is_lost_when_nobody_ran(self, world: World, noon: Clock, queue: Replica):
        await put(queue, missed="once", every_seconds=3600)
        await queue.machine.service.stop()
        noon.move(7200 + 61)
        again = await world.replica()
        await again.maintain()
        assert await outcomes(again) == [("13:00:00", "fired", "missed", 2)]


class TestOverlap:
    async def test_skip_waits_for_the_end_of_the_job(self, queue: Replica, noon: Clock):
        await put(queue, overlap="skip")
        for _ in range(2):
            noon.move(60)
            await queue.maintain()
        leased = await queue.lease_one(lease_seconds=3600)
        noon.move(60)
        await queue.maintain()
        await queue.verb("ack", leased)
        noon.move(60)
        await queue.maintain()
        assert await outcomes(queue) == [
            ("12:01:00", "fired", None, 1),
            ("12:02:00", "skipped", "overlap", 1),
            ("12:03:00", "skipped", "overlap", 1),
            ("12:04:00", "fired", None, 1),
        ]

    async def test_a_job_in_retry_has_not_ended(self, queue: Replica, noon: Clock):
        await put(queue, overlap="skip")
        noon.move(60)
        await queue.maintain()
        await queue.fail(await queue.lease_one(lease_seconds=3600), retry_in_seconds=3600)
        noon.move(60)
        await queue.maintain()
        assert (await runs(queue))[0]["reason"] == "overlap"

    async def test_a_triggered_job_counts_too(self, queue: Replica, noon: Clock):
        await put(queue, overlap="skip")
        await post(queue, "trigger", status=201)
        noon.move(60)
        await queue.maintain()
        assert await outcomes(queue) == [
            ("12:00:00", "triggered", None, 1),
            ("12:01:00", "skipped", "overlap", 1),
        ]

    async def test_of_several_jobs_each_must_have_ended(self, queue: Replica, noon: Clock):
        await put(queue, overlap="skip")
        await post(queue, "trigger", status=201)
        first = await queue.lease_one(lease_seconds=3600)
        await post(queue, "trigger", status=201)
        await queue.verb("ack", await queue.lease_one(lease_seconds=3600))
        noon.move(60)
        await queue.maintain()
        assert (await runs(queue))[0]["reason"] == "overlap"
        await queue.verb("ack", first)
        noon.move(60)
        await queue.maintain()
        assert (await runs(queue))[0]["outcome"] == "fired"

    async def test_a_dead_job_has_ended(self, queue: Replica, noon: Clock):
        await put(queue, overlap="skip")
        noon.move(60)
        await queue.maintain()
        await queue.fail(await queue.lease_one(lease_seconds=3600), retry=False)
        noon.move(60)
        await queue.maintain()
        assert (await runs(queue))[0]["outcome"] == "fired"

    async def test_allow_lets_them_pile_up(self, queue: Replica, noon: Clock):
        await put(queue)
        for _ in range(3):
            noon.move(60)
            await queue.maintain()
        assert (await queue.stats())["waiting"] == 3

    async def test_what_was_missed_does_not_overlap_either(self, queue: Replica, noon: Clock):
        await put(queue, overlap="skip", missed="once")
        await post(queue, "trigger", status=201)
        noon.move(600)
        await queue.maintain()
        assert await outcomes(queue) == [
            ("12:00:00", "triggered", None, 1),
            ("12:01:00", "skipped", "overlap", 8),
            ("12:09:00", "skipped", "overlap", 1),
            ("12:10:00", "skipped", "overlap", 1),
        ]


class TestPause:
    async def test_nothing_fires_while_it_is_paused_nor_afterwards(self, queue: Replica, noon: Clock):
        await put(queue)
        paused = await post(queue, "pause")
        assert (paused["paused"], paused["next_fires_at"]) == (True, [])
        noon.move(180)
        await queue.maintain()
        assert await runs(queue) == []
        resumed = await post(queue, "resume")
        assert (resumed["paused"], resumed["next_fires_at"][0]) == (False, "2026-06-01T12:04:00Z")
        await queue.maintain()
        assert await outcomes(queue) == [("12:01:00", "skipped", "paused", 3)]
        noon.move(60)
        await queue.maintain()
        assert (await runs(queue))[0]["outcome"] == "fired"

    async def test_again_is_nothing_new(self, queue: Replica, noon: Clock):
        await put(queue)
        await post(queue, "pause")
        await post(queue, "pause")
        noon.move(60)
        await post(queue, "resume")
        await post(queue, "resume")
        assert await outcomes(queue) == [("12:01:00", "skipped", "paused", 1)]

    async def test_resuming_what_is_not_paused_takes_no_fire_away(self, queue: Replica, noon: Clock):
        await put(queue)
        noon.move(60)
        await post(queue, "resume")
        await queue.maintain()
        assert await outcomes(queue) == [("12:01:00", "fired", None, 1)]

    async def test_a_put_may_pause_and_resume(self, queue: Replica, noon: Clock):
        assert (await put(queue, paused=True))["paused"] is True
        noon.move(60)
        # Not named: as it is.
        assert (await put(queue))["paused"] is True
        assert (await put(queue, paused=False))["next_fires_at"][0] == "2026-06-01T12:02:00Z"
        await queue.maintain()
        assert await outcomes(queue) == [("12:01:00", "skipped", "paused", 1)]


class TestTrigger:
    async def test_it_enqueues_a_job_now(self, queue: Replica):
        before = await put(queue, job={"queue": "q", "payload": 7})
        answer = await queue.http.post("/schedules/s/trigger")
        assert answer.status_code == 201
        job = answer.json()
        assert answer.headers["location"] == f"/jobs/{job['id']}"
        assert (job["state"], job["payload"]) == ("ready", 7)
        assert (await queue.lease_one())["id"] == job["id"]
        schedule = await show(queue)
        assert schedule["last_run"] == {
            "fire_at": "2026-06-01T12:00:00Z",
            "decided_at": "2026-06-01T12:00:00Z",
            "outcome": "triggered",
            "reason": None,
            "fires": 1,
            "job_id": job["id"],
        }
        assert schedule["next_fires_at"] == before["next_fires_at"]
        [ran] = queue.events.of(ScheduleRan)
        assert (ran.outcome, str(ran.job_id)) == ("triggered", job["id"])

    async def test_it_enqueues_when_paused_too(self, queue: Replica):
        await put(queue, paused=True)
        await post(queue, "trigger", status=201)
        assert len(await queue.lease()) == 1

    async def test_twice_at_one_instant_are_two(self, queue: Replica):
        await put(queue)
        first = await post(queue, "trigger", status=201)
        second = await post(queue, "trigger", status=201)
        assert [run["job_id"] for run in await runs(queue)] == [second["id"], first["id"]]

    async def test_at_the_instant_of_a_fire_it_takes_nothing_away(self, queue: Replica, noon: Clock):
        await put(queue)
        noon.move(60)
        await post(queue, "trigger", status=201)
        await queue.maintain()
        assert sorted(run[1] for run in await outcomes(queue)) == ["fired", "triggered"]
        assert (await queue.stats())["waiting"] == 2

    async def test_it_calls_a_waiting_lease(self, queue: Replica):
        await put(queue)
        async with httpx.AsyncClient(base_url=queue.http.base_url) as client:
            waiting = asyncio.create_task(
                client.post("/lease", json={"queues": ["q"], "wait_seconds": 20}, timeout=30)
            )
            while not queue.machine.service.wakeups.waiters:
                await asyncio.sleep(0.002)
            job = await post(queue, "trigger", status=201)
            assert (await waiting).json()["jobs"][0]["id"] == job["id"]


class TestLists:
    async def test_schedules_come_by_name_page_by_page(self, queue: Replica):
        for name in ["b", "d", "a", "c", "e"]:
            await put(queue, name)
        seen, cursor = [], None
        while True:
            query = {"limit": 2} | ({} if cursor is None else {"cursor": cursor})
            page = (await queue.http.get("/schedules", params=query)).json()
            seen += [schedule["name"] for schedule in page["schedules"]]
            cursor = page["next_cursor"]
            if cursor is None:
                break
        assert seen == ["a", "b", "c", "d", "e"]

    async def test_a_list_shows_what_a_schedule_by_itself_shows(self, queue: Replica, noon: Clock):
        await put(queue)
        noon.move(60)
        await queue.maintain()
        page = (await queue.http.get("/schedules")).json()
        assert page == {"schedules": [await show(queue)], "next_cursor": None}

    async def test_a_page_stops_at_eight_mebibytes(self, queue: Replica):
        for number in range(40):
            await put(queue, f"s{number:02}", job={"queue": "q", "payload": "x" * 250_000})
        page = (await queue.http.get("/schedules", params={"limit": 40})).json()
        rest = (await queue.http.get("/schedules", params={"cursor": page["next_cursor"]})).json()
        names = [schedule["name"] for schedule in page["schedules"] + rest["schedules"]]
        assert names == [f"s{number:02}" for number in range(40)]
        assert len(page["schedules"]) == 33

    async def test_runs_come_newest_first_page_by_page(self, queue: Replica, noon: Clock):
        await put(queue)
        for _ in range(4):
            noon.move(60)
            await queue.maintain()
            await post(queue, "trigger", status=201)
        whole = await runs(queue)
        assert len(whole) == 8
        seen, cursor = [], None
        while True:
            query = {"limit": 3} | ({} if cursor is None else {"cursor": cursor})
            page = (await queue.http.get("/schedules/s/runs", params=query)).json()
            seen += page["runs"]
            cursor = page["next_cursor"]
            if cursor is None:
                break
        assert seen == whole
        assert [run["fire_at"] for run in seen] == sorted((run["fire_at"] for run in seen), reverse=True)

    @pytest.mark.parametrize("path", ["/schedules", "/schedules/s/runs"])
    @pytest.mark.parametrize(
        "query", ["limit=0", "limit=501", "cursor=!", "cursor=_w", "cursor=" + "_" * 16, "x=1"]
    )
    async def test_a_bad_query_is_refused(self, queue: Replica, path: str, query: str):
        await put(queue)
        answer = await queue.http.get(f"{path}?{query}")
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid")


class TestDelete:
    async def test_it_is_gone_with_its_runs_and_fires_no_more(self, queue: Replica, noon: Clock):
        await put(queue)
        noon.move(60)
        await queue.maintain()
        assert (await queue.http.delete("/schedules/s")).status_code == 204
        noon.move(60)
        await queue.maintain()
        assert (await queue.http.get("/schedules/s")).status_code == 404
        # Its job stays.
        assert len(await queue.lease(max_jobs=5)) == 1
        await put(queue)
        assert await runs(queue) == []
