"""The ASGI application: routes in the order of how busy they are, middleware, documentation."""

import re

import structlog
from fastapi import FastAPI
from fastapi.routing import APIRoute
from prometheus_client import Counter
from prometheus_fastapi_instrumentator import Instrumentator
from prometheus_fastapi_instrumentator.metrics import Info, default
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uuid_utils.compat import uuid7

from app.api import openapi, operate, problems, work
from app.api.thin import ThinRoute
from app.engine.service import Service
from app.telemetry import Metrics

VERSION = "0.1.0"
REQUEST_ID = re.compile("[A-Za-z0-9._-]{1,128}")

ENVELOPE_BYTES_MAX = 64 * 1024

LEASE = "/lease"
NOBODYS_WORK = ["^/metrics$", "^/health"]


class RequestIds:
    """Gives every request an id, the client's own or a new one: in the reply, in problems, in each log line.

    Answers what nobody foresaw, too: Starlette's own place for that lies outside, without the id.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next(
            (value.decode("latin-1") for name, value in scope["headers"] if name == b"x-request-id"), ""
        )
        request_id = given if REQUEST_ID.fullmatch(given) else uuid7().hex
        scope.setdefault("state", {})["request_id"] = request_id
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=request_id)

        has_begun = False

        async def send_with_id(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                MutableHeaders(raw=message["headers"]).append("X-Request-Id", request_id)
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            if has_begun:
                raise
            await problems.unexpected(Request(scope), error)(scope, receive, send_with_id)


def create_app(service: Service, metrics: Metrics, *, body_bytes_max: int, payload_bytes_max: int) -> FastAPI:
    """Return the application that offers `service` over HTTP."""
    app = FastAPI(title="leaseq", version=VERSION, redirect_slashes=False, generate_unique_id_function=_name)
    # One job fits: what it brings beside its payload is small.
    thin_bytes_max = min(body_bytes_max, payload_bytes_max + ENVELOPE_BYTES_MAX)
    thin = [ThinRoute(operation, thin_bytes_max) for operation in work.operations(service, payload_bytes_max)]
    app.router.routes[:0] = thin
    app.include_router(operate.router(service, metrics))
    problems.install(app)
    app.add_middleware(RequestIds)
    _instrument(app, metrics)
    app.openapi = lambda: _document(app, thin)  # type: ignore[method-assign]  # FastAPI's documented way
    return app


def _instrument(app: FastAPI, metrics: Metrics) -> None:
    timed = default(metric_namespace="leaseq", registry=metrics.registry)
    leases = Counter("leaseq_lease_requests", "Leases answered", ["status"], registry=metrics.registry)

    def count(info: Info) -> None:
        if info.modified_handler == LEASE:
            # A long poll lasts as long as its wait: it is counted, but does not belong in the latencies.
            leases.labels(info.modified_status).inc()
        elif timed is not None:
            timed(info)

    Instrumentator(
        excluded_handlers=NOBODYS_WORK, should_group_untemplated=True, registry=metrics.registry
    ).add(count).instrument(app)


def _document(app: FastAPI, thin: list[ThinRoute]) -> dict[str, object]:
    if app.openapi_schema is None:
        app.openapi_schema = openapi.document(app, thin)
    return app.openapi_schema


def _name(route: APIRoute) -> str:
    return route.name
