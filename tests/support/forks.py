"""Processes that start at once: forked by a server that has the libraries imported already.

What a kill, a signal or a second process does is tested on processes of their own. They need not spend the seconds of
their imports: a fork of a server that computed nothing is as separate as a new process. That programs started by a
shell behave alike is tested too, where it is not known otherwise (`make test-slow`).
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

from lazydp.pipelines import cli

# Everything that some test runs in a fork: there is one server a test process, and the first fork starts it.
PRELOADED = (
    "torch._dynamo",
    "lazydp.components.budget.ledger.charges",
    "lazydp.components.budget.storage.sql",
    "lazydp.components.commands.train_cli",
    "lazydp.components.export.cli",
    "lazydp.components.export.export",
    "lazydp.components.export.publish",
    "lazydp.pipelines.cli",
    "lazydp.service.server",
    "sqlalchemy.dialects.postgresql.psycopg",
    "sqlalchemy.dialects.sqlite",
    "support.warmed",
)


LAZYDP = Path(cli.__file__)
"""The command `lazydp` as a program."""
NOWHERE = Path(os.devnull)


@dataclass(frozen=True)
class Done:
    """How a fork ended: its status (-9 where it was killed), and what it wrote."""

    returncode: int
    stdout: str
    stderr: str


class Fork:
    """A program that runs in a fork, with the interface of `subprocess.Popen` as far as tests use it.

    Args:
        program: a Python file; run as `__main__`.
        arguments: what it finds in `sys.argv[1:]`.
        environment: its variables; those of the test where left out.
        given: globals that it finds besides.
        output: files that its stdout and stderr go to; those of the test where left out.
    """

    def __init__(
        self,
        program: Path,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        given: Mapping[str, Any] | None = None,
        output: tuple[Path, Path] | None = None,
    ) -> None:
        processes = multiprocessing.get_context("forkserver")
        processes.set_forkserver_preload(list(PRELOADED))
        told = (str(program), list(arguments), dict(os.environ if environment is None else environment))
        self._process: ForkServerProcess = processes.Process(target=_run, args=(*told, dict(given or {}), output))
        with pytest.MonkeyPatch.context() as patch:
            # The server, which the first fork starts, would pass over what it cannot import.
            patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=os.pathsep)
            self._process.start()

    @property
    def pid(self) -> int:
        """Of the process."""
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """Its status once it has ended."""
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal, where it has not ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """As `kill -9`."""
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float = 120.0) -> int:
        """Its status, once it has ended; it must within `timeout` seconds."""
        self._process.join(timeout)
        assert self._process.exitcode is not None, "the process does not end"
        return self._process.exitcode


def run(program: Path, *arguments: str, folder: Path, timeout: float = 120.0, **options: Any) -> Done:
    """Run a program to its end, at most `timeout` seconds; what it writes passes through files in `folder`."""
    files = folder / "stdout", folder / "stderr"
    status = Fork(program, *arguments, output=files, **options).wait(timeout)
    return Done(status, *(file.read_text() for file in files))


def _run(
    program: str,
    arguments: list[str],
    environment: dict[str, str],
    given: dict[str, Any],
    output: tuple[Path, Path] | None,
) -> None:
    assert "support.warmed" in sys.modules, "the server of forks has not imported what it was told"
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [program, *arguments]
    # As in a process that a shell starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for target, file in enumerate(output or (), start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), target)
    runpy.run_path(program, given, "__main__")
