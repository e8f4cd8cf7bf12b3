"""Asks again what did not answer: for a task that nobody starts again when it fails."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from lazydp.components.shared.errors import UnavailableError

_log = logging.getLogger("lazydp")
_Answer = TypeVar("_Answer")


def patiently(ask: Callable[[], _Answer], *, tries: int = 5, wait_s: float = 2.0) -> _Answer:
    """What `ask` returns, asked up to `tries` times while it raises UnavailableError, each wait twice the one before.

    Raises:
        UnavailableError: that of the last try.
    """
    for turn in range(tries - 1):
        try:
            return ask()
        except UnavailableError as error:
            wait = wait_s * 2**turn
            _log.warning("%s; asked again in %g s", error, wait)
            time.sleep(wait)
    return ask()
