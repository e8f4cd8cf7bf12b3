"""The programs that the documents print run as printed, and the example runs as a program."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lazydp.components.train.mechanism.norm_rules import supported_layers

ROOT = Path(__file__).resolve().parent.parent
GUIDE = ROOT / "docs" / "from-opacus.md"
README = ROOT / "README.md"


def test_the_readmes_program_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.S)
    assert len([line for line in program.splitlines() if line.strip()]) <= 14, "an example of a dozen lines"
    exec(compile(program, str(README), "exec"), {})
    assert 2.2 < float(capsys.readouterr().out) < 2.3


def test_the_quickstart_runs(tmp_path: Path) -> None:
    """As a program: it trains, draws epsilon over steps, and gets its recommendations from a service."""
    command = [sys.executable, str(ROOT / "examples" / "quickstart.py"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "per user" in done.stdout
    assert re.search(r"spent 7\.9\d\d of 10", done.stdout), done.stdout
    recommended = re.findall(r"^ +-?\d\.\d{3}  The ", done.stdout, flags=re.M)
    assert len(recommended) == 5
    # A curve with a point for each step that the statement lists.
    assert (tmp_path / "out" / "epsilon.svg").stat().st_size > 5_000


def test_the_guides_program_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), flags=re.S)
    exec(compile(program, str(GUIDE), "exec"), {})
    assert 7.5 < float(capsys.readouterr().out) <= 8.0


def test_the_guide_names_every_layer_that_has_a_rule() -> None:
    named = set(re.findall(r"`nn\.(\w+)`", GUIDE.read_text().partition("\nLayers:")[2].partition(" are fast")[0]))
    assert named == {*supported_layers(), "Embedding", "EmbeddingBag"}
