"""What the entries of a ledger amount to: datasets, budgets and runs, by replaying the entries in order.

There is no other state: a table of balances beside the entries could contradict them.

**Families.** A run on a dataset is a run on its users, wherever else their data is. Datasets that declare one family,
name each other as parents, through any number of steps, or share a source are linked, and every run on one of them
counts in full against every other: against parents and children, and also between two children of one parent, for
nothing here proves that their users are not the same people. This overcounts disjoint subsets; it never undercounts.
Datasets of one declared family have one budget: that of the first member that has one (`LedgerState.holder`).
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from lazydp.components.budget.storage.entries import FORMAT_VERSION, Entry
from lazydp.components.shared.errors import FormatError, InputError, IntegrityError

Status = Literal["reserved", "committed", "voided"]


@dataclass(frozen=True, slots=True)
class Dataset:
    """A dataset as the ledger knows it: its name and what it shares with others.

    Attributes:
        sources: identifiers of what it was made from.
        secret: which secret identifiers were made under (`identifiers`); empty where they came from elsewhere.
        family: the declared name of its population; empty where none was declared, and it is a family of its own.
        user_column: identifier of the name of its user column; empty where that is not known.
        places: identifiers of where its rows were read from.
    """

    identifier: str
    name: str
    parents: tuple[str, ...]
    sources: tuple[str, ...]
    secret: str = ""
    family: str = ""
    user_column: str = ""
    places: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Budget:
    """What may be spent on a dataset or a declared family, and who said so.

    Attributes:
        other_people: the operator's words for why its people are in no other family that looks like it; empty where
            none looked like it.
    """

    epsilon: float
    delta: float
    privacy_unit: str
    set_by: str
    reason: str
    other_people: str = ""


@dataclass(frozen=True, slots=True)
class Account:
    """What the family of a dataset had spent at one entry, at the delta of the dataset's budget.

    Attributes:
        epsilon: everything committed and reserved, composed.
        committed_epsilon: everything that left the trust boundary, composed.
        delta: of both.
    """

    epsilon: float
    committed_epsilon: float
    delta: float


@dataclass(frozen=True, slots=True)
class Release:
    """One thing that left the trust boundary."""

    entry: int
    run_id: str
    dataset: str
    purpose: str
    release: str
    step: int | None
    epsilon: float | None
    released_at: str
    released_by: str


@dataclass(frozen=True, slots=True)
class Run:
    """One mechanism: reserved, then committed (perhaps several times: its snapshots) or voided.

    Attributes:
        reserved_event: the most it may spend, as JSON.
        released_event: what its latest release spent, as JSON; None before the first.
        epsilon: of the reserved event alone, at the delta of the dataset's budget then.
        key: public commitment to the one noise key of the run; empty until a key was presented.
        data: identifier of the files of the dataset that the run reads; empty until that was told.
        generation: how many attempts took the run's lease (`Ledger.take_lease`); the latest one holds it.
    """

    run_id: str
    dataset: str
    purpose: str
    privacy_unit: str
    status: Status
    reserved_event: dict[str, Any]
    released_event: dict[str, Any] | None
    epsilon: float
    config_digest: str
    code_version: str
    reserved_at: str
    reserved_by: str
    key: str = ""
    data: str = ""
    generation: int = 0
    void_reason: str = ""
    releases: tuple[Release, ...] = ()

    def charged_event(self) -> dict[str, Any] | None:
        """The event that counts against the budget: the reserved one until the run is closed, then the released one."""
        return self.reserved_event if self.status == "reserved" else self.released_event


@dataclass(slots=True)
class LedgerState:
    """Everything that the entries so far say."""

    datasets: dict[str, Dataset] = field(default_factory=dict)
    budgets: dict[str, Budget] = field(default_factory=dict)
    runs: dict[str, Run] = field(default_factory=dict)
    accounts: dict[str, Account] = field(default_factory=dict)
    updated_at: dict[str, str] = field(default_factory=dict)

    @classmethod
    def replayed(cls, entries: Iterable[Entry]) -> LedgerState:
        """The state after `entries`.

        Raises:
            IntegrityError: an entry that cannot follow those before it.
            FormatError: an entry of a newer format.
        """
        state = cls()
        for entry in entries:
            state.apply(entry)
        return state

    def apply(self, entry: Entry) -> None:
        """Take one more entry into account.

        Raises:
            IntegrityError: it cannot follow those before it.
            FormatError: it has a newer format.
        """
        try:
            content = entry.content()
            version = content["format_version"]
            if not isinstance(version, int) or version > FORMAT_VERSION:
                raise FormatError(
                    f"ledger entry {entry.number} has format_version {version}, this lazydp reads up to "
                    f"{FORMAT_VERSION}: use a newer lazydp"
                )
            datetime.datetime.fromisoformat(entry.recorded_at)
            _APPLY[entry.kind](self, entry, content)
            for identifier, account in content["accounts"].items():
                self.accounts[identifier] = Account(**{name: _number(value) for name, value in account.items()})
                self.updated_at[identifier] = entry.recorded_at
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
            raise IntegrityError(
                f"ledger entry {entry.number} ({entry.kind}) makes no sense: {type(error).__name__} {error}"
            ) from error

    def family(self, identifier: str) -> tuple[str, ...]:
        """The dataset and all that it shares users with, in the order in which they came."""
        linked: dict[tuple[str, str], list[str]] = {}
        for other in self.datasets.values():
            for link in _links(other):
                linked.setdefault(link, []).append(other.identifier)
        found = {identifier}
        frontier = [identifier]
        while frontier:
            for link in _links(self.datasets[frontier.pop()]):
                fresh = [other for other in linked.pop(link, ()) if other not in found]
                found.update(fresh)
                frontier += fresh
        return tuple(name for name in self.datasets if name in found)

    def declared(self, identifier: str) -> tuple[str, ...]:
        """The dataset and those that declare the same family, in the order in which they came."""
        family = self.datasets[identifier].family
        if not family:
            return (identifier,)
        return tuple(other.identifier for other in self.datasets.values() if other.family == family)

    def holder(self, identifier: str) -> str:
        """The dataset whose budget is that of `identifier`: itself, or the first of its declared family with one."""
        if identifier in self.budgets:
            return identifier
        return next((other for other in self.declared(identifier) if other in self.budgets), identifier)

    def budget(self, identifier: str) -> Budget | None:
        """The budget that a dataset has, of its own or of its declared family."""
        return self.budgets.get(self.holder(identifier))

    def runs_of(self, family: Iterable[str]) -> Iterator[Run]:
        """The runs on any dataset of a family."""
        members = set(family)
        return (run for run in self.runs.values() if run.dataset in members)

    def resolve(self, dataset: str) -> str:
        """The identifier that `dataset` names: itself, the start of one (six characters or more), a name or a family.

        What names several datasets of one declared family names the one that holds the family's budget.

        Raises:
            InputError: none fits, or more than one.
        """
        if dataset in self.datasets:
            return dataset
        fitting = [
            known.identifier
            for known in self.datasets.values()
            if dataset in (known.name, known.family) or (len(dataset) >= 6 and known.identifier.startswith(dataset))
        ]
        if len(fitting) == 1:
            return fitting[0]
        families = {self.datasets[identifier].family for identifier in fitting}
        if len(families) == 1 and "" not in families:
            return self.holder(fitting[0])
        if fitting:
            listed = ", ".join(name[:12] for name in fitting)
            raise InputError(f"dataset {dataset!r} names {len(fitting)} datasets ({listed}): give the identifier")
        raise InputError(
            f"dataset {dataset!r} is not in the ledger: register it with "
            "`lazydp budget set --dataset DATASET --epsilon E --delta D`"
        )


def _links(dataset: Dataset) -> list[tuple[str, str]]:
    """What a dataset has in common with those that it is linked to: two datasets with a common link share users."""
    links = [("dataset", name) for name in (dataset.identifier, *dataset.parents)]
    links += [("source", source) for source in dataset.sources]
    return links + ([("family", dataset.family)] if dataset.family else [])


def _number(value: Any) -> float:
    """A figure, whatever somebody wrote in its place."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"expected a number, found {str(value)[:40]!r}")
    return float(value)


def _text(value: Any) -> str:
    """A name, whatever somebody wrote in its place."""
    if not isinstance(value, str):
        raise TypeError(f"expected a text, found {str(value)[:40]!r}")
    return value


def _texts(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list | tuple):
        raise TypeError(f"expected a list, found {str(values)[:40]!r}")
    return tuple(map(_text, values))


def _event(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"expected an event, found {str(value)[:40]!r}")
    return value


def _apply_dataset(state: LedgerState, entry: Entry, content: dict[str, Any]) -> None:
    state.datasets[entry.dataset] = Dataset(
        identifier=entry.dataset,
        name=_text(content["name"]),
        parents=_texts(content["parents"]),
        sources=_texts(content["sources"]),
        secret=_text(content.get("secret", "")),
        family=_text(content.get("family", "")),
        user_column=_text(content.get("user_column", "")),
        places=_texts(content.get("places", ())),
    )


def _apply_budget(state: LedgerState, entry: Entry, content: dict[str, Any]) -> None:
    if entry.dataset not in state.datasets:
        raise ValueError(f"a budget for dataset {entry.dataset}, which was never registered")
    state.budgets[entry.dataset] = Budget(
        epsilon=_number(content["epsilon"]),
        delta=_number(content["delta"]),
        privacy_unit=_text(content["privacy_unit"]),
        set_by=entry.recorded_by,
        reason=_text(content["reason"]),
        other_people=_text(content.get("other_people", "")),
    )


def _apply_reserved(state: LedgerState, entry: Entry, content: dict[str, Any]) -> None:
    if entry.run_id in state.runs:
        raise ValueError(f"run {entry.run_id} was reserved before")
    if entry.dataset not in state.datasets:
        raise ValueError(f"a run on dataset {entry.dataset}, which was never registered")
    state.runs[entry.run_id] = Run(
        run_id=entry.run_id,
        dataset=entry.dataset,
        purpose=_text(content["purpose"]),
        privacy_unit=_text(content["privacy_unit"]),
        status="reserved",
        reserved_event=_event(content["event"]),
        released_event=None,
        epsilon=_number(content["epsilon"]),
        config_digest=_text(content["config_digest"]),
        code_version=_text(content["code_version"]),
        reserved_at=entry.recorded_at,
        reserved_by=entry.recorded_by,
        key=_text(content.get("key", "")),
        data=_text(content.get("data", "")),
    )


def _apply_bound(state: LedgerState, entry: Entry, content: dict[str, Any]) -> None:
    run = _open_run(state, entry)
    key, data = _text(content["key"]), _text(content.get("data", run.data))
    if (run.key and key != run.key) or (run.data and data != run.data):
        raise ValueError(f"run {run.run_id} is bound to another noise key or dataset already")
    state.runs[run.run_id] = replace(run, key=key, data=data)


def _apply_leased(state: LedgerState, entry: Entry, content: dict[str, Any]) -> None:
    run = _open_run(state, entry)
    generation = content["generation"]
    if generation != run.generation + 1 or isinstance(generation, bool):
        raise ValueError(f"run {run.run_id} stands at generation {run.generation}, found a lease of {generation}")
    state.runs[run.run_id] = replace(run, generation=generation)


def _apply_committed(state: LedgerState, entry: Entry, content: dict[str, Any]) -> None:
    run = _repeated_run(state, entry, content) or _open_run(state, entry)
    key = _text(content.get("key", ""))
    if run.key and key != run.key:
        raise ValueError(f"run {run.run_id} is bound to another noise key")
    release = Release(
        entry=entry.number,
        run_id=run.run_id,
        dataset=run.dataset,
        purpose=run.purpose,
        release=_text(content["release"]),
        step=None if content["step"] is None else int(_number(content["step"])),
        epsilon=None if content["epsilon"] is None else _number(content["epsilon"]),
        released_at=entry.recorded_at,
        released_by=entry.recorded_by,
    )
    state.runs[run.run_id] = replace(
        run,
        status="committed" if content["final"] else "reserved",
        released_event=_event(content["event"]),
        key=key,
        releases=(*run.releases, release),
    )


def _apply_voided(state: LedgerState, entry: Entry, content: dict[str, Any]) -> None:
    run = _open_run(state, entry)
    state.runs[run.run_id] = replace(run, status="voided", void_reason=_text(content["reason"]))


def _repeated_run(state: LedgerState, entry: Entry, content: dict[str, Any]) -> Run | None:
    """The run, where the entry records another release of what it spent in full: the same noise, and no new charge."""
    run = state.runs.get(entry.run_id)
    if run is None or run.status != "committed" or not run.key:
        return None
    same = (run.dataset, run.key, run.released_event) == (entry.dataset, content.get("key"), content["event"])
    return run if same and content["final"] else None


def _open_run(state: LedgerState, entry: Entry) -> Run:
    run = state.runs.get(entry.run_id)
    if run is None:
        raise ValueError(f"run {entry.run_id} was never reserved")
    if run.status != "reserved" or run.dataset != entry.dataset:
        raise ValueError(f"run {entry.run_id} on dataset {run.dataset} is {run.status} already")
    return run


_APPLY = {
    "dataset": _apply_dataset,
    "budget": _apply_budget,
    "reserved": _apply_reserved,
    "bound": _apply_bound,
    "leased": _apply_leased,
    "committed": _apply_committed,
    "voided": _apply_voided,
}
