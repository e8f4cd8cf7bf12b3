"""Where this machine keeps what only saves time: `LAZYDP_CACHE`, else `~/.cache/lazydp`. It may be deleted."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "LAZYDP_CACHE"


def cache_folder() -> Path | None:
    """The folder, which may be missing; None for a user without a home."""
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "lazydp"
    try:
        return Path.home() / ".cache" / "lazydp"
    except RuntimeError:
        return None
