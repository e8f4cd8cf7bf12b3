"""What `dataset.json` says, and the names of a dataset's files; see `dataset` for the layout."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from lazydp.components.shared.frozen_model import FrozenModel

# Version 1 had no parts and no ranges, and its fingerprint was over whole columns.
FORMAT_VERSION = 2
MANIFEST = "dataset.json"
TRAIN = "train"
TEST = "test"
USERS_FILE = "users.arrow"
ITEMS_FILE = "items.arrow"
RANGES_FILE = "ranges.arrow"
VOCABULARY_FOLDER = "vocab"
BAG_PREFIX = "bag:"
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
    parts: Annotated[tuple[_Part, ...], Field(min_length=1)] = (".",)
    files: dict[str, FileEntry]
