"""Every error as `application/problem+json` (RFC 9457), with a stable code."""

import traceback
from collections.abc import Callable, Mapping, Sequence
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
    InvalidItemsError,
    InvalidRequestError,
    JobNotFoundError,
    LeaseLostError,
    QueueError,
    UnavailableError,
    WrongStateError,
)
from app.queue.lifecycle import State
from app.queue.model import Keeping

MEDIA_TYPE = "application/problem+json"
TYPE_PREFIX = "urn:leaseq:problem:"

CODES: Mapping[str, tuple[int, str]] = {
    "malformed_json": (400, "The body is not JSON"),
    "bad_request": (400, "The request can not be understood"),
    "not_found": (404, "Not found"),
    "method_not_allowed": (405, "Method not allowed"),
    "lease_lost": (409, "The lease does not stand any more"),
    "queue_not_empty": (409, "Jobs of the queue are kept"),
    "wrong_state": (409, "The job's state does not allow this"),
    "duplicate": (409, "Another job holds the unique key"),
    "idempotency_conflict": (409, "The Idempotency-Key stands for another request"),
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


def problem(
    request_id: str,
    code: str,
    detail: str,
    errors: Sequence[FieldProblem] = (),
    state: State | None = None,
) -> Problem:
    """Make the problem for `code`."""
    status, title = CODES[code]
    return Problem(
        type=TYPE_PREFIX + code,
        title=title,
        status=status,
        detail=detail,
        code=code,
        request_id=request_id,
        errors=list(errors),
        state=state,
    )


def problem_of(request_id: str, error: QueueError) -> Problem:
    """Make the problem that says what `error` does."""
    match error:
        case RequestError():
            return problem(request_id, error.problem_code, str(error))
        case InvalidRequestError():
            return problem(
                request_id, error.code, str(error), errors=[FieldProblem(error.field, error.message)]
            )
        case InvalidItemsError():
            return problem(
                request_id, error.code, str(error), errors=[FieldProblem(*each) for each in error.problems]
            )
        case LeaseLostError() | WrongStateError():
            return problem(request_id, error.code, str(error), state=error.state)
        case _:
            return problem(request_id, error.code, str(error))


def headers_of(error: QueueError) -> dict[str, str]:
    """Return the headers that go with `error`."""
    match error:
        case UnavailableError():
            return {"Retry-After": str(error.retry_after_seconds)}
        case RequestError():
            return dict(error.headers or {})
        case _:
            return {}


def _response(given: Problem, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(given), given.status, headers, MEDIA_TYPE)


def install(app: FastAPI, retention: Callable[[], tuple[Keeping, Keeping]]) -> None:
    """Let every error of `app` become a problem; `retention` is the shortest and the longest that jobs are kept."""

    async def job_not_found(request: Request, error: Exception) -> Response:
        detail = f"{error} {retention_told(*retention())}"
        return _response(problem(request.state.request_id, JobNotFoundError.code, detail))

    app.add_exception_handler(JobNotFoundError, job_not_found)
    app.add_exception_handler(QueueError, _queue_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)


def retention_told(shortest: Keeping, longest: Keeping) -> str:
    """Say how long jobs are kept, to whom one is missing."""
    completed = _span(shortest.completed_seconds, longest.completed_seconds)
    dead = _span(shortest.dead_seconds, longest.dead_seconds)
    return (
        f"After its end a job is kept for a while, here {completed} when it was completed,"
        f" {dead} when it failed, was cancelled or expired."
    )


def _span(shortest: float, longest: float) -> str:
    if shortest == longest:
        return _duration(longest)
    return f"{_duration(shortest)} to {_duration(longest)} (as its queue says)"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length and seconds % length == 0:
            return f"{seconds // length:g} {unit}"
    return f"{seconds:g} seconds"


async def _queue_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, QueueError)  # noqa: S101  # what the handler is registered for
    return _response(problem_of(request.state.request_id, error), headers_of(error))


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101  # what the handler is registered for
    errors = [
        FieldProblem(".".join(str(part) for part in each["loc"][1:]) or str(each["loc"][0]), each["msg"])
        for each in error.errors()
    ]
    detail = "; ".join(f"{each.field}: {each.message}" for each in errors)
    return _response(problem(request.state.request_id, "invalid", detail, errors=errors))


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
    return _response(problem(request.state.request_id, code, detail), headers)


def _takes(request: Request, method: str) -> bool:
    asked = {**request.scope, "method": method}
    return any(route.matches(asked)[0] is Match.FULL for route in request.app.router.routes)


def unexpected(request_id: str, path: str, error: Exception) -> Problem:
    """Log an error that nobody foresaw, once, and make its answer.

    The log gets its type, its first sentence and where it was raised: what the database adds holds whole rows.
    """
    frames = traceback.extract_tb(error.__traceback__)
    log.error(
        "unexpected_error",
        path=path,
        error=repr(error),
        at=[f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames],
    )
    return problem(request_id, "internal_error", "Something went wrong here; the log has the request id.")


def bad_request(detail: str) -> bytes:
    """Return the body of the answer to what is no HTTP request at all."""
    status, title = CODES["bad_request"]
    return msgspec.json.encode(Problem(TYPE_PREFIX + "bad_request", title, status, detail, "bad_request"))
