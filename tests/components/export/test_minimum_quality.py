"""A model that is not good enough is not released: a noised comparison, charged with the run whichever way it falls."""

import math
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from dp_accounting import dp_event

from lazydp.components.budget.accounting.epsilon import epsilon
from lazydp.components.budget.accounting.events import event_to_json
from lazydp.components.budget.ledger.ledger import Ledger
from lazydp.components.budget.ledger.verify import verify
from lazydp.components.bundle.reader import Bundle
from lazydp.components.evaluate.user_scores import scores_over_popularity
from lazydp.components.export import quality
from lazydp.components.export.export import export
from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.ingest.ingest import ingest
from lazydp.components.shared.errors import InputError, QualityError
from lazydp.components.train.config import TrainConfig
from lazydp.components.train.release_settings import MinimumQuality
from lazydp.components.train.run.costs import RunCost, calibrated_noise_multiplier
from lazydp.components.train.run.folder import RunFolder
from lazydp.components.train.run.popularity import item_histogram
from lazydp.components.train.run.settings_check import check_fits
from lazydp.components.train.run.train import train
from lazydp.components.tune.sweep import Sweep
from lazydp.components.tune.tune import tune
from lazydp.kernels.noise_key import NoiseKey
from support.tiny import TINY_CONFIG, TINY_SPEC

COUNTING: dict[str, Any] = {"popularity": {"noise_multiplier": 3.0}, "steps": 2}
# Of 60 users the sum is about 30 and its noise about 5: passed but for a chance of 1e-9; the other is 600 below zero.
EASY = {"metric": "auc", "over_popularity": 0.01, "noise_multiplier": 5.0}
HARD = {"metric": "auc", "over_popularity": 20.0, "noise_multiplier": 2.0}


class Killed(BaseException):
    """Stands for `kill -9`."""


def trained(tiny: Any, minimum: dict[str, Any]) -> dict[str, Any]:
    """What export is asked: a run with this minimum, done."""
    url = tiny.ledger()
    config = tiny.config(**COUNTING, minimum_quality=minimum)
    run = train(dataset=tiny.dataset, config=config, out=tiny.folder / "run", ledger=url).folder
    return {"run": run, "dataset": tiny.dataset, "out": tiny.folder / "bundle", "ledger": url}


def test_a_model_that_passes_is_charged_for_the_comparison_and_says_so(tiny: Any) -> None:
    asked = trained(tiny, EASY)
    export(**asked)
    statement = Bundle.open(asked["out"]).statement
    assert statement.minimum_quality is not None
    assert statement.minimum_quality.model_dump() == {**EASY, "sensitivity": 1.01}
    config = tiny.config(**COUNTING)
    event = dp_event.ComposedDpEvent([RunCost(config, 20).of_run(), dp_event.GaussianDpEvent(5.0)])
    assert statement.epsilon == epsilon(event, delta=1e-5)
    assert statement.epsilon > epsilon(RunCost(config, 20).of_run(), delta=1e-5)
    with Ledger.open(asked["ledger"]) as ledger:
        [run] = ledger.runs()
        assert run.reserved_event == run.released_event == event_to_json(event)


def test_a_model_that_does_not_is_charged_and_never_released(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = trained(tiny, HARD)
    destroy = RunFolder.destroy_keys
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "destroy_keys", lambda self: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            export(**asked)  # after the charge, before the key is gone
    assert RunFolder.destroy_keys is destroy
    for _ in range(2):  # the same command decides the same, with and without the key
        with pytest.raises(QualityError, match=r"auc is below 20 times .* its charge stays") as raised:
            export(**asked)
        assert len(str(raised.value).splitlines()) == 1
    assert not asked["out"].exists()
    assert not list(asked["run"].rglob("noise.key"))
    assert not list(asked["run"].rglob("root.key"))
    with Ledger.open(asked["ledger"]) as ledger:
        assert verify(ledger.entries()).problems == ()
        [run] = ledger.runs()
        assert (run.status, [release.release for release in ledger.releases()]) == ("committed", ["nothing"])
        assert ledger.show("tiny").charged_epsilon == pytest.approx(
            epsilon(RunCost(tiny.config(**COUNTING, minimum_quality=HARD), 20).of_run(), delta=1e-5)
        )


# --- the mechanism -----------------------------------------------------------------------------------------------


def test_a_user_moves_the_sum_by_the_users_own_figure(tiny: Any, tmp_path: Path) -> None:
    """With its negative control: compared with exact counts, somebody else's figure moves too."""
    asked = trained(tiny, EASY)
    export(**asked)
    released = Bundle.open(asked["out"])
    rows = pq.read_table(tiny.dataset.parent / "interactions.parquet")
    fewer = rows.filter(np.asarray(rows["user"].to_pylist()) != "u7")
    pq.write_table(fewer, tmp_path / "rows.parquet")
    (tmp_path / "spec.yaml").write_text(TINY_SPEC)
    ingest([str(tmp_path / "rows.parquet")], str(tmp_path / "spec.yaml"), tmp_path / "fewer")
    both = [EncodedDataset.open(tiny.dataset), EncodedDataset.open(tmp_path / "fewer")]

    def figures(data: EncodedDataset, counts: torch.Tensor) -> list[float]:
        found = scores_over_popularity(
            data,
            model=released.model,
            tables=released.tables,
            counts=counts,
            metric="auc",
            over_popularity=2.0,
        )
        return sorted(found.tolist())

    def exact(data: EncodedDataset) -> torch.Tensor:
        counts = item_histogram(data.split("train"), num_items=data.items.num_items, privacy_unit="example")
        return torch.from_numpy(counts).float()

    def left_over(counts_of: Any) -> list[float]:
        """Figures of the larger dataset that the smaller one lacks."""
        more, less = (figures(data, counts_of(data)) for data in both)
        for figure in less:
            if figure in more:
                more.remove(figure)
        return more

    assert released.popularity is not None
    assert len(figures(both[0], released.popularity)) == 60
    [own] = left_over(lambda _: released.popularity)
    assert -2.0 <= own <= 1.0
    assert len(left_over(exact)) > 1


def test_the_noise_is_what_is_accounted_for(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """How often a sum of 3 passes, over 4,000 keys; noise of another size would pass it at another rate."""
    monkeypatch.setattr(quality, "scores_over_popularity", lambda *_, **__: np.array([3.0]))
    minimum = MinimumQuality(noise_multiplier=2.0, over_popularity=2.0)
    keys, nothing = 4000, torch.zeros(1)
    passed = sum(
        quality.reaches(minimum, tiny, model=None, tables={}, counts=nothing, key=NoiseKey.for_tests(seed))  # type: ignore[arg-type]
        for seed in range(keys)
    )
    for sensitivity, expected in ((3.0, True), (1.0, False), (2.0, False)):
        chance = NormalDist(sigma=2.0 * sensitivity).cdf(3.0)
        deviation = math.sqrt(keys * chance * (1 - chance))
        assert (abs(passed - keys * chance) < 4 * deviation) == expected, sensitivity


def test_a_whole_user_pays_once(tiny: Any) -> None:
    config = tiny.config(**COUNTING, minimum_quality=EASY)
    without = tiny.config(**COUNTING)
    gaussian = dp_event.GaussianDpEvent(5.0)
    for event in ("of_run", "of_release", "of_user", "of_known_batches"):
        alone = getattr(RunCost(without, 20), event)()
        assert getattr(RunCost(config, 20), event)() == dp_event.ComposedDpEvent([alone, gaussian])
    assert RunCost(config, 20).of_training() == RunCost(without, 20).of_training()


# --- settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"popularity": None}, "this run releases none"),
        ({"publish_every": 1}, "publish_every releases earlier ones"),
        ({"mode": "sgd", "popularity": None}, "a run without privacy is no release"),
        ({"minimum_quality": {"noise_multiplier": 0}}, "noise_multiplier"),
        ({"minimum_quality": {"noise_multiplier": 5, "metric": "brier"}}, "metric"),
        ({"minimum_quality": {"noise_multiplier": 5, "over_popularity": 0}}, "over_popularity"),
    ],
    ids=str,
)
def test_what_cannot_be_judged_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        TrainConfig.parse({**TINY_CONFIG, **COUNTING, "minimum_quality": EASY, **changes}, where="test")


def test_it_is_left_out_without_privacy_and_of_the_digest_where_it_is_absent(tiny: Any) -> None:
    config = tiny.config(**COUNTING, minimum_quality=EASY)
    assert config.with_changes(mode="sgd").minimum_quality is None
    assert "minimum_quality" not in tiny.config()._deciding()
    assert config.digest() != tiny.config(**COUNTING).digest()


def test_it_needs_held_out_rows_and_no_sweep(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny.config(**COUNTING, minimum_quality=EASY)
    settings = {"embeddings.learning_rate": [1.0]}
    score = {"kind": "held_out", "noise_multiplier": 5.0}
    sweep = Sweep.model_validate({"mean_trials": 1, "score": score, "settings": settings})
    with pytest.raises(InputError, match="minimum_quality: a sweep keeps its best trial"):
        tune(dataset=tiny.dataset, config=config, sweep=sweep, out=tiny.folder / "sweep", ledger=tiny.ledger())
    data = EncodedDataset.open(tiny.dataset)
    split = EncodedDataset.split
    monkeypatch.setattr(EncodedDataset, "split", lambda self, name: [] if name == "test" else split(self, name))
    with pytest.raises(InputError, match="minimum_quality is judged on held-out examples"):
        check_fits(data, config)


def test_noise_that_leaves_nothing_for_training_is_named() -> None:
    document = {**TINY_CONFIG, **COUNTING, "minimum_quality": {"noise_multiplier": 0.5}, "noise_multiplier": None}
    config = TrainConfig.parse({**document, "target_epsilon": 1.0}, where="test")
    with pytest.raises(InputError, match=r"minimum_quality\.noise_multiplier 0\.5 cost epsilon .* give the two more"):
        calibrated_noise_multiplier(config, 20)
