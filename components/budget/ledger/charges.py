"""What a family of datasets has spent: the events that count, composed by PLD at the delta of each budget."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from typing import Any

from dp_accounting.dp_event import DpEvent

from lazydp.components.budget.accounting.epsilon import epsilon
from lazydp.components.budget.accounting.events import composed, event_from_json
from lazydp.components.budget.accounting.loss_store import default_store
from lazydp.components.budget.ledger.state import Account, LedgerState
from lazydp.components.budget.storage.entries import canonical_json

EventJson = dict[str, Any]


def epsilon_of(events: Iterable[EventJson], *, delta: float, trusting: bool = True) -> float:
    """Epsilon of the composition of `events`; infinite where one has no privacy.

    Args:
        events: as JSON.
        delta: in (0, 1).
        trusting: whether loss distributions kept on this machine may be used.
    """
    parts = [_event(canonical_json(event)) for event in events]
    return epsilon(composed(parts), delta=delta, store=default_store() if trusting else None)


@functools.lru_cache(maxsize=1 << 14)
def _event(text: str) -> DpEvent:
    return event_from_json(json.loads(text))


def charged_epsilon(
    state: LedgerState, identifier: str, *, more: Iterable[EventJson] = (), trusting: bool = True
) -> float:
    """Epsilon of everything charged to a dataset that has a budget, were `more` charged as well."""
    runs = state.runs_of(state.family(identifier))
    charged = [event for run in runs if (event := run.charged_event()) is not None]
    return epsilon_of([*charged, *more], delta=state.budgets[identifier].delta, trusting=trusting)


def account_of(state: LedgerState, identifier: str, *, trusting: bool = True) -> Account:
    """The account of a dataset that has a budget."""
    runs = state.runs_of(state.family(identifier))
    released = [run.released_event for run in runs if run.released_event is not None]
    delta = state.budgets[identifier].delta
    return Account(
        epsilon=charged_epsilon(state, identifier, trusting=trusting),
        committed_epsilon=epsilon_of(released, delta=delta, trusting=trusting),
        delta=delta,
    )


def accounts_of(state: LedgerState, identifier: str) -> dict[str, Account]:
    """The accounts of every dataset with a budget in the family of `identifier`."""
    return {member: account_of(state, member) for member in state.family(identifier) if member in state.budgets}
