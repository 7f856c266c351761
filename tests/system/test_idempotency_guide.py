"""The guide's handler, as it is printed, ends in the middle and goes on at the next attempt."""

import asyncio
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import Clock, Replica

GUIDE = Path(__file__).parents[2] / "docs" / "idempotency.md"


@contextmanager
def handler(base_url: str, do: Any) -> Iterator[Any]:
    """Yield the guide's function `work`, at this service and with this step."""
    [code] = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)
    names: dict[str, Any] = {"do": do}
    exec(code, names)  # noqa: S102  # what the guide tells its readers to run
    names["http"].close()
    with httpx.Client(base_url=base_url, timeout=30) as names["http"]:
        yield names["work"]


async def test_no_step_is_done_twice(queue: Replica, clock: Clock):
    done: list[tuple[str, str]] = []
    deaths: list[str] = []

    class DiesError(Exception):
        """The worker's machine is gone."""

    def do(step: str, key: str) -> None:
        if step == "b" and not deaths:
            deaths.append(step)
            raise DiesError
        done.append((step, key))

    await queue.enqueue(payload={"steps": ["a", "b", "c"]}, backoff={"jitter": "none"})
    first = await queue.lease_one()
    with handler(str(queue.http.base_url), do) as work, pytest.raises(DiesError):
        await asyncio.to_thread(work, first)
    clock.move(31)
    await queue.maintain()
    clock.move(2)
    await queue.maintain()
    again = await queue.lease_one()
    assert (again["id"], again["attempt"], again["checkpoint"]) == (first["id"], 2, {"step": 1})
    assert again["last_error"]["type"] == "lease_expired"
    with handler(str(queue.http.base_url), do) as work:
        await asyncio.to_thread(work, again)
    assert (await queue.job(first["id"]))["state"] == "completed"
    assert done == [(step, f"{first['id']}/{n}") for n, step in enumerate("abc")]


async def test_the_guides_requests_are_taken(queue: Replica):
    bodies = re.findall(r"-d '(\{.*?\})'", GUIDE.read_text())
    assert len(bodies) == 2
    for body in bodies:
        answers = [
            await queue.http.post(
                "/jobs",
                content=body,
                headers={"content-type": "application/json", "idempotency-key": body[-20:]},
            )
            for _ in range(2)
        ]
        assert [answer.status_code for answer in answers] == [201, 200]
