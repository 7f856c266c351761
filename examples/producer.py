#!/usr/bin/env python3
"""A leaseq producer in Python, standard library only: one job for each regular file of a directory tree.

Environment: LEASEQ_URL, LEASEQ_QUEUE. ``producer.py --help`` tells the rest.
"""

import argparse
import http.client
import itertools
import json
import os
import random
import sys
import threading
import time
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

TIMEOUT_SECONDS = 30
TRY_AGAIN = {429, 500, 502, 503, 504}


def warn(trouble: object) -> None:
    """Say on standard error what is left out, and why."""
    print(f"left out: {trouble}", file=sys.stderr)


def regular_files(root: Path, skip: Collection[str] = ()) -> Iterator[Path]:
    """Yield the regular files below ``root`` in a stable order; no links, no directory named in ``skip``.

    Warns of directories that cannot be read.
    """
    for directory, subdirectories, names in os.walk(root, onerror=warn):
        subdirectories[:] = sorted(set(subdirectories).difference(skip))
        for name in sorted(names):
            path = Path(directory, name)
            if path.is_file() and not path.is_symlink():
                yield path


def digest_job(queue: str, path: Path) -> dict[str, Any]:
    """Describe the job that digests ``path``.

    Raises UnicodeDecodeError for a name that is not UTF-8: JSON carries text, and such a name is none.
    """
    return {"queue": queue, "type": "file-digest", "payload": {"path": os.fsencode(path).decode()}}


def enqueue(url: str, jobs: Iterable[dict[str, Any]], connections: int = 4, tries: int = 12) -> int:
    """POST the jobs, one a request, over a few connections, in about their order; return how many there were.

    While the service is away each connection pauses and tries again, so often in all. A lost reply makes a repeat,
    so a job may be there twice; a worker must be able to do a job twice anyway.
    Raises ValueError when the service refuses a job, ConnectionError when it stays away.
    """
    service = urlsplit(url)
    waiting = iter(jobs)
    turn = threading.Lock()
    broken = threading.Event()

    def work() -> int:
        connection = connect(service)
        count = 0
        try:
            while not broken.is_set():
                with turn:
                    job = next(waiting, None)
                if job is None:
                    break
                post(connection, service.path.rstrip("/") + "/jobs", job, tries)
                count += 1
        except BaseException:
            broken.set()
            raise
        finally:
            connection.close()
        return count

    with ThreadPoolExecutor(connections) as pool:
        return sum(future.result() for future in [pool.submit(work) for _ in range(connections)])


def connect(service: SplitResult) -> http.client.HTTPConnection:
    """Make a keep-alive connection; it connects at its first request, and again after a failure."""
    kind = http.client.HTTPSConnection if service.scheme == "https" else http.client.HTTPConnection
    return kind(service.hostname or "", service.port, timeout=TIMEOUT_SECONDS)


def post(connection: http.client.HTTPConnection, target: str, body: dict[str, Any], tries: int) -> None:
    """POST until answered. Raises ValueError when refused, ConnectionError when no try was answered."""
    for attempt in itertools.count(1):
        pause_seconds = min(10, 0.25 * 2**attempt) * random.uniform(0.5, 1)
        try:
            connection.request("POST", target, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer = response.read()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            reason = repr(error)
        else:
            if response.status in {HTTPStatus.OK, HTTPStatus.CREATED}:
                return
            reason = f"{response.status} {answer.decode(errors='replace')}"
            if response.status not in TRY_AGAIN:
                raise ValueError(reason)
            retry_after = response.headers.get("Retry-After", "")
            pause_seconds = float(retry_after) if retry_after.isdigit() else pause_seconds
        if attempt >= tries:
            break
        time.sleep(pause_seconds)
    raise ConnectionError(reason)


def main() -> None:
    """Walk the directory and enqueue."""
    parser = argparse.ArgumentParser(
        description="Enqueue a file-digest job for each file of a directory tree."
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument(
        "--skip", action="append", default=[], metavar="NAME", help="leave out directories so named"
    )
    parser.add_argument("--connections", type=int, default=4, metavar="N")
    arguments = parser.parse_args()
    queue = os.environ.get("LEASEQ_QUEUE", "files")

    def jobs() -> Iterator[dict[str, Any]]:
        for path in regular_files(arguments.directory.resolve(), arguments.skip):
            try:
                yield digest_job(queue, path)
            except UnicodeDecodeError:
                warn(f"{os.fsencode(path)!r}, its name is not UTF-8")

    began_at = time.monotonic()
    count = enqueue(os.environ.get("LEASEQ_URL", "http://127.0.0.1:8080"), jobs(), arguments.connections)
    seconds = time.monotonic() - began_at
    print(f"{count} jobs enqueued in {seconds:.1f} s, {count / seconds:.0f} a second")


if __name__ == "__main__":
    main()
