"""Whether the ledger is as new as the bundles that are served: each names the ledger's last entry before it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from lazydp.components.budget.storage.entries import Entry
from lazydp.components.bundle.manifest import BundleManifest

OLDER = (
    "the ledger is older than the model: it lacks entries that were there when the model was released (a copy or a "
    "backup from before), so what it says was spent is too low"
)
ANOTHER = (
    "the ledger is not the one that the model was released under, or was rewritten: what it says was spent may be too "
    "low"
)


@dataclass(frozen=True, slots=True)
class LedgerAge:
    """What is needed of a reading of the ledger to tell its age.

    Attributes:
        digests: of its entries, in the order of their numbers, which begin with 1.
        releases: digests or names of what it says was released.
    """

    digests: tuple[str, ...]
    releases: frozenset[str]

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> Self:
        """From the ledger's entries."""
        entries = tuple(entries)
        contents = [entry.content() for entry in entries if entry.kind == "committed"]
        return cls(
            tuple(entry.digest for entry in entries),
            frozenset(content["release"] for content in contents if isinstance(content.get("release"), str)),
        )

    def problem(self, manifest: BundleManifest) -> str | None:
        """Why the ledger's figures cannot be trusted beside this bundle; None where nothing speaks against them."""
        number, _, digest = manifest.lineage.ledger_head.partition(":")
        if not number.isdecimal() or not int(number):
            return None  # no ledger, an empty one, or a bundle of an older lazydp
        if int(number) > len(self.digests):
            return OLDER
        if self.digests[int(number) - 1] != digest:
            return ANOTHER
        return None if manifest.version in self.releases else OLDER
