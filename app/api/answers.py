"""What FastAPI's own routes answer, said in OpenAPI, and the form of it."""

from typing import Any

from fastapi import Response

from app.api.thin import encode


class EventText(str):
    """Server-sent events."""

    __slots__ = ()


TEXTS: dict[type, str] = {str: "text/plain", EventText: "text/event-stream"}
"""The replies that are not JSON, with their media types."""

REPLIES: dict[str, type] = {}
"""The replies that routes have named, by their names: FastAPI carries nothing but JSON from a route to its document."""


def answers(reply: type | None, description: str, *problems: str) -> dict[str, Any]:
    """Say in OpenAPI what a route answers, and which problems beside those that any request may meet."""
    if reply is not None:
        REPLIES[reply.__name__] = reply
    return {
        "x-reply": None if reply is None else reply.__name__,
        "x-description": description,
        "x-problems": problems,
    }


def json_response(reply: object, status: int = 200) -> Response:
    """Return an answer with `reply` as its body."""
    return Response(encode(reply), status, media_type="application/json")
