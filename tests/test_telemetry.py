"""The log: a JSON line for each change of a job's state, with request and job, and never what the job carries."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest

from tests.conftest import World
from tests.served import ROOT, environment, served

SECRETS = {
    where: f"secret-of-the-{where}-4f1b"
    for where in ("payload", "metadata", "tag", "result", "message", "stack", "malformed", "query")
}

SAY_SOMETHING = """
import logging, sys
from app.telemetry import configure_logging
import structlog
configure_logging(sys.argv[1], sys.argv[2])
log = structlog.get_logger("test")
log.debug("quiet")
log.info("said", number=1)
logging.getLogger("uvicorn.error").info("chatter")
logging.getLogger("uvicorn.error").error("trouble")
try:
    raise ValueError("why")
except ValueError:
    log.exception("failed")
"""


def said(level: str, form: str, *, on_terminal: bool = False) -> str:
    """Return what a process with this logging says on standard error."""
    terminal, standard_error = os.openpty() if on_terminal else os.pipe()
    try:
        subprocess.run(
            [sys.executable, "-c", SAY_SOMETHING, level, form],
            cwd=ROOT,
            env=environment(),
            stderr=standard_error,
            check=True,
            timeout=60,
        )
        return os.read(terminal, 1 << 16).decode()
    finally:
        os.close(standard_error)
        os.close(terminal)


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_lines_are_json_with_a_level_and_an_instant_in_utc():
    events = lines(said("info", "json"))
    assert [(line["event"], line["level"]) for line in events] == [
        ("said", "info"),
        ("trouble", "error"),
        ("failed", "error"),
    ]
    for line in events:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", line["timestamp"])
    assert events[0]["number"] == 1
    assert "ValueError: why" in events[-1]["exception"]


def test_the_level_says_from_where_on_lines_are_written():
    assert [line["event"] for line in lines(said("debug", "json"))] == ["quiet", "said", "trouble", "failed"]
    assert [line["event"] for line in lines(said("error", "json"))] == ["trouble", "failed"]


def test_auto_is_json_for_a_file_and_pretty_on_a_terminal():
    assert lines(said("info", "auto"))
    pretty = said("info", "auto", on_terminal=True)
    assert "said" in pretty
    assert not any(line.startswith("{") for line in pretty.splitlines())


def test_a_format_that_is_asked_for_is_kept_wherever_the_lines_go():
    assert lines(said("info", "json", on_terminal=True))
    assert not said("info", "pretty").startswith("{")


async def live(http: httpx.AsyncClient) -> dict[str, str]:
    """Lead jobs through every change that a request can make; return which job did what."""

    async def call(method: str, path: str, request_id: str, body: Any = None) -> Any:
        answer = await http.request(method, path, json=body, headers={"X-Request-Id": request_id})
        assert answer.is_success, answer.text
        return answer.json() if answer.content else None

    async def leased(name: str) -> tuple[str, dict[str, str]]:
        job = await call(
            "POST",
            "/jobs",
            f"enqueue-{name}",
            {
                "queue": name,
                "payload": {SECRETS["payload"]: SECRETS["payload"]},
                "metadata": {"note": SECRETS["metadata"]},
                "tags": [SECRETS["tag"]],
            },
        )
        [taken] = (await call("POST", "/lease", f"lease-{name}", {"queues": [name], "worker": "w1"}))["jobs"]
        assert taken["id"] == job["id"]
        return job["id"], {"lease_id": taken["lease_id"]}

    error = {"message": SECRETS["message"], "type": "Boom", "stack": SECRETS["stack"]}
    jobs = {}
    jobs["acked"], lease = await leased("acked")
    await call("POST", f"/jobs/{jobs['acked']}/ack", "ack", {**lease, "result": SECRETS["result"]})
    jobs["failed"], lease = await leased("failed")
    await call("POST", f"/jobs/{jobs['failed']}/fail", "fail", {**lease, "error": error})
    await call("POST", f"/jobs/{jobs['failed']}/cancel", "cancel")
    jobs["dead"], lease = await leased("dead")
    await call("POST", f"/jobs/{jobs['dead']}/fail", "give-up", {**lease, "error": error, "retry": False})
    await call("POST", f"/jobs/{jobs['dead']}/retry", "retry")
    jobs["released"], lease = await leased("released")
    await call("POST", f"/jobs/{jobs['released']}/cancel", "ask")
    await call("POST", f"/jobs/{jobs['released']}/release", "release", lease)
    await call("DELETE", f"/jobs/{jobs['released']}", "delete")
    return jobs


@pytest.mark.slow
async def test_each_change_is_a_line_with_its_request_and_its_job_and_never_what_the_job_carries(
    world: World, tmp_path: Path
):
    async with served(
        tmp_path, world.database_url, QUEUE_LOG_LEVEL="debug", QUEUE_LOG_FORMAT="json"
    ) as leaseq:
        jobs = await live(leaseq.http)
        await leaseq.http.post(
            "/jobs", content=b'{"queue":"q","payload":"%s",}' % SECRETS["malformed"].encode()
        )
        await leaseq.http.post("/jobs", json={"queue": "q", "payload": 1, SECRETS["malformed"]: 1})
        await leaseq.http.get("/jobs", params={"tag": SECRETS["query"], "limit": 0})

    about_jobs = [line for line in leaseq.lines if "job_id" in line]
    told = {(line["request_id"], line["event"], line["job_id"], line["level"]) for line in about_jobs}
    assert told == {
        *((f"enqueue-{name}", "job_enqueued", job, "debug") for name, job in jobs.items()),
        *((f"lease-{name}", "job_leased", job, "debug") for name, job in jobs.items()),
        ("ack", "job_completed", jobs["acked"], "debug"),
        ("fail", "attempt_ended", jobs["failed"], "info"),
        ("cancel", "job_cancelled", jobs["failed"], "info"),
        ("give-up", "attempt_ended", jobs["dead"], "warning"),
        ("retry", "job_retried", jobs["dead"], "info"),
        ("ask", "job_cancel_requested", jobs["released"], "info"),
        ("release", "attempt_ended", jobs["released"], "debug"),
        ("delete", "job_deleted", jobs["released"], "info"),
    }
    assert len(about_jobs) == len(told), "one line a change"
    for line in about_jobs:
        assert UUID(line["job_id"])
        assert line["queue"]
        assert line["type"] == "default"
    for where, secret in SECRETS.items():
        assert secret not in leaseq.log, where
        assert secret.encode().hex() not in leaseq.log, where
    assert {line["level"] for line in leaseq.lines} <= {"debug", "info", "warning"}


@pytest.mark.slow
async def test_at_the_usual_level_routine_is_silent(world: World, tmp_path: Path):
    async with served(tmp_path, world.database_url, QUEUE_LOG_FORMAT="json") as leaseq:
        await live(leaseq.http)
    events = {line["event"] for line in leaseq.lines}
    assert not events & {"job_enqueued", "job_leased", "job_completed"}
    assert {"attempt_ended", "job_cancelled", "job_retried", "job_deleted"} <= events


@pytest.mark.slow
async def test_what_maintenance_does_to_a_job_is_a_line_too(world: World, tmp_path: Path):
    queue = await world.replica()
    job = await queue.enqueue(payload=SECRETS["payload"], max_retries=0)
    await queue.lease_one(worker="gone", lease_seconds=0.5)
    async with served(
        tmp_path,
        world.database_url,
        QUEUE_LOG_LEVEL="debug",
        QUEUE_LOG_FORMAT="json",
        QUEUE_MAINTENANCE_SECONDS="0.05",
    ) as leaseq:
        while (await leaseq.http.get(f"/jobs/{job['id']}")).json()["state"] != "failed":
            pass
    [line] = [line for line in leaseq.lines if line.get("job_id") == job["id"]]
    assert (line["event"], line["outcome"], line["state"]) == ("attempt_ended", "lease_expired", "failed")
    assert (line["level"], line["worker"]) == ("warning", "gone")
    assert "request_id" not in line
