"""`lazydp bench quality`: one protocol for everybody, and figures that `lazydp evaluate` agrees with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from scipy import stats

from lazydp.components.bench import protocol
from lazydp.components.bench import quality as module
from lazydp.components.bench.protocol import Measured, Quality, drawn_negatives
from lazydp.components.bench.quality import run, scored_by, start_of
from lazydp.components.bench.quality_cli import quality
from lazydp.components.bench.quality_plot import draw
from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.ingest.manifest import TEST
from lazydp.kernels.noise_key import NoiseKey
from support.tiny import Tiny


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


def test_configurations_with_steps_are_contestants(tiny: Tiny) -> None:
    """From the start's vectors: with a rate of almost nothing they stay what they are."""
    noise, model = 0.05, {"kind": "two_tower", "embedding_dim": 48, "user": "history", "prior": True}
    steps = {"model": model, "start": {"noise_multiplier": noise}, "noise_multiplier": 1.0, "steps": 2}
    still, moved = (tiny.config(**steps, embeddings={"learning_rate": rate}) for rate in (1e-9, 50.0))
    data = EncodedDataset.open(tiny.dataset)
    found = {
        result.contestant: result
        for result in run(
            data, epsilons=[], seeds=1, configs={"still": still, "moved": moved}, key_of_seed=NoiseKey.for_tests
        )
    }
    begun = tiny.config(model=model, start={}, steps=0, noise_multiplier=noise)
    score = scored_by(data, begun, start_of(data, begun, NoiseKey.for_tests(0)))
    assert found["still"].mean["ndcg_at_10"] == pytest.approx(float(Measured(data, None).by(score).ndcg_at_10.mean()))
    assert found["moved"].mean != found["still"].mean
    assert found["still"].privacy_unit == "example"


def test_sampled_negatives_are_new_to_the_user_and_uniform(tiny_dataset: Path) -> None:
    data = EncodedDataset.open(tiny_dataset)
    test, seen = data.split(TEST), data.seen_items()
    assert test.item is not None
    assert test.user_index is not None
    rows = np.arange(len(test))
    drawn = drawn_negatives(data, rows, 5)
    assert torch.equal(drawn.values, drawn_negatives(data, rows, 5).values)
    for row in rows:
        items = drawn.values[drawn.offsets[row] : drawn.offsets[row + 1]].numpy()
        user = test.user_index[row]
        taken = seen.values[seen.offsets[user] : seen.offsets[user + 1]].numpy()
        assert len(np.unique(items)) == 5
        assert not np.isin(items, [0, test.item[row], *taken]).any()
    # Users have taken items of one half alone, so the other half has most of what is drawn.
    many = drawn_negatives(data, np.zeros(200, dtype=np.int64), 5).values.numpy()
    counts = np.bincount(many, minlength=41)[1:]
    free = counts[counts > 0]
    assert stats.chisquare(free).pvalue > 1e-4
    # The control: the five smallest codes would not pass.
    assert (
        stats.chisquare(np.where(np.arange(len(free)) < 5, 200, 1e-9), np.full(len(free), 1000 / len(free))).pvalue
        < 1e-4
    )


def test_an_interval_covers_other_keys_and_other_users() -> None:
    """In 400 drawn worlds with known effects of keys and users; intervals of one source alone cover too few."""
    random = np.random.default_rng(3)
    covered = []
    for _ in range(400):
        values = 0.5 + random.normal(0, 0.1, (5, 1)) + random.normal(0, 1.0, 100)
        covered.append(abs(values.mean() - 0.5) <= protocol._half_width(values))
    assert 0.92 <= np.mean(covered) <= 1.0
    one = np.full((1, 4), 0.5)
    assert protocol._half_width(one) == 0.0


def test_the_command_prints_json_and_draws(tiny_dataset: Path, tmp_path: Path) -> None:
    plot = tmp_path / "quality.svg"
    arguments = ["--dataset", str(tiny_dataset), "--epsilon", "8", "--seeds", "1", "--json", "--plot", str(plot)]
    done = CliRunner().invoke(quality, [*arguments, "--users", "20", "--negatives", "15"], catch_exceptions=False)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert {line["users"] for line in lines} == {20}
    assert {line["bench"] for line in lines} == {"quality"}
    assert {line["negatives"] for line in lines} == {15}
    assert lines[-1]["privacy_unit"] == "user"
    assert "<svg" in plot.read_text()
    assert plot.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(("other", "against"), [(60, "epsilon"), (90, "users")])
def test_datasets_that_differ_in_users_are_drawn_against_users(other: int, against: str) -> None:
    def one(epsilon: float | None, of_users: int) -> Quality:
        mean = {"hr_at_10": 0.1}
        unit: Any = "user" if epsilon else None
        return Quality(
            "tiny", "start", unit, epsilon, seeds=1, of_users=of_users, users=60, mean=mean, std=mean, interval=mean
        )

    figures = [one(None, 60), one(1.0, 60), one(8.0, 60), one(1.0, other), one(8.0, other)]
    drawn = draw(figures, metric="hr_at_10").decode()
    assert f"<!-- {against} -->" in drawn
    assert drawn.count("<!-- epsilon -->") + drawn.count("<!-- users -->") == 1
