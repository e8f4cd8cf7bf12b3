"""Adding an entry to the ledger: read, decide and append while nobody else can.

Every decision is made and its entry added while the database's write lock is held: two processes can never both be told
that the last of the budget is theirs. Composing privacy losses takes longer than a lock should be held, so it is done
once before taking it; what is found is kept, and under the lock the same question is answered from memory unless
somebody else came in between.
"""

from __future__ import annotations

import datetime
import functools
import getpass
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lazydp.components.budget.ledger.chain import check_chain
from lazydp.components.budget.ledger.memory import HeadMemory, was_remembered
from lazydp.components.budget.ledger.rules import check_same_secret
from lazydp.components.budget.ledger.secret import VARIABLE, LedgerSecret, secret_file
from lazydp.components.budget.ledger.state import Account, LedgerState
from lazydp.components.budget.storage.base import Storage, sqlite_path
from lazydp.components.budget.storage.entries import Entry, Kind, next_entry
from lazydp.components.shared.errors import IntegrityError

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
        state = checked_state(storage, entries)
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

    if sqlite_path(storage.shown) is not None:
        own_secret(storage)
    entries = storage.read()
    entry: Entry | None = None
    try:
        entry, state = prepared(entries)
    except IntegrityError:
        # Read without the lock: somebody may have added and remembered an entry since. Under the lock it is damage.
        stale = True
    else:
        stale = False
        if entry is None:
            return None, state
    with storage.locked() as transaction:
        if stale or entry is None or transaction.head() != entry.previous:
            entries = transaction.read()
            entry, state = prepared(entries)
        if entry is None:
            return None, state
        memory = _memory(storage, state)
        if memory is not None:
            memory.intend(entries[-1] if entries else None, entry)
            transaction.after_commit(functools.partial(memory.confirm, entry))
        transaction.append(entry)
    return entry, state


def checked_state(storage: Storage, entries: list[Entry]) -> LedgerState:
    """What `entries` amount to, once their chain and their end are found to hold.

    Raises:
        IntegrityError: the ledger is damaged, cut, replaced or older than what is remembered of it.
        PrivacyError: its datasets were registered under another secret than the one at hand.
    """
    check_chain(entries, ledger=storage.shown)
    state = LedgerState.replayed(entries)
    memory = _memory(storage, state)
    if memory is not None:
        memory.check(entries)
    return state


def own_secret(storage: Storage) -> LedgerSecret:
    """The secret of the ledger, made where a SQLite ledger never had one.

    Raises:
        InputError: there is none, and the ledger knows datasets under one, or it is a PostgreSQL ledger.
        IntegrityError: the ledger is damaged.
    """
    path = sqlite_path(storage.shown)
    if path is not None and not _is_given() and not secret_file(path).exists():
        entries = storage.read()
        known = any(dataset.secret for dataset in LedgerState.replayed(entries).datasets.values())
        if not known and not was_remembered(entries):
            with storage.locked() as transaction:
                if not secret_file(path).exists():
                    _make_secret(storage, path, transaction.read())
    return LedgerSecret.of(storage.shown)


def _make_secret(storage: Storage, path: Path, entries: list[Entry]) -> None:
    def remember(made: LedgerSecret) -> None:
        # The memory comes first: a secret without one says that an empty ledger was not always empty.
        HeadMemory.of(storage.shown, made).confirm(entries[-1] if entries else None)

    LedgerSecret.make(path, before=remember)


def _memory(storage: Storage, state: LedgerState) -> HeadMemory | None:
    """What is remembered of the ledger; None where it has no secret yet, or (PostgreSQL) none was given.

    Raises:
        InputError: the secret under which the ledger knows its datasets is missing.
        PrivacyError: the one at hand is another one.
        IntegrityError: the ledger is empty, and something beside it says that it was not.
    """
    path = sqlite_path(storage.shown)
    known = any(dataset.secret for dataset in state.datasets.values())
    if not _is_given() and (path is None or not (known or secret_file(path).exists())):
        return None
    secret = LedgerSecret.of(storage.shown)
    check_same_secret(state, secret.name)
    memory = HeadMemory.of(storage.shown, secret)
    if path is not None and not state.datasets and not memory.exists() and secret_file(path).exists():
        raise IntegrityError(
            f"ledger {storage.shown} is empty, and its secret {path}.secret is there: the ledger was deleted or "
            "replaced, and with it what was spent. Bring it back from a copy; only if it never held an entry, remove "
            "the secret too"
        )
    return memory


def _is_given() -> bool:
    return bool(os.environ.get(VARIABLE, "").strip())


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
