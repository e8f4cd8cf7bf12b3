"""The programs that the documents print run as printed."""

from __future__ import annotations

import difflib
import re
import warnings
from pathlib import Path
from typing import Any

import pytest

from lazydp.components.budget.accounting.epsilon import epsilon
from lazydp.components.train.data.sampler import poisson_dp_event
from lazydp.components.train.mechanism.norm_rules import supported_layers

ROOT = Path(__file__).resolve().parent.parent
GUIDE = ROOT / "docs" / "from-opacus.md"
README = ROOT / "README.md"


def test_the_readmes_program_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.S)
    assert len([line for line in program.splitlines() if line.strip()]) <= 14, "an example of a dozen lines"
    exec(compile(program, str(README), "exec"), {})
    assert 2.2 < float(capsys.readouterr().out) < 2.3


@pytest.fixture(scope="module")
def programs() -> list[str]:
    """Of the guide: Opacus', the same in one call, the same by hand."""
    found: list[str] = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), flags=re.S)
    assert len(found) == 3
    return found


def ran(program: str, capsys: pytest.CaptureFixture[str]) -> tuple[float, dict[str, Any]]:
    """The epsilon that a program of the guide prints, and its names."""
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Opacus' own: deprecated hooks, and a generator that is not secure
        exec(compile(program, str(GUIDE), "exec"), names)
    return float(capsys.readouterr().out), names


def test_the_program_by_hand_runs(programs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert 7.5 < ran(programs[2], capsys)[0] <= 8.0


def test_at_most_ten_lines_of_the_opacus_program_change(programs: list[str]) -> None:
    before, after = (program.splitlines() for program in programs[:2])
    changed = [line for line in difflib.ndiff(before, after) if line[:2] in {"- ", "+ "}]
    removed = sum(line.startswith("-") for line in changed)
    assert max(removed, len(changed) - removed) <= 10


def test_both_programs_end_at_the_same_epsilon(programs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("opacus")
    theirs, of_opacus = ran(programs[0], capsys)
    ours, of_lazydp = ran(programs[1], capsys)
    assert 2.98 < theirs <= 3.0
    assert 2.98 < ours <= 3.0
    # Each accountant on the noise of the other: the mechanism is the same, steps and sampling probability included.
    mechanism = of_lazydp["trainer"].mechanism
    history = of_opacus["engine"].accountant.history
    ((their_sigma, q, steps),) = history
    assert (q, steps) == (mechanism.sampling_prob, mechanism.steps)
    their_event = poisson_dp_event(
        noise_multiplier=their_sigma, sampling_prob=q, steps=steps, max_examples_per_user=None
    )
    assert epsilon(their_event, delta=1e-5) == pytest.approx(theirs, rel=0.01)
    history[:] = [(mechanism.privacy.noise_multiplier, q, steps)]
    assert of_opacus["engine"].get_epsilon(1e-5) == pytest.approx(ours, rel=0.01)


def test_the_guide_names_every_layer_that_has_a_rule() -> None:
    named = set(re.findall(r"`nn\.(\w+)`", GUIDE.read_text().partition("\nLayers:")[2].partition(" are fast")[0]))
    assert named == {*supported_layers(), "Embedding", "EmbeddingBag"}
