"""What runs by itself: starts once, stops and has stopped, begins again after a failure, is never forgotten."""

import asyncio
import random
from collections.abc import Callable, Iterator

import pytest
from structlog.testing import capture_logs
from structlog.typing import EventDict

from app.engine.copies import Copies
from app.engine.maintenance import Maintenance
from app.engine.running import Component, TaskOwner
from app.engine.streams import Streams
from app.engine.wakeup import Wakeups
from app.engine.watching import Watching
from app.engine.workers import Workers
from app.telemetry import Showing
from tests.conftest import Replica

TASKS = 10
CYCLES = 50


class Part(Component):
    """A component that knows how often it runs at a time, and takes a while to end."""

    def __init__(self) -> None:
        super().__init__()
        self.runs = 0
        self.runs_at_a_time = 0
        self.most_at_a_time = 0
        self.began = asyncio.Event()

    async def _run(self) -> None:
        self.runs += 1
        self.runs_at_a_time += 1
        self.most_at_a_time = max(self.most_at_a_time, self.runs_at_a_time)
        self.began.set()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            for _ in range(3):
                await asyncio.sleep(0)
            self.runs_at_a_time -= 1


class Stubborn(Part):
    """A component that once takes the end for something else, as libraries do that lose a cancellation."""

    async def _run(self) -> None:
        try:
            await super()._run()
        except asyncio.CancelledError:
            if self.runs == 1:
                return
            raise


class Failing(Part):
    """A component that fails at its first run."""

    async def _run(self) -> None:
        if self.runs == 0:
            self.runs += 1
            message = "as expected"
            raise RuntimeError(message)
        await super()._run()


@pytest.fixture
def logged() -> Iterator[list[EventDict]]:
    with capture_logs() as lines:
        yield lines


def tasks_of(*components: Component) -> list[str]:
    names = {type(component).__name__ for component in components}
    return [task.get_name() for task in asyncio.all_tasks() if task.get_name() in names]


async def start_and_stop(component: Component, chance: random.Random) -> None:
    for _ in range(CYCLES):
        await component.start()
        await asyncio.sleep(chance.choice([0, 0, 0.001, 0.01]))
        await component.stop()


def test_every_component_of_the_service_is_tested_here() -> None:
    ours = {each for each in Component.__subclasses__() if each.__module__.startswith("app.")}
    assert ours == {Wakeups, Maintenance, Showing, Copies, Workers, Watching, Streams}


@pytest.mark.parametrize(
    "component_of",
    [
        pytest.param(lambda queue: queue.machine.service.wakeups, id="Wakeups"),
        pytest.param(lambda queue: queue.machine.service.maintenance, id="Maintenance"),
        pytest.param(lambda queue: queue.machine.service.copies, id="Copies"),
        pytest.param(lambda queue: queue.machine.service.workers, id="Workers"),
        pytest.param(lambda queue: queue.machine.service.watching, id="Watching"),
        pytest.param(lambda queue: queue.machine.service.streams, id="Streams"),
    ],
)
async def test_component_of_the_service_survives_starts_and_stops_of_many_tasks(
    component_of: Callable[[Replica], Component], queue: Replica
):
    component = component_of(queue)
    async with asyncio.timeout(60):
        await asyncio.gather(*(start_and_stop(component, random.Random(number)) for number in range(TASKS)))
        await component.stop()
        assert tasks_of(component) == []
        await component.start()
        assert len(tasks_of(component)) == 1


async def test_component_never_runs_twice_at_a_time_however_starts_and_stops_meet():
    part = Part()
    await asyncio.gather(*(start_and_stop(part, random.Random(number)) for number in range(TASKS)))
    await part.stop()
    assert part.runs > 1
    assert part.most_at_a_time == 1
    assert part.runs_at_a_time == 0


async def test_every_stop_returns_only_when_the_task_has_ended():
    part = Part()
    await part.start()
    await part.began.wait()

    async def stop() -> int:
        await part.stop()
        return part.runs_at_a_time

    assert await asyncio.gather(*(stop() for _ in range(3))) == [0, 0, 0]


async def test_start_after_a_stop_that_has_not_ended_yet_runs_it_again():
    part = Part()
    await part.start()
    await part.began.wait()
    part.began.clear()
    await asyncio.gather(part.stop(), part.start())
    async with asyncio.timeout(5):
        await part.began.wait()
    assert part.runs == 2
    await part.stop()


async def test_component_that_loses_the_word_to_end_is_told_again():
    part = Stubborn()
    await part.start()
    await part.began.wait()
    async with asyncio.timeout(10):
        await part.stop()
    assert tasks_of(part) == []


async def test_start_twice_runs_once_and_stop_twice_is_one_stop():
    part = Part()
    await part.start()
    await part.start()
    await part.began.wait()
    assert len(tasks_of(part)) == 1
    await part.stop()
    await part.stop()
    assert (part.runs, part.runs_at_a_time) == (1, 0)


async def test_stop_before_start_does_nothing_and_start_still_starts():
    part = Part()
    await part.stop()
    await part.start()
    await part.began.wait()
    await part.stop()
    assert part.runs == 1


async def test_service_that_was_never_started_can_be_stopped(queue: Replica):
    service = queue.machine.service
    await service.stop()
    await service.stop()
    assert tasks_of(service.wakeups, service.maintenance) == []


async def test_component_that_fails_is_logged_and_begins_again(logged: list[EventDict]):
    part = Failing()
    await part.start()
    await part.began.wait()
    assert part.runs == 2
    await part.stop()
    failures = [line for line in logged if line["event"] == "component_failed"]
    assert [(line["component"], line["log_level"]) for line in failures] == [("Failing", "error")]
    assert failures[0]["exc_info"]


async def test_component_can_be_stopped_while_it_waits_to_begin_again(logged: list[EventDict]):
    part = Failing()
    await part.start()
    while not logged:
        await asyncio.sleep(0)
    await part.stop()
    assert (part.runs, tasks_of(part)) == (1, [])


async def test_owner_waits_for_what_still_runs():
    owner = TaskOwner()
    done = []

    async def work() -> None:
        await asyncio.sleep(0)
        done.append(True)

    owner.spawn(work())
    await owner.settle(within_seconds=10)
    assert done == [True]


async def test_owner_ends_what_takes_too_long():
    owner = TaskOwner()
    ended = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            ended.set()

    owner.spawn(work())
    await owner.settle(within_seconds=0.01)
    assert ended.is_set()
    await owner.settle(within_seconds=0)


async def test_owner_with_nothing_to_do_settles_at_once():
    await TaskOwner().settle(within_seconds=60)


async def test_owned_work_that_fails_is_logged(logged: list[EventDict]):
    owner = TaskOwner()

    async def work() -> None:
        message = "as expected"
        raise RuntimeError(message)

    owner.spawn(work())
    await owner.settle(within_seconds=10)
    await asyncio.sleep(0)
    [line] = logged
    assert (line["event"], line["log_level"]) == ("background_work_failed", "error")
    assert "as expected" in line["error"]
