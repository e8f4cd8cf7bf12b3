"""Entries of the ledger: lines that are only ever added, each carrying the digest of the one before.

The digest covers every column, so an edit, a removal and a swap show. Whoever can rewrite the whole table can also
rewrite every digest after an edit; against that, keep the head (`number:digest`) somewhere else and check it later
(`lazydp budget verify --expect-head`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lazydp.components.shared.errors import IntegrityError

Kind = Literal["dataset", "budget", "reserved", "bound", "leased", "committed", "voided"]
KINDS: tuple[str, ...] = get_args(Kind)

GENESIS = "0" * 64
_BRACKET = re.compile(r"[\[\]{}]")

# Of an entry's body. 2: datasets stand under identifiers instead of hashes of their content (`identifiers`).
# 3: runs are bound to their noise key. 4: attempts of a run that several ranks train are numbered; these entries only.
FORMAT_VERSION = 4
_VERSION_OF = {"leased": 4}
_VERSION_OF_OTHERS = 3
# Of what a digest covers; another number would make every digest written before it a wrong one.
_DIGEST_VERSION = 1


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the ledger, as stored.

    Attributes:
        number: 1, 2, 3, ... without gaps.
        kind: what happened.
        dataset: identifier of the dataset concerned (`identifiers` says what it tells of the dataset: nothing).
        run_id: the run concerned, or empty.
        recorded_at: UTC, ISO 8601 with microseconds.
        recorded_by: who did it.
        body: everything else, as canonical JSON.
        previous: digest of the entry before; zeros for the first.
        digest: SHA-256 over all of the above.
    """

    number: int
    kind: str
    dataset: str
    run_id: str
    recorded_at: str
    recorded_by: str
    body: str
    previous: str
    digest: str

    def content(self) -> dict[str, Any]:
        """The body, parsed.

        Raises:
            IntegrityError: not a JSON object, or nested more deeply than anything that a ledger holds.
        """
        try:
            document = json.loads(self.body)
        except (ValueError, TypeError, RecursionError) as error:
            raise IntegrityError(f"ledger entry {self.number} holds no JSON: {type(error).__name__}") from error
        if not isinstance(document, dict):
            raise IntegrityError(f"ledger entry {self.number} holds no JSON object: {self.body[:40]!r}")
        if _depth(self.body) > _MOST_DEPTH:
            raise IntegrityError(f"ledger entry {self.number} is nested more deeply than anything that a ledger holds")
        return document


COLUMNS: tuple[str, ...] = Entry.__slots__
_MOST_DEPTH = 64


def _depth(text: str) -> int:
    """At most how deeply the JSON `text` is nested (brackets inside strings count as well)."""
    depth = deepest = 0
    for bracket in _BRACKET.findall(text):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


def canonical_json(document: Mapping[str, Any]) -> str:
    """One text for one document: sorted keys, no spaces, no NaN."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest_of(
    *,
    number: int,
    kind: str,
    dataset: str,
    run_id: str,
    recorded_at: str,
    recorded_by: str,
    body: str,
    previous: str,
) -> str:
    """The digest that an entry of these columns carries."""
    covered = [_DIGEST_VERSION, number, kind, dataset, run_id, recorded_at, recorded_by, body, previous]
    return hashlib.sha256(json.dumps(covered, ensure_ascii=True).encode()).hexdigest()


def true_digest(entry: Entry) -> str:
    """The digest that `entry` should carry."""
    columns = {name: getattr(entry, name) for name in COLUMNS if name != "digest"}
    return digest_of(**columns)


def next_entry(
    last: Entry | None,
    *,
    kind: Kind,
    dataset: str,
    run_id: str,
    recorded_at: str,
    recorded_by: str,
    content: Mapping[str, Any],
) -> Entry:
    """The entry that follows `last`, chained to it."""
    number = 1 if last is None else last.number + 1
    previous = GENESIS if last is None else last.digest
    body = canonical_json({"format_version": _VERSION_OF.get(kind, _VERSION_OF_OTHERS), **content})
    digest = digest_of(
        number=number,
        kind=kind,
        dataset=dataset,
        run_id=run_id,
        recorded_at=recorded_at,
        recorded_by=recorded_by,
        body=body,
        previous=previous,
    )
    return Entry(number, kind, dataset, run_id, recorded_at, recorded_by, body, previous, digest)


def head_of(last: Entry | None) -> str:
    """`number:digest` of the last entry: what to keep elsewhere."""
    return f"0:{GENESIS}" if last is None else f"{last.number}:{last.digest}"
