"""Every error as `application/problem+json` (RFC 9457), with a stable code."""

import traceback
from collections.abc import Mapping, Sequence
from http import HTTPStatus

import msgspec
import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match

from app.api.schemas import FieldProblem, Problem
from app.queue.errors import (
    InvalidRequestError,
    LeaseLostError,
    QueueError,
    UnavailableError,
    WrongStateError,
)
from app.queue.lifecycle import State

MEDIA_TYPE = "application/problem+json"
TYPE_PREFIX = "urn:leaseq:problem:"

CODES: Mapping[str, tuple[int, str]] = {
    "malformed_json": (400, "The body is not JSON"),
    "bad_request": (400, "The request can not be understood"),
    "not_found": (404, "Not found"),
    "method_not_allowed": (405, "Method not allowed"),
    "lease_lost": (409, "The lease does not stand any more"),
    "wrong_state": (409, "The job's state does not allow this"),
    "body_too_large": (413, "The body is too large"),
    "payload_too_large": (413, "The payload is too large"),
    "unsupported_media_type": (415, "The body must be application/json"),
    "invalid": (422, "A field's value is not acceptable"),
    "internal_error": (500, "Internal error"),
    "unavailable": (503, "Not available now"),
}
"""Every code that an answer may carry, with its status and title. OpenAPI lists them."""

_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
_CODE_OF_STATUS = {404: "not_found", 405: "method_not_allowed"}

log = structlog.get_logger(__name__)


class RequestError(QueueError):
    """The request can not be read at all."""

    def __init__(self, code: str, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.problem_code = code
        self.headers = headers


def problem_response(
    request: Request,
    code: str,
    detail: str,
    *,
    errors: Sequence[FieldProblem] = (),
    state: State | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Make the answer for `code`."""
    status, title = CODES[code]
    problem = Problem(
        type=TYPE_PREFIX + code,
        title=title,
        status=status,
        detail=detail,
        code=code,
        request_id=getattr(request.state, "request_id", ""),
        errors=list(errors),
        state=state,
    )
    return Response(msgspec.json.encode(problem), status, headers, MEDIA_TYPE)


def install(app: FastAPI) -> None:
    """Let every error of `app` become a problem."""
    app.add_exception_handler(QueueError, _queue_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)


async def _queue_error(request: Request, error: Exception) -> Response:
    match error:
        case RequestError():
            return problem_response(request, error.problem_code, str(error), headers=error.headers)
        case InvalidRequestError():
            errors = [FieldProblem(error.field, error.message)]
            return problem_response(request, error.code, str(error), errors=errors)
        case LeaseLostError() | WrongStateError():
            return problem_response(request, error.code, str(error), state=error.state)
        case UnavailableError():
            headers = {"Retry-After": str(error.retry_after_seconds)}
            return problem_response(request, error.code, str(error), headers=headers)
        case QueueError():
            return problem_response(request, error.code, str(error))
        case _:
            raise error


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101  # what the handler is registered for
    errors = [
        FieldProblem(".".join(str(part) for part in each["loc"][1:]) or str(each["loc"][0]), each["msg"])
        for each in error.errors()
    ]
    detail = "; ".join(f"{each.field}: {each.message}" for each in errors)
    return problem_response(request, "invalid", detail, errors=errors)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101  # what the handler is registered for
    code = _CODE_OF_STATUS.get(error.status_code, "bad_request")
    detail = {
        "not_found": f"There is nothing at {request.url.path}.",
        "method_not_allowed": f"{request.url.path} does not take {request.method}.",
    }.get(code, HTTPStatus(error.status_code).phrase)
    headers = dict(error.headers or {})
    if code == "method_not_allowed":
        # Several routes share a path; the one that refused knows only its own methods.
        headers["Allow"] = ", ".join(method for method in _METHODS if _takes(request, method))
    return problem_response(request, code, detail, headers=headers)


def _takes(request: Request, method: str) -> bool:
    asked = {**request.scope, "method": method}
    return any(route.matches(asked)[0] is Match.FULL for route in request.app.router.routes)


def unexpected(request: Request, error: Exception) -> Response:
    """Log an error that nobody foresaw, once, and make its answer.

    The log gets its type, its first sentence and where it was raised: what the database adds holds whole rows.
    """
    frames = traceback.extract_tb(error.__traceback__)
    log.error(
        "unexpected_error",
        path=request.scope["path"],
        error=repr(error),
        at=[f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames],
    )
    return problem_response(
        request, "internal_error", "Something went wrong here; the log has the request id."
    )


def bad_request(detail: str) -> bytes:
    """Return the body of the answer to what is no HTTP request at all."""
    status, title = CODES["bad_request"]
    problem = Problem(TYPE_PREFIX + "bad_request", title, status, detail, "bad_request")
    return msgspec.json.encode(problem)
