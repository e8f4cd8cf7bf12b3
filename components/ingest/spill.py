"""Encoded rows parted by hash into files on disk, so that each part fits into memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lazydp.components.ingest.hashing import Words, partition_of
from lazydp.components.shared.files import PRIVATE_FILE

# A partition is held a few times over while it is sorted and gathered.
_WORKING_COPIES = 6
_MAX_PARTITIONS = 512


def partitions_needed(*, num_rows: int, row_bytes: float, memory_bytes: int) -> int:
    """How many partitions keep each within `memory_bytes` while it is worked on; at most 512 (open files)."""
    return int(min(_MAX_PARTITIONS, max(1, -(-num_rows * row_bytes * _WORKING_COPIES // memory_bytes))))


class Spill:
    """Rows on disk in `num_partitions` files: rows are added, it is closed, then read once."""

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

    def add(self, rows: pa.RecordBatch, hashes: Words) -> None:
        """Append rows to the partitions of their hashes."""
        if self.num_partitions == 1:
            self._write(0, rows)
            return
        partitions = partition_of(hashes, self.num_partitions)
        order = np.argsort(partitions, kind="stable")
        ends = np.cumsum(np.bincount(partitions, minlength=self.num_partitions))
        parted = rows.take(pa.array(order))
        begin = 0
        for number, end in enumerate(ends.tolist()):
            if end > begin:
                self._write(number, parted.slice(begin, end - begin))
            begin = end

    def _write(self, number: int, rows: pa.RecordBatch) -> None:
        if self._writers[number] is None:
            path = self._paths[number]
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, PRIVATE_FILE))
            self._sinks[number] = pa.OSFile(str(path), "wb")
            self._writers[number] = pa.ipc.new_stream(self._sinks[number], rows.schema)
        self._writers[number].write_batch(rows)

    def partitions(self) -> Iterator[pa.Table | None]:
        """The partitions in order of hash, None where one is empty; each is deleted when the next is asked for."""
        for path in self._paths:
            if not path.exists():
                yield None
                continue
            with pa.OSFile(str(path), "rb") as source, pa.ipc.open_stream(source) as stream:
                table = stream.read_all()
            path.unlink()
            yield table
