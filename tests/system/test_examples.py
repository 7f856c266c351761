"""The example workers: each alone with a service that misbehaves, each with the real one, all in the demo."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from examples.demo.processes import LANGUAGES, Fleet, Language, Process, ProcessError, service
from examples.demo.traffic import Job
from examples.demo.verdict import judge, sha256sums
from examples.producer import digest_job, enqueue, regular_files
from examples.worker import media_type

REPOSITORY = Path(__file__).resolve().parents[2]
PATIENCE_SECONDS = 30
RETRY_AFTER_SECONDS = 1


def until(condition: Callable[[], object], what: str) -> None:
    """Wait for the condition; fail naming ``what`` if it does not come true in time."""
    give_up_at = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < give_up_at, f"waited in vain until {what}"
        time.sleep(0.02)


class Request(NamedTuple):
    """What a worker asked: ``lease``, or a verb on a job."""

    verb: str
    job_id: str
    body: Any  # JSON
    at: float


class Script:
    """A stand-in for the service: answers what a test wants answered, and remembers what it was asked."""

    def __init__(self, *paths: str, faults: dict[str, list[str]] | None = None) -> None:
        """Have a job for each path; ``faults`` come first, for each verb in their order."""
        self.jobs = [
            {"id": f"job-{number}", "lease_id": f"lease-{number}", "payload": {"path": path}}
            for number, path in enumerate(paths)
        ]
        self.faults = faults or {}
        self.requests: list[Request] = []
        self.over = threading.Event()

    def answer(self, path: str, body: object) -> tuple[int, Any] | None:
        """Return status and body, or None to hang up without a word."""
        *_, job_id, verb = path.split("/")
        self.requests.append(Request(verb, job_id, body, time.monotonic()))
        fault = self.faults[verb].pop(0) if self.faults.get(verb) else ""
        if fault == "hang up":
            return None
        if fault == "away":
            return 503, {"code": "unavailable"}
        if fault == "lost":
            return 409, {"code": "lease_lost"}
        if verb == "heartbeat":
            return 200, {"cancel_requested": fault == "cancel", "directive": "continue"}
        if verb != "lease":
            return 200, {}
        if not self.jobs:
            self.over.wait(PATIENCE_SECONDS)
        return 200, {"jobs": [self.jobs.pop(0)] if self.jobs else []}

    def asked(self, *verbs: str) -> list[Request]:
        """Return the requests so far that had one of these verbs."""
        return [request for request in self.requests if request.verb in verbs]

    @contextmanager
    def serve(self) -> Iterator[str]:
        """Serve on a free loopback port; give the URL."""
        script = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                answer = script.answer(self.path, body)
                if answer is None:
                    self.close_connection = True
                    return
                status, content = answer
                encoded = json.dumps(content).encode()
                with suppress(ConnectionError):
                    self.send_response(status)
                    if status == 503:
                        self.send_header("Retry-After", str(RETRY_AFTER_SECONDS))
                    self.send_header("Content-Length", str(len(encoded)))
                    self.end_headers()
                    self.wfile.write(encoded)

            def log_message(self, *_: object) -> None:
                """Keep the test's output clean."""

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                """Workers hang up when they leave; that is no error."""

        server = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            self.over.set()
            server.shutdown()
            server.server_close()


@pytest.fixture(params=LANGUAGES, ids=lambda language: str(language.name))
def language(request: pytest.FixtureRequest) -> Language:
    """Give each language that is installed here."""
    language: Language = request.param
    try:
        language.version()
    except ProcessError as reason:
        pytest.skip(str(reason))
    return language


@pytest.fixture
def start(language: Language, tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Give a function that starts a worker; it ends with the test."""
    fleets = []

    def start(url: str, queue: str = "files", lease_seconds: float = 30) -> Process:
        environment = {"LEASEQ_URL": url, "LEASEQ_QUEUE": queue, "LEASEQ_LEASE_SECONDS": str(lease_seconds)}
        fleet = Fleet(environment, tmp_path)
        fleets.append(fleet)
        fleet.start(language, 1)
        return fleet.workers[f"{language.name}-1"]

    yield start
    for fleet in fleets:
        fleet.stop()


def odd_tree(directory: Path) -> Path:
    """Make a tree of files whose names and sizes have broken programs before."""
    tree = directory / "tree"
    (tree / "with space").mkdir(parents=True)
    contents = {
        "empty.txt": b"",
        "no newline at the end.py": b"one\ntwo",
        "with space/new\nline\n": b"\n\n\n",
        "-n": b"looks like an option\n",
        "quotes ' \" ` $(id) ${HOME} \\n %s.json": b"{}\n",
        "[red]not markup.html": b"<p>\n",
        "grüße-日本.xml": b"<a/>\n",
        "*": b"\0\xff\n\0",
        "large.so": b"0123456789abcde\n" * (1 << 20),
    }
    for name, content in contents.items():
        (tree / name).write_bytes(content)
    return tree


def expected(path: str, language: str) -> dict[str, Any]:
    """Compute the result that a worker must send."""
    content = Path(path).read_bytes()
    return {
        "sha256": hashlib.sha256(content).hexdigest(),
        "size": len(content),
        "lines": content.count(b"\n"),
        "media_type": media_type(path),
        "language": language,
    }


def test_every_file_gives_the_same_result_in_every_language(
    language: Language, start: Callable[..., Process], tmp_path: Path
) -> None:
    paths = [str(path) for path in regular_files(odd_tree(tmp_path))]
    script = Script(*paths)
    with script.serve() as url:
        start(url)
        until(lambda: len(script.asked("ack", "fail")) == len(paths), "each job is settled")
    assert not script.asked("fail")
    results = [request.body["result"] for request in script.asked("ack")]
    assert results == [expected(path, language.name) for path in paths]


def test_unreadable_files_fail_with_the_same_error_in_every_language(
    start: Callable[..., Process], tmp_path: Path
) -> None:
    (tmp_path / "dangling").symlink_to("nowhere")
    paths = [tmp_path / "missing", tmp_path, tmp_path / "dangling"]
    script = Script(*(str(path) for path in paths))
    with script.serve() as url:
        start(url)
        until(lambda: len(script.asked("ack", "fail")) == len(paths), "each job is settled")
    errors = [request.body["error"] for request in script.asked("fail")]
    assert [error["type"] for error in errors] == ["ENOENT", "EISDIR", "ENOENT"]
    assert all(error["message"] for error in errors)


def test_a_worker_waits_for_a_service_that_is_away_and_drops_what_it_lost(
    start: Callable[..., Process], tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.touch()
    script = Script(
        *[str(file)] * 3,
        faults={"lease": ["away", "hang up"], "ack": ["away", "lost", "hang up"]},
    )
    with script.serve() as url:
        worker = start(url)
        until(lambda: len(script.requests) == 11, "the worker waits for a fourth job")
        worker.stop()
    asked = [(request.verb, request.job_id) for request in script.requests]
    lease = ("lease", "")
    assert asked == [
        *[lease] * 3,  # 503, no answer, job-0
        *[("ack", "job-0")] * 2,  # 503, lease_lost: dropped
        lease,
        *[("ack", "job-1")] * 2,  # no answer, done
        lease,
        ("ack", "job-2"),
        lease,
    ]
    for first, second in ((0, 1), (3, 4)):
        waited_seconds = script.requests[second].at - script.requests[first].at
        assert waited_seconds >= RETRY_AFTER_SECONDS * 0.95
    assert all(request.body["lease_id"] == f"lease-{request.job_id[-1]}" for request in script.asked("ack"))


def test_a_worker_beats_while_it_works_and_finishes_the_job_in_hand_before_it_leaves(
    start: Callable[..., Process], tmp_path: Path
) -> None:
    slow = tmp_path / "slow"
    os.mkfifo(slow)  # Whoever reads it waits until somebody writes.
    script = Script(str(slow), str(slow))
    with script.serve() as url:
        worker = start(url, lease_seconds=0.6)
        until(lambda: len(script.asked("heartbeat")) >= 2, "two heartbeats have come")
        worker.leave()
        beats = len(script.asked("heartbeat"))
        until(lambda: len(script.asked("heartbeat")) > beats, "it beats on after SIGTERM")
        assert worker.running
        until(lambda: _feed(slow) and script.asked("ack", "fail"), "the job is settled")
        assert worker.stop() == 0
    assert len(script.asked("lease")) == 1
    assert [request.verb for request in script.asked("ack", "fail")] == ["ack"]
    assert {request.body["lease_id"] for request in script.asked("heartbeat")} == {"lease-0"}


def _feed(fifo: Path) -> bool:
    """Let one reader of the named pipe, if there is one, come to its end."""
    with suppress(OSError):  # ENXIO: nobody reads just now.
        os.close(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))
    return True


def test_a_worker_abandons_a_job_that_is_cancelled(
    language: Language, start: Callable[..., Process], tmp_path: Path
) -> None:
    if language.name == "shell":
        pytest.skip("it finishes the file, which is its right")
    with (tmp_path / "long").open("wb") as file:
        file.truncate(1 << 36)
    script = Script(str(tmp_path / "long"), faults={"heartbeat": ["cancel"]})
    with script.serve() as url:
        start(url, lease_seconds=0.6)
        until(lambda: script.asked("ack", "fail"), "the job is settled")
    assert [request.verb for request in script.asked("ack", "fail")] == ["fail"]


def test_a_worker_without_a_job_leaves_at_once(start: Callable[..., Process]) -> None:
    script = Script()
    with script.serve() as url:
        worker = start(url)
        until(lambda: script.asked("lease"), "the worker waits for a job")
        worker.leave()
        until(lambda: not worker.running, "the worker has left, long before the poll's end")
        assert worker.stop() == 0


def test_a_worker_ends_when_the_service_refuses_its_lease(start: Callable[..., Process]) -> None:
    script = Script(faults={"lease": ["lost"]})
    with script.serve() as url:
        worker = start(url)
        until(lambda: not worker.running, "the worker has ended")
        assert worker.stop() == 1
        assert "lease_lost" in worker.last_words


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Run the real service, once for this file."""
    with (
        tempfile.TemporaryDirectory(prefix="leaseq-test-") as directory,
        service(Path(directory, "data"), Path(directory, "service.log")) as url,
    ):
        yield url


def test_a_late_ack_is_dropped_and_the_job_done_again(
    language: Language, start: Callable[..., Process], url: str, tmp_path: Path
) -> None:
    file = tmp_path / "file.txt"
    file.write_text("text\n")
    queue = f"late-{language.name}"
    job = digest_job(queue, file) | {"backoff": {"strategy": "fixed", "initial_seconds": 0.1}}

    with httpx.Client(base_url=url, trust_env=False) as client:

        def post() -> str:
            answer = client.post("/jobs", json=job)
            assert answer.status_code == 201, answer.text
            return str(answer.json()["id"])

        def state(job_id: str) -> str:
            return str(client.get(f"/jobs/{job_id}").json()["state"])

        def freeze_with_a_job() -> str:
            """Freeze the worker while it waits for a job, so that it cannot work on the one that it is given."""
            time.sleep(
                0.5
            )  # So long it may take to ask for the next job; if it takes longer, there is another round.
            worker.signal(signal.SIGSTOP)
            job_id = post()
            for _ in range(5):
                if state(job_id) == "active":
                    return job_id
                time.sleep(0.1)
            worker.signal(signal.SIGCONT)
            until(lambda: state(job_id) == "completed", "the worker goes on")
            return freeze_with_a_job()

        worker = start(url, queue, lease_seconds=1)
        first = post()
        until(lambda: state(first) == "completed", "the worker works")
        late = freeze_with_a_job()
        until(lambda: state(late) != "active", "its lease is taken away")
        worker.signal(signal.SIGCONT)
        until(lambda: state(late) == "completed", "it has done the job after all")

        attempts = client.get(f"/jobs/{late}/attempts").json()["attempts"]
        assert sorted((attempt["attempt"], attempt["outcome"]) for attempt in attempts) == [
            (1, "lease_expired"),
            (2, "acked"),
        ]
        assert client.get(f"/jobs/{late}").json()["result"] == expected(str(file), language.name)
    assert worker.running
    assert "lease_lost" in worker.last_words
    assert worker.stop() == 0


def test_the_producer_enqueues_each_regular_file_once_and_leaves_strange_names_out(
    url: str, tmp_path: Path
) -> None:
    tree = odd_tree(tmp_path)
    (tree / "link").symlink_to("empty.txt")
    Path(os.fsdecode(os.fsencode(tree) + b"/not-utf-8-\xff")).touch()
    (tree / "skipped").mkdir()
    (tree / "skipped" / "file").touch()
    answer = subprocess.run(
        (sys.executable, REPOSITORY / "examples" / "producer.py", tree, "--skip", "skipped"),
        env={**os.environ, "LEASEQ_URL": url, "LEASEQ_QUEUE": "produced"},
        capture_output=True,
        check=True,
        timeout=30,
    )
    assert b"not-utf-8-\\xff" in answer.stderr
    jobs = httpx.get(f"{url}/jobs", params={"queue": "produced", "limit": 100}, trust_env=False).json()[
        "jobs"
    ]
    paths = [job["payload"]["path"] for job in jobs]
    texts = [path for path in regular_files(tree, ["skipped"]) if "not-utf-8" not in path.name]
    assert sorted(paths) == sorted(str(path) for path in texts)
    assert {job["type"] for job in jobs} == {"file-digest"}


def test_the_producer_raises_what_the_service_refuses(url: str) -> None:
    with pytest.raises(ValueError, match="422"):
        enqueue(url, [{"queue": "files", "no-such-field": 1}])


def demo(directory: Path, *options: str) -> subprocess.Popen[str]:
    """Start the demo on an odd tree, with ``directory`` for its temporary files and no terminal."""
    tree = odd_tree(directory)
    for number in range(60):
        (tree / f"{number}.py").write_text("line\n" * number)
    Path(os.fsdecode(os.fsencode(tree) + b"/not-utf-8-\xff")).touch()
    temporary = directory / "temporary"
    temporary.mkdir()
    return subprocess.Popen(
        (sys.executable, "-m", "examples.demo", "--quick", "--root", str(tree), *options),
        cwd=REPOSITORY,
        env={**os.environ, "TMPDIR": str(temporary), "COLUMNS": "80"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def leftovers(directory: Path) -> list[str]:
    """Return what the demo has left: files in its temporary directory, processes that name it."""
    temporary = directory / "temporary"
    left = [str(path) for path in temporary.iterdir()]
    for command_line in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if os.fsencode(temporary) in command_line.read_bytes():
                left.append(command_line.read_text(errors="replace"))
    return left


@pytest.fixture
def directory() -> Iterator[Path]:
    """Give a directory with a short name that others may enter, as PostgreSQL's socket and user need it."""
    with tempfile.TemporaryDirectory(prefix="leaseq-test-") as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


@pytest.mark.slow
def test_the_demo_verifies_every_result_and_the_killed_workers_jobs(directory: Path) -> None:
    with demo(directory) as process:
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    files = 60 + 9
    assert f"{files} of {files} digests are those of sha256sum" in output
    assert "1 more left out" in output
    assert "python-2 killed" in output
    assert "python-2's" in output
    lines = [line.split() for line in output.splitlines()]
    numbers = {line[0]: line for line in lines if line}
    assert numbers["Completed"][1] == str(files)
    assert int(numbers["Retries"][1]) >= 4  # Three that cannot be read, and the killed worker's job.
    assert {"missing", "a-directory", "dangling-link"} <= numbers.keys()
    assert {"Python", "Node", "bash"} <= numbers.keys()
    assert "…" not in output  # Nothing is cut off in 80 columns.
    assert not leftovers(directory)


@pytest.mark.slow
def test_the_demo_leaves_nothing_behind_when_interrupted(directory: Path) -> None:
    with demo(directory) as process:
        assert process.stdout
        for line in process.stdout:
            if "workers" in line:
                break
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert not leftovers(directory)


def test_the_verdict_finds_whatever_is_wrong(tmp_path: Path) -> None:
    right, wrong, lost = (str(tmp_path / name) for name in ("right", "wrong\n", "lost"))
    for path in (right, wrong, lost):
        Path(path).write_text("text\n")
    completed: list[Job] = [
        {"payload": {"path": right}, "result": expected(right, "shell")},
        {"payload": {"path": wrong}, "result": expected(wrong, "shell") | {"sha256": "0" * 64}},
        {"payload": {"path": "alien"}, "result": {}},
    ]
    dead: list[Job] = [
        {"payload": {"path": "missing"}, "last_error": {"type": "ENOENT"}},
        {"payload": {"path": "directory"}, "last_error": {"type": "ENOENT"}},
        {"payload": {"path": "innocent"}, "last_error": None},
    ]
    verdict = judge(
        [right, wrong, lost],
        {"missing": "ENOENT", "directory": "EISDIR", "forbidden": "EACCES"},
        completed,
        dead,
    )
    assert verdict.verified == 1
    assert len(verdict.problems) == 6
    for number, word in enumerate(
        ("wrong sha256", "lost", "alien", "not of EISDIR", "forbidden", "innocent")
    ):
        assert word in verdict.problems[number]


def test_sha256sums_leaves_out_what_it_cannot_read(tmp_path: Path) -> None:
    file = tmp_path / "a\nb"
    file.touch()
    assert sha256sums([str(file), str(tmp_path / "missing")]) == {str(file): hashlib.sha256(b"").hexdigest()}
