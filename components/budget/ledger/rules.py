"""What the ledger refuses, and what it says then. Each rule reads the state that the entries so far amount to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lazydp.components.budget.ledger.state import Dataset, LedgerState, Run
from lazydp.components.shared.errors import BudgetExceededError, InputError, PrivacyError

# Two computations of one epsilon may differ in the last digits (another machine, another FFT).
_SAME = 1e-9


def epsilon_alone(document: dict[str, Any], delta: float) -> float:
    from lazydp.components.budget.ledger.charges import epsilon_of  # noqa: PLC0415 - scipy is slow to import

    return epsilon_of([document], delta=delta)


def check_unit(state: LedgerState, identifier: str, privacy_unit: str) -> None:
    """One unit for a family: an epsilon per example and one per user do not compose."""
    family = state.family(identifier)
    units = {run.privacy_unit for run in state.runs_of(family)}
    holder = state.holder(identifier)
    units |= {state.budgets[name].privacy_unit for name in family if name in state.budgets and name != holder}
    if units - {privacy_unit}:
        raise InputError(
            f"dataset {state.datasets[identifier].name} and those that share its users are accounted per "
            f"{', '.join(sorted(units))}: a budget per {privacy_unit} beside it needs a ledger of its own (--ledger)"
        )


def check_same_secret(state: LedgerState, secret: str) -> None:
    """One secret for a ledger: under another one, data that it knows would look new."""
    used = {dataset.secret for dataset in state.datasets.values()} - {"", secret}
    if secret and used:
        raise PrivacyError(
            f"the ledger knows its datasets under another secret ({', '.join(sorted(used))}) than the one given "
            f"({secret}): bring that one back; under this one known data would look new, and have a fresh budget"
        )


def check_units_agree(state: LedgerState, dataset: Dataset) -> None:
    """A dataset that joins families may not join an epsilon per example to one per user."""
    joined = replace(state, datasets={**state.datasets, dataset.identifier: dataset})
    family = joined.family(dataset.identifier)
    units = {joined.budgets[name].privacy_unit for name in family if name in joined.budgets}
    if len(units) > 1:
        raise InputError(
            f"dataset {dataset.name} would share users with datasets that are accounted per {' and per '.join(units)}: "
            "register it in a ledger of its own for each unit (--ledger)"
        )


def check_budget_is_set(state: LedgerState, identifier: str, privacy_unit: str) -> None:
    name = state.datasets[identifier].name
    budget = state.budget(identifier)
    if budget is None:
        raise PrivacyError(
            f"dataset {name} ({identifier[:12]}{_family(state, identifier)}) has no budget: set one with "
            f"`lazydp budget set --dataset {identifier[:12]} --epsilon E --delta D --privacy-unit {privacy_unit}`"
        )
    if budget.privacy_unit != privacy_unit:
        raise PrivacyError(
            f"the budget of dataset {name} is per {budget.privacy_unit}, the run is accounted per {privacy_unit}: "
            f"train with privacy_unit {budget.privacy_unit}, or use a ledger of its own for this unit (--ledger)"
        )
    check_unit(state, identifier, privacy_unit)


def _family(state: LedgerState, identifier: str) -> str:
    family = state.datasets[identifier].family
    return f", family {family}" if family else ""


def check_same_family(known: Dataset, family: str) -> None:
    """A dataset belongs to one declared family for good: under another one its rows would have a fresh budget."""
    if known.family and family and known.family != family:
        raise PrivacyError(
            f"dataset {known.name} ({known.identifier[:12]}) belongs to family {known.family}, and {family} was "
            f"declared: its rows are the same people whatever they are called; declare family {known.family}"
        )


def check_other_people(state: LedgerState, identifier: str, other_people: str) -> None:
    """A first budget is for people who have none yet; where the ledger knows them by something, words are needed.

    Datasets that are linked to this one are not asked for: their runs count against its budget in full anyway.
    """
    own = state.datasets[identifier]
    linked = set(state.family(identifier))
    found = []
    for other in state.datasets.values():
        if other.identifier in linked or state.budget(other.identifier) is None:
            continue
        common = [
            what
            for what, same in (
                ("name", own.name in {other.name, other.family} or own.family == other.name),
                ("user column", bool(own.user_column) and own.user_column == other.user_column),
                ("source", not set(own.places).isdisjoint(other.places)),
            )
            if same
        ]
        if common:
            called = f"family {other.family}" if other.family else f"dataset {other.name} ({other.identifier[:12]})"
            found.append(f"{called} (same {' and '.join(common)})")
    if found and not other_people.strip():
        mine = f"family {own.family}" if own.family else f"dataset {own.name} ({identifier[:12]})"
        raise PrivacyError(
            f"{mine} is new to the ledger, and looks like people who have a budget there: "
            f"{', '.join(dict.fromkeys(found))}. If they are the same people, declare their family (`family:` in the "
            "feature spec, or `lazydp budget set --family`); if they are others, say in words why "
            '(`lazydp budget set --other-people "..."`), which the ledger keeps'
        )


def check_admitted(state: LedgerState, identifier: str, document: dict[str, Any]) -> None:
    from lazydp.components.budget.ledger.charges import charged_epsilon  # noqa: PLC0415 - scipy is slow to import

    for member in state.family(identifier):
        budget = state.budgets.get(member)
        if budget is None:
            continue
        before = state.accounts[member].epsilon if member in state.accounts else 0.0
        after = charged_epsilon(state, member, more=[document])
        if not after <= budget.epsilon:
            shared = "" if member == identifier else f", which shares users with {state.datasets[identifier].name}"
            raise BudgetExceededError(
                f"the budget of dataset {state.datasets[member].name}{shared} does not admit the run: epsilon "
                f"{budget.epsilon:g} at delta {budget.delta:g} per {budget.privacy_unit}, charged so far {before:.4g}, "
                f"with the run {after:.4g} (alone {epsilon_alone(document, budget.delta):.4g}): take fewer "
                "steps or more noise, void reservations that released nothing, or raise the budget with "
                "`lazydp budget set`"
            )


def check_same_claim(run: Run, identifier: str, claim: Mapping[str, Any]) -> None:
    # The code may have been upgraded between a crash and the resume; the mechanism may not.
    found = (run.dataset, run.purpose, run.privacy_unit, run.reserved_event, run.config_digest)
    asked = (identifier, claim["purpose"], claim["privacy_unit"], claim["event"], claim["config_digest"])
    if found != asked:
        raise InputError(f"run_id {run.run_id} was used for another run: choose a new one")
    if run.status == "voided":
        raise PrivacyError(f"run {run.run_id} was voided ({run.void_reason}): train a new run under a new run_id")


def check_key(run: Run, key: str) -> None:
    """One reservation is one noise key: under a second one, the same run would be another release, charged once.

    Args:
        run: as the ledger knows it.
        key: public commitment to the key that is presented; empty where none is.
    """
    if run.key and run.key != key:
        found = f"another one ({key[:12]})" if key else "none"
        raise PrivacyError(
            f"run {run.run_id} is bound to one noise key (commitment {run.key[:12]}), and {found} was presented: a "
            "copy of its folder, or another folder or volume under the same run id, began training anew. Go on in the "
            "folder that the run began in, or train under a new run id with a reservation of its own"
        )


def check_data(run: Run, data: str) -> None:
    """A run reads one dataset: other rows under its noise key would be a second release, with the noise of the first.

    Args:
        run: as the ledger knows it.
        data: identifier of the files that are to be read; empty where that is not told.
    """
    if run.data and data and run.data != data:
        raise PrivacyError(
            f"run {run.run_id} was begun on other files than the dataset now has: the difference of two models under "
            "one noise key is free of noise. Bring the dataset back as it was, or train a new run under a new run id"
        )


def is_recorded(run: Run, document: dict[str, Any], *, release: str, final: bool) -> bool:
    """Whether a commit asks for what is in the ledger already.

    Raises:
        PrivacyError: the run is closed, and something else than what it released is to be released.
    """
    if run.released_event != document or (final and run.status == "reserved"):
        return False
    if any(known.release == release for known in run.releases):
        return True
    if run.status == "committed" and not run.key:
        released = ", ".join(sorted({known.release for known in run.releases}))
        raise PrivacyError(
            f"run {run.run_id} was released as {released!r}, and {release!r} would be a second release for one charge: "
            "nothing in the ledger proves that both carry the same noise; train a new run under a new run id"
        )
    return False


def checked_within_reservation(state: LedgerState, run: Run, document: dict[str, Any]) -> float:
    """Epsilon of `document` alone, at most what was reserved and at least what was released before."""
    delta = state.budgets[state.holder(run.dataset)].delta
    spent = epsilon_alone(document, delta)
    if document == run.reserved_event:
        return spent
    reserved = epsilon_alone(run.reserved_event, delta)
    if spent > reserved * (1 + _SAME):
        raise PrivacyError(
            f"run {run.run_id} reserved epsilon {reserved:.4g} and would release at {spent:.4g}: nothing may "
            "be released"
        )
    if run.released_event is not None and spent < epsilon_alone(run.released_event, delta) * (1 - _SAME):
        raise PrivacyError(f"run {run.run_id} released a later snapshot before: an earlier one cannot be charged less")
    return spent
