"""Progress of long work: a bar on a terminal, a log line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import Self

_log = logging.getLogger("lazydp")
_LOG_EVERY_S = 10.0


class Progress:
    """Counts work done towards `total` and shows it on standard error.

    On a terminal a bar with rate and remaining time; elsewhere one log line every ten seconds and one at the
    end. Used as a context manager; `advance` may be called from one thread only.
    """

    def __init__(self, description: str, *, total: int | None, unit: str) -> None:
        self._description = description
        self._total = total
        self._unit = unit
        self._done = 0
        self._note = ""
        self._bar = None
        if sys.stderr.isatty():
            from rich.console import Console  # noqa: PLC0415 - rich is slow to import and only needed here
            from rich.progress import (  # noqa: PLC0415
                BarColumn,
                MofNCompleteColumn,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )
            from rich.progress import Progress as RichProgress  # noqa: PLC0415

            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(unit),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )

    def __enter__(self) -> Self:
        self._started = self._logged = time.monotonic()
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self._description, total=self._total, note="")
        return self

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Report `count` more units done, and optionally a short note beside the bar."""
        self._done += count
        if note is not None:
            self._note = note
        if self._bar is not None:
            self._bar.update(self._task, advance=count, note=self._note)
        elif time.monotonic() - self._logged >= _LOG_EVERY_S:
            self._logged = time.monotonic()
            self._line()

    def _line(self) -> None:
        of = f"/{self._total}" if self._total is not None else ""
        rate = self._done / max(time.monotonic() - self._started, 1e-9)
        _log.info("%s: %d%s %s, %.3g a second %s", self._description, self._done, of, self._unit, rate, self._note)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None:
            self._line()
