"""The OpenAPI document: FastAPI's part for its own routes, the thin routes' from their msgspec types, one set of schemas."""

import re
from collections.abc import Iterable
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from app.api.answers import REPLIES, TEXTS
from app.api.body import LINES_MEDIA_TYPE
from app.api.problems import CODES, MEDIA_TYPE
from app.api.schemas import Problem
from app.api.thin import Operation, ThinRoute

PATH_PARAMETERS = {"job_id": "the job's id, a UUIDv7", "name": "its name"}
REF = "#/components/schemas/{name}"
ANY_REQUEST = ("internal_error", "unavailable")
ANY_BODY = ("malformed_json", "body_too_large", "unsupported_media_type", "invalid")

DESCRIPTION = """\
A job queue that any language uses over HTTP. Producers `POST /jobs`; workers long-poll `POST /lease`, then
heartbeat, ack or fail. Delivery is at least once: a lease that runs out gives the job to another worker.

Times are RFC 3339 in UTC, durations are seconds. Errors are `application/problem+json` (RFC 9457): match on `code`.
"""

TAGS = [
    {"name": "Produce", "description": "Put jobs in."},
    {"name": "Work", "description": "Take jobs, say what became of them."},
    {"name": "Inspect", "description": "See jobs and counts."},
    {"name": "Operate", "description": "Retry, cancel, delete."},
    {"name": "Schedule", "description": "Enqueue jobs at given times, again and again."},
    {"name": "Health", "description": "For probes and monitors; open to everybody."},
]


def document(app: FastAPI, thin: Iterable[ThinRoute]) -> dict[str, Any]:
    """Return the whole document."""
    base: dict[str, Any] = get_openapi(
        title=app.title,
        version=app.version,
        description=DESCRIPTION,
        routes=app.routes,
        tags=TAGS,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
    )
    schemas: dict[str, Any] = {}
    for operations in base["paths"].values():
        for operation in operations.values():
            _describe_answers(operation, schemas)
    for route in thin:
        base["paths"].setdefault(route.path, {})[route.operation.method.lower()] = _thin_operation(
            route.operation, schemas
        )
    schemas["Problem"]["properties"]["code"]["enum"] = list(CODES)
    base["components"] = {"schemas": dict(sorted(schemas.items()))}
    return base


def _describe_answers(operation: dict[str, Any], schemas: dict[str, Any]) -> None:
    name = operation.pop("x-reply", None)
    reply = None if name is None else REPLIES[name]
    good = operation.pop("x-description")
    problems = operation.pop("x-problems")
    also = operation.pop("x-also", {})
    status = next(status for status in operation["responses"] if status.startswith("2"))
    responses: dict[str, Any] = {status: _answer(good, reply, schemas)}
    responses |= {str(code): _answer(text, reply, schemas) for code, text in also.items()}
    operation["responses"] = {**_problems((*problems, *ANY_REQUEST), schemas), **responses}
    operation["responses"] = dict(sorted(operation["responses"].items()))


def _thin_operation(operation: Operation, schemas: dict[str, Any]) -> dict[str, Any]:
    parameters: list[dict[str, Any]] = [
        {
            "name": name,
            "in": "path",
            "required": True,
            "schema": {"type": "string"},
            "description": PATH_PARAMETERS[name],
        }
        for name in re.findall(r"{(\w+)}", operation.path)
    ]
    parameters += [
        {"name": name, "in": "header", "required": False, "schema": {"type": "string"}}
        for name in operation.headers
    ]
    parameters += [
        {"name": name, "in": "query", "required": False, "schema": _schema(type_, schemas)}
        for name, type_ in operation.query.items()
    ]
    good = {
        str(status): _answer(text, operation.reply, schemas) for status, text in operation.statuses.items()
    }
    if "201" in good:
        good["201"]["headers"] = {"Location": {"description": "its path", "schema": {"type": "string"}}}
    bad = _problems((*operation.problems, *ANY_BODY, *ANY_REQUEST), schemas)
    described: dict[str, Any] = {
        "tags": [operation.tag],
        "summary": operation.summary,
        "description": operation.description,
        "operationId": operation.name,
        "requestBody": {
            "required": not operation.body_is_optional,
            "content": {
                "application/json": {
                    "schema": _schema(operation.request, schemas),
                    "example": operation.example,
                }
            },
        },
        "responses": dict(sorted({**good, **bad}.items())),
    }
    if operation.line is not None:
        described["requestBody"]["content"][LINES_MEDIA_TYPE] = {"schema": _schema(operation.line, schemas)}
    if parameters:
        described["parameters"] = parameters
    return described


def _answer(description: str, reply: Any, schemas: dict[str, Any]) -> dict[str, Any]:
    if reply is None:
        return {"description": description}
    schema = {"type": "string"} if reply in TEXTS else _schema(reply, schemas)
    media_type = TEXTS.get(reply, "application/json")
    return {"description": description, "content": {media_type: {"schema": schema}}}


def _problems(codes: Iterable[str], schemas: dict[str, Any]) -> dict[str, Any]:
    by_status: dict[int, list[str]] = {}
    for code in codes:
        by_status.setdefault(CODES[code][0], []).append(code)
    answers = {}
    for status, names in by_status.items():
        answer = {
            "description": "; ".join(f"`{name}`: {CODES[name][1]}" for name in names),
            "content": {
                MEDIA_TYPE: {
                    "schema": _schema(Problem, schemas),
                    "example": {
                        "type": f"urn:leaseq:problem:{names[0]}",
                        "title": CODES[names[0]][1],
                        "status": status,
                        "detail": CODES[names[0]][1] + ".",
                        "code": names[0],
                        "request_id": "0198f2c1",
                    },
                }
            },
        }
        if status == CODES["unavailable"][0]:
            answer["headers"] = {"Retry-After": {"description": "seconds", "schema": {"type": "integer"}}}
        answers[str(status)] = answer
    return answers


def _schema(type_: Any, schemas: dict[str, Any]) -> dict[str, Any]:
    (schema,), components = msgspec.json.schema_components([type_], ref_template=REF)
    schemas.update(components)
    return schema
