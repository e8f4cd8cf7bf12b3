"""An Arrow file of a dataset, mapped into memory: what is not read is not loaded."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pyarrow as pa

from lazydp.components.shared.errors import FormatError

Addresses: TypeAlias = np.ndarray[tuple[int], np.dtype[np.int64]]
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class MappedFile:
    """A file of one record batch, whose columns are views of the file.

    Attributes:
        columns: by name.
        num_bytes: of the file.
    """

    def __init__(self, path: Path) -> None:
        """Map the file.

        Raises:
            FormatError: it holds another number of batches.
            OSError: it cannot be read; pyarrow's errors where it is no Arrow file.
        """
        self._path = path
        # Python's own mmap would keep a file descriptor open for each file of each part.
        with pa.memory_map(str(path)) as source:
            self._bytes = source.read_buffer()
        reader = pa.ipc.open_file(pa.BufferReader(self._bytes))
        if reader.num_record_batches != 1:
            raise FormatError(f"{path}: expected one record batch, found {reader.num_record_batches}; run ingest again")
        batch = reader.get_batch(0)
        self.num_bytes = int(self._bytes.size)
        self.columns: dict[str, pa.Array] = dict(zip(batch.schema.names, batch.columns, strict=True))

    def read_at_random(self) -> None:
        """Tell the kernel that reads are scattered: of each it then loads one page, not the 128 KiB around it."""
        self._advise(mmap.MADV_RANDOM)

    def evict(self) -> None:
        """Have the kernel forget the file's pages, where no other process maps them: for benchmarks."""
        self._advise(mmap.MADV_DONTNEED)
        descriptor = os.open(self._path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)

    def _advise(self, advice: int) -> None:
        if _LIBC.madvise(self._bytes.address, self.num_bytes, advice) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(self._path))


def will_need(starts: Addresses, sizes: Addresses) -> None:
    """Have the kernel load what lies at these addresses of mapped files, without waiting for it.

    Args:
        starts: int64 [n], addresses.
        sizes: int64 [n], bytes at each; none may be empty.
    """
    if not len(starts):
        return
    first, last = starts // mmap.PAGESIZE, (starts + sizes - 1) // mmap.PAGESIZE
    order = np.argsort(first, kind="stable")
    first, last = first[order], np.maximum.accumulate(last[order])
    # Pages that touch or overlap are asked for together.
    begins = np.flatnonzero(np.append(True, first[1:] > last[:-1] + 1))
    ends = np.append(begins[1:], len(first)) - 1
    for page, until in zip(first[begins].tolist(), last[ends].tolist(), strict=True):
        # Advice: where it cannot be followed, the page is read when it is touched.
        _LIBC.madvise(page * mmap.PAGESIZE, (until - page + 1) * mmap.PAGESIZE, mmap.MADV_WILLNEED)
