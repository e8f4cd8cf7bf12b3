"""Runs a pipeline on this machine with kfp's subprocess runner: the same components as on a cluster, no cluster."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self, TextIO

from kfp import dsl, local
from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from lazydp.components.shared.errors import LazyDPError
from lazydp.components.shared.files import PRIVATE_DIRECTORY, require_local

_STARTED = re.compile(r"Executing task .*'(?P<task>[\w-]+)'")
_FINISHED = re.compile(r"Task .*'(?P<task>[\w-]+)'.* finished with status \S*?(?P<status>SUCCESS|FAILURE)")
# What our own code says inside a component: its log lines, and the line in which it refuses something.
_OURS = re.compile(
    r"lazydp\.components\.shared\.errors\.\w+Error: (?P<error>.*)|(?:(?P<level>[A-Z]+) )?(?P<line>lazydp[\w.]*: .*)"
)


class PipelineFailedError(LazyDPError):
    """A component failed; the message is the component's own line."""


class _Watcher(io.TextIOBase):
    """Standard output of the runner: everything to a log file, and to the console a line for each task.

    On a terminal the task under way is shown with the last line of its log; elsewhere only what is done. Our own
    warnings are always shown.
    """

    def __init__(self, log: TextIO, console: Console) -> None:
        self._log = log
        self._console = console
        self._line = ""
        self._started: dict[str, float] = {}
        self._task = ""
        # Standard output is already taken: `Live` must not take it again.
        self._live = Live(console=console, transient=True, redirect_stdout=False, redirect_stderr=False)
        self.error: str | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self._log.write(text)
        self._log.flush()
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            self._see(re.sub(r"\x1b\[[0-9;]*m|\x1b\[\d+m", "", line))
        return len(text)

    def _see(self, line: str) -> None:
        if found := _STARTED.search(line):
            self._task = found["task"]
            self._started[self._task] = time.monotonic()
            self._show_underway("")
        elif found := _FINISHED.search(line):
            took = time.monotonic() - self._started.get(found["task"], time.monotonic())
            mark = "[green]✓[/green]" if found["status"] == "SUCCESS" else "[red]✗[/red]"
            self._console.print(f"{mark} {found['task']:26} [dim]{took:6.1f} s[/dim]", highlight=False)
        elif found := _OURS.search(line):
            if found["error"]:
                self.error = found["error"]
            elif found["level"] in {"WARNING", "ERROR"}:
                self._console.print(found["line"], style="yellow", highlight=False, markup=False, soft_wrap=True)
            else:
                self._show_underway(found["line"].partition(": ")[2])

    def _show_underway(self, said: str) -> None:
        text = Text.assemble(" ", (self._task, "bold"), "  ", (said, "dim"), no_wrap=True, overflow="ellipsis")
        self._live.update(Spinner("dots", text))


def run_locally(
    pipeline: Callable[..., Any], arguments: Mapping[str, Any], *, folder: Path, console: Console
) -> Mapping[str, Any]:
    """Run `pipeline` to its end and return its outputs.

    Args:
        pipeline: a kfp pipeline function.
        arguments: its parameters.
        folder: where artifacts go (`folder/artifacts`) and the full log of the runner (`folder/pipeline.log`).
        console: where progress is shown.

    Raises:
        PipelineFailedError: a component failed; the message is what the component said.
    """
    require_local(folder)
    # The artifacts hold the private dataset and checkpoints.
    folder.mkdir(parents=True, exist_ok=True, mode=PRIVATE_DIRECTORY)
    folder.chmod(PRIVATE_DIRECTORY)
    local.init(
        runner=local.SubprocessRunner(use_venv=False), pipeline_root=str(folder / "artifacts"), raise_on_error=True
    )
    log_path = folder / "pipeline.log"
    with log_path.open("w") as log, warnings.catch_warnings():
        # kfp warns that our image is not a stock Python image: it holds this very package.
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="kfp")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="kfp")
        # ... and that names, volumes and resources are for a cluster.
        warnings.filterwarnings("ignore", category=UserWarning, message=".*have no effect in the current local runner")
        watcher = _Watcher(log, console)
        try:
            with watcher, contextlib.redirect_stdout(watcher), _quiet_root():
                task = pipeline(**arguments)
        except RuntimeError as error:
            raise PipelineFailedError(f"{watcher.error or error} (full log: {log_path})") from error
    assert isinstance(task, dsl.PipelineTask)
    outputs: Mapping[str, Any] = task.outputs
    return outputs


@contextlib.contextmanager
def _quiet_root() -> Iterator[None]:
    """kfp talks through the root logger; what it says is in the log file already."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.WARNING)
    try:
        yield
    finally:
        root.setLevel(level)
