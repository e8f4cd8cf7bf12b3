"""Points between which a process kills itself, around functions of the product, which has no hook for this.

A call of a wrapped function passes two points, before and after. A point has a name and a number (the how-manieth of
that name), so that what runs in the background doesn't move the others.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any


class KillPoints:
    """The points of one process.

    Args:
        kill_at: the point that is the last, such as `before save 2`; empty for none.
        trace: a file that gets a line a point.
    """

    def __init__(self, kill_at: str, trace: Path) -> None:
        self._kill_at = kill_at
        self._trace = trace
        self._seen: Counter[str] = Counter()

    def _pass(self, name: str) -> None:
        self._seen[name] += 1
        passed = f"{name} {self._seen[name]}"
        with self._trace.open("a") as trace:
            trace.write(passed + "\n")
        if passed == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def wrap(self, owner: Any, name: str) -> None:
        """Let every call of `owner.name` pass two points; a call's `purpose` belongs to their name."""
        original: Callable[..., Any] = getattr(owner, name)

        def wrapped(*arguments: Any, **named: Any) -> Any:
            what = f"{name} {named['purpose']}" if "purpose" in named else name
            self._pass(f"before {what}")
            result = original(*arguments, **named)
            self._pass(f"after {what}")
            return result

        setattr(owner, name, wrapped)
