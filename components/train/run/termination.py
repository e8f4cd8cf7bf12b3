"""SIGTERM while a run trains: it ends after the step under way, with a checkpoint, instead of at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

from lazydp.components.shared.errors import LazyDPError


class TerminatedError(LazyDPError):
    """A run was told to end before its last step; its checkpoint is whole."""


class Termination:
    """Notes SIGTERM as long as the block lasts; use it as a context.

    Kubernetes sends it before it removes a pod, and kills the pod after the grace period. Outside the main thread,
    where Python delivers no signals, it notes nothing.

    Attributes:
        requested: whether the signal came.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.requested = True
