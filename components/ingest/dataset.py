"""The encoded dataset: a private folder of memory-mapped Arrow files, read at random without copying it.

    dataset.json    feature spec, counts, fingerprint, contribution bound, rejected rows by reason, digests of the files
    ranges.arrow    what each range of the users' hashes holds, by count and digest (see `ranges`)
    train.arrow     the training examples, by user, then time: label, dense, codes, item, user_index, bags, history
    test.arrow      the examples held out for evaluation, likewise
    users.arrow     user id (private) and training items in order of time, by user_index; absent without a user column
    items.arrow     the public catalogue (see `features.catalogue`); absent without an item
    vocab/          the declared lists of values

With several parts, `train.arrow`, `test.arrow` and `users.arrow` lie in a folder for each: `part-000` and so on, in
order of hash. Users and training items are then counted from the first of the part.

A history is stored as the window `history_end - history_length .. history_end` of all users' training items laid end to
end (`users.arrow`, values of `items`): many examples share one sequence, and the file stays small.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import torch

from lazydp.components.features.batch import Bags, ItemCatalogue
from lazydp.components.features.item_tensors import item_catalogue
from lazydp.components.features.spec import FeatureSpec
from lazydp.components.features.vocabulary import Vocabularies
from lazydp.components.ingest.manifest import (
    ITEMS_FILE,
    MANIFEST,
    TEST,
    TRAIN,
    USERS_FILE,
    VOCABULARY_FOLDER,
    DatasetManifest,
    check_files,
    read_manifest,
)
from lazydp.components.ingest.mapped_file import MappedFile
from lazydp.components.ingest.split import Split, SplitPart, list_parts
from lazydp.components.shared.errors import FormatError, InputError

Array: TypeAlias = np.ndarray[Any, Any]


class EncodedDataset:
    """A dataset that ingest wrote. Open one with `EncodedDataset.open`."""

    def __init__(self, path: Path, manifest: DatasetManifest, spec: FeatureSpec) -> None:
        self.path = path
        self.manifest = manifest
        self.spec = spec
        self.vocabularies = Vocabularies.load(spec, path / VOCABULARY_FOLDER)
        folders = [path / part for part in manifest.parts]
        self._user_files = [MappedFile(folder / USERS_FILE) for folder in folders] if spec.user is not None else []
        users = [file.columns for file in self._user_files]
        # Canonical user ids by user_index, private; None without a user column.
        self.users: pa.Array | None = _joined([part["user"] for part in users]) if users else None
        self._sequences = [list_parts(part["items"]) for part in users if "items" in part]
        self.item_table: pa.Table | None = _read_table(path / ITEMS_FILE) if spec.item is not None else None
        before = np.cumsum([0, *(len(part["user"]) for part in users)])
        self._splits = {name: self._open_split(name, folders, before) for name in (TRAIN, TEST)}
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
        manifest = read_manifest(folder)
        spec = FeatureSpec.from_document(manifest.spec, where=f"dataset {folder / MANIFEST}")
        check_files(folder, manifest, verify=verify)
        try:
            return cls(folder, manifest, spec)
        except (pa.ArrowException, KeyError, OSError) as error:
            raise FormatError(f"dataset {folder} cannot be read: {error}; run ingest again") from None

    def _open_split(self, name: str, folders: Sequence[Path], users_before: Array) -> Split:
        parts, files = [], list(self._user_files)
        for number, folder in enumerate(folders):
            file = MappedFile(folder / f"{name}.arrow")
            files.append(file)
            sequence = self._sequences[number][0] if self._sequences else np.empty(0, dtype=np.int32)
            before = int(users_before[number]) if self.users is not None else 0
            parts.append(SplitPart(self.spec, file.columns, sequence=sequence, users_before=before))
        return Split(self.spec, parts, files)

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
        """What `seen_items` says, int32 [n], and offsets [num_users + 1] in it; views of the file of a single part.

        Raises:
            InputError: the dataset has no user column or no item.
        """
        if not self._sequences:
            raise InputError("this dataset lacks users or items: there is nothing that a user has seen")
        return self._whole_sequences

    @cached_property
    def _whole_sequences(self) -> tuple[Array, Array]:
        if len(self._sequences) == 1:
            return self._sequences[0]
        lengths = np.concatenate([np.diff(offsets) for _, offsets in self._sequences])
        values = np.concatenate([values for values, _ in self._sequences])
        return values, np.append(0, np.cumsum(lengths))


def _read_table(path: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _joined(parts: Sequence[pa.Array]) -> pa.Array:
    return parts[0] if len(parts) == 1 else pa.concat_arrays(parts)
