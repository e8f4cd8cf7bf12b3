"""Columns written piece by piece, then joined into one memory-mappable Arrow file with a single record batch.

With one record batch a column is one contiguous array: a reader picks any rows without looking up chunks. Pieces go to
raw files first, which are then mapped, so that a column larger than memory is no obstacle.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from lazydp.components.features.encode import CodeLists
from lazydp.components.ingest.manifest import FileEntry
from lazydp.components.shared.files import PRIVATE_FILE

Array = np.ndarray[Any, Any]
# What is written and hashed at a time: it is still in the cache for the second. For less a thread does not pay.
_HASHED_BYTES = 1 << 20
_SMALL_BYTES = 1 << 16


def _create(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, PRIVATE_FILE), "wb", buffering=1 << 20)


class _RawFile:
    """Numbers of one type appended to a file; knows their count."""

    def __init__(self, path: Path, dtype: Any) -> None:
        self._path = path
        self._file = _create(path)
        self.dtype = np.dtype(dtype)
        self.count = 0

    def append(self, values: Array) -> None:
        content = np.ascontiguousarray(values, dtype=self.dtype).reshape(-1).view(np.uint8)
        self._file.write(content.data)
        self.count += values.size

    def close(self) -> None:
        self._file.close()

    def buffer(self) -> Any:
        """The file's bytes, mapped."""
        self._file.close()
        if self.count == 0:
            return pa.py_buffer(b"")
        return pa.memory_map(str(self._path)).read_buffer()

    def remove(self) -> None:
        self._path.unlink()


class NumberColumn:
    """A column of numbers, or with `width` of fixed-size lists of them."""

    def __init__(self, path: Path, dtype: Any, *, width: int | None = None) -> None:
        self._raw = _RawFile(path, dtype)
        self._width = width

    def append(self, values: Array) -> None:
        """Append values [n] or [n, width]."""
        self._raw.append(values)

    def array(self) -> pa.Array:
        """The whole column, mapped."""
        flat = pa.Array.from_buffers(pa.from_numpy_dtype(self._raw.dtype), self._raw.count, [None, self._raw.buffer()])
        return flat if self._width is None else pa.FixedSizeListArray.from_arrays(flat, self._width)

    def close(self) -> None:
        """Close the file: nothing will be appended."""
        self._raw.close()

    def remove(self) -> None:
        """Delete the raw file."""
        self._raw.remove()


class ListColumn:
    """A column of lists of int32 codes."""

    def __init__(self, path: Path) -> None:
        self._values = _RawFile(path.with_suffix(".values"), np.int32)
        self._offsets = _RawFile(path.with_suffix(".offsets"), np.int64)
        self._offsets.append(np.zeros(1, dtype=np.int64))

    def append(self, lists: CodeLists) -> None:
        """Append lists."""
        self._offsets.append(self._values.count + np.cumsum(lists.lengths))
        self._values.append(lists.values)

    def array(self) -> pa.Array:
        """The whole column, mapped."""
        values = pa.Array.from_buffers(pa.int32(), self._values.count, [None, self._values.buffer()])
        return pa.LargeListArray.from_buffers(
            pa.large_list(pa.int32()), self._offsets.count - 1, [None, self._offsets.buffer()], children=[values]
        )

    def close(self) -> None:
        """Close the files: nothing will be appended."""
        self._values.close()
        self._offsets.close()

    def remove(self) -> None:
        """Delete the raw files."""
        self._values.remove()
        self._offsets.remove()


class TextColumn:
    """A column of text without nulls."""

    def __init__(self, path: Path) -> None:
        self._bytes = _RawFile(path.with_suffix(".bytes"), np.uint8)
        self._offsets = _RawFile(path.with_suffix(".offsets"), np.int64)
        self._offsets.append(np.zeros(1, dtype=np.int64))

    def append(self, texts: pa.Array) -> None:
        """Append texts [n]."""
        array = texts.cast(pa.large_string())
        offsets = np.frombuffer(array.buffers()[1], dtype=np.int64)[array.offset : array.offset + len(array) + 1]
        self._offsets.append(self._bytes.count + offsets[1:] - offsets[0])
        if array.buffers()[2] is not None:
            self._bytes.append(np.frombuffer(array.buffers()[2], dtype=np.uint8)[offsets[0] : offsets[-1]])

    def array(self) -> pa.Array:
        """The whole column, mapped."""
        buffers = [None, self._offsets.buffer(), self._bytes.buffer()]
        return pa.Array.from_buffers(pa.large_string(), self._offsets.count - 1, buffers)

    def close(self) -> None:
        """Close the files: nothing will be appended."""
        self._bytes.close()
        self._offsets.close()

    def remove(self) -> None:
        """Delete the raw files."""
        self._bytes.remove()
        self._offsets.remove()


Column = NumberColumn | ListColumn | TextColumn


class _HashedFile:
    """A file that is written and hashed at once, on two cores; what Arrow needs of a file object."""

    closed = False

    def __init__(self, file: BinaryIO, pool: ThreadPoolExecutor) -> None:
        self.sha256 = hashlib.sha256()
        self.size = 0
        self._file = file
        self._pool = pool

    def write(self, content: Any) -> int:
        view = memoryview(content).cast("B")
        for begin in range(0, len(view), _HASHED_BYTES):
            piece = view[begin : begin + _HASHED_BYTES]
            hashed = self._pool.submit(self.sha256.update, piece) if len(piece) > _SMALL_BYTES else None
            self._file.write(piece)
            if hashed is None:
                self.sha256.update(piece)
            else:
                hashed.result()
        self.size += len(view)
        return len(view)

    def flush(self) -> None:
        self._file.flush()


def write_arrow(path: Path, columns: dict[str, Column], *, num_rows: int, notes: dict[str, str]) -> FileEntry:
    """Join columns into one Arrow IPC file with a single record batch, and delete their raw files.

    Returns:
        Size and digest of the file.

    Args:
        path: the file to make, mode 0600.
        columns: columns of `num_rows` rows each.
        num_rows: rows of each.
        notes: field name -> a note for a person, kept as metadata of the field.
    """
    arrays = {name: column.array() for name, column in columns.items()}
    fields = [
        pa.field(name, array.type, nullable=False, metadata={"note": notes[name]} if name in notes else None)
        for name, array in arrays.items()
    ]
    schema = pa.schema(fields)
    assert all(len(array) == num_rows for array in arrays.values())
    with _create(path) as file, ThreadPoolExecutor(max_workers=1) as pool:
        sink = _HashedFile(file, pool)
        with pa.ipc.new_file(sink, schema) as writer:
            writer.write_batch(pa.RecordBatch.from_arrays(list(arrays.values()), schema=schema))
    for column in columns.values():
        column.remove()
    return FileEntry(bytes=sink.size, sha256=sink.sha256.hexdigest())
