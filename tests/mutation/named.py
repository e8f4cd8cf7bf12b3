"""Faults that an earlier review planted by hand and that no test of their own folder saw. Each must be killed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Named:
    """A fault by the text that it replaces, which stands once in the file.

    Attributes:
        folder: of the tests that must see it, below tests/components.
        file: below components.
        old: what stands there.
        new: what the fault makes of it.
    """

    folder: str
    file: str
    old: str
    new: str


NAMED = {
    "a budget that admits 1.001 times itself": Named(
        "budget",
        "budget/ledger/rules.py",
        "if not after <= budget.epsilon:",
        "if not after <= 1.001 * budget.epsilon:",
    ),
    "the earliest rows of a user kept instead of the latest": Named(
        "ingest",
        "ingest/assemble.py",
        'or spec.effective_selection != "sample":\n        return masks\n',
        ":\n        return masks\n    order_rows = lambda user, content: np.arange(len(user))\n",
    ),
    "only the first 50 items of a history left out of an answer": Named(
        "bundle",
        "bundle/scoring/selection.py",
        "query.history if query.exclude_seen else ()",
        "query.history[:50] if query.exclude_seen else ()",
    ),
    "eager noise every second step": Named(
        "train",
        "train/tables/embedding_tables.py",
        'if self._mode == "dpsgd":',
        'if self._mode == "dpsgd" and self.step % 2 == 0:',
    ),
}
