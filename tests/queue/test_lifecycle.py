"""The transition table, walked whole, and the places that repeat its words."""

import itertools
import re
from pathlib import Path

import pytest

from app.queue.lifecycle import (
    COUNTED_AS,
    TERMINAL,
    TRANSITIONS,
    Event,
    IllegalMoveError,
    State,
    diagram,
    may,
    next_state,
)
from app.store.database import SQL_DIRECTORY

ARCHITECTURE = Path(__file__).parents[2] / "docs" / "architecture.md"

LEGAL = {
    ("scheduled", "promote"): "ready",
    ("scheduled", "cancel"): "cancelled",
    ("scheduled", "expire"): "expired",
    ("ready", "lease"): "active",
    ("ready", "postpone"): "scheduled",
    ("ready", "hold"): "held",
    ("ready", "cancel"): "cancelled",
    ("ready", "expire"): "expired",
    ("held", "admit"): "ready",
    ("held", "cancel"): "cancelled",
    ("held", "expire"): "expired",
    ("active", "ack"): "completed",
    ("active", "retry_later"): "retry",
    ("active", "give_up"): "failed",
    ("active", "release"): "ready",
    ("active", "release_later"): "scheduled",
    ("active", "request_cancel"): "active",
    ("active", "cancel"): "cancelled",
    ("retry", "promote"): "ready",
    ("retry", "cancel"): "cancelled",
    ("failed", "retry"): "ready",
    ("cancelled", "retry"): "ready",
    ("expired", "retry"): "ready",
}
"""The contract's moves, written a second time: a change of the table must be meant."""


@pytest.mark.parametrize(("state", "event"), list(itertools.product(State, Event)))
def test_a_move_is_legal_exactly_when_the_contract_has_it(state: State, event: Event):
    target = LEGAL.get((state.value, event.value))
    assert may(state, event) is (target is not None)
    if target is not None:
        assert next_state(state, event) == State(target)
        return
    with pytest.raises(IllegalMoveError, match=f"{state} does not take the event {event}") as raised:
        next_state(state, event)
    assert (raised.value.state, raised.value.event) == (state, event)


def test_every_state_and_every_event_has_its_part_in_the_table():
    assert set(TRANSITIONS) == set(State)
    assert {event for events in TRANSITIONS.values() for event in events} == set(Event)


def test_only_an_operator_brings_a_terminal_job_back_and_a_completed_one_never():
    assert {state.value for state in TERMINAL} == {"completed", "failed", "cancelled", "expired"}
    assert not TRANSITIONS[State.COMPLETED]
    for state in TERMINAL - {State.COMPLETED}:
        assert dict(TRANSITIONS[state]) == {Event.RETRY: State.READY}


@pytest.mark.parametrize("start", [State.SCHEDULED, State.READY])
def test_a_new_job_may_come_to_every_state_and_is_stuck_in_none(start: State):
    reached = {start}
    while grown := {target for state in reached for target in TRANSITIONS[state].values()} - reached:
        reached |= grown
    assert reached == set(State)
    for state in set(State) - TERMINAL:
        assert set(TRANSITIONS[state].values()) - {state}


def test_the_table_can_not_be_changed_at_run_time():
    with pytest.raises(TypeError):
        TRANSITIONS[State.COMPLETED] = {}  # type: ignore[index]


def test_every_state_is_counted_under_the_contracts_name():
    assert {state.value: name for state, name in COUNTED_AS.items()} == {
        "scheduled": "delayed",
        "ready": "waiting",
        "held": "waiting",
        "active": "active",
        "retry": "delayed",
        "completed": "completed",
        "failed": "failed",
        "cancelled": "cancelled",
        "expired": "expired",
    }


def test_the_diagram_shows_every_move_and_every_end():
    lines = diagram().splitlines()
    assert lines[0] == "stateDiagram-v2"
    for (state, event), target in LEGAL.items():
        assert f"    {state} --> {target}: {event}" in lines
    for state in State:
        assert (f"    {state} --> [*]" in lines) is (state in TERMINAL)


def test_the_architectures_diagram_is_the_tables():
    found = re.search(
        r"<!-- lifecycle:begin -->\n```mermaid\n(.*?)\n```\n<!-- lifecycle:end -->",
        ARCHITECTURE.read_text(),
        re.DOTALL,
    )
    assert found is not None, "docs/architecture.md lacks the diagram between its markers"
    assert found[1] == diagram()


@pytest.mark.parametrize("path", sorted(SQL_DIRECTORY.glob("*.sql")), ids=lambda path: path.stem)
def test_every_state_that_a_statement_names_is_a_state(path: Path):
    text = re.sub(r"--.*", "", path.read_text())
    named = set(re.findall(r"\bstate\s*=\s*'(\w+)'", text)) | set(
        re.findall(r"'(\w+)'(?:\s+END)?\s+AS\s+state", text)
    )
    for several in re.findall(r"\bstate\s+IN\s*\(([^)]*)\)", text):
        named |= set(re.findall(r"'(\w+)'", several))
    assert named <= {state.value for state in State}


def test_the_statements_do_name_states():
    """Else the test above would look past them."""
    text = (SQL_DIRECTORY / "cancel.sql").read_text()
    assert set(re.findall(r"'(\w+)'(?:\s+END)?\s+AS\s+state", text)) == {"ready", "scheduled", "active"}
