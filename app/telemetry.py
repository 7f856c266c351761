"""What happened, as Prometheus metrics and as log lines. Payloads, results and error texts never pass here.

Counters and histograms follow the events of this process; gauges are read from the database when Prometheus
scrapes, at most once each GAUGE_SECONDS, with queries whose cost does not depend on how many jobs there are.

Processes that serve one address together keep their counters in files of a directory that they share, so that the
one that is scraped shows the sums of all. Each writes under its number, not its process id: who takes the place of
one that died goes on counting where that one ended, and there are never more files than processes.
"""

import asyncio
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, values
from prometheus_client.gc_collector import GCCollector
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from app.engine.running import Component
from app.queue.events import (
    AttemptEnded,
    BulkRan,
    CancelRequested,
    JobCancelled,
    JobCompleted,
    JobDeleted,
    JobEdited,
    JobEnqueued,
    JobEvent,
    JobExpired,
    JobLeased,
    JobProgressed,
    JobPromoted,
    JobReplaced,
    JobRetried,
    LeasesReplayed,
    MaintenanceFailed,
    MaintenanceRan,
    Observer,
    QueueChanged,
    QueueEvent,
    QueuePurged,
    ScheduleRan,
    StreamReset,
    WorkerDirected,
)
from app.queue.lifecycle import State
from app.queue.model import Outcome
from app.queue.scheduling import RunOutcome

GAUGE_SECONDS = 2.0
SHOW_SECONDS = 1.0
SHARED_DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
"""The variable by which prometheus_client knows where processes share their metrics."""
QUEUE_LABELS_MAX = 500
"""Queues beyond so many share one label, so that a flood of names does not become a flood of series."""
OTHER_QUEUES = "_other"

LEASE_PATH = "/lease"

_REQUESTS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_WAITS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 7200)
_RUNS = (0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200)


log = structlog.get_logger(__name__)


class Everyone:
    """Tells several observers."""

    def __init__(self, observers: Iterable[Observer]) -> None:
        self._observers = tuple(observers)

    def on(self, event: QueueEvent) -> None:
        """Pass `event` on to each. What it tells of has happened: no observer's failure may look like its failure."""
        for observer in self._observers:
            try:
                observer.on(event)
            except Exception:
                log.exception("observer_failed", observer=type(observer).__name__)


class _OfQueue(NamedTuple):
    """The metrics of one queue that change with every job: looking them up by label costs more than the change."""

    enqueued: Counter
    completed: Counter
    waits: Histogram
    runs: Histogram


class Metrics:
    """What this process counts, and `registry`, which holds what a scrape of it shows.

    `process` is its number among those that share their metrics in SHARED_DIRECTORY; None: it is alone.
    """

    def __init__(self, process: int | None = None) -> None:
        self.registry = CollectorRegistry()
        self._counted: CollectorRegistry | None = self.registry
        PlatformCollector(registry=self.registry)
        if process is None:
            ProcessCollector(registry=self.registry)
            GCCollector(registry=self.registry)
        else:
            values.ValueClass = values.MultiProcessValue(lambda: process)  # type: ignore[no-untyped-call]
            MultiProcessCollector(self.registry)  # type: ignore[no-untyped-call]
            self._counted = None
        self._stored = _Stored(self.registry)
        self._queues: set[str] = set()
        self._by_queue: dict[str, _OfQueue] = {}
        self._enqueued = self._counter("leaseq_jobs_enqueued", "Jobs stored", "queue")
        self._replaced = self._counter(
            "leaseq_jobs_replaced", "Jobs that took the fields of a new one with their unique key", "queue"
        )
        self._completed = self._counter("leaseq_jobs_completed", "Jobs acked", "queue")
        self._attempts_failed = self._counter(
            "leaseq_attempts_failed",
            "Attempts that ended as failed, lease_expired or timed_out",
            "queue",
            "outcome",
        )
        self._retried = self._counter("leaseq_jobs_retried", "Attempts that led to another one", "queue")
        self._dead_lettered = self._counter("leaseq_jobs_dead_lettered", "Jobs that failed for good", "queue")
        self._leases_expired = self._counter(
            "leaseq_leases_expired", "Leases that ran out without a word from their worker", "queue"
        )
        self._released = self._counter("leaseq_jobs_released", "Jobs given back uncounted", "queue")
        self._cancelled = self._counter("leaseq_jobs_cancelled", "Jobs cancelled", "queue")
        self._expired = self._counter(
            "leaseq_jobs_expired", "Jobs that no worker took before their start deadline", "queue"
        )
        self._replays = self._counter(
            "leaseq_lease_replays", "Leases asked for again by their request_id, and handed out again"
        )
        self._bulk = self._counter("leaseq_bulk_jobs", "Jobs changed by calls for many at a time", "verb")
        self._waits = Histogram(
            "leaseq_lease_wait_seconds",
            "From ready to leased",
            ["queue"],
            buckets=_WAITS,
            registry=self._counted,
        )
        self._runs = Histogram(
            "leaseq_run_seconds", "From leased to acked", ["queue"], buckets=_RUNS, registry=self._counted
        )
        self._schedule_runs = self._counter(
            "leaseq_schedule_runs", "Fires of schedules that were decided, and triggers", "outcome"
        )
        self._requests = self._counter(
            "leaseq_http_requests", "Requests answered", "handler", "method", "status"
        )
        self._request_seconds = Histogram(
            "leaseq_http_request_duration_seconds",
            "From the request to the end of its answer, but for those that wait: they last as long as they wait",
            ["handler", "method"],
            buckets=_REQUESTS,
            registry=self._counted,
        )
        self._request_metrics: dict[tuple[str, str, str], tuple[Counter, Histogram | None]] = {}
        self._maintenance = Histogram(
            "leaseq_maintenance_seconds", "One turn of a maintenance task", ["task"], registry=self._counted
        )
        self._maintenance_failures = self._counter(
            "leaseq_maintenance_failures", "Turns of a maintenance task that failed", "task"
        )
        self._waiters = self._gauge("leaseq_lease_waiters", "Leases that wait", "livesum")
        self._watchers = self._gauge(
            "leaseq_job_watchers", "Requests that wait for the end of a job", "livesum"
        )
        self._streams = self._gauge("leaseq_event_streams", "Listeners of GET /events", "livesum")
        self._resets = self._counter(
            "leaseq_event_stream_resets", "Times that listeners were told that something is missing", "reason"
        )
        self._listening = self._gauge(
            "leaseq_listening", "1 while hints from other processes are heard", "livemin"
        )
        self._pool = self._gauge(
            "leaseq_database_pool_connections", "Connections of the verbs' pool", "livesum", "state"
        )
        self._gauges_read_at = float("-inf")

    def on(self, event: QueueEvent) -> None:  # noqa: C901, PLR0912  # one short case an event; a table would hide the types
        """Count `event`."""
        match event:
            case JobEnqueued():
                self._of(event.queue).enqueued.inc()
            case JobReplaced():
                self._replaced.labels(self._queue(event.queue)).inc()
            case JobLeased():
                self._of(event.queue).waits.observe(event.waited_seconds)
            case JobCompleted():
                of = self._of(event.queue)
                of.completed.inc()
                of.runs.observe(event.ran_seconds)
            case AttemptEnded():
                self._ended(event)
            case JobCancelled():
                self._cancelled.labels(self._queue(event.queue)).inc()
            case JobExpired():
                self._expired.labels(self._queue(event.queue)).inc()
            case LeasesReplayed():
                self._replays.inc()
            case BulkRan():
                self._bulk.labels(event.verb.value).inc(event.changed)
            case ScheduleRan():
                self._schedule_runs.labels(event.outcome.value).inc()
            case MaintenanceRan():
                self._maintenance.labels(event.task).observe(event.took_seconds)
            case StreamReset():
                self._resets.labels(event.reason).inc()
            case MaintenanceFailed():
                self._maintenance_failures.labels(event.task).inc()
            case _:
                pass

    def request(self, handler: str, method: str, status: str, took_seconds: float | None) -> None:
        """Note a request: its route's path, its status as `2xx`, and how long it took; None where it chose to wait."""
        label = handler, method, status
        found = self._request_metrics.get(label)
        if found is None:
            timed = None if handler == LEASE_PATH else self._request_seconds.labels(handler, method)
            found = self._request_metrics[label] = (self._requests.labels(*label), timed)
        count, seconds = found
        count.inc()
        if seconds is not None and took_seconds is not None:
            seconds.observe(took_seconds)

    def gauges_due(self) -> bool:
        """Whether the gauges are older than GAUGE_SECONDS; then the caller reads them anew and calls `show`."""
        if time.monotonic() - self._gauges_read_at < GAUGE_SECONDS:
            return False
        self._gauges_read_at = time.monotonic()
        return True

    def show_process(
        self, *, waiters: int, watchers: int, streams: int, listening: bool, pool_size: int, pool_idle: int
    ) -> None:
        """Set the gauges that this process knows by itself."""
        self._waiters.set(waiters)
        self._watchers.set(watchers)
        self._streams.set(streams)
        self._listening.set(listening)
        self._pool.labels("idle").set(pool_idle)
        self._pool.labels("used").set(pool_size - pool_idle)

    def show_database(
        self,
        counts: Mapping[str, Mapping[State, int]] | None,
        oldest_ready_seconds: Mapping[str, float],
        maintenance_seconds_ago: float | None,
    ) -> None:
        """Set the gauges that were read from the database; counts is None when it did not answer."""
        self._stored.up = counts is not None
        jobs: dict[tuple[str, State], int] = {}
        for queue, states in (counts or {}).items():
            for state, count in states.items():
                label = self._queue(queue), state
                jobs[label] = jobs.get(label, 0) + count
        oldest: dict[str, float] = {}
        for queue, seconds in oldest_ready_seconds.items():
            name = self._queue(queue)
            oldest[name] = max(seconds, oldest.get(name, 0.0))
        self._stored.jobs, self._stored.oldest = jobs, oldest
        if maintenance_seconds_ago is not None:
            self._stored.maintained_at = time.monotonic() - maintenance_seconds_ago

    def show_queues(self, paused: Mapping[str, bool]) -> None:
        """Set the gauge of the queues that somebody has made: whether each is paused."""
        shown: dict[str, bool] = {}
        for queue, is_paused in paused.items():
            name = self._queue(queue)
            shown[name] = is_paused or shown.get(name, False)
        self._stored.paused = shown

    def _ended(self, event: AttemptEnded) -> None:
        queue = self._queue(event.queue)
        if event.outcome is Outcome.RELEASED:
            self._released.labels(queue).inc()
        elif event.outcome is not Outcome.CANCELLED:
            self._attempts_failed.labels(queue, event.outcome.value).inc()
        if event.outcome is Outcome.LEASE_EXPIRED:
            self._leases_expired.labels(queue).inc()
        match event.state:
            case State.RETRY:
                self._retried.labels(queue).inc()
            case State.FAILED:
                self._dead_lettered.labels(queue).inc()
            case State.CANCELLED:
                self._cancelled.labels(queue).inc()
            case _:
                pass

    def _of(self, queue: str) -> "_OfQueue":
        found = self._by_queue.get(queue)
        if found is None:
            label = self._queue(queue)
            found = _OfQueue(
                enqueued=self._enqueued.labels(label),
                completed=self._completed.labels(label),
                waits=self._waits.labels(label),
                runs=self._runs.labels(label),
            )
            if label == queue:  # the names beyond the limit are not kept either
                self._by_queue[queue] = found
        return found

    def _queue(self, queue: str) -> str:
        if queue in self._queues:
            return queue
        if len(self._queues) >= QUEUE_LABELS_MAX:
            return OTHER_QUEUES
        self._queues.add(queue)
        return queue

    def _counter(self, name: str, help_text: str, *labels: str) -> Counter:
        return Counter(name, help_text, labels, registry=self._counted)

    def _gauge(
        self, name: str, help_text: str, together: Literal["livesum", "livemin"], *labels: str
    ) -> Gauge:
        """Return a gauge; `together` says what the values of several processes make."""
        return Gauge(name, help_text, labels, registry=self._counted, multiprocess_mode=together)


class _Stored:
    """What was last read from the database. It is the same for all processes, so none adds to another's."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.jobs: dict[tuple[str, State], int] = {}
        self.oldest: dict[str, float] = {}
        self.paused: dict[str, bool] = {}
        self.maintained_at: float | None = None
        self.up = False
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """Yield it as prometheus_client asks for it."""
        jobs = GaugeMetricFamily("leaseq_jobs", "Jobs kept now", labels=["queue", "state"])
        for label, count in self.jobs.items():
            jobs.add_metric(label, count)
        oldest = GaugeMetricFamily(
            "leaseq_oldest_ready_seconds", "Age of the oldest ready job", labels=["queue"]
        )
        for queue, seconds in self.oldest.items():
            oldest.add_metric([queue], seconds)
        paused = GaugeMetricFamily(
            "leaseq_queue_paused", "1 while leases pass the queue over", labels=["queue"]
        )
        for queue, is_paused in self.paused.items():
            paused.add_metric([queue], float(is_paused))
        # Goes on growing while the database is away.
        lag = 0.0 if self.maintained_at is None else time.monotonic() - self.maintained_at
        yield jobs
        yield oldest
        yield paused
        yield GaugeMetricFamily(
            "leaseq_maintenance_lag_seconds", "Since any process last looked for expired leases", lag
        )
        yield GaugeMetricFamily(
            "leaseq_database_up", "1 when the database answered this scrape", float(self.up)
        )


class Showing(Component):
    """Shows the other processes what this one is like, again and again: any of them may be scraped."""

    def __init__(self, show: Callable[[], None]) -> None:
        super().__init__()
        self._show = show

    async def _run(self) -> None:
        while True:
            self._show()
            await asyncio.sleep(SHOW_SECONDS)


def forget(process: int, directory: Path) -> None:
    """Let a process that has ended add to no gauge any more; what it has counted stays."""
    mark_process_dead(process, directory)  # type: ignore[no-untyped-call]


_PLAIN_LINES: dict[type[QueueEvent], tuple[int, str]] = {
    CancelRequested: (logging.INFO, "job_cancel_requested"),
    JobCancelled: (logging.INFO, "job_cancelled"),
    JobDeleted: (logging.INFO, "job_deleted"),
    JobEdited: (logging.INFO, "job_edited"),
    JobExpired: (logging.INFO, "job_expired"),
    JobProgressed: (logging.DEBUG, "job_progressed"),
    JobPromoted: (logging.DEBUG, "job_promoted"),
    JobRetried: (logging.INFO, "job_retried"),
}
"""The lines of the events that tell no more than which job they happened to."""


class EventLog:
    """One line for each change of a job's state: routine at debug, what an operator wants to know at info and up."""

    def __init__(self, level: str) -> None:
        self._log = structlog.get_logger("leaseq")
        self._level = logging.getLevelNamesMapping()[level.upper()]

    def on(self, event: QueueEvent) -> None:  # noqa: C901, PLR0912  # one short case an event
        """Write `event` down."""
        match event:
            case JobEnqueued() | JobReplaced():
                name = "job_enqueued" if isinstance(event, JobEnqueued) else "job_replaced"
                self._line(logging.DEBUG, name, event, state=event.state)
            case JobLeased():
                self._line(logging.DEBUG, "job_leased", event, worker=event.worker, attempt=event.attempt)
            case JobCompleted():
                self._line(logging.DEBUG, "job_completed", event, worker=event.worker, attempt=event.attempt)
            case AttemptEnded():
                level = {State.FAILED: logging.WARNING, State.RETRY: logging.INFO}.get(
                    event.state, logging.DEBUG
                )
                self._line(
                    level,
                    "attempt_ended",
                    event,
                    worker=event.worker,
                    attempt=event.attempt,
                    outcome=event.outcome,
                    state=event.state,
                )
            case JobEvent() if type(event) in _PLAIN_LINES:
                self._line(*_PLAIN_LINES[type(event)], event)
            case QueuePurged():
                self._log.warning("queue_purged", queue=event.queue, removed=event.removed)
            case QueueChanged():
                self._log.info("queue_changed", queue=event.queue, change=event.change)
            case LeasesReplayed():
                self._log.info("leases_replayed", worker=event.worker, leases=event.leases)
            case WorkerDirected():
                self._log.info("worker_directed", worker=event.worker, directive=event.directive)
            case ScheduleRan():
                level = {RunOutcome.FIRED: logging.DEBUG, RunOutcome.FAILED: logging.WARNING}.get(
                    event.outcome, logging.INFO
                )
                self._log.log(
                    level,
                    f"schedule_{event.outcome}",
                    schedule=event.schedule,
                    reason=event.reason,
                    fires=event.fires,
                    job_id=None if event.job_id is None else str(event.job_id),
                )
            case BulkRan():
                self._log.info(
                    "bulk_ran",
                    verb=event.verb,
                    matched=event.matched,
                    changed=event.changed,
                    finished=event.finished,
                    took_seconds=round(event.took_seconds, 3),
                )
            case MaintenanceRan(changed=changed) if changed:
                self._log.debug("maintenance_ran", task=event.task, changed=changed)
            case MaintenanceFailed():
                self._log.warning("maintenance_failed", task=event.task, error=event.error)
            case _:
                pass

    def _line(self, level: int, name: str, event: JobEvent, **more: object) -> None:
        if level >= self._level:
            self._log.log(level, name, job_id=str(event.job_id), queue=event.queue, type=event.type, **more)


def configure_logging(level: str, form: str, process: int | None = None) -> None:
    """Write log lines to standard error: as JSON, or pretty on a terminal. uvicorn's lines go the same way.

    `process` is put into each line: the number of this process among several that write to one place.
    """
    pretty = form == "pretty" or (form == "auto" and sys.stderr.isatty())
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        lambda _logger, _name, line: line if process is None else {**line, "process": process},
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    render: list[structlog.typing.Processor] = (
        [structlog.dev.ConsoleRenderer()]
        if pretty
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    )
    number = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(
        processors=[*shared, *render],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        # A line is one write: print would make two where nothing is buffered, and mix lines of several processes.
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    # Libraries speak up when something is wrong; what they do all day is theirs.
    root.setLevel(max(number, logging.WARNING))
