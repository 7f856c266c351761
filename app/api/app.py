"""The ASGI application: routes in the order of how busy they are, middleware, documentation."""

from dataclasses import dataclass

from fastapi import FastAPI
from fastapi.routing import APIRoute
from prometheus_fastapi_instrumentator import Instrumentator
from prometheus_fastapi_instrumentator.metrics import Info

from app.api import (
    batch,
    changing,
    dead_letters,
    openapi,
    operate,
    problems,
    queues,
    schedules,
    watch,
    work,
    workers,
)
from app.api.front import Front, Unexpected
from app.api.thin import ThinRoute
from app.engine.service import Service
from app.telemetry import Metrics

VERSION = "0.1.0"
NOBODYS_WORK = ["^/metrics$", "^/health"]
ENVELOPE_BYTES_MAX = 64 * 1024


@dataclass(frozen=True)
class Api:
    """`service` over HTTP: `front` is what a server serves, `app` what FastAPI knows of it."""

    front: Front
    app: FastAPI


def create_api(service: Service, metrics: Metrics, *, body_bytes_max: int, payload_bytes_max: int) -> Api:
    """Offer `service` over HTTP."""
    app = FastAPI(title="leaseq", version=VERSION, redirect_slashes=False, generate_unique_id_function=_name)
    # One job fits: what it brings beside its payload is small.
    one_bytes_max = min(body_bytes_max, payload_bytes_max + ENVELOPE_BYTES_MAX)
    thin = [
        ThinRoute(operation, body_bytes_max if operation.takes_many else one_bytes_max)
        for operation in (
            *work.operations(service, payload_bytes_max),
            *queues.operations(service),
            *changing.operations(service, payload_bytes_max),
            *schedules.operations(service, payload_bytes_max),
            *batch.operations(service, payload_bytes_max),
            *dead_letters.operations(service),
        )
    ]
    app.router.routes[:0] = thin
    app.include_router(operate.router(service, metrics))
    app.include_router(schedules.router(service))
    app.include_router(watch.router(service))
    app.include_router(queues.router(service))
    app.include_router(dead_letters.router(service))
    app.include_router(workers.router(service))
    problems.install(app, lambda: (service.policies.shortest, service.policies.longest))
    app.add_middleware(Unexpected)
    _instrument(app, metrics)
    app.openapi = lambda: _document(app, thin)  # type: ignore[method-assign]  # FastAPI's documented way
    return Api(Front(app, thin, metrics), app)


def _instrument(app: FastAPI, metrics: Metrics) -> None:
    def note(info: Info) -> None:
        took = None if watch.waits(info.request) else info.modified_duration
        metrics.request(info.modified_handler, info.method, info.modified_status, took)

    Instrumentator(
        excluded_handlers=NOBODYS_WORK, should_group_untemplated=True, registry=metrics.registry
    ).add(note).instrument(app)


def _document(app: FastAPI, thin: list[ThinRoute]) -> dict[str, object]:
    if app.openapi_schema is None:
        app.openapi_schema = openapi.document(app, thin)
    return app.openapi_schema


def _name(route: APIRoute) -> str:
    return route.name
