"""Encoded rows parted by hash, in memory or on disk, so that each part can be worked on by itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lazydp.components.ingest.hashing import Words
from lazydp.components.ingest.rows import HASH_COLUMN, USER_COLUMN, Encoded
from lazydp.components.shared.files import PRIVATE_FILE
from lazydp.kernels.rows import Array, Rows, order_by_part, part_by_user

# A partition is held so often, in part, while it is sorted and gathered; slices of many batches take memory as well.
_WORKING_COPIES = 8
# As many as there are ranges of hashes in the format. A power of two, as any number of partitions: so none holds a part
# of a range alone.
_MAX_PARTITIONS = 512
# What so many rows take is still near the processor when it is used again: larger parts are slower.
_GOOD_ROWS = 1 << 19
_NAME = "name"


@dataclass(frozen=True, slots=True)
class Parted:
    """The rows of a batch by partition: those of one lie side by side, in the order of the partitions.

    rows: the columns; with users, the first says by a number (uint32) which of its partition's names a row's user has.
    ends: where the rows of each partition end, int64 [partitions].
    names: the names of the users, by partition, text; None without users.
    name_ends: where the names of each partition end, int64 [partitions].
    """

    rows: pa.RecordBatch
    ends: Rows
    names: pa.Array | None
    name_ends: Rows

    @property
    def num_bytes(self) -> int:
        """What it takes in memory."""
        return int(self.rows.nbytes) + (int(self.names.nbytes) if self.names is not None else 0)

    def of(self, number: int) -> pa.RecordBatch | None:
        """The rows of a partition, their user a dictionary of names; None where it has none. Views, no copies."""
        begin, end = _within(self.ends, number)
        if begin == end:
            return None
        rows = self.rows.slice(begin, end - begin)
        if self.names is None:
            return rows
        first, last = _within(self.name_ends, number)
        user = pa.DictionaryArray.from_arrays(rows.column(0), self.names.slice(first, last - first), safe=False)
        return pa.RecordBatch.from_arrays([user, *rows.columns[1:]], names=rows.schema.names)

    def parts(self) -> Iterator[tuple[int, pa.RecordBatch]]:
        """The partitions that have rows, each with its number; see `of`."""
        for number in np.flatnonzero(np.diff(self.ends, prepend=0)).tolist():
            rows = self.of(number)
            assert rows is not None
            yield number, rows


def _within(ends: Rows, number: int) -> tuple[int, int]:
    return int(ends[number - 1]) if number else 0, int(ends[number])


def part_by_hash(rows: pa.RecordBatch, hashes: Words, num_partitions: int) -> Parted:
    """Rows by the partitions of their hashes."""
    order, ends = order_by_part(hashes, num_partitions)
    return Parted(rows if num_partitions == 1 else _taken(rows, order), ends, None, ends)


def _taken(rows: pa.RecordBatch, picked: Array) -> pa.RecordBatch:
    return pc.take(rows, pa.array(picked), boundscheck=False)


def part_encoded(encoded: Encoded, num_partitions: int) -> Parted:
    """The accepted rows of a batch by the partitions of their users, or without users of their content."""
    if encoded.users is None:
        return part_by_hash(encoded.rows, np.asarray(encoded.rows.column(HASH_COLUMN).to_numpy()), num_partitions)
    users = encoded.users
    found = part_by_user(users.entries, users.hashes, num_partitions, accepted=encoded.accepted)
    ordered = _taken(encoded.rows, found.rows)
    columns = [pa.array(found.local), *ordered.columns]
    return Parted(
        rows=pa.RecordBatch.from_arrays(columns, names=[USER_COLUMN, *ordered.schema.names]),
        ends=found.ends,
        names=users.names.take(pa.array(found.users)),
        name_ends=found.user_ends,
    )


def partitions_needed(*, num_rows: int, row_bytes: float, memory_bytes: int, workers: int = 1) -> int:
    """How many partitions keep what `workers` hold of them within `memory_bytes`: a power of two, at most 512."""
    for_memory = -(-num_rows * row_bytes * _WORKING_COPIES * workers // max(memory_bytes, 1))
    needed = int(max(1, for_memory, -(-num_rows // _GOOD_ROWS)))
    return min(_MAX_PARTITIONS, 1 << (needed - 1).bit_length())


class _BatchFile:
    """Record batches written to a file, then mapped. Once mapped, the file has no name: it ends with the process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._sink: Any = None
        self._writer: Any = None

    def write(self, batch: pa.RecordBatch) -> None:
        if self._writer is None:
            os.close(os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, PRIVATE_FILE))
            self._sink = pa.OSFile(str(self._path), "wb")
            self._writer = pa.ipc.new_file(self._sink, batch.schema)
        self._writer.write_batch(batch)

    def mapped(self) -> list[pa.RecordBatch]:
        """Close the file; the batches in their order."""
        if self._writer is None:
            return []
        self._writer.close()
        self._sink.close()
        with pa.memory_map(str(self._path)) as source:
            reader = pa.ipc.open_file(source)
            batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        self._path.unlink()
        return batches


class Spill:
    """Rows in `num_partitions` parts, in memory as far as that goes and else on disk: added, closed, then read.

    The partition of a row is a function of its hash; a larger hash never falls into an earlier partition. Batches stay
    as they were parted, so that few large ones are written; a partition is made of a slice of each.
    """

    def __init__(self, folder: Path, name: str, num_partitions: int, *, memory_bytes: int = 0) -> None:
        """Make no file yet.

        Args:
            folder: where files are made.
            name: what their names begin with.
            num_partitions: number of parts.
            memory_bytes: what is kept in memory at most.
        """
        self.num_partitions = num_partitions
        self._memory_left = memory_bytes
        self._parted: list[Parted] = []
        self._written: list[tuple[Array, Array]] = []
        self._rows = _BatchFile(folder / f"{name}.rows.arrow")
        self._names = _BatchFile(folder / f"{name}.names.arrow")
        self._counts = np.zeros(num_partitions, dtype=np.int64)

    def close(self) -> None:
        """Nothing will be added."""
        rows, names = self._rows.mapped(), self._names.mapped()
        for number, (ends, name_ends) in enumerate(self._written):
            own = names[number].column(0) if names else None
            self._parted.append(Parted(rows[number], ends, own, name_ends))
        self._written = []

    def add(self, parted: Parted) -> None:
        """Append parted rows."""
        self._counts += np.diff(parted.ends, prepend=0)
        if parted.num_bytes <= self._memory_left:
            self._memory_left -= parted.num_bytes
            self._parted.append(parted)
            return
        self._rows.write(parted.rows)
        if parted.names is not None:
            self._names.write(pa.record_batch({_NAME: parted.names}))
        # Many batches have many ends.
        self._written.append((parted.ends.astype(np.uint32), parted.name_ends.astype(np.uint32)))

    def has_rows(self, number: int) -> bool:
        """Whether a partition has rows."""
        return bool(self._counts[number])

    def read(self, number: int) -> pa.Table | None:
        """The rows of a partition, None where it is empty: views of what is held or mapped."""
        if not self.has_rows(number):
            return None
        return pa.Table.from_batches([rows for rows in (parted.of(number) for parted in self._parted) if rows])

    def partitions(self) -> Iterator[pa.Table | None]:
        """The partitions in order of hash; see `read`."""
        return map(self.read, range(self.num_partitions))
