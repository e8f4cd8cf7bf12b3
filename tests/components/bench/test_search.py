"""`lazydp bench search`: finds what is better than the rule where there is something, and measures it afresh."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from lazydp.components.bench import search as module
from lazydp.components.bench.quality_cli import search
from lazydp.components.bench.search import Setting, Trials
from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.onepass.rules import RULE
from lazydp.kernels.noise_key import NoiseKey


def test_a_search_finds_the_best_and_measures_it_again(tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials whose figure is known: nearer to a scale of 1.7 is better, with noise by key."""
    seen: list[tuple[Setting, bytes]] = []

    def one(self: Trials, setting: Setting, key: NoiseKey) -> float:
        noise = int.from_bytes(key.commitment().encode()[:2]) / 2**16
        seen.append((setting, key.commitment().encode()))
        return 1.0 - 0.1 * abs(math.log(setting.rule.scale / 1.7)) + 0.01 * noise

    monkeypatch.setattr(Trials, "one", one)
    data = EncodedDataset.open(tiny_dataset)
    rule, *others = module.run(data, data, epsilon=3.0, settings=40, seeds=4)
    assert (rule.changes, rule.ratio) == ({}, 1.0)
    for found in others:
        assert abs(math.log(found.changes["scale"] / 1.7)) < 0.2
        assert found.ratio < 1.0
        assert found.mean > rule.mean
        # Under the same keys the noise falls out of the differences.
        assert found.error < 1e-3
    searched = {key for setting, key in seen[: 41 + 11 + 2 * 5]}
    fresh = {key for setting, key in seen[-12:]}
    assert len(fresh) == 4
    assert not fresh & searched


def test_settings_lie_around_the_rule() -> None:
    for has_features in (False, True):
        drawn = module._drawn(200, 0, has_features=has_features)
        assert drawn == module._drawn(200, 0, has_features=has_features)
        scales = np.array([setting.rule.scale for setting in drawn])
        assert 0.5 <= scales.min() < 0.6
        assert 1.8 < scales.max() <= 2.0
        assert {setting.rule.directions == RULE.directions for setting in drawn} == {not has_features}


def test_the_command_prints_ratios(tiny_dataset: Path) -> None:
    arguments = ["--dataset", str(tiny_dataset), "--validation", str(tiny_dataset), "--epsilon", "100"]
    few = ["--settings", "3", "--seeds", "2", "--users", "20"]
    done = CliRunner().invoke(search, [*arguments, *few, "--json"], catch_exceptions=False)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [line["bench"] for line in lines] == ["search"] * 3
    assert [bool(line["changes"]) for line in lines] == [False, True, True]
    assert all(line["searched"] > 0.2 for line in lines)
