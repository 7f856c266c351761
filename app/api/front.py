"""Where requests come in: each gets an id, and those for thin routes go straight to their endpoint.

What FastAPI's stack of middleware would do for a thin route (ids, errors as problems, timings, routing) happens here
at a fraction of its price; everything else goes through that stack. The thin routes are routes of the app too, so
that it knows their paths, and answers 405 for them.
"""

import itertools
import re
import time
from collections.abc import Iterable, Mapping

import msgspec
import structlog
from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uuid_utils.compat import uuid7

from app.api import problems
from app.api.schemas import Problem
from app.api.thin import Endpoint, ThinRoute
from app.queue.errors import QueueError
from app.telemetry import Metrics

# Index 0: the client was gone before its answer.
_STATUS_CLASSES = ("none", "1xx", "2xx", "3xx", "4xx", "5xx")
_PROCESS = uuid7().hex[:24]
_NUMBERS = itertools.count()
"""A request's own id is the process's and a number: as unique as a UUID, and made faster."""

REQUEST_ID = re.compile("[A-Za-z0-9._-]{1,128}")


class Unexpected:
    """Middleware of the app that answers errors nobody foresaw: Starlette's own place for that lies outside it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        has_begun = False

        async def send_on(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, send_on)
        except Exception as error:
            if has_begun:
                raise
            request_id = scope["state"]["request_id"]
            await _send_problem(send, problems.unexpected(request_id, scope["path"], error))


class Front:
    """The ASGI application that is served."""

    def __init__(self, app: FastAPI, thin: Iterable[ThinRoute], metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics
        self._by_path: dict[str, Endpoint] = {}
        self._by_verb: dict[str, Endpoint] = {}
        for route in thin:
            if not route.operation.busy:
                continue
            prefix, _, verb = route.path.partition("{job_id}/")
            if verb:
                self._by_verb[verb] = route.served
            else:
                self._by_path[prefix] = route.served

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        structlog.contextvars.bind_contextvars(request_id=request_id)
        id_header = (b"x-request-id", request_id.encode())
        sent_status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal sent_status
            if message["type"] == "http.response.start":
                sent_status = message["status"]
                message["headers"] = [*message["headers"], id_header]
            await send(message)

        endpoint = self._endpoint(scope) if scope["method"] == "POST" else None
        if endpoint is None:
            await self._app(scope, receive, send_with_id)
            return
        began = time.perf_counter()
        try:
            await endpoint(scope, receive, send_with_id)
        except QueueError as error:
            headers = problems.headers_of(error)
            await _send_problem(send_with_id, problems.problem_of(request_id, error), headers)
        except Exception as error:
            if sent_status:
                raise
            await _send_problem(send_with_id, problems.unexpected(request_id, scope["path"], error))
        finally:
            took = time.perf_counter() - began
            self._metrics.request(endpoint.path, "POST", _STATUS_CLASSES[sent_status // 100], took)

    def _endpoint(self, scope: Scope) -> Endpoint | None:
        path: str = scope["path"]
        endpoint = self._by_path.get(path)
        if endpoint is None and path.startswith("/jobs/"):
            job_id, _, verb = path[6:].partition("/")
            endpoint = self._by_verb.get(verb)
            scope["path_params"] = {"job_id": job_id}
        return endpoint


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            given: str = value.decode("latin-1")
            return given if REQUEST_ID.fullmatch(given) else _new_id()
    return _new_id()


def _new_id() -> str:
    return f"{_PROCESS}{next(_NUMBERS):08x}"


async def _send_problem(send: Send, problem: Problem, headers: Mapping[str, str] | None = None) -> None:
    body = msgspec.json.encode(problem)
    await send(
        {
            "type": "http.response.start",
            "status": problem.status,
            "headers": [
                (b"content-type", problems.MEDIA_TYPE.encode()),
                (b"content-length", str(len(body)).encode()),
                *((name.lower().encode(), value.encode()) for name, value in (headers or {}).items()),
            ],
        }
    )
    await send({"type": "http.response.body", "body": body})
