"""Huge pages for large tensors: random rows of a table of gigabytes otherwise wait for address translation.

torch asks for them where its environment says so, and reads that once, at its first allocation: so this comes before
torch is imported. Measured in docs/benchmarks.md.
"""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "THP_MEM_ALLOC_ENABLE"
_KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def prefer_huge_pages() -> None:
    """Have torch ask for them, unless the kernel gives none or the user decided in the environment."""
    if kernel_gives_huge_pages():
        os.environ.setdefault(VARIABLE, "1")


def huge_pages_in_use() -> bool:
    """Whether large tensors of this process lie in huge pages, as far as the environment tells."""
    return os.environ.get(VARIABLE) == "1" and kernel_gives_huge_pages()


def kernel_gives_huge_pages() -> bool:
    """Whether the kernel gives them to a process that asks: its setting is `always` or `madvise`."""
    try:
        return "[never]" not in _KERNEL.read_text()
    except OSError:
        return False
