"""A start from the configuration to the service's answers: charged, released, stated, and worth serving."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from lazydp.components.budget.ledger.ledger import Ledger
from lazydp.components.bundle.query import Query
from lazydp.components.bundle.reader import Bundle
from lazydp.components.bundle.scoring.make import make_scorer
from lazydp.components.evaluate.evaluate import evaluate
from lazydp.components.export.export import export
from lazydp.components.features.batch import Bags
from lazydp.components.features.pooling import lookup_weights
from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.ingest.ingest import ingest
from lazydp.components.onepass import contributions
from lazydp.components.onepass.rules import Noise
from lazydp.components.onepass.start import noised_counts, one_pass
from lazydp.components.plan.plan import plan
from lazydp.components.shared.errors import InputError
from lazydp.components.train.config import TrainConfig
from lazydp.components.train.run.train import train
from lazydp.kernels.noise_key import NoiseKey
from support.tiny import Tiny

KEY = NoiseKey.for_tests(3)


def config(**changes: Any) -> TrainConfig:
    model = {"kind": "two_tower", "embedding_dim": 8, "user": "history", "prior": True}
    settings = {"model": model, "noise_multiplier": 0.05, **changes}
    return TrainConfig.parse(settings, where="test")


@dataclass(frozen=True)
class Released:
    bundle: Path
    run: Path
    ledger: str


def release(tiny: Tiny, folder: Path, **changes: Any) -> Released:
    """Train without a step and export, under a secret key."""
    settings = config(**changes)
    url = tiny.ledger(epsilon=10_000.0, privacy_unit=settings.privacy_unit)
    folder.mkdir()
    train(dataset=tiny.dataset, config=settings, out=folder / "run", ledger=url)
    export(run=folder / "run", dataset=tiny.dataset, out=folder / "bundle", ledger=url, allow_non_private=True)
    return Released(folder / "bundle", folder / "run", url)


@pytest.mark.parametrize("unit", ["user", "example"])
def test_a_start_is_charged_released_and_better_than_popularity(tiny: Tiny, tmp_path: Path, unit: str) -> None:
    done = release(tiny, tmp_path / unit, privacy_unit=unit)
    bundle = Bundle.open(done.bundle)
    statement = bundle.statement
    assert (statement.private, statement.privacy_unit, statement.steps) == (True, unit, 0)
    assert "joint differential privacy" in statement.guarantee
    assert statement.start is not None
    assert statement.start.noise_multiplier == pytest.approx(0.05)
    assert statement.popularity is not None
    assert statement.sampler.startswith("none")
    with Ledger.open(done.ledger, read_only=True) as ledger:
        (run,) = ledger.state().runs.values()
    assert run.status == "committed"
    assert run.releases[-1].epsilon == pytest.approx(statement.epsilon)
    # Users take items of one half: whoever reads a history finds the half, and popularity finds no more than chance.
    measured = evaluate(bundle=done.bundle, dataset=tiny.dataset)
    assert measured.model is not None
    assert measured.popularity is not None
    assert measured.model.hr_at_10 > 1.5 * measured.popularity.hr_at_10


def test_the_service_answers_a_history_and_calls_nobody_by_name(tiny: Tiny, tmp_path: Path) -> None:
    bundle = Bundle.open(release(tiny, tmp_path / "one").bundle)
    scorer = make_scorer(bundle)
    first, unknown, nobody = scorer.rank(
        [
            Query(history=("1", "2", "3"), k=10),
            Query(user_id="u1", k=10),
            Query(k=10),
        ]
    )
    assert first.source == "history"
    assert sum(code <= 20 for code in first.codes) >= 7  # of the half that the history is of; by chance 5
    assert unknown.source == nobody.source == "popular"
    assert unknown.codes == nobody.codes
    # The ranking is the prior and the history's part: by hand.
    weight = bundle.tables["item"]
    codes = torch.tensor([1, 2, 3])
    pooled = lookup_weights(Bags(codes, torch.tensor([0, 3])), "recent")
    assert pooled is not None
    assert bundle.popularity is not None
    logits = bundle.model.state_dict()["prior"] + weight @ (pooled @ weight[codes])
    best = [code for code in (1 + torch.argsort(-logits[1:])).tolist() if code not in (1, 2, 3)]
    assert first.codes == best[:10]
    assert torch.allclose(torch.from_numpy(first.scores), logits[torch.tensor(first.codes)], atol=1e-4)
    # Items alike are alike by what they go with, not by how popular they are.
    (similar,) = scorer.rank([Query(similar_to=["1"], k=5)])
    assert sum(code <= 20 for code in similar.codes) >= 3
    assert np.abs(similar.scores).max() <= 1.0 + 1e-5


def test_an_approximate_index_ranks_by_the_prior_too(tiny: Tiny, tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    bundle = Bundle.open(release(tiny, tmp_path / "one").bundle)
    queries = [Query(history=(str(item),), k=5) for item in (1, 25)]
    exact, approximate = make_scorer(bundle).rank(queries), make_scorer(bundle, approximate_from=1).rank(queries)
    assert [ranking.codes for ranking in exact] == [ranking.codes for ranking in approximate]


def test_a_replayed_key_gives_the_same_bits_whatever_the_blocks(
    tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, noise = EncodedDataset.open(tiny_dataset), Noise.of(0.1, histogram_share=0.1)
    for unit in ("user", "example"):
        monkeypatch.setattr(contributions, "_ITEMS_AT_ONCE", 1 << 19)
        whole = one_pass(data, unit, noise, KEY, dim=8)  # type: ignore[arg-type]
        monkeypatch.setattr(contributions, "_ITEMS_AT_ONCE", 7)
        parts = one_pass(data, unit, noise, KEY, dim=8)  # type: ignore[arg-type]
        for name in ("counts", "prior", "vectors"):
            assert torch.equal(getattr(whole, name), getattr(parts, name))
        assert torch.equal(noised_counts(data, unit, noise, KEY), whole.counts)  # type: ignore[arg-type]
        other = one_pass(data, unit, noise, NoiseKey.for_tests(4), dim=8)  # type: ignore[arg-type]
        assert not torch.equal(other.vectors, whole.vectors)


def test_the_bundle_carries_the_counts_that_the_prior_was_made_of(tiny: Tiny, tmp_path: Path) -> None:
    bundle = Bundle.open(release(tiny, tmp_path / "one").bundle)
    assert bundle.popularity is not None
    assert bundle.statement.popularity is not None
    floor = max(1.0, bundle.statement.popularity.noise_multiplier)
    prior = bundle.model.state_dict()["prior"]
    assert torch.allclose(prior[1:], bundle.popularity[1:].clamp(min=floor).log())


def test_steps_go_on_from_a_start_and_both_are_charged(tiny: Tiny, tmp_path: Path) -> None:
    steps = {"steps": 3, "sampling_prob": 0.1, "expected_batch_size": 80, "target_delta": 1e-5, "negatives": 4}
    more = {"embeddings": {"learning_rate": 0.01}, "noise_multiplier": 2.0, "privacy_unit": "user"}
    settings = {**steps, **more, "start": {"noise_multiplier": 0.05}}
    done = release(tiny, tmp_path / "trained", **settings)
    alone = release(tiny, tmp_path / "alone")
    statement = Bundle.open(done.bundle).statement
    assert statement.steps == 3
    assert statement.epsilon is not None
    assert statement.epsilon > (Bundle.open(alone.bundle).statement.epsilon or 0.0)
    measured = evaluate(bundle=done.bundle, dataset=tiny.dataset)
    assert measured.model is not None
    assert measured.popularity is not None
    # Popularity reaches 0.3 here; the start and three noised steps 0.8, give or take the noise.
    assert measured.model.hr_at_10 > measured.popularity.hr_at_10 + 0.3


def test_without_privacy_nothing_is_noised_and_no_counts_are_released(tiny: Tiny, tmp_path: Path) -> None:
    settings = {"mode": "sgd", "noise_multiplier": None}
    first, second = (Bundle.open(release(tiny, tmp_path / name, **settings).bundle, allow_non_private=True)
                     for name in ("one", "two"))  # fmt: skip
    assert torch.equal(first.tables["item"], second.tables["item"])
    assert first.popularity is None
    assert first.statement.start is None
    assert first.statement.epsilon is None


def test_a_dataset_without_histories_is_refused_with_what_to_do(tiny_dataset: Path, tmp_path: Path) -> None:
    source = EncodedDataset.open(tiny_dataset).manifest.source.locations[0]
    spec = yaml.safe_load((tiny_dataset.parent / "spec.yaml").read_text())
    del spec["history"]
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    ingest([str(source)], str(tmp_path / "spec.yaml"), tmp_path / "dataset")
    with pytest.raises(InputError, match=r"add `history: \{max_length: 200\}`"):
        train(dataset=tmp_path / "dataset", config=config(), out=tmp_path / "run")


@pytest.mark.parametrize(("items", "what"), [(3000, "a matrix of 3,000 items"), (10_000, "512 leading eigenvectors")])
def test_a_plan_without_privacy_is_the_default_of_mode_sgd(items: int, what: str) -> None:
    made = plan(users=2000, items=items, epsilon=math.inf, delta=1e-5)
    assert what in made.text()
    assert "without privacy" in made.text()
    assert TrainConfig.parse(yaml.safe_load(made.text()), where="plan") == TrainConfig.parse(
        {"mode": "sgd"}, where="default"
    )
    assert made.to_json()["z"] is None
    assert made.gain[0] > plan(users=10**6, items=items, epsilon=8.0, delta=1e-7).gain[0]


def test_the_plan_is_the_default() -> None:
    made = plan(users=2000, items=3000, epsilon=8.0, delta=1e-5)
    assert TrainConfig.parse(yaml.safe_load(made.text()), where="plan") == TrainConfig.parse(
        {"target_epsilon": 8}, where="default"
    )
    assert "warning" not in made.text()
    assert "1 / users" in plan(users=200_000, items=3000, epsilon=8.0, delta=1e-5).text()
    few, many = (
        plan(users=500, items=100, epsilon=1.0, delta=1e-5),
        plan(users=10**5, items=100, epsilon=1.0, delta=1e-5),
    )
    assert few.gain[0] < many.gain[0]
    assert few.z < many.z
    with pytest.raises(InputError, match="at least one user"):
        plan(users=0, items=10, epsilon=1.0, delta=1e-5)
