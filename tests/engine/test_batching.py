import asyncio
from collections.abc import Sequence
from contextvars import ContextVar

import pytest

from app.engine import batching
from app.engine.batching import Batcher
from app.queue.errors import UnavailableError


class Pen:
    """Writes batches when it is let, and remembers them."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.may_write = asyncio.Event()
        self.may_write.set()

    async def write(self, items: Sequence[int]) -> list[int]:
        self.batches.append(list(items))
        await self.may_write.wait()
        if any(item < 0 for item in items):
            raise ValueError(items)
        return [item * 10 for item in items]


async def test_an_item_on_an_idle_system_is_written_alone_and_at_once():
    pen = Pen()
    assert await Batcher(pen.write).submit(1) == 10
    assert pen.batches == [[1]]


async def test_what_arrives_during_a_flush_goes_into_the_next_one():
    pen = Pen()
    batcher = Batcher(pen.write)
    pen.may_write.clear()
    answers = [asyncio.create_task(batcher.submit(1))]
    while not pen.batches:
        await asyncio.sleep(0)
    answers += [asyncio.create_task(batcher.submit(item)) for item in (2, 3, 4)]
    await asyncio.sleep(0)
    pen.may_write.set()
    assert await asyncio.gather(*answers) == [10, 20, 30, 40]
    assert pen.batches == [[1], [2, 3, 4]]


async def test_a_batch_is_bounded_by_weight():
    pen = Pen()
    batcher = Batcher(pen.write, weight=lambda item: item, batch_max=5)
    answers = await asyncio.gather(*(batcher.submit(item) for item in (2, 3, 1, 9, 1)))
    assert answers == [20, 30, 10, 90, 10]
    assert pen.batches == [[2, 3], [1], [9], [1]]


async def test_a_bad_item_fails_alone():
    pen = Pen()
    batcher = Batcher(pen.write)
    answers = await asyncio.gather(*(batcher.submit(item) for item in (1, -2, 3)), return_exceptions=True)
    assert answers[0] == 10
    assert isinstance(answers[1], ValueError)
    assert answers[2] == 30


async def test_two_items_with_one_key_are_written_one_after_the_other():
    pen = Pen()
    batcher = Batcher(pen.write, key=lambda item: item % 10)
    assert await asyncio.gather(*(batcher.submit(item) for item in (1, 11, 2))) == [10, 110, 20]
    assert pen.batches == [[1, 2], [11]]


async def test_when_the_database_is_away_nobody_is_tried_again():
    calls = 0

    async def away(_items: Sequence[int]) -> list[int]:
        nonlocal calls
        calls += 1
        raise UnavailableError("away", 7)

    batcher = Batcher(away)
    answers = await asyncio.gather(*(batcher.submit(item) for item in (1, 2)), return_exceptions=True)
    assert calls == 1
    assert [error.retry_after_seconds for error in answers if isinstance(error, UnavailableError)] == [7, 7]


async def test_the_answer_to_one_who_has_gone_is_handed_over():
    pen = Pen()
    orphans: list[int] = []
    batcher = Batcher(pen.write, orphaned=orphans.append)
    pen.may_write.clear()
    gone = asyncio.create_task(batcher.submit(1))
    while not pen.batches:
        await asyncio.sleep(0)
    gone.cancel()
    pen.may_write.set()
    await batcher.drained()
    assert orphans == [10]


async def test_a_full_line_refuses(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(batching, "LINE_MAX", 2)
    pen = Pen()
    batcher = Batcher(pen.write)
    pen.may_write.clear()
    waiting = [asyncio.create_task(batcher.submit(1))]
    while not pen.batches:
        await asyncio.sleep(0)
    waiting += [asyncio.create_task(batcher.submit(item)) for item in (2, 3)]
    await asyncio.sleep(0)
    with pytest.raises(UnavailableError):
        await batcher.submit(4)
    pen.may_write.set()
    assert await asyncio.gather(*waiting) == [10, 20, 30]


async def test_one_that_is_cancelled_before_it_could_take_its_answer_is_an_orphan():
    orphans: list[int] = []
    batcher = Batcher(Pen().write, orphaned=orphans.append)

    async def first() -> None:
        await batcher.submit(1)
        # Both answers are there, and the other one has not run since.
        second.cancel()

    first_one = asyncio.create_task(first())
    second = asyncio.create_task(batcher.submit(2))
    await asyncio.wait({first_one, second})
    assert second.cancelled()
    assert orphans == [20]


async def test_a_bad_item_among_many_is_found_by_halving():
    pen = Pen()
    batcher = Batcher(pen.write)
    items = [*range(300), -1, *range(300, 499)]
    answers = await asyncio.gather(*(batcher.submit(item) for item in items), return_exceptions=True)
    assert [item for item, answer in zip(items, answers, strict=True) if answer != item * 10] == [-1]
    assert len(pen.batches) < 25


async def test_when_the_database_goes_away_while_a_bad_item_is_looked_for_the_search_ends():
    tries = 0

    async def write(_items: Sequence[int]) -> list[int]:
        nonlocal tries
        tries += 1
        if tries > 2:
            raise UnavailableError("away")
        raise ValueError

    batcher = Batcher(write)
    answers = await asyncio.gather(*(batcher.submit(item) for item in range(100)), return_exceptions=True)
    assert {type(answer) for answer in answers} == {UnavailableError}
    assert tries == 3


async def test_a_wrong_number_of_answers_leaves_nobody_waiting():
    async def write(_items: Sequence[int]) -> list[int]:
        return []

    batcher = Batcher(write)
    answers = await asyncio.gather(*(batcher.submit(item) for item in range(3)), return_exceptions=True)
    assert {type(answer) for answer in answers} == {UnavailableError}
    assert batcher.idle


async def test_each_answer_is_told_in_the_context_of_who_asked():
    name: ContextVar[str] = ContextVar("name")
    told: list[tuple[int, str]] = []
    pen = Pen()
    batcher = Batcher(pen.write, told=lambda answer: told.append((answer, name.get())))

    async def submit(item: int) -> None:
        name.set(f"request {item}")
        await batcher.submit(item)

    await asyncio.gather(*(asyncio.create_task(submit(item)) for item in (1, 2, 3)))
    assert told == [(10, "request 1"), (20, "request 2"), (30, "request 3")]


async def test_a_line_is_bounded_by_what_its_items_weigh(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(batching, "LINE_MAX", 100)
    pen = Pen()
    batcher = Batcher(pen.write, weight=lambda item: item, batch_max=1)
    pen.may_write.clear()
    waiting = [asyncio.create_task(batcher.submit(item)) for item in (1, 60, 60)]
    await asyncio.sleep(0)
    with pytest.raises(UnavailableError):
        await batcher.submit(1)
    pen.may_write.set()
    assert await asyncio.gather(*waiting) == [10, 600, 600]
    assert await batcher.submit(1) == 10
