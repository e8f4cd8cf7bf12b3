"""The encoded dataset: a private folder of memory-mapped Arrow files, read at random without copying it.

    dataset.json    feature spec, counts, fingerprint, contribution bound, rejected rows by reason, digests of the files
    train.arrow     the training examples, by user, then time: label, dense, codes, item, user_index, bags, history
    test.arrow      the examples held out for evaluation, likewise
    users.arrow     user id (private) and training items in order of time, by user_index; absent without a user column
    items.arrow     the public catalogue (see `features.catalogue`); absent without an item
    vocab/          the declared lists of values

A history is stored as the window `history_end - history_length .. history_end` of all users' training items laid end to
end (`users.arrow`, values of `items`): many examples share one sequence, and the file stays small.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import torch

from lazydp.components.features.batch import Bags, Batch, ItemCatalogue
from lazydp.components.features.encode import ranges
from lazydp.components.features.item_tensors import item_catalogue
from lazydp.components.features.spec import HISTORY, USER, FeatureSpec, ListFeature
from lazydp.components.features.vocabulary import Vocabularies
from lazydp.components.ingest.manifest import (
    BAG_PREFIX,
    FORMAT_VERSION,
    ITEMS_FILE,
    MANIFEST,
    TEST,
    TRAIN,
    USERS_FILE,
    VOCABULARY_FOLDER,
    DatasetManifest,
)
from lazydp.components.shared.errors import FormatError, InputError, IntegrityError
from lazydp.components.shared.files import read_json, sha256_file
from lazydp.components.shared.validation import Document

Array: TypeAlias = np.ndarray[Any, Any]
Rows: TypeAlias = np.ndarray[tuple[int], np.dtype[np.int64]]


class Split:
    """The examples of one split; `take` reads any of them.

    The arrays are read-only views of the file: label float32 [n], item int32 [n] or None, user_index int64 [n]
    (ascending) or None.
    """

    def __init__(self, spec: FeatureSpec, columns: Mapping[str, pa.Array], sequence: Array) -> None:
        self._size = len(columns["label"])
        self._sequence = sequence
        self.label: Array = _numbers(columns["label"])
        self.item: Array | None = _numbers(columns["item"]) if "item" in columns else None
        self.user_index: Array | None = _numbers(columns["user_index"]) if "user_index" in columns else None
        self._dense = _matrix(columns.get("dense"), self._size, spec.num_dense, np.float32)
        embedded = spec.embedded("user", "context")
        self._singles = [f.name for f in embedded if not isinstance(f, ListFeature)]
        if spec.user is not None and spec.user.embed:
            self._singles.insert(0, USER)
        self._codes = _matrix(columns.get("codes"), self._size, len(self._singles), np.int32)
        self._lists = {
            f.name: _list_parts(columns[BAG_PREFIX + f.name]) for f in embedded if isinstance(f, ListFeature)
        }
        self._history = (
            (_numbers(columns["history_end"]), _numbers(columns["history_length"]))
            if spec.history is not None
            else None
        )
        self._order = [feature.name for feature in spec.example_features()]

    def __len__(self) -> int:
        return self._size

    def take(self, rows: Rows) -> Batch:
        """The examples `rows` (int64 [B], any order, repeats allowed, none allowed), in that order.

        Raises:
            IndexError: a row outside 0..len - 1.
        """
        rows = np.asarray(rows, dtype=np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= self._size):
            raise IndexError(f"rows must lie in 0..{self._size - 1}, found {rows.min()}..{rows.max()}")
        bags = self._single_bags(rows) | self._list_bags(rows)
        return Batch(
            size=len(rows),
            labels=torch.from_numpy(self.label[rows]),
            dense=torch.from_numpy(self._dense[rows]),
            bags={name: bags[name] for name in self._order},
            item=None if self.item is None else torch.from_numpy(self.item[rows].astype(np.int64)),
            user_index=None if self.user_index is None else torch.from_numpy(self.user_index[rows]),
        )

    def _single_bags(self, rows: Rows) -> dict[str, Bags]:
        codes = torch.from_numpy(np.ascontiguousarray(self._codes[rows].T, dtype=np.int64))
        offsets = torch.arange(len(rows) + 1)
        return {name: Bags(codes[column], offsets) for column, name in enumerate(self._singles)}

    def _list_bags(self, rows: Rows) -> dict[str, Bags]:
        bags = {}
        for name, (values, offsets) in self._lists.items():
            starts = offsets[rows]
            bags[name] = _gathered(values, starts, offsets[rows + 1] - starts)
        if self._history is not None:
            ends, lengths = self._history[0][rows], self._history[1][rows].astype(np.int64)
            bags[HISTORY] = _gathered(self._sequence, ends - lengths, lengths)
        return bags

    def rows_of(self, users: Rows) -> tuple[Rows, Rows]:
        """Where the examples of `users` (int64 [U], user_index) begin, and how many each has: int64 [U] both.

        A user's examples lie side by side, so two binary searches find them: what isn't asked for isn't read.

        Raises:
            InputError: the dataset has no user column.
        """
        if self.user_index is None:
            raise InputError("this dataset has no user column: its privacy unit can only be the example")
        starts = np.searchsorted(self.user_index, users).astype(np.int64)
        return starts, np.searchsorted(self.user_index, users, side="right") - starts


class EncodedDataset:
    """A dataset that ingest wrote. Open one with `EncodedDataset.open`."""

    def __init__(self, path: Path, manifest: DatasetManifest, spec: FeatureSpec) -> None:
        self.path = path
        self.manifest = manifest
        self.spec = spec
        self.vocabularies = Vocabularies.load(spec, path / VOCABULARY_FOLDER)
        users = _read_columns(path / USERS_FILE) if spec.user is not None else {}
        # Canonical user ids by user_index, private; None without a user column.
        self.users: pa.Array | None = users.get("user")
        self._sequences = _list_parts(users["items"]) if "items" in users else None
        self.item_table: pa.Table | None = _read_table(path / ITEMS_FILE) if spec.item is not None else None
        self._splits = {name: self._open_split(name) for name in (TRAIN, TEST)}
        self._items: ItemCatalogue | None = None

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True) -> EncodedDataset:
        """Open a dataset folder.

        Args:
            path: the folder.
            verify: compare every file with its digest (reads all of it once); sizes are compared in any case.

        Raises:
            FormatError: no dataset, torn, or of a newer format.
            IntegrityError: a file differs from its digest.
        """
        folder = Path(path)
        document = read_json(folder / MANIFEST, format_version=FORMAT_VERSION, what="dataset")
        manifest = Document(f"dataset {folder / MANIFEST}", document).validated(DatasetManifest, raises=FormatError)
        spec = FeatureSpec.from_document(manifest.spec, where=f"dataset {folder / MANIFEST}")
        _check_files(folder, manifest, verify=verify)
        try:
            return cls(folder, manifest, spec)
        except (pa.ArrowException, KeyError, OSError) as error:
            raise FormatError(f"dataset {folder} cannot be read: {error}; run ingest again") from None

    def _open_split(self, name: str) -> Split:
        sequence = self._sequences[0] if self._sequences is not None else np.empty(0, dtype=np.int32)
        return Split(self.spec, _read_columns(self.path / f"{name}.arrow"), sequence)

    def split(self, name: str) -> Split:
        """The split "train" or "test".

        Raises:
            InputError: another name.
        """
        if name not in self._splits:
            raise InputError(f"a dataset has the splits train and test, not {name!r}")
        return self._splits[name]

    def files_digest(self) -> str:
        """A digest over those of all files: private, as the fingerprint is, and taken of what is read, not declared."""
        listed = sorted((name, entry.sha256) for name, entry in self.manifest.files.items())
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()

    @property
    def num_users(self) -> int:
        """Users with at least one accepted row; user_index runs 0..num_users - 1."""
        return self.manifest.counts.users

    @property
    def items(self) -> ItemCatalogue:
        """The public features of the items; empty without an item."""
        if self._items is None:
            self._items = item_catalogue(self.spec, self.item_table if self.item_table is not None else pa.table({}))
        return self._items

    def seen_items(self) -> Bags:
        """For each user_index the items (codes) of the positive training rows, in order of time, repeats included.

        All of them, also those that the contribution bound keeps out of training.

        Raises:
            InputError: the dataset has no user column or no item.
        """
        values, offsets = self.histories()
        return Bags(torch.from_numpy(values.astype(np.int64)), torch.from_numpy(offsets.copy()))

    def histories(self) -> tuple[Array, Array]:
        """What `seen_items` says, as views of the memory-mapped file: int32 [n], and offsets [num_users + 1] in it.

        Raises:
            InputError: the dataset has no user column or no item.
        """
        if self._sequences is None:
            raise InputError("this dataset lacks users or items: there is nothing that a user has seen")
        return self._sequences


def _check_files(folder: Path, manifest: DatasetManifest, *, verify: bool) -> None:
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


def _read_table(path: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _read_columns(path: Path) -> dict[str, pa.Array]:
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    if reader.num_record_batches != 1:
        raise FormatError(f"{path}: expected one record batch, found {reader.num_record_batches}; run ingest again")
    batch = reader.get_batch(0)
    return dict(zip(batch.schema.names, batch.columns, strict=True))


def _numbers(array: pa.Array) -> Array:
    return np.asarray(array.to_numpy(zero_copy_only=True))


def _matrix(array: pa.Array | None, size: int, width: int, dtype: Any) -> Array:
    if array is None:
        return np.empty((size, width), dtype=dtype)
    return _numbers(array.flatten()).reshape(size, width)


def _list_parts(array: pa.Array) -> tuple[Array, Array]:
    return _numbers(array.values), _numbers(array.offsets)


def _gathered(values: Array, starts: Rows, lengths: Rows) -> Bags:
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return Bags(torch.from_numpy(values[ranges(starts, lengths)].astype(np.int64)), torch.from_numpy(offsets))
