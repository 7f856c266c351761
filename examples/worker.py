#!/usr/bin/env python3
"""A leaseq worker in Python, standard library only. Its work: digest a file.

Copy it and put your own work in the place of ``digest``; the rest stays as it is.
Environment: LEASEQ_URL, LEASEQ_QUEUE, LEASEQ_WORKER, LEASEQ_LEASE_SECONDS.
"""

import errno
import hashlib
import http.client
import itertools
import json
import logging
import math
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

URL = urlsplit(os.environ.get("LEASEQ_URL", "http://127.0.0.1:8080"))
QUEUE = os.environ.get("LEASEQ_QUEUE", "files")
WORKER = os.environ.get("LEASEQ_WORKER", f"python-{os.getpid()}")
LEASE_SECONDS = float(os.environ.get("LEASEQ_LEASE_SECONDS", "30"))
WAIT_SECONDS = 20
TRY_AGAIN = {429, 500, 502, 503, 504}

# The same few lines in every language: mimetypes and file(1) answer differently from machine to machine,
# and a retry may land on a worker in another language.
MEDIA_TYPES = {
    ".py": "text/x-python",
    ".txt": "text/plain",
    ".html": "text/html",
    ".xml": "application/xml",
    ".json": "application/json",
    ".c": "text/x-c",
    ".h": "text/x-c",
    ".so": "application/x-sharedlib",
    ".png": "image/png",
}

log = logging.getLogger(WORKER)


def media_type(path: str) -> str:
    """Return the media type that the end of a file's name stands for."""
    return next((kind for end, kind in MEDIA_TYPES.items() if path.endswith(end)), "application/octet-stream")


def digest(path: str, abandoned: threading.Event) -> dict[str, Any]:
    """Do the work: SHA-256, size in bytes, number of newlines and media type of the file at ``path``.

    Raises OSError when the file cannot be read, or once ``abandoned`` is set.
    """
    sha256, size, lines = hashlib.sha256(), 0, 0
    with Path(os.fsdecode(path.encode())).open("rb") as file:  # names are UTF-8 whatever the locale says
        while chunk := file.read(1 << 20):
            if abandoned.is_set():
                raise InterruptedError(errno.EINTR, "the lease is lost or the job is cancelled")
            sha256.update(chunk)
            size += len(chunk)
            lines += chunk.count(b"\n")
    return {
        "sha256": sha256.hexdigest(),
        "size": size,
        "lines": lines,
        "media_type": media_type(path),
        "language": "python",
    }


class RefusedError(Exception):
    """The service understood and said no: the lease is lost (409), or the request is wrong."""


class Service:
    """One keep-alive connection to the service, for one thread."""

    def __init__(self) -> None:
        """Connect at the first request, and again after a failure."""
        connection = http.client.HTTPSConnection if URL.scheme == "https" else http.client.HTTPConnection
        self.connection = connection(URL.hostname or "", URL.port, timeout=WAIT_SECONDS + 10)

    def post(self, path: str, body: dict[str, Any], tries: float = 20) -> Any:
        """POST ``body`` and return the answer; while the service is away, pause and try again.

        Safe for ack and fail: a repeat with the same lease changes nothing and gets the same answer.
        Raises RefusedError, and ConnectionError when no try was answered.
        """
        target, headers = URL.path.rstrip("/") + path, {"Content-Type": "application/json"}
        for attempt in itertools.count(1):
            pause_seconds = min(10, 0.25 * 2**attempt) * random.uniform(0.5, 1)
            try:
                self.connection.request("POST", target, json.dumps(body), headers)
                response = self.connection.getresponse()
                answer = response.read()
            except (OSError, http.client.HTTPException) as error:
                self.connection.close()
                reason = repr(error)
            else:
                if response.status == HTTPStatus.OK:
                    return json.loads(answer)
                reason = f"{response.status} {answer.decode(errors='replace')}"
                if response.status not in TRY_AGAIN:
                    raise RefusedError(reason)
                retry_after = response.headers.get("Retry-After", "")
                pause_seconds = float(retry_after) if retry_after.isdigit() else pause_seconds
            if attempt >= tries:
                break
            log.warning("no answer (%s), trying again in %.1f s", reason, pause_seconds)
            time.sleep(pause_seconds)
        raise ConnectionError(reason)


@contextmanager
def heartbeats(job: dict[str, Any]) -> Iterator[threading.Event]:
    """Extend the lease while the work lasts; the event that comes back is set once the work is in vain."""
    done, abandoned = threading.Event(), threading.Event()

    def beat() -> None:
        service = Service()
        while not done.wait(LEASE_SECONDS / 3):
            try:
                answer = service.post(f"/jobs/{job['id']}/heartbeat", {"lease_id": job["lease_id"]}, tries=1)
                if answer["cancel_requested"]:
                    abandoned.set()
            except RefusedError:
                abandoned.set()
            except ConnectionError as error:
                log.warning("heartbeat: %s", error)

    threading.Thread(target=beat, daemon=True).start()
    try:
        yield abandoned
    finally:
        done.set()


class Worker:
    """Lease a job, do it, settle it; again and again until a signal says to leave."""

    def __init__(self) -> None:
        """Take SIGTERM and Ctrl-C as the wish to leave."""
        self.leaving = False
        self.polling = True
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self.leave)

    def leave(self, signum: int, _frame: object) -> None:
        """Leave now if no job is in hand, else after it. A second signal ends the process at once."""
        signal.signal(signum, signal.SIG_DFL)
        self.leaving = True
        if self.polling:
            sys.exit()

    def run(self) -> None:
        """Work until told to leave. Raises RefusedError when the service does not let it lease."""
        service = Service()
        wish = {
            "queues": [QUEUE],
            "types": ["file-digest"],
            "worker": WORKER,
            "wait_seconds": WAIT_SECONDS,
            "lease_seconds": LEASE_SECONDS,
        }
        while not self.leaving:
            jobs = service.post("/lease", wish, tries=math.inf)["jobs"]
            self.polling = False
            for job in jobs:
                self.work(service, job)
            self.polling = True

    def work(self, service: Service, job: dict[str, Any]) -> None:
        """Do one job and tell the service how it went."""
        try:
            with heartbeats(job) as abandoned:
                verb, outcome = "ack", {"result": digest(job["payload"]["path"], abandoned)}
        except Exception as error:  # noqa: BLE001 - whatever goes wrong in the work is the job's failure
            kind = errno.errorcode.get(getattr(error, "errno", None) or 0, type(error).__name__)
            failure = {"type": kind, "message": str(error), "stack": traceback.format_exc()}
            verb, outcome = "fail", {"error": failure}
        try:
            service.post(f"/jobs/{job['id']}/{verb}", {"lease_id": job["lease_id"], **outcome})
            log.info("%s %s", verb, job["id"])
        except (RefusedError, ConnectionError) as error:
            # 409 lease_lost: the job is another worker's by now, or nobody's; its result is not ours.
            log.warning("%s %s dropped: %s", verb, job["id"], error)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(name)s %(message)s")
    Worker().run()
