"""Copies of what few ever change: loaded before the first request, replaced at a change, kept through an outage."""

import asyncio
from collections.abc import Mapping

import pytest

from app.engine.copies import Copies
from app.queue.errors import UnavailableError
from tests.conftest import NEVER_SECONDS

MOMENT = 0.005


class Source:
    """What there is to copy: a value, its number, and whether it can be reached."""

    def __init__(self) -> None:
        self.number = 0
        self.value = "first"
        self.away = False
        self.copied: list[str] = []
        self.told: list[str] = []
        self.news = asyncio.Event()

    async def numbers(self) -> Mapping[str, int]:
        self.news.set()
        if self.away:
            raise UnavailableError("away")
        return {"things": self.number} if self.number else {}

    async def load(self) -> None:
        await asyncio.sleep(0)
        if self.away:
            raise UnavailableError("away")
        self.copied.append(self.value)

    def change(self, value: str) -> None:
        self.number += 1
        self.value = value

    async def asked(self) -> None:
        """Wait until the numbers have been asked for once more."""
        self.news.clear()
        await self.news.wait()

    def copies(self, every_seconds: float = NEVER_SECONDS) -> Copies:
        copies = Copies(self.numbers, self.told.append, every_seconds)
        copies.keep("things", self.load)
        return copies


@pytest.fixture
def source() -> Source:
    return Source()


async def test_a_copy_is_loaded_once_and_then_only_when_its_number_has_changed(source: Source):
    copies = source.copies()
    await copies.load()
    await copies.compare()
    assert source.copied == ["first"]
    source.change("second")
    await copies.compare()
    await copies.compare()
    assert source.copied == ["first", "second"]


async def test_a_refresh_loads_at_once_and_tells_the_others(source: Source):
    copies = source.copies()
    await copies.load()
    source.change("second")
    await copies.refresh("things")
    await copies.compare()
    assert source.copied == ["first", "second"]
    assert source.told == ["things"]


async def test_refreshes_that_come_together_share_a_load(source: Source):
    copies = source.copies()
    await copies.load()
    source.change("second")
    await asyncio.gather(*(copies.refresh("things") for _ in range(20)))
    # The first began before the others asked; one more has all that they changed.
    assert len(source.copied) <= 3
    assert source.copied[-1] == "second"


async def test_a_hint_makes_it_compare_at_once(source: Source):
    copies = source.copies()
    await copies.load()
    await copies.start()
    try:
        source.change("second")
        copies.hint(["strange"])
        copies.hint(["things", "strange"])
        async with asyncio.timeout(10):
            while source.copied != ["first", "second"]:
                await source.asked()
                await asyncio.sleep(0)
    finally:
        await copies.stop()


async def test_an_outage_leaves_the_copy_as_it_is_and_the_change_comes_after_it(source: Source):
    copies = source.copies(MOMENT)
    await copies.load()
    await copies.start()
    try:
        source.away = True
        source.change("second")
        async with asyncio.timeout(10):
            await source.asked()
            await source.asked()
            assert source.copied == ["first"]
            with pytest.raises(UnavailableError):
                await copies.refresh("things")
            source.away = False
            while source.copied != ["first", "second"]:
                await source.asked()
                await asyncio.sleep(0)
    finally:
        await copies.stop()


async def test_without_the_database_there_is_no_first_copy(source: Source):
    source.away = True
    with pytest.raises(UnavailableError):
        await source.copies().load()
