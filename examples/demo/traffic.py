"""What the demonstration itself does with the queue: feed it, and read what became of the jobs."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import httpx

from examples.producer import enqueue

Job = dict[str, Any]
Counts = Mapping[str, int]
NO_COUNTS: Counts = dict.fromkeys(("waiting", "active", "delayed", "completed", "failed"), 0)


def done(counts: Counts) -> int:
    """Return how many jobs have come to their end."""
    return counts["completed"] + counts["failed"]


class Ledger:
    """What the service says about one queue. Its methods raise httpx.HTTPError when there is no answer."""

    def __init__(self, url: str, queue: str) -> None:
        """Read over one keep-alive connection."""
        self._client = httpx.Client(base_url=url, timeout=10, trust_env=False)
        self._queue = queue

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def counts(self) -> Counts:
        """Return how many jobs are waiting, active, delayed, completed and failed."""
        counts: Counts = self._get("/stats")["queues"].get(self._queue, NO_COUNTS)
        return counts

    def job(self, job_id: str) -> Job:
        """Return one job."""
        job: Job = self._get(f"/jobs/{job_id}")
        return job

    def jobs(self, **filters: str) -> list[Job]:
        """Return all jobs of the queue that pass the filters, which are named as the query's parameters."""
        jobs: list[Job] = []
        cursor: dict[str, str] = {}
        while True:
            page = self._get("/jobs", queue=self._queue, limit="500", **filters, **cursor)
            jobs += page["jobs"]
            if page["next_cursor"] is None:
                return jobs
            cursor = {"cursor": page["next_cursor"]}

    def attempts(self, job_id: str) -> list[dict[str, Any]]:
        """Return the attempts at a job, oldest first."""
        attempts: list[dict[str, Any]] = self._get(f"/jobs/{job_id}/attempts")["attempts"]
        return sorted(attempts, key=lambda attempt: int(attempt["attempt"]))

    def _get(self, path: str, **query: str) -> Any:
        answer = self._client.get(path, params=query)
        answer.raise_for_status()
        return answer.json()


class Feed:
    """Enqueues in the background; the second half waits for ``release``, so that work is left to kill for."""

    def __init__(self, url: str, jobs: Sequence[Job]) -> None:
        """Start at once."""
        self._url = url
        self._jobs = jobs
        self._released = threading.Event()
        self._stopped = False
        self._error: Exception | None = None
        self.holding_back = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Let the second half go."""
        self._released.set()

    def finished(self) -> bool:
        """Tell whether every job is enqueued. Raises what went wrong, if anything did."""
        if self._error:
            raise self._error
        return not self._thread.is_alive()

    def stop(self) -> None:
        """Enqueue nothing more, and wait for what is on its way."""
        self._stopped = True
        self._released.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            enqueue(self._url, self._steps(), tries=4)
        except Exception as error:  # noqa: BLE001 - kept for the thread that asks
            self._error = error

    def _steps(self) -> Iterator[Job]:
        for number, job in enumerate(self._jobs):
            if number == len(self._jobs) // 2:
                self.holding_back = True
                self._released.wait()
                self.holding_back = False
            if self._stopped:
                return
            yield job
