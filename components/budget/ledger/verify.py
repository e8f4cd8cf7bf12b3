"""Verification of a ledger: the chain, the rules, and every epsilon, recomputed from the entries alone.

Nothing recorded is believed: not the digests, not the accounts beside the entries, not the losses kept on this
machine from earlier compositions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lazydp.components.budget.ledger.chain import Problem, chain_problems, head_problems
from lazydp.components.budget.ledger.state import LedgerState
from lazydp.components.budget.storage.entries import Entry, head_of
from lazydp.components.shared.errors import LazyDPError

# What arithmetic on a content raises that somebody made up, with digests that fit.
_NONSENSE = (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)
# Two computations of one epsilon differ in the last digits only (another machine, another FFT).
_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class Verification:
    """What verification found.

    Attributes:
        entries: how many there are.
        head: `number:digest` of the last one; keep it elsewhere.
        epsilons: how many epsilons were recomputed.
        problems: empty where everything holds.
    """

    entries: int
    head: str
    epsilons: int
    problems: tuple[Problem, ...]


def verify(
    entries: Sequence[Entry],
    *,
    expect_head: str | None = None,
    recompute: bool = True,
    progress: Callable[[], None] | None = None,
) -> Verification:
    """Check the chain, replay the entries, and recompute every epsilon.

    Args:
        entries: as stored, in order of their numbers.
        expect_head: `number:digest` that an earlier verification printed; that entry must still be there, unchanged.
        recompute: False leaves the epsilons as recorded: it takes milliseconds, where composing them takes minutes.
        progress: called after every entry.

    Raises:
        InputError: `expect_head` is not of that form.
    """
    problems = [*chain_problems(entries), *head_problems(entries, expect_head)]
    broken = {problem.entry for problem in problems}
    state = LedgerState()
    epsilons = 0
    due = 1
    for entry in entries:
        if entry.number != due or (entry.number in broken and not _makes_sense(state, entry)):
            # What follows builds on what is gone: its figures cannot be expected to come out.
            problems.append(
                Problem(None, f"figures from entry {due} on were not recomputed, for it is gone or unreadable")
            )
            break
        if entry.number not in broken:
            found, recomputed = _replay_problems(state, entry, recompute=recompute)
            problems += found
            epsilons += recomputed
        due += 1
        if progress is not None:
            progress()
    head = head_of(entries[-1] if entries else None)
    problems.sort(key=lambda problem: math.inf if problem.entry is None else problem.entry)
    return Verification(entries=len(entries), head=head, epsilons=epsilons, problems=tuple(problems))


def _makes_sense(state: LedgerState, entry: Entry) -> bool:
    """Apply an entry that the chain does not vouch for, if that can be done."""
    try:
        state.apply(entry)
    except LazyDPError:
        return False
    return True


def _replay_problems(state: LedgerState, entry: Entry, *, recompute: bool) -> tuple[list[Problem], int]:
    try:
        state.apply(entry)
        if not recompute:
            return [], 0
        content = entry.content()
        problems = list(_account_problems(state, entry, content["accounts"]))
        if entry.kind in ("reserved", "committed"):
            problems += _alone_problems(state, entry, content)
        return problems, 2 * len(content["accounts"]) + (entry.kind in ("reserved", "committed"))
    except LazyDPError as error:
        return [Problem(entry.number, str(error))], 0
    except _NONSENSE as error:
        return [Problem(entry.number, f"its content makes no sense: {type(error).__name__} {error}")], 0


def _account_problems(state: LedgerState, entry: Entry, recorded: dict[str, Any]) -> Iterator[Problem]:
    from lazydp.components.budget.ledger.charges import account_of  # noqa: PLC0415 - scipy is slow to import

    due = [member for member in state.family(entry.dataset) if member in state.budgets]
    if sorted(due) != sorted(recorded):
        yield Problem(entry.number, "it does not record the account of every dataset that it concerns")
        return
    for identifier in due:
        true = asdict(account_of(state, identifier, trusting=False))
        for figure, value in true.items():
            if not _same(recorded[identifier][figure], value):
                yield Problem(
                    entry.number,
                    f"it records {figure} {recorded[identifier][figure]!r} for dataset {identifier[:12]}; "
                    f"recomputed, it is {value!r}",
                )
        if entry.kind == "reserved" and true["epsilon"] > state.budgets[identifier].epsilon * (1 + _TOLERANCE):
            yield Problem(
                entry.number,
                f"it reserves beyond the budget of dataset {identifier[:12]}: epsilon {true['epsilon']:.6g} of "
                f"{state.budgets[identifier].epsilon:g}",
            )


def _alone_problems(state: LedgerState, entry: Entry, content: dict[str, Any]) -> Iterator[Problem]:
    from lazydp.components.budget.ledger.charges import epsilon_of  # noqa: PLC0415 - as above

    budget = state.budget(entry.dataset)
    if budget is None:
        yield Problem(entry.number, f"it is {entry.kind} on a dataset without a budget")
        return
    true = epsilon_of([content["event"]], delta=budget.delta, trusting=False)
    if not _same(content["epsilon"], true):
        yield Problem(
            entry.number, f"it records epsilon {content['epsilon']!r} for its event alone; recomputed, it is {true!r}"
        )


def _same(recorded: Any, true: float) -> bool:
    return (
        isinstance(recorded, int | float)
        and not isinstance(recorded, bool)
        and math.isclose(recorded, true, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)
    )
