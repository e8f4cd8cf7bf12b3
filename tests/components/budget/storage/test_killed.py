"""Whatever is killed, and wherever: nothing trains without a reservation, nothing is out without a commit."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lazydp.components.budget.ledger.ledger import Ledger
from lazydp.components.budget.ledger.verify import verify
from support import forks

# Between each pair of steps, and inside the two writes; the last is where nobody is killed.
POINTS = 9
PROGRAM = Path(__file__).with_name("release_steps.py")


def run(url: str, folder: Path, *, kill_at: int) -> forks.Done:
    environment = {**os.environ, "KILL_AT": str(kill_at)}
    return forks.run(PROGRAM, url, str(folder), folder=folder, environment=environment)


@pytest.mark.parametrize("kill_at", range(1, POINTS + 1))
def test_killed_between_each_pair_of_steps(ledger: Ledger, ledger_url: str, tmp_path: Path, kill_at: int) -> None:
    killed = run(ledger_url, tmp_path, kill_at=kill_at)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    held = {found.run_id: found.status for found in ledger.runs()}
    if (tmp_path / "trained").exists():
        assert held, "it trained without a reservation"
    if (tmp_path / "published").exists():
        assert held == {"run": "committed"}, "it was released without a commit"
    assert verify(ledger.entries()).problems == ()

    again = run(ledger_url, tmp_path, kill_at=0)
    assert again.returncode == 0, again.stderr[-2000:]
    assert (tmp_path / "published").exists()
    kinds = [entry.kind for entry in ledger.entries() if entry.run_id == "run"]
    assert kinds == ["reserved", "committed"]
    assert verify(ledger.entries()).problems == ()


def test_the_points_are_all_there_are(ledger: Ledger, ledger_url: str, tmp_path: Path) -> None:
    """In a process that a shell could have started."""
    command = [sys.executable, str(PROGRAM), ledger_url, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert int(done.stdout) == POINTS
