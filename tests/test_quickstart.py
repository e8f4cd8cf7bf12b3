"""The example runs as a program: it trains, draws epsilon over steps, and gets its recommendations from a service."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from support import forks

QUICKSTART = Path(__file__).resolve().parent.parent / "examples" / "quickstart.py"


def started(out: Path) -> forks.Done:
    """Run it in a process of its own, from a folder of its own."""
    command = [sys.executable, str(QUICKSTART), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=out.parent)
    return forks.Done(done.returncode, done.stdout, done.stderr)


def forked(out: Path) -> forks.Done:
    """Run it in a fork that has the libraries imported. The commands that it starts are programs here as well."""
    return forks.run(QUICKSTART, str(out), folder=out.parent, timeout=240.0)


@pytest.mark.parametrize("run", [forked, pytest.param(started, marks=pytest.mark.slow)])
def test_the_quickstart_runs(run: Callable[[Path], forks.Done], tmp_path: Path) -> None:
    done = run(tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "per user" in done.stdout
    assert re.search(r"spent 7\.9\d\d of 10", done.stdout), done.stdout
    recommended = re.findall(r"^ +-?\d\.\d{3}  The ", done.stdout, flags=re.M)
    assert len(recommended) == 5
    # A curve with a point for each step that the statement lists.
    assert (tmp_path / "out" / "epsilon.svg").stat().st_size > 5_000
