"""The chain of entries: whether each is whole, and follows the one before. Cheap enough for every decision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lazydp.components.budget.storage.entries import COLUMNS, GENESIS, KINDS, Entry, true_digest
from lazydp.components.shared.errors import InputError, IntegrityError

_MOST_MISSING = 20


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that does not hold, and the entry that shows it (None: the ledger as a whole)."""

    entry: int | None
    what: str

    def line(self) -> str:
        """The problem in one line."""
        return f"ledger: {self.what}" if self.entry is None else f"entry {self.entry}: {self.what}"


def check_chain(entries: Sequence[Entry], *, ledger: str) -> None:
    """Refuse to decide anything on a chain that does not hold.

    Raises:
        IntegrityError: the first problem.
    """
    for problem in chain_problems(entries):
        raise IntegrityError(
            f"ledger {ledger} is damaged, and nothing is decided on it: {problem.line()}. See `lazydp budget verify`, "
            "and restore it from a copy"
        )


def chain_problems(entries: Sequence[Entry]) -> Iterator[Problem]:
    expected = 1
    previous: str | None = GENESIS
    for entry in entries:
        number = entry.number
        wrong = [name for name in COLUMNS if not isinstance(getattr(entry, name), int if name == "number" else str)]
        if wrong:
            where = number if isinstance(number, int) else None
            yield Problem(where, f"it is not of the ledger: its {wrong[0]} is not what a column of that name holds")
            previous = None
            expected = number + 1 if isinstance(number, int) else expected + 1
            continue
        if number < expected:
            yield Problem(None, f"an entry carries the number {number!r}, which is out of order")
            continue
        if number > expected:
            yield from _missing(expected, number)
            previous = None  # the digest that it should follow is gone with the entry that carried it
        if true_digest(entry) != entry.digest:
            yield Problem(
                number, "its content does not match its digest: it was changed, or another was put in its place"
            )
            previous = None
        else:
            if entry.kind not in KINDS:
                yield Problem(number, f"an entry of kind {entry.kind!r} is not known")
            if previous is not None and entry.previous != previous:
                yield Problem(number, "it does not follow the entry before it: entries were rewritten or exchanged")
            previous = entry.digest
        expected = number + 1


def _missing(first: int, end: int) -> Iterator[Problem]:
    for number in range(first, min(end, first + _MOST_MISSING)):
        yield Problem(number, "it is missing: it was removed")
    if end - first > _MOST_MISSING:
        yield Problem(None, f"entries {first} to {end - 1} are missing")


def head_problems(entries: Sequence[Entry], expect_head: str | None) -> Iterator[Problem]:
    if expect_head is None:
        return
    number_text, _, digest = expect_head.partition(":")
    if not number_text.isdigit() or len(digest) != len(GENESIS):
        raise InputError(f"expected a head as NUMBER:DIGEST, the way verify prints it, found {expect_head!r}")
    number = int(number_text)
    if number == 0:
        return
    kept = next((entry for entry in entries if entry.number == number), None)
    if kept is None:
        yield Problem(number, "it is missing, though it was the head once: the end of the ledger was cut off")
    elif kept.digest != digest:
        yield Problem(number, "its digest is not the one that it had as the head: the ledger was rewritten")
