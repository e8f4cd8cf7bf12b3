"""What `dataset.json` says, and the names of a dataset's files; see `dataset` for the layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from lazydp.components.shared.errors import FormatError, IntegrityError
from lazydp.components.shared.files import read_json, sha256_file
from lazydp.components.shared.frozen_model import FrozenModel
from lazydp.components.shared.validation import Document

# Version 1 had no parts and no ranges, and its fingerprint was over whole columns.
FORMAT_VERSION = 2
MANIFEST = "dataset.json"
TRAIN = "train"
TEST = "test"
USERS_FILE = "users.arrow"
ROWS_FILE = "rows.arrow"
ITEMS_FILE = "items.arrow"
RANGES_FILE = "ranges.arrow"
VOCABULARY_FOLDER = "vocab"
BAG_PREFIX = "bag:"
# Why a row is left out that the contribution bound does not let in.
OVER_BOUND = "over_max_examples_per_user"
_Size = Annotated[int, Field(ge=0)]
_Part = Annotated[str, Field(pattern=r"^(\.|part-[0-9]{3})$")]


class Counts(FrozenModel):
    """How much there is; private figures.

    users and items count what the spec and the data name; max_examples_of_a_user is the most that any user contributes
    to training.
    """

    train: _Size
    test: _Size
    users: _Size
    items: _Size
    max_examples_of_a_user: _Size


class Origin(FrozenModel):
    """Where the interactions came from.

    digest: hash of who took what over all `rows` of the input (without users: of the encoded rows), private as the
    fingerprint is. Two datasets made of one log under different specs, which `fingerprint` tells apart, agree in it.
    """

    locations: tuple[str, ...]
    rows: _Size
    digest: str


class Kept(FrozenModel):
    """What later rows can be added to: of a dataset that keeps its encoded rows (`rows.arrow` of each part).

    parts: of the dataset, those without rows included.
    sums: what `Origin.digest` is made of, in decimal digits.
    time_kind: what the log's times count.
    users_digest: of the user features; empty without any.
    """

    parts: Annotated[int, Field(ge=1)]
    sums: tuple[str, str]
    time_kind: str
    users_digest: str


class FileEntry(FrozenModel):
    """Size and digest of one file of the dataset."""

    bytes: _Size
    sha256: str


class DatasetManifest(FrozenModel):
    """What `dataset.json` says; all of it is private but the spec.

    fingerprint: SHA-256 of the encoded content: equal content, whatever the order or the files it came from. Who knows
        all of the content but one user's can tell by it whether that user is in: it never leaves the private folders.
        Elsewhere the dataset goes by the identifier that `budget.ledger.identifiers` makes of it.
    family: the population that the rows are of, as declared: the spec's `family`, or its name; None where an older
        lazydp wrote the dataset, which is then a family of its own.
    max_examples_per_user: the contribution bound that holds for training, None where the spec states none.
    rejected: reason -> rows of the input that became no example.
    source: where the interactions came from, and what tells one log from another.
    kept: what rows are added to later; None where the dataset does not keep its rows.
    parts: folders of the dataset with the files of a part each, in order of hash; one part lies in the dataset's own.
    """

    spec: dict[str, Any]
    family: str | None = None
    fingerprint: str
    max_examples_per_user: int | None
    counts: Counts
    rejected: dict[str, _Size]
    source: Origin
    lazydp_version: str
    kept: Kept | None = None
    parts: Annotated[tuple[_Part, ...], Field(min_length=1)] = (".",)
    files: dict[str, FileEntry]


def without_places(document: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved spec as a document without what says where files lie: their content has digests in it."""
    kept: dict[str, Any] = _without_files(json.loads(json.dumps(dict(document))))
    for part in ("users", "items"):
        kept.get(part, {}).pop("path", None)
    return kept


def _without_files(document: Any) -> Any:
    """The document without the location of any vocabulary that carries a digest."""
    if isinstance(document, dict):
        kept = {key: _without_files(value) for key, value in document.items()}
        if "sha256" in kept:
            kept.pop("file", None)
        return kept
    if isinstance(document, list):
        return [_without_files(value) for value in document]
    return document


def read_manifest(folder: Path) -> DatasetManifest:
    """What `dataset.json` of a folder says.

    Raises:
        FormatError: no dataset, or of a newer format.
    """
    document = read_json(folder / MANIFEST, format_version=FORMAT_VERSION, what="dataset")
    return Document(f"dataset {folder / MANIFEST}", document).validated(DatasetManifest, raises=FormatError)


def check_files(folder: Path, manifest: DatasetManifest, *, verify: bool) -> None:
    """Compare the files of a dataset with what its manifest says.

    Args:
        folder: of the dataset.
        manifest: its manifest.
        verify: compare every file with its digest (reads all of it once); sizes are compared in any case.

    Raises:
        FormatError: a file is missing.
        IntegrityError: a file differs.
    """
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise FormatError(f"dataset {folder} is torn: {name} is missing; run ingest again")
        if path.stat().st_size != entry.bytes:
            found = path.stat().st_size
            raise IntegrityError(
                f"dataset {folder}: {name} has {found} bytes, {MANIFEST} says {entry.bytes}; run ingest again"
            )
        if verify and sha256_file(path) != entry.sha256:
            raise IntegrityError(f"dataset {folder}: {name} differs from its digest in {MANIFEST}; run ingest again")
