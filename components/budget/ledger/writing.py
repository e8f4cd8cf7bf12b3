"""Adding an entry to the ledger: read, decide and append while nobody else can.

Every decision is made and its entry added while the database's write lock is held: two processes can never both be told
that the last of the budget is theirs. Composing privacy losses takes longer than a lock should be held, so it is done
once before taking it; what is found is kept, and under the lock the same question is answered from memory unless
somebody else came in between.
"""

from __future__ import annotations

import datetime
import getpass
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from lazydp.components.budget.ledger.state import Account, LedgerState
from lazydp.components.budget.storage.base import Storage
from lazydp.components.budget.storage.entries import Entry, Kind, next_entry

OPERATOR_VARIABLE = "LAZYDP_OPERATOR"

Decide = Callable[[LedgerState], Mapping[str, Any] | None]


def add(
    storage: Storage,
    kind: Kind,
    dataset: Callable[[LedgerState], str],
    decide: Decide,
    *,
    run_id: str = "",
    by: str | None = None,
) -> tuple[Entry | None, LedgerState]:
    """Add the entry that `decide` asks for, with the accounts after it; None where it asks for none.

    Returns the entry and the state after it. Everything is prepared without the lock, where composing may take its
    time; under it the entry stands if the ledger still ends where it did, and is otherwise prepared anew.
    """
    recorded_by = by or operator()

    def prepared(entries: list[Entry]) -> tuple[Entry | None, LedgerState]:
        state = LedgerState.replayed(entries)
        content = decide(state)
        if content is None:
            return None, state
        last = entries[-1] if entries else None
        entry = _with_accounts(
            state,
            last,
            kind=kind,
            dataset=dataset(state),
            run_id=run_id,
            recorded_by=recorded_by,
            content=content,
        )
        return entry, state

    entries = storage.read()
    entry, state = prepared(entries)
    if entry is None:
        return None, state
    with storage.locked() as transaction:
        if transaction.head() != entry.previous:
            entry, state = prepared(transaction.read())
        if entry is not None:
            transaction.append(entry)
    return entry, state


def operator() -> str:
    """Who acts: LAZYDP_OPERATOR, or the user of the operating system."""
    named = os.environ.get(OPERATOR_VARIABLE, "").strip()
    if named:
        return named
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


def _with_accounts(
    state: LedgerState,
    last: Entry | None,
    *,
    kind: Kind,
    dataset: str,
    run_id: str,
    recorded_by: str,
    content: Mapping[str, Any],
) -> Entry:
    """The next entry with the accounts that it leads to; `state` is moved past it, accounts included."""

    def made(accounts: Mapping[str, Account]) -> Entry:
        return next_entry(
            last,
            kind=kind,
            dataset=dataset,
            run_id=run_id,
            recorded_at=now,
            recorded_by=recorded_by,
            content={**content, "accounts": {name: asdict(account) for name, account in accounts.items()}},
        )

    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
    state.apply(made({}))
    if not any(member in state.budgets for member in state.family(dataset)):
        return made({})
    from lazydp.components.budget.ledger.charges import accounts_of  # noqa: PLC0415 - scipy is slow to import

    accounts = accounts_of(state, dataset)
    state.accounts.update(accounts)
    state.updated_at.update(dict.fromkeys(accounts, now))
    return made(accounts)
