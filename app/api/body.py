"""Reading a request's body: bounded, and checked to be JSON that any other reader will take.

What a producer sends is handed to workers as it came, so one job with bad JSON would spoil the reply for all that
share it. msgspec checks the syntax also of what it passes through; this module adds what it leaves open there:
UTF-8, lone surrogates, depth.
"""

import re
from collections.abc import Mapping
from itertools import accumulate
from typing import TypeVar

import msgspec
from starlette.types import Message, Receive

from app.api.problems import RequestError
from app.queue.errors import InvalidRequestError

DEPTH_MAX = 500
LINES_MEDIA_TYPE = "application/x-ndjson"

# Possessive, and content with the end of the text where a string has none: linear whatever is sent.
_STRING = re.compile(rb'"(?:[^"\\]++|\\.?)*+(?:"|\Z)', re.DOTALL)
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_STEP = [0] * 256
for _open, _close in (b"[]", b"{}"):
    _STEP[_open], _STEP[_close] = 1, -1
# Any text in which each escaped half of a surrogate pair has its other half beside it.
_PAIRED = re.compile(
    rb"(?:[^\\]++|\\[^u]|\\u(?:[0-9a-cA-CefEF]...|[dD][0-7]..|[dD][89abAB]..\\u[dD][c-fC-F]..))*+", re.DOTALL
)
_AT = re.compile(r" - at `\$\.?([^`]{0,200})`\Z")
_MESSAGE_LENGTH_MAX = 200

T = TypeVar("T")


def are_lines(headers: Mapping[bytes, bytes]) -> bool:
    """Whether the body is lines of JSON by its header."""
    media_type = headers.get(b"content-type", b"").partition(b";")[0]
    return media_type.strip().lower() == LINES_MEDIA_TYPE.encode()


async def read_body(
    headers: Mapping[bytes, bytes], receive: Receive, bytes_max: int, *, takes_lines: bool = False
) -> bytes:
    """Return the whole body. Raises RequestError when it is no JSON by its header, or too large (before reading it)."""
    content_type = headers.get(b"content-type", b"")
    if content_type != b"application/json" and not takes_lines:
        media_type = content_type.partition(b";")[0].strip().lower()
        if media_type != b"application/json" and not media_type.endswith(b"+json"):
            raise RequestError("unsupported_media_type", "Send the header Content-Type: application/json.")
    length = headers.get(b"content-length", b"")
    if length.isdigit() and int(length) > bytes_max:
        raise _too_large(bytes_max)
    body = bytearray()
    while True:
        message: Message = await receive()
        if message["type"] == "http.disconnect":
            raise RequestError("bad_request", "The connection ended within the body.")
        part: bytes = message.get("body", b"")
        if len(body) + len(part) > bytes_max:
            raise _too_large(bytes_max)
        if not message.get("more_body", False):
            return bytes(body + part) if body else part
        body += part


def decode(decoder: "msgspec.json.Decoder[T]", body: bytes) -> T:
    """Return the body as the decoder's type. Raises RequestError for what is no JSON, InvalidRequestError else."""
    check_json(body)
    return validated(decoder, body)


def validated(decoder: "msgspec.json.Decoder[T]", text: bytes) -> T:
    """Return a text that `check_json` has seen as the decoder's type. Raises as `decode` does."""
    try:
        return decoder.decode(text)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _malformed(str(error)) from None


def check_json(body: bytes) -> None:
    """Raise RequestError for what msgspec would pass through: bad UTF-8, lone surrogates, nesting over DEPTH_MAX."""
    try:
        body.decode()
    except UnicodeDecodeError as error:
        raise _malformed(f"it is not UTF-8 at byte {error.start}") from None
    if b"\\u" in body and not _PAIRED.fullmatch(body):
        raise _malformed("it escapes half of a surrogate pair")
    if body.count(b"[") + body.count(b"{") > DEPTH_MAX and depth(body) > DEPTH_MAX:
        raise _malformed(f"it is nested deeper than {DEPTH_MAX}")


def depth(body: bytes) -> int:
    """Return how deep the brackets outside strings are nested."""
    brackets = _STRING.sub(b"", body).translate(None, _NOT_BRACKETS)
    return max(accumulate(map(_STEP.__getitem__, brackets)), default=0)


def _malformed(why: str) -> RequestError:
    return RequestError("malformed_json", f"The body is not JSON: {why}.")


def _too_large(bytes_max: int) -> RequestError:
    # No `Connection: close`: the server would reset the connection of a client that is still sending, and with it
    # goes the answer. As it is, the rest is read past, and kept nowhere.
    return RequestError("body_too_large", f"A body may have at most {bytes_max} bytes.")


def _invalid(text: str) -> InvalidRequestError:
    # The text repeats what the client wrote, as long as it is, and that may look like a path too.
    at = _AT.search(text)
    message, field = (text, "") if at is None else (text[: at.start()], at[1])
    if len(message) > _MESSAGE_LENGTH_MAX:
        message = message[:_MESSAGE_LENGTH_MAX] + "…"
    return InvalidRequestError(field or "body", message)
