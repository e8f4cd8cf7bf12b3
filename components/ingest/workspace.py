"""Arrays to work in: in memory, or in a file where they are too large for the memory given."""

from __future__ import annotations

import mmap
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lazydp.kernels.rows import Array

# Smaller arrays are left in memory: a file for each would cost more.
_SMALL_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Workspace:
    """Gives out arrays.

    folder: where files are made, which have no name there; None: everything stays in memory.
    """

    folder: Path | None = None

    def empty(self, size: int, dtype: Any) -> Array:
        """An array [size], not filled. One in a file takes no memory that the system could not write out."""
        length = size * np.dtype(dtype).itemsize
        if self.folder is None or length < _SMALL_BYTES:
            return np.empty(size, dtype=dtype)
        with tempfile.TemporaryFile(dir=self.folder) as file:
            file.truncate(length)
            return np.frombuffer(mmap.mmap(file.fileno(), length), dtype=dtype)
