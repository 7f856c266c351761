"""The states of a job and every legal move between them.

Everything that affects which move is legal lives here, in one dict. The statements in `store/sql` make the
moves, `policy` chooses between them; neither may make one that is not in `TRANSITIONS` (tests walk both).
The diagram in docs/architecture.md is generated from it by `diagram`.
"""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType


class State(StrEnum):
    """Where a job is in its life. The values are the words of the HTTP API."""

    SCHEDULED = "scheduled"
    READY = "ready"
    HELD = "held"
    ACTIVE = "active"
    RETRY = "retry"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


class Event(StrEnum):
    """What can happen to a job."""

    PROMOTE = "promote"
    """Its run_at or its backoff has come."""
    POSTPONE = "postpone"
    """It gets a run_at in the future."""
    HOLD = "hold"
    """Its concurrency key's turn has not come."""
    ADMIT = "admit"
    """Its concurrency key's turn has come."""
    LEASE = "lease"
    ACK = "ack"
    RETRY_LATER = "retry_later"
    """The attempt failed or its lease expired, and the retry budget allows another."""
    GIVE_UP = "give_up"
    """The attempt failed for good."""
    RELEASE = "release"
    RELEASE_LATER = "release_later"
    REQUEST_CANCEL = "request_cancel"
    """Someone cancels an active job: its worker learns of it at the next heartbeat."""
    CANCEL = "cancel"
    EXPIRE = "expire"
    """Its start deadline passed before any worker took it."""
    RETRY = "retry"
    """An operator gives a dead job a fresh budget."""


TRANSITIONS: Mapping[State, Mapping[Event, State]] = MappingProxyType(
    {
        State.SCHEDULED: {
            Event.PROMOTE: State.READY,
            Event.CANCEL: State.CANCELLED,
            Event.EXPIRE: State.EXPIRED,
        },
        State.READY: {
            Event.LEASE: State.ACTIVE,
            Event.POSTPONE: State.SCHEDULED,
            Event.HOLD: State.HELD,
            Event.CANCEL: State.CANCELLED,
            Event.EXPIRE: State.EXPIRED,
        },
        State.HELD: {
            Event.ADMIT: State.READY,
            Event.CANCEL: State.CANCELLED,
            Event.EXPIRE: State.EXPIRED,
        },
        State.ACTIVE: {
            Event.ACK: State.COMPLETED,
            Event.RETRY_LATER: State.RETRY,
            Event.GIVE_UP: State.FAILED,
            Event.RELEASE: State.READY,
            Event.RELEASE_LATER: State.SCHEDULED,
            Event.REQUEST_CANCEL: State.ACTIVE,
            Event.CANCEL: State.CANCELLED,
        },
        State.RETRY: {
            Event.PROMOTE: State.READY,
            Event.CANCEL: State.CANCELLED,
        },
        State.COMPLETED: {},
        State.FAILED: {Event.RETRY: State.READY},
        State.CANCELLED: {Event.RETRY: State.READY},
        State.EXPIRED: {Event.RETRY: State.READY},
    }
)

TERMINAL = frozenset({State.COMPLETED, State.FAILED, State.CANCELLED, State.EXPIRED})

COUNTED_AS: Mapping[State, str] = MappingProxyType(
    {
        State.READY: "waiting",
        State.HELD: "waiting",
        State.SCHEDULED: "delayed",
        State.RETRY: "delayed",
        State.ACTIVE: "active",
        State.COMPLETED: "completed",
        State.FAILED: "failed",
        State.CANCELLED: "cancelled",
        State.EXPIRED: "expired",
    }
)
"""How `/stats` sums the states up."""


def summed_up(states: Mapping[State, int]) -> dict[str, int]:
    """Sum counts of jobs up as `/stats` names them, with all the names."""
    sums = dict.fromkeys(COUNTED_AS.values(), 0)
    for state, count in states.items():
        sums[COUNTED_AS[state]] += count
    return sums


class IllegalMoveError(Exception):
    """An event met a state in which it may not happen."""

    def __init__(self, state: State, event: Event) -> None:
        super().__init__(f"a job that is {state} does not take the event {event}")
        self.state = state
        self.event = event


def next_state(state: State, event: Event) -> State:
    """Return the state that `event` leads to. Raises IllegalMoveError when the move is not in the table."""
    try:
        return TRANSITIONS[state][event]
    except KeyError:
        raise IllegalMoveError(state, event) from None


def may(state: State, event: Event) -> bool:
    """Whether `event` is a legal move for a job in `state`."""
    return event in TRANSITIONS[state]


CANCELLABLE = frozenset(state for state in State if may(state, Event.CANCEL))
RETRIABLE = frozenset(state for state in State if may(state, Event.RETRY))


def diagram() -> str:
    """Return the table as a Mermaid state diagram: the documentation's copy is checked against it."""
    moves = ["    [*] --> scheduled: enqueue", "    [*] --> ready: enqueue"]
    moves += [
        f"    {state} --> {target}: {event}"
        for state, events in TRANSITIONS.items()
        for event, target in events.items()
    ]
    ends = [f"    {state} --> [*]" for state in State if state in TERMINAL]
    return "\n".join(["stateDiagram-v2", *moves, *ends])
