"""Which failures are alike: those of one type whose messages differ in what changes from job to job only."""

import hashlib
import re

_READ_MAX = 1000
"""Of a long message so many characters tell it from others."""

_VARIES = re.compile(
    r"""
      (?<!\w)(?:'[^'\n]{0,200}'|"[^"\n]{0,200}"|`[^`\n]{0,200}`)(?!\w)  # what is quoted; no apostrophe within a word
    | \b[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\b
    | \b0[xX][0-9a-fA-F]+\b
    | \b(?=[0-9a-fA-F]{0,63}[0-9])[0-9a-fA-F]{8,64}\b  # a hash, a commit; a word without a digit is none
    | \d+(?:[.,:]\d+)*
    """,
    re.VERBOSE,
)


_GROUP = re.compile("[0-9a-f]{16}")


def error_group(type_: str | None, message: str) -> str:
    """Return the name of the group of failures that one of this type, with this message, belongs to.

    It is a short hash that is the same in every process and version. Numbers, ids, what is quoted, and how much space
    there is between words make no difference.
    """
    alike = " ".join(_VARIES.sub("#", message[:_READ_MAX]).split())
    return hashlib.blake2b(f"{type_ or ''}\0{alike}".encode(), digest_size=8).hexdigest()


def is_error_group(text: str) -> bool:
    """Whether a text has the form of a group's name. The types of errors do not look like that."""
    return _GROUP.fullmatch(text) is not None
