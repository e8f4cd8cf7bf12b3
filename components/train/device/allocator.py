"""Memory that a step frees is kept for the next step, instead of coming again from the system as fresh pages.

A fresh page costs a fault of some microseconds. A step that frees tens of megabytes at its end and asks for them again
can fault ten thousand times, which nearly doubled its time without one more operation.
"""

from __future__ import annotations

import ctypes
import functools
import sys

# From glibc's malloc.h. Blocks up to the threshold come from the heap (32 MiB is the most that glibc accepts), and
# the heap shrinks only when more than the trim threshold lies free at its top.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_HEAP_BLOCK_BYTES = 32 << 20
_KEPT_BYTES = 1 << 30


@functools.cache
def keep_freed_memory() -> bool:
    """Tell the allocator, once a process; whether it took notice (glibc does, other C libraries need not)."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _HEAP_BLOCK_BYTES)) and bool(mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES))
