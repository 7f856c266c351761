"""Cron expressions: five fields, read by cronsim, in the local time of a zone.

A local time fires once. One that does not exist, because the clock was put forward over it, fires at the first
instant after the gap, together with all others of the gap; one that occurs twice, because the clock was put back,
fires at its first occurrence. That holds of every expression alike: cronsim's own way follows elapsed time where
minute or hour are wildcards and local time elsewhere, so here it walks over local times only, and never sees a zone.
"""

import re
from bisect import bisect_left
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from zoneinfo import ZoneInfo, available_timezones

from cronsim import CronSim, CronSimError

from app.queue.errors import InvalidRequestError
from app.queue.scheduling import Plan, Rhythm, Schedule, interval

FIELDS = 5
# Days of the month, and of the week, as cronsim names what a star means.
_EVERY_DAY = set(range(1, 32))
_EVERY_WEEKDAY = set(range(7))
_SOME_TIME = datetime(2000, 1, 1)  # noqa: DTZ001  # a local time
_LETTERS = re.compile("[0-9A-Za-z*/,#-]+(?: +[0-9A-Za-z*/,#-]+)*")


def rhythm_of(schedule: Schedule) -> Rhythm:
    """Return when the schedule fires."""
    plan = schedule.plan
    if plan.cron is not None:
        return cron(plan.cron, plan.timezone)
    assert plan.every_seconds is not None  # noqa: S101  # a plan has one of both
    return interval(schedule.anchored_at, plan.every_seconds)


def cron(expression: str, timezone: str) -> Rhythm:
    """Return the rhythm of a cron expression that `check` has taken."""
    zone = ZoneInfo(timezone)

    def after(instant: datetime) -> Iterator[datetime]:
        last = instant
        # A local time that has come for the second time has fired already: what it maps to is not later.
        for local in _local_times(expression, instant.astimezone(zone).replace(tzinfo=None)):
            fire_at = _instant(local, zone)
            if fire_at > last:
                yield fire_at
                last = fire_at

    return after


def check(plan: Plan) -> None:
    """Raise InvalidRequestError where the plan's expression or zone is none."""
    if plan.timezone not in _zones():
        raise InvalidRequestError("timezone", "is no time zone of the IANA database, such as Europe/Berlin")
    if plan.cron is None:
        return
    if not _LETTERS.fullmatch(plan.cron) or len(plan.cron.split()) != FIELDS:
        raise InvalidRequestError(
            "cron", f"must have {FIELDS} fields: minute, hour, day of the month, month, weekday"
        )
    try:
        next(_local_times(plan.cron, _SOME_TIME), None)
    except CronSimError as error:
        raise InvalidRequestError("cron", f"{str(error).lower()}: it is none, or it never comes") from None


def _local_times(expression: str, after: datetime) -> Iterator[datetime]:
    yield from CronSim(_normal(expression), after)


@lru_cache(maxsize=1024)
def _normal(expression: str) -> str:
    """Return the expression as cronsim is to read it: a day matches when either of its two fields does.

    To cronsim a field that begins with a star, such as `*/2`, must match too; here only one that restricts nothing
    leaves the day to the other.
    """
    minute, hour, day, month, weekday = expression.split()
    days = CronSim(f"0 0 {day} 1 *", _SOME_TIME).days
    weekdays = {
        each % 7 for each in CronSim(f"0 0 1 1 {weekday}", _SOME_TIME).weekdays if isinstance(each, int)
    }
    day = "*" if days >= _EVERY_DAY else day.replace("*", "1-31", 1)
    weekday = "*" if weekdays >= _EVERY_WEEKDAY else weekday.replace("*", "0-6", 1)
    return f"{minute} {hour} {day} {month} {weekday}"


def _instant(local: datetime, zone: ZoneInfo) -> datetime:
    """Return the instant at which clocks in `zone` first show `local`, or jump over it."""
    instant = local.replace(tzinfo=zone).astimezone(UTC)
    if instant.astimezone(zone).replace(tzinfo=None) == local:
        return instant
    # In a gap, `fold` chooses between the offsets before and after the change, which lies between the two instants.
    before = local.replace(tzinfo=zone, fold=1).astimezone(UTC)
    offset = before.astimezone(zone).utcoffset()
    seconds = range(round((instant - before).total_seconds()))
    changed = bisect_left(
        seconds,
        True,  # noqa: FBT003  # the key's own values
        key=lambda second: (before + timedelta(seconds=second)).astimezone(zone).utcoffset() != offset,
    )
    return before + timedelta(seconds=changed)


@lru_cache(maxsize=1)
def _zones() -> frozenset[str]:
    # Those of the machine's own that its administrator set are not the same on every replica.
    return frozenset(available_timezones() - {"localtime", "posixrules", "Factory"})
