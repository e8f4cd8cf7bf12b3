"""`lazydp bench quality`: one protocol for everybody, and figures that `lazydp evaluate` agrees with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from lazydp.components.bench import quality as module
from lazydp.components.bench.cli import quality
from lazydp.components.bench.quality import Quality, run
from lazydp.components.bench.quality_plot import draw
from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.kernels.noise_key import NoiseKey


def test_every_contestant_is_ranked_by_the_same_protocol(tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_IALS", {**module._IALS, "factors": 8, "iterations": 3})
    monkeypatch.setattr(module, "_RANK", 8)
    data = EncodedDataset.open(tiny_dataset)
    found = list(run(data, epsilons=[1.0, 100.0], seeds=2, key_of_seed=NoiseKey.for_tests))
    assert {result.users for result in found} == {60}
    by = {(result.contestant, result.epsilon): result.mean["hr_at_10"] for result in found}
    # Users take items of one half. Popularity knows no half; all others find it, a start where epsilon is large.
    chance = by["popularity", None]
    for contestant in ("pure_svd", "ease", "start"):
        assert by[contestant, None] > chance + 0.2
    assert by["start", 100.0] > by["dp_popularity", 100.0] + 0.2
    # The control: at epsilon 1, sixty users are lost in the noise.
    assert by["start", 1.0] < by["start", 100.0]
    again = list(run(data, epsilons=[100.0], seeds=2, key_of_seed=NoiseKey.for_tests))
    assert again[-1].mean == found[-1].mean


def test_the_command_prints_json_and_draws(tiny_dataset: Path, tmp_path: Path) -> None:
    plot = tmp_path / "quality.svg"
    arguments = ["--dataset", str(tiny_dataset), "--epsilon", "8", "--seeds", "1", "--json", "--plot", str(plot)]
    done = CliRunner().invoke(quality, [*arguments, "--users", "20"], catch_exceptions=False)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert {line["users"] for line in lines} == {20}
    assert {line["bench"] for line in lines} == {"quality"}
    assert lines[-1]["privacy_unit"] == "user"
    assert "<svg" in plot.read_text()
    assert plot.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(("other", "against"), [(60, "epsilon"), (90, "users")])
def test_datasets_that_differ_in_users_are_drawn_against_users(other: int, against: str) -> None:
    def one(epsilon: float | None, of_users: int) -> Quality:
        mean = {"hr_at_10": 0.1}
        unit: Any = "user" if epsilon else None
        return Quality("tiny", "start", unit, epsilon, seeds=1, of_users=of_users, users=60, mean=mean, std=mean)

    figures = [one(None, 60), one(1.0, 60), one(8.0, 60), one(1.0, other), one(8.0, other)]
    drawn = draw(figures, metric="hr_at_10").decode()
    assert f"<!-- {against} -->" in drawn
    assert drawn.count("<!-- epsilon -->") + drawn.count("<!-- users -->") == 1
