"""The ledger: what may be spent on each dataset, what is promised, what was spent, by whom."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from lazydp.components.budget.accounting.limits import SMALLEST_DELTA
from lazydp.components.budget.ledger.memory import HeadMemory
from lazydp.components.budget.ledger.reader import LedgerReader
from lazydp.components.budget.ledger.rules import (
    check_admitted,
    check_budget_is_set,
    check_data,
    check_key,
    check_other_people,
    check_same_claim,
    check_same_family,
    check_same_secret,
    check_unit,
    check_units_agree,
    checked_within_reservation,
    epsilon_alone,
    is_recorded,
)
from lazydp.components.budget.ledger.secret import LedgerSecret
from lazydp.components.budget.ledger.state import Dataset, LedgerState
from lazydp.components.budget.ledger.views import Commitment, DatasetBudget, Reservation, budget_of, reservation_of
from lazydp.components.budget.ledger.writing import add, checked_state, own_secret
from lazydp.components.budget.storage.entries import head_of
from lazydp.components.shared.errors import InputError, PrivacyError
from lazydp.components.shared.version import code_version as this_code_version

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

PURPOSES = ("training", "vocabulary", "metrics", "tuning")
PRIVACY_UNITS = ("example", "user")


class Ledger(LedgerReader):
    """An open ledger; a context manager. Not to be shared between threads while writing."""

    def secret(self) -> LedgerSecret:
        """The ledger's secret, made where it never had one.

        Raises:
            InputError: there is none, and none can be made.
        """
        return own_secret(self._storage)

    def remember(self) -> str:
        """Accept the ledger as it is, and remember where it ends; returns the head. For whoever verified it.

        Raises:
            InputError: the ledger has no secret.
        """
        with self._storage.locked() as transaction:
            entries = transaction.read()
            last = entries[-1] if entries else None
            HeadMemory.of(self.url, LedgerSecret.of(self.url)).confirm(last)
        return head_of(last)

    # --- datasets and budgets --------------------------------------------------------------------------------

    def register_dataset(
        self,
        identifier: str,
        *,
        name: str,
        parents: Iterable[str] = (),
        sources: Iterable[str] = (),
        secret: str = "",
        family: str = "",
        default_family: str = "",
        user_column: str = "",
        places: Iterable[str] = (),
        by: str | None = None,
    ) -> Dataset:
        """Make a dataset known; repeated, it adds parents and sources and changes nothing else.

        All of it is published. Where a dataset is at hand, `identifiers.register` names it by what tells nothing.

        Args:
            identifier: of the dataset; never a hash of its content.
            name: for people.
            parents: datasets, known to the ledger, that share users with this one (a month before, a superset).
            sources: identifiers of what it was made from; datasets with a common one share users.
            secret: which secret the identifiers were made under.
            family: the declared name of its population, public; datasets of one family have one budget.
            default_family: that of a dataset for which nobody declared one, here or before.
            user_column: identifier of its user column.
            places: identifiers of where its rows were read from.
            by: who registers it; the operator by default.

        Raises:
            InputError: an unknown parent, or an empty identifier or name.
            PrivacyError: the ledger's datasets were registered under another secret, or this one with another family.
        """
        if not identifier or not name:
            raise InputError(f"a dataset needs an identifier and a name, found {identifier!r} and {name!r}")

        def decide(state: LedgerState) -> Mapping[str, Any] | None:
            check_same_secret(state, secret)
            known = state.datasets.get(identifier)
            before = known or Dataset(identifier, name, (), ())
            check_same_family(before, family)
            named = tuple(state.resolve(parent) for parent in parents)
            after = Dataset(
                identifier,
                before.name,
                _union(before.parents, (parent for parent in named if parent != identifier)),
                _union(before.sources, sources),
                secret or before.secret,
                family or before.family or default_family,
                user_column or before.user_column,
                _union(before.places, places),
            )
            if after == known:
                return None
            check_units_agree(state, after)
            return {
                "name": after.name,
                "parents": list(after.parents),
                "sources": list(after.sources),
                "secret": after.secret,
                "family": after.family,
                "user_column": after.user_column,
                "places": list(after.places),
            }

        _, state = add(self._storage, "dataset", lambda state: identifier, decide, by=by)
        return state.datasets[identifier]

    def set_budget(
        self,
        dataset: str,
        *,
        epsilon: float,
        delta: float,
        privacy_unit: str = "example",
        by: str | None = None,
        reason: str = "",
        other_people: str = "",
    ) -> DatasetBudget:
        """Set what may be spent on a dataset, or on its whole family where it declares one.

        To raise it takes a name and a reason, which the ledger keeps.

        Args:
            dataset: identifier, its first characters, or name.
            epsilon: above 0.
            delta: in (0, 1); of every epsilon of this dataset from now on.
            privacy_unit: `example` or `user`; one for a whole family, fixed by the first run.
            by: who sets it; must be given where it is raised.
            reason: why; must be given where it is raised.
            other_people: why its people have no budget yet, though the ledger knows its name, user column or source
                from another family; must be given for a first budget then.

        Raises:
            InputError: a value out of range, a raise without name or reason, or another unit than the family's.
            PrivacyError: a first budget for people who look like others that have one, without `other_people`.
        """
        if not (epsilon > 0 and math.isfinite(epsilon)):
            raise InputError(f"the budget's epsilon must be a finite number above 0, found {epsilon}")
        if not SMALLEST_DELTA <= delta < 1:
            raise InputError(f"the budget's delta must be in [{SMALLEST_DELTA:g}, 1), found {delta}")
        if privacy_unit not in PRIVACY_UNITS:
            raise InputError(f"privacy_unit must be one of {', '.join(PRIVACY_UNITS)}, found {privacy_unit!r}")

        def decide(state: LedgerState) -> Mapping[str, Any] | None:
            identifier = state.resolve(dataset)
            check_unit(state, identifier, privacy_unit)
            before = state.budget(identifier)
            if before is None:
                check_other_people(state, identifier, other_people)
            else:
                if (before.epsilon, before.delta, before.privacy_unit) == (epsilon, delta, privacy_unit):
                    return None
                raised = epsilon > before.epsilon or delta > before.delta
                if raised and not (by and reason.strip()):
                    raise InputError(
                        f"the budget of {state.datasets[identifier].name} is epsilon {before.epsilon:g} at delta "
                        f"{before.delta:g}; to raise it to {epsilon:g} at {delta:g}, give a name and a reason "
                        "(--by, --reason)"
                    )
            words = other_people.strip() or (before.other_people if before else "")
            return {
                "epsilon": epsilon,
                "delta": delta,
                "privacy_unit": privacy_unit,
                "reason": reason.strip(),
                "other_people": words,
            }

        _, state = add(self._storage, "budget", lambda state: state.holder(state.resolve(dataset)), decide, by=by)
        return budget_of(state, state.resolve(dataset))

    # --- runs ------------------------------------------------------------------------------------------------

    def reserve(
        self,
        *,
        dataset: str,
        event: DpEvent,
        run_id: str,
        privacy_unit: str = "example",
        purpose: str = "training",
        config_digest: str = "",
        code_version: str | None = None,
        key: str = "",
        data: str = "",
        by: str | None = None,
    ) -> Reservation:
        """Claim what a run may at most spend, before it touches the data.

        A run that holds a reservation of the same event gets the same one again (a retry, a resumed run).

        Args:
            dataset: identifier, its first characters, or name.
            event: the whole run, per `privacy_unit`, for neighbours that differ by adding or removing one.
            run_id: names the run for good.
            privacy_unit: must be that of the dataset's budget.
            purpose: training, vocabulary, metrics or tuning.
            config_digest: of the run's configuration.
            code_version: of the code that runs; this one's by default.
            key: public commitment to the run's noise key (`NoiseKey.commitment`). The first one that is presented
                binds the reservation; the pipeline's gate, which has no key yet, presents none.
            data: identifier of the files that the run reads; the first one that is told binds the reservation.
            by: who asks.

        Raises:
            BudgetExceededError: the budget of the dataset, or of one that shares users with it, does not admit the run.
            PrivacyError: no budget was set, or it is of another privacy unit, or the run is bound to another noise key
                or other files.
            InputError: an unknown dataset or purpose, or a run_id that was used for something else.
        """
        from lazydp.components.budget.accounting.events import event_to_json  # noqa: PLC0415 - scipy is slow to import

        if purpose not in PURPOSES:
            raise InputError(f"purpose must be one of {', '.join(PURPOSES)}, found {purpose!r}")
        if not run_id:
            raise InputError("a reservation needs a run_id that is not empty")
        document = event_to_json(event)
        claim = {
            "purpose": purpose,
            "privacy_unit": privacy_unit,
            "event": document,
            "config_digest": config_digest,
            "code_version": code_version or this_code_version(),
        }

        def decide(state: LedgerState) -> Mapping[str, Any] | None:
            identifier = state.resolve(dataset)
            if run_id in state.runs:
                check_same_claim(state.runs[run_id], identifier, claim)
                if key:
                    check_key(state.runs[run_id], key)
                check_data(state.runs[run_id], data)
                return None
            check_budget_is_set(state, identifier, privacy_unit)
            check_admitted(state, identifier, document)
            return {
                **claim,
                "key": key,
                "data": data,
                "epsilon": epsilon_alone(document, state.budgets[state.holder(identifier)].delta),
            }

        entry, state = add(
            self._storage, "reserved", lambda state: state.resolve(dataset), decide, run_id=run_id, by=by
        )
        run = state.runs[run_id]
        if run.status == "reserved" and ((key and not run.key) or (data and not run.data)):
            state = self._bind(run_id, key=key, data=data, by=by)
        return reservation_of(state, run_id, entry)

    def _bind(self, run_id: str, *, key: str, data: str, by: str | None) -> LedgerState:
        """Bind a reservation that was made before there was a key or a dataset: the first ones are the only ones."""

        def decide(state: LedgerState) -> Mapping[str, Any] | None:
            run = state.runs[run_id]
            if key:
                check_key(run, key)
            check_data(run, data)
            bound = {"key": run.key or key, "data": run.data or data}
            return None if (run.key, run.data) == (bound["key"], bound["data"]) else bound

        _, state = add(
            self._storage, "bound", lambda state: self._dataset_of(state, run_id), decide, run_id=run_id, by=by
        )
        return state

    def take_lease(self, run_id: str, *, by: str | None = None) -> int:
        """Begin another attempt of a run, and end all earlier ones; returns the attempt's number (its generation).

        A file lock holds back the processes of one host. An attempt on another host that is cut off may go on for a
        while; from here on it can neither keep a checkpoint nor release anything (`check_lease`).

        Raises:
            PrivacyError: the run holds no open reservation.
        """

        def decide(state: LedgerState) -> Mapping[str, Any]:
            run = state.runs.get(run_id)
            if run is None or run.status != "reserved":
                found = "none" if run is None else f"one that was {run.status}"
                raise PrivacyError(f"run {run_id} needs an open reservation in ledger {self.url}; found {found}")
            return {"generation": run.generation + 1}

        _, state = add(
            self._storage, "leased", lambda state: self._dataset_of(state, run_id), decide, run_id=run_id, by=by
        )
        return state.runs[run_id].generation

    def check_lease(self, run_id: str, generation: int) -> None:
        """Refuse to go on with an attempt that another one took the run from.

        Raises:
            PrivacyError: a later attempt holds the lease.
        """
        state = checked_state(self._storage, self._storage.read())
        run = state.runs.get(run_id)
        latest = 0 if run is None else run.generation
        if latest != generation:
            raise PrivacyError(
                f"this is attempt {generation} of run {run_id}, and attempt {latest} holds its lease in ledger "
                f"{self.url}: another process trains or exports the run. This one keeps and releases nothing more"
            )

    def require_reservation(self, run_id: str, *, dataset: str, event: DpEvent, key: str = "") -> Reservation:
        """The reservation that a run must hold before its first step.

        Raises:
            PrivacyError: it holds none, or one for another dataset, event or noise key, or it is closed.
        """
        from lazydp.components.budget.accounting.events import event_to_json  # noqa: PLC0415 - scipy is slow to import

        state = checked_state(self._storage, self._storage.read())
        run = state.runs.get(run_id)
        if run is None or run.status != "reserved":
            found = "none" if run is None else f"one that was {run.status}"
            raise PrivacyError(f"run {run_id} needs a reservation in ledger {self.url} before it starts; found {found}")
        if run.dataset != state.resolve(dataset) or run.reserved_event != event_to_json(event):
            raise PrivacyError(f"run {run_id} reserved budget for another dataset or mechanism: use a new run_id")
        check_key(run, key)
        return reservation_of(state, run_id, None)

    def commit(
        self,
        run_id: str,
        *,
        event: DpEvent,
        release: str = "",
        step: int | None = None,
        final: bool = True,
        key: str = "",
        by: str | None = None,
    ) -> Commitment:
        """Charge what is about to be released; only then release it.

        Several commits of one run are its snapshots: one mechanism, charged once, at the latest. Until the final
        one the whole reservation stays charged. To commit the same release again (an export that was killed and is
        repeated) changes nothing. Another release of the same event is recorded, without a charge, where the same
        noise key proves that it carries the same noise, and is refused elsewhere.

        Args:
            run_id: holds a reservation.
            event: what the run spent up to this release.
            release: digest or name of what is released.
            step: of a snapshot.
            final: whether the run is over; what it reserved beyond `event` is given back.
            key: public commitment to the noise key; must be that of the reservation, where that has one.
            by: who releases.

        Raises:
            PrivacyError: no reservation, or more was spent than was reserved, or less than at an earlier snapshot; or
                another noise key, or another release of a run that is closed.
        """
        from lazydp.components.budget.accounting.events import event_to_json  # noqa: PLC0415 - scipy is slow to import

        document = event_to_json(event)

        def decide(state: LedgerState) -> Mapping[str, Any] | None:
            run = state.runs.get(run_id)
            if run is None:
                raise PrivacyError(f"run {run_id} holds no reservation in ledger {self.url}: nothing may be released")
            check_key(run, key)
            if is_recorded(run, document, release=release, final=final):
                return None
            closed = run.status == "committed"
            if run.status == "voided" or (closed and run.released_event != document):
                raise PrivacyError(f"run {run_id} was {run.status}: nothing more of it may be released")
            return {
                "event": document,
                "release": release,
                "step": step,
                "final": final or closed,
                "key": key,
                "epsilon": checked_within_reservation(state, run, document),
            }

        entry, state = add(
            self._storage, "committed", lambda state: self._dataset_of(state, run_id), decide, run_id=run_id, by=by
        )
        run = state.runs[run_id]
        account = state.accounts[state.holder(run.dataset)]
        return Commitment(
            run_id=run_id,
            dataset=run.dataset,
            epsilon=run.releases[-1].epsilon or 0.0,
            charged_epsilon=account.epsilon,
            delta=account.delta,
            existing=entry is None,
        )

    def void(self, run_id: str, *, by: str, reason: str) -> None:
        """Give back what a run reserved, because nothing (more) of it was or will be released.

        A crashed run stays reserved until somebody says so by name: its checkpoints still hold what was learnt, and
        whoever voids it vouches that they are gone. What its snapshots released stays charged.

        Raises:
            InputError: no name or no reason.
            PrivacyError: no such reservation, or the run is closed.
        """
        if not by.strip() or not reason.strip():
            raise InputError("to void a reservation, give a name and a reason (--by, --reason)")

        def decide(state: LedgerState) -> Mapping[str, Any] | None:
            run = state.runs.get(run_id)
            if run is None or run.status != "reserved":
                found = "it was never reserved" if run is None else f"it was {run.status}"
                raise PrivacyError(f"run {run_id} holds no reservation to void: {found}")
            return {"reason": reason.strip()}

        add(self._storage, "voided", lambda state: self._dataset_of(state, run_id), decide, run_id=run_id, by=by)

    def charge(
        self,
        *,
        dataset: str,
        event: DpEvent,
        run_id: str,
        purpose: str,
        privacy_unit: str = "example",
        release: str = "",
        by: str | None = None,
    ) -> Commitment:
        """Reserve and commit at once: a vocabulary or a metric that a DP mechanism is about to release.

        Raises:
            LazyDPError: as `reserve` and `commit`.
        """
        self.reserve(dataset=dataset, event=event, run_id=run_id, privacy_unit=privacy_unit, purpose=purpose, by=by)
        return self.commit(run_id, event=event, release=release, by=by)

    def _dataset_of(self, state: LedgerState, run_id: str) -> str:
        run = state.runs.get(run_id)
        if run is None:
            raise PrivacyError(f"run {run_id} holds no reservation in ledger {self.url}: nothing may be released")
        return run.dataset


def _union(known: Iterable[str], more: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys([*known, *more]))
