"""The cursors of lists and of calls for many: a position, as text that goes into a URL."""

import base64
from collections.abc import Callable

from app.queue.errors import InvalidRequestError


def write(position: bytes) -> str:
    """Return the cursor for a position."""
    return base64.urlsafe_b64encode(position).decode().rstrip("=")


def read(cursor: str) -> bytes:
    """Return the position that a cursor tells. Raises InvalidRequestError when it is none."""
    try:
        return base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
    except ValueError:
        raise not_ours() from None


def read_name(cursor: str | None, may_be: Callable[[str], bool]) -> str:
    """Return the name that a list goes on after: without a cursor the empty one. Raises InvalidRequestError."""
    if cursor is None:
        return ""
    name = read(cursor).decode(errors="replace")
    if not may_be(name):
        raise not_ours()
    return name


def not_ours() -> InvalidRequestError:
    """Return the error for a cursor that this service has not made."""
    return InvalidRequestError("cursor", "is not a cursor of this service")
