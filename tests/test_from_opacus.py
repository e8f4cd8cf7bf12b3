"""The program in the guide for users of Opacus runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lazydp.components.train.mechanism.norm_rules import supported_layers

GUIDE = Path(__file__).resolve().parent.parent / "docs" / "from-opacus.md"


def test_the_guides_program_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), flags=re.S)
    exec(compile(program, str(GUIDE), "exec"), {})
    assert 7.5 < float(capsys.readouterr().out) <= 8.0


def test_the_guide_names_every_layer_that_has_a_rule() -> None:
    named = set(re.findall(r"`nn\.(\w+)`", GUIDE.read_text().partition("\nLayers:")[2].partition(". Another")[0]))
    assert named == {*supported_layers(), "Embedding", "EmbeddingBag"}
