"""Encoded rows parted by hash into files on disk, so that each part fits into memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lazydp.components.ingest.hashing import Words
from lazydp.components.ingest.rows import HASH_COLUMN, USER_COLUMN, Encoded
from lazydp.components.shared.files import PRIVATE_FILE
from lazydp.kernels.rows import Array, Rows, order_by_part, part_by_user

# A partition is held so often, in part, while it is sorted and gathered.
_WORKING_COPIES = 4
# Each is a file that is open. A power of two, as any number of partitions: so none holds a part of a hash range alone.
_MAX_PARTITIONS = 512
# What so many rows take is still near the processor when it is used again: larger parts are slower.
_GOOD_ROWS = 1 << 19

Parted = list[tuple[int, pa.RecordBatch]]


def part_by_hash(rows: pa.RecordBatch, hashes: Words, num_partitions: int) -> Parted:
    """Rows by the partitions of their hashes."""
    if num_partitions == 1:
        return [(0, rows)]
    order, ends = order_by_part(hashes, num_partitions)
    ordered = _taken(rows, order)
    return [(number, ordered.slice(begin, end - begin)) for number, begin, end in _parts(ends)]


def _taken(rows: pa.RecordBatch, picked: Array) -> pa.RecordBatch:
    return pc.take(rows, pa.array(picked), boundscheck=False)


def part_encoded(encoded: Encoded, num_partitions: int) -> Parted:
    """The accepted rows of a batch by the partitions of their users, or without users of their content.

    A user is a column of its own, a dictionary of the names that a partition has in this batch.
    """
    if encoded.users is None:
        return part_by_hash(encoded.rows, np.asarray(encoded.rows.column(HASH_COLUMN).to_numpy()), num_partitions)
    users = encoded.users
    found = part_by_user(users.entries, users.hashes, num_partitions, accepted=encoded.accepted)
    ordered = _taken(encoded.rows, found.rows)
    names, local = users.names.take(pa.array(found.users)), pa.array(found.local)
    begins = np.append(0, found.user_ends[:-1])
    parted: Parted = []
    for number, begin, end in _parts(found.ends):
        first = int(begins[number])
        named = names.slice(first, int(found.user_ends[number]) - first)
        user = pa.DictionaryArray.from_arrays(local.slice(begin, end - begin), named, safe=False)
        columns = [user, *(column.slice(begin, end - begin) for column in ordered.columns)]
        parted.append((number, pa.RecordBatch.from_arrays(columns, names=[USER_COLUMN, *ordered.schema.names])))
    return parted


def _parts(ends: Rows) -> Iterator[tuple[int, int, int]]:
    """(number, begin, end) of the parts that have rows."""
    begin = 0
    for number, end in enumerate(ends.tolist()):
        if end > begin:
            yield number, begin, end
        begin = end


def partitions_needed(*, num_rows: int, row_bytes: float, memory_bytes: int, workers: int = 1) -> int:
    """How many partitions keep what `workers` hold of them within `memory_bytes`: a power of two, at most 512."""
    for_memory = -(-num_rows * row_bytes * _WORKING_COPIES * workers // max(memory_bytes, 1))
    needed = int(max(1, for_memory, -(-num_rows // _GOOD_ROWS)))
    return min(_MAX_PARTITIONS, 1 << (needed - 1).bit_length())


class Spill:
    """Rows in `num_partitions` parts, in memory as far as that goes and else on disk: added, closed, then read once.

    The partition of a row is a function of its hash; a larger hash never falls into an earlier partition.
    """

    def __init__(self, folder: Path, name: str, num_partitions: int, *, memory_bytes: int = 0) -> None:
        """Make no file yet.

        Args:
            folder: where files are made.
            name: what their names begin with.
            num_partitions: number of parts.
            memory_bytes: what is kept in memory at most.
        """
        self._memory_left = memory_bytes
        self._held: list[list[pa.RecordBatch]] = [[] for _ in range(num_partitions)]
        self._paths = [folder / f"{name}.{number}.arrows" for number in range(num_partitions)]
        self._sinks: list[Any] = [None] * num_partitions
        self._writers: list[Any] = [None] * num_partitions

    @property
    def num_partitions(self) -> int:
        """Number of parts."""
        return len(self._paths)

    def close(self) -> None:
        """Close the files: nothing will be added."""
        for writer, sink in zip(self._writers, self._sinks, strict=True):
            if writer is not None:
                writer.close()
                sink.close()

    def add(self, parted: Parted) -> None:
        """Append parted rows."""
        size = sum(rows.nbytes for _, rows in parted)
        if size <= self._memory_left:
            self._memory_left -= size
            for number, rows in parted:
                self._held[number].append(rows)
            return
        for number, rows in parted:
            if self._writers[number] is None:
                path = self._paths[number]
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, PRIVATE_FILE))
                self._sinks[number] = pa.OSFile(str(path), "wb")
                self._writers[number] = pa.ipc.new_stream(self._sinks[number], rows.schema)
            self._writers[number].write_batch(rows)

    def has_rows(self, number: int) -> bool:
        """Whether a partition has rows, before it is read."""
        return bool(self._held[number]) or self._paths[number].exists()

    def read(self, number: int) -> pa.Table | None:
        """The rows of a partition, None where it is empty; its file is mapped and deleted, and gone with the table."""
        batches, self._held[number] = self._held[number], []
        path = self._paths[number]
        if path.exists():
            with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
                batches += list(stream)
            path.unlink()
        return pa.Table.from_batches(batches) if batches else None

    def partitions(self) -> Iterator[pa.Table | None]:
        """The partitions in order of hash; see `read`."""
        return map(self.read, range(self.num_partitions))
