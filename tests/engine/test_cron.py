"""Cron expressions in local time, above all when clocks change. The right answers are written down, or modelled anew."""

from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from itertools import islice, pairwise, takewhile
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.engine.cron import check, cron
from app.queue.errors import InvalidRequestError
from app.queue.model import JobRequest
from app.queue.scheduling import Plan

MINUTE = timedelta(minutes=1)

CHANGES = {
    # Berlin: 02:00 becomes 03:00, and 03:00 becomes 02:00; the change is at 01:00 UTC.
    "Berlin, spring": ("Europe/Berlin", datetime(2026, 3, 29, 1, tzinfo=UTC)),
    "Berlin, autumn": ("Europe/Berlin", datetime(2026, 10, 25, 1, tzinfo=UTC)),
    # New York: 02:00 becomes 03:00 (07:00 UTC), and 02:00 becomes 01:00 (06:00 UTC).
    "New York, spring": ("America/New_York", datetime(2026, 3, 8, 7, tzinfo=UTC)),
    "New York, autumn": ("America/New_York", datetime(2026, 11, 1, 6, tzinfo=UTC)),
    # Lord Howe: half an hour; 02:00 becomes 02:30 (15:30 UTC), and 02:00 becomes 01:30 (15:00 UTC).
    "Lord Howe, spring": ("Australia/Lord_Howe", datetime(2026, 10, 3, 15, 30, tzinfo=UTC)),
    "Lord Howe, autumn": ("Australia/Lord_Howe", datetime(2026, 4, 4, 15, tzinfo=UTC)),
    # Havana changes at midnight, so a whole day begins in a gap; Cairo at midnight too, to 01:00.
    "Havana, spring": ("America/Havana", datetime(2026, 3, 8, 5, tzinfo=UTC)),
    "Cairo, spring": ("Africa/Cairo", datetime(2026, 4, 23, 22, tzinfo=UTC)),
}


def fires(expression: str, zone: str, begin: datetime, end: datetime) -> list[datetime]:
    return list(takewhile(lambda fire: fire <= end, cron(expression, zone)(begin)))


def local(expression: str, change: str, hours: float = 3) -> list[str]:
    """Return when it fires around a change of clocks: the local time with its offset."""
    zone, at = CHANGES[change]
    around = timedelta(hours=hours)
    return [
        f"{fire.astimezone(ZoneInfo(zone)):%H:%M%z}"
        for fire in fires(expression, zone, at - around, at + around)
    ]


@pytest.mark.parametrize(
    ("change", "expression", "expected"),
    [
        ("Berlin, spring", "30 1 * * *", ["01:30+0100"]),
        ("Berlin, spring", "30 2 * * *", ["03:00+0200"]),
        ("Berlin, spring", "0 2 * * *", ["03:00+0200"]),
        ("Berlin, spring", "0 3 * * *", ["03:00+0200"]),
        ("Berlin, spring", "0 2-3 * * *", ["03:00+0200"]),
        ("Berlin, spring", "*/20 2 * * *", ["03:00+0200"]),
        (
            "Berlin, spring",
            "0 * * * *",
            ["00:00+0100", "01:00+0100", "03:00+0200", "04:00+0200", "05:00+0200", "06:00+0200"],
        ),
        ("Berlin, autumn", "30 1 * * *", ["01:30+0200"]),
        ("Berlin, autumn", "30 2 * * *", ["02:30+0200"]),
        ("Berlin, autumn", "0 3 * * *", ["03:00+0100"]),
        ("Berlin, autumn", "0 2-3 * * *", ["02:00+0200", "03:00+0100"]),
        ("Berlin, autumn", "*/20 2 * * *", ["02:00+0200", "02:20+0200", "02:40+0200"]),
        (
            "Berlin, autumn",
            "0 * * * *",
            ["01:00+0200", "02:00+0200", "03:00+0100", "04:00+0100", "05:00+0100"],
        ),
        ("New York, spring", "30 2 * * *", ["03:00-0400"]),
        (
            "New York, spring",
            "15,45 1-3 * * *",
            ["01:15-0500", "01:45-0500", "03:00-0400", "03:15-0400", "03:45-0400"],
        ),
        ("New York, autumn", "30 1 * * *", ["01:30-0400"]),
        ("New York, autumn", "30 2 * * *", ["02:30-0500"]),
        ("Lord Howe, spring", "15 2 * * *", ["02:30+1100"]),
        ("Lord Howe, spring", "*/15 2 * * *", ["02:30+1100", "02:45+1100"]),
        ("Lord Howe, autumn", "45 1 * * *", ["01:45+1100"]),
        ("Lord Howe, autumn", "*/15 1 * * *", ["01:00+1100", "01:15+1100", "01:30+1100", "01:45+1100"]),
        ("Lord Howe, autumn", "0 2 * * *", ["02:00+1030"]),
        ("Havana, spring", "0 0 * * *", ["01:00-0400"]),
        ("Havana, spring", "30 0 8 3 *", ["01:00-0400"]),
        ("Cairo, spring", "0 0 * * FRI", ["01:00+0300"]),
    ],
)
def test_clocks_change(change: str, expression: str, expected: list[str]):
    assert local(expression, change) == expected


def test_the_first_look_after_a_change_finds_what_one_before_it_finds():
    zone, at = CHANGES["Berlin, autumn"]
    whole = fires("*/15 * * * *", zone, at - timedelta(hours=3), at + timedelta(hours=3))
    for minutes in range(-180, 180, 7):
        begin = at + timedelta(minutes=minutes)
        assert fires("*/15 * * * *", zone, begin, at + timedelta(hours=3)) == [
            fire for fire in whole if fire > begin
        ]


def modelled(
    minutes: set[int], hours: set[int], zone: ZoneInfo, begin: datetime, end: datetime
) -> Iterator[datetime]:
    """Walk through real time minute by minute, as somebody does who watches the clock on the wall."""

    def matches(shown: datetime) -> bool:
        return shown.minute in minutes and shown.hour in hours

    instant = begin - timedelta(days=1)
    shown = latest = instant.astimezone(zone).replace(tzinfo=None)
    while instant < end:
        instant += MINUTE
        shown = instant.astimezone(zone).replace(tzinfo=None)
        jumped_over = []
        while latest + MINUTE < shown:
            latest += MINUTE
            jumped_over.append(latest)
        if shown > latest:
            latest = shown
            if instant > begin and any(map(matches, [*jumped_over, shown])):
                yield instant


@settings(deadline=None)
@given(
    st.sampled_from(sorted(CHANGES)),
    st.sets(st.integers(0, 59), min_size=1, max_size=8),
    st.sets(st.integers(0, 5), min_size=1) | st.just(set(range(24))),
    st.integers(-240, 240),
)
def test_it_fires_as_the_clock_on_the_wall_says(change: str, minutes: set[int], hours: set[int], offset: int):
    zone, at = CHANGES[change]
    begin = at + timedelta(minutes=offset)
    end = at + timedelta(hours=6)
    hour = "*" if len(hours) == 24 else ",".join(map(str, sorted(hours)))
    expression = f"{','.join(map(str, sorted(minutes)))} {hour} * * *"
    found = fires(expression, zone, begin, end)
    assert found == list(modelled(minutes, hours, ZoneInfo(zone), begin, end))
    assert all(a < b for a, b in pairwise(found))


FIELDS = (
    st.sampled_from(["*", "*/15", "0", "30", "5-50/9", "0,59"]),
    st.sampled_from(["*", "*/6", "2", "1-3", "0,23"]),
    st.sampled_from(["*", "1", "29", "31", "L", "*/10"]),
    st.sampled_from(["*", "2", "JAN-MAR", "*/5"]),
    st.sampled_from(["*", "MON", "0", "7", "MON-FRI", "5L", "TUE#1"]),
)


@settings(deadline=None)
@given(
    st.tuples(*FIELDS).map(" ".join),
    st.sampled_from(
        sorted({zone for zone, _ in CHANGES.values()} | {"UTC", "Pacific/Apia", "Asia/Kathmandu"})
    ),
    st.datetimes(datetime(2000, 1, 1), datetime(2037, 1, 1), timezones=st.just(UTC)),  # noqa: DTZ001  # bounds
)
def test_fires_strictly_increase_and_go_on_from_any_of_them(expression: str, zone: str, begin: datetime):
    try:
        check(Plan(JobRequest("q"), cron=expression, timezone=zone))
    except InvalidRequestError:
        return
    rhythm = cron(expression, zone)
    found = list(islice(rhythm(begin), 6))
    assert all(a < b for a, b in zip([begin, *found], found, strict=False))
    for place, fire in enumerate(found):
        assert list(islice(rhythm(fire), 5 - place)) == found[place + 1 :]
        assert next(rhythm(fire - timedelta.resolution)) == fire


def days(expression: str, count: int = 4) -> list[str]:
    check(Plan(JobRequest("q"), cron=expression))
    begin = datetime(2026, 1, 1, tzinfo=UTC) - MINUTE
    return [f"{fire:%m-%d %a}" for fire in islice(cron(expression, "UTC")(begin), count)]


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("0 0 * * *", ["01-01 Thu", "01-02 Fri", "01-03 Sat", "01-04 Sun"]),
        ("0 0 2 * MON", ["01-02 Fri", "01-05 Mon", "01-12 Mon", "01-19 Mon"]),
        # To restrict is to restrict, also where the field begins with a star.
        ("0 0 */15 * MON", ["01-01 Thu", "01-05 Mon", "01-12 Mon", "01-16 Fri"]),
        ("0 0 5 * */6", ["01-03 Sat", "01-04 Sun", "01-05 Mon", "01-10 Sat"]),
        # What lets everything pass leaves the day to the other field.
        ("0 0 */1 * MON", ["01-05 Mon", "01-12 Mon", "01-19 Mon", "01-26 Mon"]),
        ("0 0 1-31 * MON", ["01-05 Mon", "01-12 Mon", "01-19 Mon", "01-26 Mon"]),
        ("0 0 5 * 1-7", ["01-05 Mon", "02-05 Thu", "03-05 Thu", "04-05 Sun"]),
        ("0 0 5 * *,MON", ["01-05 Mon", "02-05 Thu", "03-05 Thu", "04-05 Sun"]),
        ("0 0 30 2 */2", ["02-01 Sun", "02-03 Tue", "02-05 Thu", "02-07 Sat"]),
        ("0 0 * * 0", ["01-04 Sun", "01-11 Sun", "01-18 Sun", "01-25 Sun"]),
        ("0 0 * * sun", ["01-04 Sun", "01-11 Sun", "01-18 Sun", "01-25 Sun"]),
        ("0 0 1 jan,Mar *", ["01-01 Thu", "03-01 Sun", "01-01 Fri", "03-01 Mon"]),
        ("0 0 29 2 *", ["02-29 Tue", "02-29 Sun", "02-29 Fri", "02-29 Wed"]),
        ("0 0 L * *", ["01-31 Sat", "02-28 Sat", "03-31 Tue", "04-30 Thu"]),
        ("0 0 LW * *", ["01-30 Fri", "02-27 Fri", "03-31 Tue", "04-30 Thu"]),
        ("0 0 * * MON#2", ["01-12 Mon", "02-09 Mon", "03-09 Mon", "04-13 Mon"]),
        ("0 0 * * 5L", ["01-30 Fri", "02-27 Fri", "03-27 Fri", "04-24 Fri"]),
        ("0 0 * 2 MON#5", ["02-29 Mon", "02-29 Mon", "02-29 Mon", "02-29 Mon"]),
    ],
)
def test_days(expression: str, expected: list[str]):
    assert days(expression) == expected


@given(st.text("0123456789*/,-#LWMONSU ", max_size=40) | st.text(max_size=20))
def test_whatever_is_written_is_understood_or_refused(expression: str):
    with suppress(InvalidRequestError):
        check(Plan(JobRequest("q"), cron=expression))
        next(cron(expression, "UTC")(datetime(2026, 1, 1, tzinfo=UTC)), None)
