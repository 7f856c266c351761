"""The header `Idempotency-Key`: what a client calls a request, so that a repeat of it does nothing more."""

import re
from hashlib import sha256

from app.api.thin import Call
from app.queue.errors import InvalidRequestError
from app.queue.model import IdempotencyKey

HEADER = "Idempotency-Key"
KEY_LENGTH_MAX = 255
NOBODY = ""
"""Whose keys they are: there are no clients with names."""

# A string of RFC 8941, as the draft of the header wants it, or the bare characters that most clients send.
_QUOTED = re.compile(rb'"((?:[\x20\x21\x23-\x5b\x5d-\x7e]|\\["\\])*)"')
_BARE = re.compile(rb"[\x21\x23-\x7e][\x20-\x7e]*")


def idempotency_key(call: Call, path: str) -> IdempotencyKey | None:
    """Return the key of a request to `path`; None when it has none. Raises InvalidRequestError."""
    value = call.headers.get(b"idempotency-key")
    if value is None:
        return None
    quoted = _QUOTED.fullmatch(value.strip())
    if quoted is not None:
        key = re.sub(rb"\\(.)", rb"\1", quoted[1])
    elif _BARE.fullmatch(value.strip()):
        key = value.strip()
    else:
        key = b""
    if not 1 <= len(key) <= KEY_LENGTH_MAX:
        raise InvalidRequestError(HEADER, f"must be 1 to {KEY_LENGTH_MAX} printable characters of ASCII")
    return IdempotencyKey(NOBODY, path, key.decode(), sha256(call.body).digest())
