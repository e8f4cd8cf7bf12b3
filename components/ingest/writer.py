"""Writes the encoded dataset piece by piece (see `dataset` for its layout)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa

from lazydp.components.features.catalogue import catalogue_table
from lazydp.components.features.spec import FeatureSpec, ListFeature
from lazydp.components.ingest.assemble import Assembled, SplitRows
from lazydp.components.ingest.columns import Column, ListColumn, NumberColumn, TextColumn, write_arrow
from lazydp.components.ingest.manifest import (
    BAG_PREFIX,
    FORMAT_VERSION,
    ITEMS_FILE,
    MANIFEST,
    TEST,
    TRAIN,
    USERS_FILE,
    VOCABULARY_FOLDER,
    Counts,
    DatasetManifest,
    FileEntry,
    Origin,
)
from lazydp.components.ingest.resolve import ResolvedSpec
from lazydp.components.shared.files import PRIVATE_DIRECTORY, PRIVATE_FILE, sha256_file, write_json


class _SplitWriter:
    """One split's columns."""

    def __init__(self, folder: Path, name: str, spec: FeatureSpec) -> None:
        self.size = 0
        self._path = folder / f"{name}.arrow"
        self._notes = _notes(spec)
        stem = folder / f".{name}"

        def numbers(column: str, dtype: object, width: int | None = None) -> NumberColumn:
            return NumberColumn(Path(f"{stem}.{column}"), dtype, width=width)

        self._columns: dict[str, Column] = {"label": numbers("label", np.float32)}
        if spec.num_dense:
            self._columns["dense"] = numbers("dense", np.float32, spec.num_dense)
        embedded = spec.embedded("user", "context")
        lists = [feature.name for feature in embedded if isinstance(feature, ListFeature)]
        singles = len(embedded) - len(lists) + (spec.user is not None and spec.user.embed)
        if singles:
            self._columns["codes"] = numbers("codes", np.int32, singles)
        if spec.item is not None:
            self._columns["item"] = numbers("item", np.int32)
        if spec.user is not None:
            self._columns["user_index"] = numbers("user_index", np.int64)
        if spec.history is not None:
            self._columns["history_end"] = numbers("history_end", np.int64)
            self._columns["history_length"] = numbers("history_length", np.int32)
        for name_of_list in lists:
            self._columns[BAG_PREFIX + name_of_list] = ListColumn(Path(f"{stem}.bag-{name_of_list}.x"))

    def append(self, examples: SplitRows, *, users_before: int, items_before: int) -> None:
        user, end = examples.user_index, examples.history_end
        fields = {
            "label": examples.label,
            "dense": examples.dense,
            "codes": examples.codes,
            "item": examples.item,
            "user_index": None if user is None else user + users_before,
            "history_end": None if end is None else end + items_before,
            "history_length": examples.history_length,
        }
        for name, column in self._columns.items():
            if isinstance(column, ListColumn):
                column.append(examples.lists[name.removeprefix(BAG_PREFIX)])
            else:
                values = fields[name]
                assert isinstance(column, NumberColumn)
                assert values is not None
                column.append(values)
        self.size += len(examples)

    def close(self) -> None:
        for column in self._columns.values():
            column.close()

    def finish(self) -> dict[str, str]:
        """Write the split's file; returns column -> fingerprint."""
        write_arrow(self._path, self._columns, num_rows=self.size, notes=self._notes)
        return {f"{self._path.stem}.{name}": column.fingerprint() for name, column in self._columns.items()}


class _UsersWriter:
    """The users of the dataset, by user_index."""

    def __init__(self, folder: Path, spec: FeatureSpec) -> None:
        self.size = 0
        self.num_items = 0
        self._path = folder / USERS_FILE
        self._user = TextColumn(folder / ".users.user.x")
        self._items = ListColumn(folder / ".users.items.x") if spec.item is not None else None
        self._columns: dict[str, Column] = {"user": self._user}
        if self._items is not None:
            self._columns["items"] = self._items

    def append(self, part: Assembled) -> None:
        assert part.users is not None
        self._user.append(part.users)
        if self._items is not None:
            assert part.sequences is not None
            self._items.append(part.sequences)
            self.num_items += len(part.sequences.values)
        self.size += len(part.users)

    def close(self) -> None:
        for column in self._columns.values():
            column.close()

    def finish(self) -> dict[str, str]:
        write_arrow(self._path, self._columns, num_rows=self.size, notes={})
        return {f"users.{name}": column.fingerprint() for name, column in self._columns.items()}


class DatasetWriter:
    """Takes the partitions of a dataset in order and writes its folder; a context manager, which closes its files."""

    def __init__(self, folder: Path, resolved: ResolvedSpec) -> None:
        self._folder = folder
        self._resolved = resolved
        spec = resolved.spec
        self._splits = {name: _SplitWriter(folder, name, spec) for name in (TRAIN, TEST)}
        self._users = _UsersWriter(folder, spec) if spec.user is not None else None
        self._max_examples = 0
        self.over_bound = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for split in self._splits.values():
            split.close()
        if self._users is not None:
            self._users.close()

    def append(self, part: Assembled) -> None:
        """Append one partition."""
        users, items = (self._users.size, self._users.num_items) if self._users is not None else (0, 0)
        self._splits[TRAIN].append(part.train, users_before=users, items_before=items)
        self._splits[TEST].append(part.test, users_before=users, items_before=items)
        if self._users is not None:
            self._users.append(part)
        self._max_examples = max(self._max_examples, part.max_examples)
        self.over_bound += part.over_bound

    def finish(self, *, origin: Origin, rejected: Mapping[str, int]) -> DatasetManifest:
        """Write what is left: the catalogue, the vocabularies and the manifest."""
        spec = self._resolved.spec
        parts: dict[str, str] = {}
        for split in self._splits.values():
            parts |= split.finish()
        if self._users is not None:
            parts |= self._users.finish()
        num_items = self._write_catalogue(parts)
        self._resolved.vocabularies.save(self._folder / VOCABULARY_FOLDER)
        manifest = DatasetManifest(
            spec=spec.document(),
            family=spec.family or spec.name,
            fingerprint=_fingerprint(spec, parts),
            max_examples_per_user=spec.max_examples_per_user,
            counts=Counts(
                train=self._splits[TRAIN].size,
                test=self._splits[TEST].size,
                users=self._users.size if self._users is not None else 0,
                items=num_items,
                max_examples_of_a_user=self._max_examples,
            ),
            rejected=dict(sorted(rejected.items())),
            source=origin,
            lazydp_version=version("lazydp"),
            files=_seal(self._folder),
        )
        write_json(
            self._folder / MANIFEST,
            manifest.model_dump(mode="json"),
            format_version=FORMAT_VERSION,
            mode=PRIVATE_FILE,
        )
        return manifest

    def _write_catalogue(self, parts: dict[str, str]) -> int:
        if self._resolved.spec.item is None:
            return 0
        table = catalogue_table(self._resolved.spec, self._resolved.vocabularies, self._resolved.items)
        with pa.OSFile(str(self._folder / ITEMS_FILE), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        for name in table.column_names:
            text = json.dumps(table.column(name).to_pylist())
            parts[f"items.{name}"] = hashlib.sha256(text.encode()).hexdigest()
        return int(table.num_rows)


def _notes(spec: FeatureSpec) -> dict[str, str]:
    embedded = spec.embedded("user", "context")
    singles = [feature.name for feature in embedded if not isinstance(feature, ListFeature)]
    if spec.user is not None and spec.user.embed:
        singles.insert(0, "user")
    return {
        "codes": ", ".join(singles),
        "dense": ", ".join(feature.name for feature in spec.dense("user", "context")),
        "history_end": "end of a window of users.arrow items (values laid end to end)",
    }


def _fingerprint(spec: FeatureSpec, parts: Mapping[str, str]) -> str:
    """SHA-256 over the spec (which vouches for its lists) and the content of every column.

    Where files lay does not count, only what was in them.
    """
    document = spec.document()
    document.pop("family", None)  # a declaration about the rows, none of them
    for part in ("users", "items"):
        document.get(part, {}).pop("path", None)
    text = json.dumps({"spec": _without_files(document), "columns": dict(parts)}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


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


def _seal(folder: Path) -> dict[str, FileEntry]:
    """Make every file private and take its digest."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            path.chmod(PRIVATE_DIRECTORY)
            continue
        path.chmod(PRIVATE_FILE)
        files[path.relative_to(folder).as_posix()] = FileEntry(bytes=path.stat().st_size, sha256=sha256_file(path))
    return files
