"""Encoded rows that a dataset keeps, so that later rows can be added without reading the first ones again.

Each part has a file of them: a record batch for each hash range that has rows, in the order of the ranges, and the rows
in their final order. So the bytes depend on the rows alone.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lazydp.components.features.spec import FeatureSpec, ImplicitLabel
from lazydp.components.ingest.assemble import Assembled, content_hashes
from lazydp.components.ingest.manifest import (
    OVER_BOUND,
    RANGES_FILE,
    ROWS_FILE,
    TEST,
    TRAIN,
    USERS_FILE,
    DatasetManifest,
    Kept,
    check_files,
    read_manifest,
    without_places,
)
from lazydp.components.ingest.ranges import Range, part_of_range, read_ranges
from lazydp.components.ingest.rows import (
    HASH_COLUMN,
    LABEL_COLUMN,
    NO_COLUMN,
    USER_COLUMN,
    USER_HASH_COLUMN,
    with_label,
)
from lazydp.components.shared.errors import InputError
from lazydp.components.shared.files import PRIVATE_FILE

_TIMES = {"number": "numbers", "instant": "dates"}


class RowsWriter:
    """Writes the kept rows of a part; makes no file where none are given."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._sink: Any = None
        self._writer: Any = None

    def append(self, batches: Sequence[pa.RecordBatch]) -> None:
        """Append batches, one for each range."""
        for batch in batches:
            if self._writer is None:
                os.close(os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, PRIVATE_FILE))
                self._sink = pa.OSFile(str(self._path), "wb")
                self._writer = pa.ipc.new_file(self._sink, batch.schema)
            self._writer.write_batch(batch)

    def close(self) -> None:
        """Finish the file."""
        if self._writer is not None:
            self._writer.close()
            self._sink.close()
            self._writer = None


def rows_of_ranges(spec: FeatureSpec, rows: pa.Table, part: Assembled, ranges: Sequence[Range]) -> list[pa.RecordBatch]:
    """The rows of a partition in their final order, with all that was left out of them: a batch for each range."""
    left_out = [name for name in (USER_COLUMN, NO_COLUMN) if name in rows.column_names]
    plain = with_label(rows.drop_columns(left_out), spec)
    batches = []
    begin = 0
    for found in ranges:
        picked = part.order[begin : begin + found.rows]
        columns = dict(zip(plain.column_names, plain.take(pa.array(picked)).columns, strict=True))
        if part.users is not None:
            user = np.searchsorted(part.row_ends, np.arange(begin, begin + found.rows), side="right")
            named = {USER_COLUMN: part.users.take(pa.array(user)), USER_HASH_COLUMN: pa.array(part.hashes[user])}
            columns = named | columns | {HASH_COLUMN: pa.array(content_hashes(spec, rows, picked))}
        (batch,) = pa.table(columns).combine_chunks().to_batches()
        batches.append(batch)
        begin += found.rows
    return batches


def spilled_rows(spec: FeatureSpec, kept: pa.Table) -> pa.Table:
    """Kept rows as a spill has them."""
    if spec.user is None:
        return kept
    left_out = {USER_COLUMN, USER_HASH_COLUMN, HASH_COLUMN}
    if isinstance(spec.label, ImplicitLabel):
        left_out.add(LABEL_COLUMN)
    user = kept.column(USER_COLUMN).combine_chunks().dictionary_encode()
    user = pa.DictionaryArray.from_arrays(user.indices.cast(pa.uint32()), user.dictionary)
    plain = {name: kept.column(name) for name in kept.column_names if name not in left_out}
    return pa.table({USER_COLUMN: user} | (plain or {NO_COLUMN: pa.nulls(kept.num_rows)}))


class KeptRows:
    """The rows of a dataset that keeps them."""

    def __init__(self, folder: Path, manifest: DatasetManifest, kept: Kept, ranges: Sequence[Range]) -> None:
        """Take a dataset that keeps its rows; see `open`."""
        self.kept = kept
        self.manifest = manifest
        self.sums = int(kept.sums[0]), int(kept.sums[1])
        # What the contribution bound leaves out is counted anew.
        self.rejected = Counter({reason: n for reason, n in manifest.rejected.items() if reason != OVER_BOUND})
        self._folder = folder
        self._ranges: dict[int, list[Range]] = {}
        for found in ranges:
            self._ranges.setdefault(part_of_range(found.number, kept.parts), []).append(found)

    @classmethod
    def open(cls, folder: Path) -> KeptRows:
        """Open a dataset; every file is compared with its digest.

        Raises:
            FormatError: no dataset, torn, or of a newer format.
            IntegrityError: a file differs from its digest.
            InputError: it does not keep its rows.
        """
        manifest = read_manifest(folder)
        if manifest.kept is None:
            raise InputError(f"{folder} does not keep its rows: ingest the whole log, with --keep-rows")
        check_files(folder, manifest, verify=True)
        return cls(folder, manifest, manifest.kept, read_ranges(folder / RANGES_FILE))

    def name(self, place: int) -> str:
        """The folder of a part."""
        return part_name(place, self.kept.parts)

    def ranges(self, place: int) -> list[Range]:
        """The ranges of a part that have rows."""
        return self._ranges.get(place, [])

    def rows(self, number: int, num_partitions: int) -> list[pa.Table]:
        """The rows of one of so many partitions, no fewer than parts, as tables; mapped."""
        place = number * self.kept.parts // num_partitions
        ranges = self.ranges(place)
        if not ranges:
            return []
        with pa.memory_map(str(self._folder / self.name(place) / ROWS_FILE)) as source:
            reader = pa.ipc.open_file(source)
            return [
                pa.Table.from_batches([reader.get_batch(index)])
                for index, found in enumerate(ranges)
                if part_of_range(found.number, num_partitions) == number
            ]

    def link(self, place: int, folder: Path) -> None:
        """Give another dataset the files of a part, without a copy where the file system can."""
        source, target = self._folder / self.name(place), folder / self.name(place)
        target.mkdir(exist_ok=True)
        for name in (f"{TRAIN}.arrow", f"{TEST}.arrow", USERS_FILE, ROWS_FILE):
            if not (source / name).exists():
                continue
            try:
                (target / name).hardlink_to(source / name)
            except OSError:
                (target / name).write_bytes((source / name).read_bytes())

    def check_same(self, *, spec: Mapping[str, Any], time_kind: str, locations: Sequence[str]) -> None:
        """Check that rows encoded so can be added.

        Args:
            spec: the resolved spec now, as a document.
            time_kind: what the times of the new rows count.
            locations: of the new rows.

        Raises:
            InputError: they cannot.
        """
        if without_places(spec) != without_places(self.manifest.spec):
            raise InputError(
                f"the feature spec is not the one of {self._folder}: rows are added under one spec, with the same "
                "lists; ingest the whole log"
            )
        if time_kind != self.kept.time_kind:
            raise InputError(
                f"times are given as {_TIMES[time_kind]} and in {self._folder} as {_TIMES[self.kept.time_kind]}: "
                "their order cannot be told"
            )
        again = sorted(set(locations) & set(self.manifest.source.locations))
        if again:
            raise InputError(f"{again[0]} is in {self._folder} already: its rows would count double")

    def check_users(self, digest: str) -> None:
        """Check that the user features are what they were, since untouched parts keep theirs.

        Raises:
            InputError: they are not.
        """
        if digest != self.kept.users_digest:
            raise InputError(f"the users table is not the one of {self._folder}: ingest the whole log")


def part_name(place: int, parts: int) -> str:
    """The folder of a part in its dataset."""
    return "." if parts == 1 else f"part-{place:03}"
