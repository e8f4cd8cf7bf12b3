"""The memory that ingest may take: what the process has already, what allocators keep, arrays too large for it."""

from __future__ import annotations

import contextlib
import mmap
import os
import resource
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lazydp.kernels.rows import Array, return_memory_at_once

# Smaller arrays are left in memory: a file for each would cost more.
_SMALL_BYTES = 1 << 20
# With less than this, allocators give back what is freed, which takes time.
PLENTY = 512 << 20


def anonymous_memory() -> int:
    """Bytes that this process has in memory that no file backs; 0 where the system does not say."""
    try:
        _, resident, shared, *_ = Path("/proc/self/statm").read_text(encoding="ascii").split()
    except OSError:
        return 0
    return (int(resident) - int(shared)) * resource.getpagesize()


def working_memory(memory_bytes: int) -> int:
    """What of the memory given is left for rows, beside what the process takes already; at least a quarter of it."""
    return max(memory_bytes - anonymous_memory(), memory_bytes // 4, 1)


@contextlib.contextmanager
def allocators_for(memory_bytes: int) -> Iterator[None]:
    """Where memory is scarce, let what is freed go back to the system instead of being kept for later.

    Arrow's own pool keeps some tens of MiB beyond what it holds, and so does the C library for each thread. What the C
    library is told holds for the rest of the process.
    """
    # What earlier work of this process left in it is no less the process's.
    pa.default_memory_pool().release_unused()
    if memory_bytes >= PLENTY:
        yield
        return
    before = pa.default_memory_pool()
    return_memory_at_once()
    pa.set_memory_pool(pa.system_memory_pool())
    try:
        yield
    finally:
        pa.set_memory_pool(before)


@dataclass(frozen=True, slots=True)
class Workspace:
    """Gives out arrays.

    folder: where files are made, which have no name there; None: everything stays in memory.
    """

    folder: Path | None = None

    def empty(self, size: int, dtype: Any) -> Array:
        """An array [size], not filled. One in a file takes no memory that the system could not write out.

        Raises:
            OSError: the disk is full.
        """
        length = size * np.dtype(dtype).itemsize
        if self.folder is None or length < _SMALL_BYTES:
            return np.empty(size, dtype=dtype)
        with tempfile.TemporaryFile(dir=self.folder) as file:
            # A file with holes would end the process by SIGBUS where the disk is full when they are written.
            os.posix_fallocate(file.fileno(), 0, length)
            return np.frombuffer(mmap.mmap(file.fileno(), length), dtype=dtype)
