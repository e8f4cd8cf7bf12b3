"""Writes the encoded dataset piece by piece (see `dataset` for its layout)."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa

from lazydp.components.features.catalogue import catalogue_table
from lazydp.components.features.spec import FeatureSpec, ListFeature
from lazydp.components.ingest.assemble import Assembled, SplitRows
from lazydp.components.ingest.columns import Column, ListColumn, NumberColumn, TextColumn, write_arrow
from lazydp.components.ingest.kept import RowsWriter
from lazydp.components.ingest.manifest import (
    BAG_PREFIX,
    FORMAT_VERSION,
    ITEMS_FILE,
    MANIFEST,
    OVER_BOUND,
    RANGES_FILE,
    ROWS_FILE,
    TEST,
    TRAIN,
    USERS_FILE,
    VOCABULARY_FOLDER,
    Counts,
    DatasetManifest,
    FileEntry,
    Kept,
    Origin,
    without_places,
)
from lazydp.components.ingest.ranges import Range, write_ranges
from lazydp.components.ingest.resolve import ResolvedSpec
from lazydp.components.ingest.workers import cores, in_order
from lazydp.components.shared.files import PRIVATE_DIRECTORY, PRIVATE_FILE, sha256_file, write_json
from lazydp.components.shared.version import release


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

    def finish(self) -> tuple[Path, FileEntry]:
        """Write the split's file."""
        return self._path, write_arrow(self._path, self._columns, num_rows=self.size, notes=self._notes)


class _UsersWriter:
    """The users of a part, by user_index."""

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

    def finish(self) -> tuple[Path, FileEntry]:
        return self._path, write_arrow(self._path, self._columns, num_rows=self.size, notes={})


class PartWriter:
    """Takes partitions in order of hash and writes the files of one part; a context manager, which closes its files.

    Users and training items are counted from the part's first ones.
    """

    def __init__(self, folder: Path, spec: FeatureSpec) -> None:
        folder.mkdir(mode=PRIVATE_DIRECTORY, exist_ok=True)
        self._rows = RowsWriter(folder / ROWS_FILE)
        self._splits = {name: _SplitWriter(folder, name, spec) for name in (TRAIN, TEST)}
        self._users = _UsersWriter(folder, spec) if spec.user is not None else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for split in self._splits.values():
            split.close()
        if self._users is not None:
            self._users.close()
        self._rows.close()

    def append(self, part: Assembled, rows: Sequence[pa.RecordBatch]) -> None:
        """Append one partition, and the rows to be kept of it, if any."""
        self._rows.append(rows)
        users, items = (self._users.size, self._users.num_items) if self._users is not None else (0, 0)
        self._splits[TRAIN].append(part.train, users_before=users, items_before=items)
        self._splits[TEST].append(part.test, users_before=users, items_before=items)
        if self._users is not None:
            self._users.append(part)

    def finish(self) -> dict[Path, FileEntry]:
        """Write the files, on all cores; returns the size and digest of each."""
        writers: list[_SplitWriter | _UsersWriter] = [*self._splits.values()]
        if self._users is not None:
            writers.append(self._users)
        return dict(in_order(lambda writer: writer.finish(), writers, workers=cores()))


def finish_dataset(
    folder: Path,
    resolved: ResolvedSpec,
    *,
    parts: Sequence[str],
    ranges: Sequence[Range],
    files: Mapping[Path, FileEntry],
    origin: Origin,
    rejected: Mapping[str, int],
    kept: Kept | None,
) -> DatasetManifest:
    """Write what stands beside the parts: the catalogue, the vocabularies, the ranges and the manifest.

    Args:
        folder: of the dataset, with the folders of its parts.
        resolved: the spec.
        parts: the folders of the parts, in order of hash.
        ranges: of all parts, in their order.
        files: size and digest of those files of parts that are known; also of those that are in a store already.
        origin: where the rows came from.
        rejected: reason -> rows that were not accepted.
        kept: what rows are added to later, if they are kept.
    """
    spec = resolved.spec
    over_bound = sum(found.rows - found.train - found.test for found in ranges)
    catalogue, num_items = _write_catalogue(folder, resolved)
    resolved.vocabularies.save(folder / VOCABULARY_FOLDER)
    write_ranges(folder / RANGES_FILE, ranges)
    manifest = DatasetManifest(
        spec=spec.document(),
        family=spec.family or spec.name,
        fingerprint=_fingerprint(spec, catalogue, ranges),
        max_examples_per_user=spec.max_examples_per_user,
        counts=Counts(
            train=sum(found.train for found in ranges),
            test=sum(found.test for found in ranges),
            users=sum(found.users for found in ranges),
            items=num_items,
            max_examples_of_a_user=max((found.most for found in ranges), default=0),
        ),
        rejected=dict(sorted((+(Counter(rejected) + Counter({OVER_BOUND: over_bound}))).items())),
        source=origin,
        lazydp_version=release(),
        kept=kept,
        parts=tuple(parts),
        files=_seal(folder, files),
    )
    write_json(
        folder / MANIFEST,
        manifest.model_dump(mode="json"),
        format_version=FORMAT_VERSION,
        mode=PRIVATE_FILE,
    )
    return manifest


def _write_catalogue(folder: Path, resolved: ResolvedSpec) -> tuple[dict[str, str], int]:
    """Returns the digest of each column, and the number of items."""
    if resolved.spec.item is None:
        return {}, 0
    table = catalogue_table(resolved.spec, resolved.vocabularies, resolved.items)
    with pa.OSFile(str(folder / ITEMS_FILE), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    texts = {name: json.dumps(table.column(name).to_pylist()) for name in table.column_names}
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}, int(table.num_rows)


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


def _fingerprint(spec: FeatureSpec, catalogue: Mapping[str, str], ranges: Sequence[Range]) -> str:
    """SHA-256 over the spec (which vouches for its lists), the catalogue, and what every range holds.

    Where files lay does not count, only what was in them.
    """
    document = without_places(spec.document())
    document.pop("family", None)  # a declaration about the rows, none of them
    content = {
        "spec": document,
        "items": dict(catalogue),
        "ranges": [[r.number, r.train, r.test, r.users, r.items, r.digest] for r in ranges],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _seal(folder: Path, known: Mapping[Path, FileEntry]) -> dict[str, FileEntry]:
    """Make every file private and take its digest where it isn't known; one that is known may lie elsewhere."""
    found = []
    for path in folder.rglob("*"):
        path.chmod(PRIVATE_DIRECTORY if path.is_dir() else PRIVATE_FILE)
        if path.is_file():
            found.append(path)
    paths = sorted({*found, *known})
    entries = in_order(lambda path: known.get(path) or file_entry(path), paths, workers=cores())
    return {path.relative_to(folder).as_posix(): entry for path, entry in zip(paths, entries, strict=True)}


def file_entry(path: Path) -> FileEntry:
    """Size and digest of a file."""
    return FileEntry(bytes=path.stat().st_size, sha256=sha256_file(path))
