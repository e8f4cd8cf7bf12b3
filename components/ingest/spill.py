"""Encoded rows parted by hash into files on disk, so that each part fits into memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from lazydp.components.ingest.hashing import Words
from lazydp.components.shared.files import PRIVATE_FILE
from lazydp.kernels.rows import order_by_part

# A partition is held so often, in part, while it is sorted and gathered.
_WORKING_COPIES = 4
# Each is a file that is open. A power of two, as any number of partitions: so none holds a part of a hash range alone.
_MAX_PARTITIONS = 512
# What so many rows take is still near the processor when it is used again: larger parts are slower.
_GOOD_ROWS = 1 << 19

Parted = list[tuple[int, pa.RecordBatch]]


# What a process takes before it holds a row: the interpreter, libraries, buffers of readers.
_BASE_BYTES = 64 << 20


def working_memory(memory_bytes: int) -> int:
    """What of the memory given is left for rows; at least a quarter of it."""
    return max(memory_bytes - _BASE_BYTES, memory_bytes // 4, 1)


def partitions_needed(*, num_rows: int, row_bytes: float, memory_bytes: int, workers: int = 1) -> int:
    """How many partitions keep what `workers` hold of them within `memory_bytes`: a power of two, at most 512."""
    for_memory = -(-num_rows * row_bytes * _WORKING_COPIES * workers // working_memory(memory_bytes))
    needed = int(max(1, for_memory, -(-num_rows // _GOOD_ROWS)))
    return min(_MAX_PARTITIONS, 1 << (needed - 1).bit_length())


class Spill:
    """Rows on disk in `num_partitions` files: rows are added, it is closed, then read once.

    The partition of a row is a function of its hash; a larger hash never falls into an earlier partition.
    """

    def __init__(self, folder: Path, name: str, num_partitions: int) -> None:
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

    def part(self, rows: pa.RecordBatch, hashes: Words) -> Parted:
        """The rows by the partitions of their hashes; changes nothing, so that threads may call it."""
        if self.num_partitions == 1:
            return [(0, rows)]
        order, ends = order_by_part(hashes, self.num_partitions)
        ordered = rows.take(pa.array(order))
        found: Parted = []
        begin = 0
        for number, end in enumerate(ends.tolist()):
            if end > begin:
                found.append((number, ordered.slice(begin, end - begin)))
            begin = end
        return found

    def add(self, parted: Parted) -> None:
        """Append what `part` returned."""
        for number, rows in parted:
            if self._writers[number] is None:
                path = self._paths[number]
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, PRIVATE_FILE))
                self._sinks[number] = pa.OSFile(str(path), "wb")
                self._writers[number] = pa.ipc.new_stream(self._sinks[number], rows.schema)
            self._writers[number].write_batch(rows)

    def has_rows(self, number: int) -> bool:
        """Whether a partition has rows, before it is read."""
        return self._paths[number].exists()

    def read(self, number: int) -> pa.Table | None:
        """The rows of a partition, mapped, None where it is empty; its file is deleted, and gone with the table."""
        path = self._paths[number]
        if not path.exists():
            return None
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
            table = stream.read_all()
        path.unlink()
        return table

    def partitions(self) -> Iterator[pa.Table | None]:
        """The partitions in order of hash; see `read`."""
        return map(self.read, range(self.num_partitions))
