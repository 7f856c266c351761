"""Which failures are alike: by type and by what does not change from job to job in a message."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.queue.groups import error_group, is_error_group


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("timed out after 30 seconds", "timed out after 1.5 seconds"),
        ("no row 12 in 4,711", "no row 9 in 1"),
        ("connect to 10.0.0.1:5432 refused", "connect to 192.168.7.20:6432 refused"),
        ("job 0198f2c1-9a4e-7c3d-8f21-5b6a7c8d9e0f", "job 7F3D2C52-7A4E-4A2B-9D6E-0D8B2A2F6C11"),
        ("at 0x7ffd01", "at 0xBEEF"),
        ("commit 18feeb2f3a unknown", "commit 7335678deadbeef unknown"),
        ("no user 'ann'", "no user 'bob'"),
        ('no user "ann"', 'no user ""'),
        ("no column `a b`", "no column `c`"),
        ("a\n  b\tc ", "a b c"),
        ("x" * 1000 + "1", "x" * 1000 + "y"),
    ],
)
def test_what_changes_from_job_to_job_makes_no_difference(one: str, other: str):
    assert error_group("E", one) == error_group("E", other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("connection refused", "connection reset"),
        ("can't read, won't write", "can't write, won't read"),
        ("no user 'ann'", "no group 'ann'"),
        ("defaced facade", "facade defaced"),
        ("", "1"),
    ],
)
def test_what_is_said_does(one: str, other: str):
    assert error_group("E", one) != error_group("E", other)


def test_the_type_does():
    assert len({error_group(type_, "boom") for type_ in (None, "A", "B", "a")}) == 4


def test_a_group_has_the_same_name_for_ever():
    """Who has kept it, in a runbook or a filter, finds it again after an upgrade."""
    assert error_group("SmtpError", "mailbox 'a@example.com' is full (552)") == "354a2921fa0c9186"


@given(st.none() | st.text(), st.text(max_size=3000))
def test_whatever_the_error_it_has_one(type_: str | None, message: str):
    assert is_error_group(error_group(type_, message))


@pytest.mark.parametrize("part", ["'", '"a', "a1", "0x", "1.", "aaaaaaaa-", "' '", "\n"])
def test_no_message_takes_long(part: str):
    began = time.process_time()
    error_group(None, part * 4096)
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    "text", ["SmtpError", "", "0123456789abcde", "0123456789ABCDEF", "0123456789abcdef\n"]
)
def test_what_is_no_name_of_a_group(text: str):
    assert not is_error_group(text)
