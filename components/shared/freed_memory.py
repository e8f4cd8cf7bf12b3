"""What Arrow's allocator does with freed memory: kept for some seconds, it need not be asked of the kernel again.

By default the allocator gives freed memory back after ten milliseconds. An ingest then gets most pages several times,
each of them cleared. The allocator reads its environment once, when Arrow is loaded: so this comes before pyarrow is
imported.
"""

from __future__ import annotations

import os

VARIABLE = "MIMALLOC_PURGE_DELAY"
_MILLISECONDS = 10_000


def keep_freed_memory() -> None:
    """Have Arrow keep it for ten seconds, unless the user decided in the environment."""
    os.environ.setdefault(VARIABLE, str(_MILLISECONDS))
