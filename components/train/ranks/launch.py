"""Starting ranks, and finding out whether this process is one. Imports no torch, so that a command can ask at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn


def launched() -> bool:
    """Whether this process is one of several that torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def start_ranks(ranks: int, arguments: Sequence[str], *, restarts: int) -> NoReturn:
    """Become a launcher that runs `lazydp` on `ranks` processes of this machine, and waits for them.

    Args:
        ranks: W.
        arguments: of the command `lazydp`, as they were given.
        restarts: how often all ranks are started again after one of them failed.
    """
    launcher = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={ranks}",
        f"--max-restarts={restarts}",
    ]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *launcher, "-m", "lazydp.pipelines.cli", *arguments])  # noqa: S606 - no shell is wanted
