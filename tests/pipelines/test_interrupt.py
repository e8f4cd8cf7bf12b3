"""Ctrl-C ends a command with one line and status 130, whatever a library makes of the interrupt."""

from __future__ import annotations

import subprocess
import sys

import pytest

_SCRIPT = """
import os, signal, sys, types
import click
from lazydp.pipelines import cli

# A process that was started in the background of a shell ignores the signal, and so do its children.
signal.signal(signal.SIGINT, signal.default_int_handler)

@click.command()
def command():
    try:
        if {interrupt}:
            os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        pass  # as numpy's import does
    {after}

sys.modules["swallows"] = types.ModuleType("swallows")
sys.modules["swallows"].command = command
cli._COMMANDS["swallow"] = ("swallows:command", "")
cli.main(["swallow"])
"""


def _run(*, interrupt: bool, after: str) -> subprocess.CompletedProcess[str]:
    script = _SCRIPT.format(interrupt=interrupt, after=after)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("after", ["raise RecursionError('of something else')", "raise KeyboardInterrupt"])
def test_an_interrupt_is_one_line(after: str) -> None:
    done = _run(interrupt=True, after=after)
    assert done.returncode == 130
    assert done.stderr.strip() == "lazydp: interrupted; nothing was left half-written"


def test_an_error_without_an_interrupt_is_not_called_one() -> None:
    done = _run(interrupt=False, after="raise RecursionError('a defect of ours')")
    assert done.returncode == 1
    assert "RecursionError: a defect of ours" in done.stderr
    assert "interrupted" not in done.stderr
