"""A sweep is one mechanism: reserved before anything is drawn, private together with its scores, charged once."""

import math
import stat
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from lazydp.components.budget.accounting.epsilon import epsilon
from lazydp.components.budget.accounting.events import event_to_json
from lazydp.components.budget.accounting.tuning import Tuning
from lazydp.components.budget.ledger.ledger import Ledger
from lazydp.components.budget.ledger.verify import verify
from lazydp.components.bundle.reader import Bundle
from lazydp.components.evaluate.user_scores import mean_by_user, user_scores
from lazydp.components.export.export import export
from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.ingest.ingest import ingest
from lazydp.components.shared.errors import BudgetExceededError, InputError, PrivacyError
from lazydp.components.train.config import TrainConfig
from lazydp.components.train.run.costs import RunCost
from lazydp.components.train.run.folder import RunFolder
from lazydp.components.train.run.train import train
from lazydp.components.tune import trials
from lazydp.components.tune import tune as sweeps
from lazydp.components.tune.sweep import Sweep, with_settings
from lazydp.components.tune.tune import tune

RATES = [0.001, 0.5, 2.0]
SWEEP: dict[str, Any] = {
    "distribution": "geometric",
    "mean_trials": 2.0,
    "metric": "auc",
    "score": {"kind": "held_out", "noise_multiplier": 5.0},
    "settings": {"embeddings.learning_rate": RATES, "dense.learning_rate": [1e-3, 1e-2]},
}


class Killed(BaseException):
    """Stands for `kill -9`."""


def sweep(**changes: Any) -> Sweep:
    return Sweep.model_validate({**SWEEP, **changes})


def test_a_sweep_file_of_the_first_version_is_read() -> None:
    before = {("law" if name == "distribution" else name): value for name, value in SWEEP.items()}
    assert Sweep.model_validate(before) == sweep()
    with pytest.raises(ValueError, match="law"):
        Sweep.model_validate({**SWEEP, "law": "poisson"})  # both at once


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps of three trials: how many there are is tested by itself."""
    monkeypatch.setattr(Tuning, "number_of_trials", lambda self, uniform: 3)


def given(tiny: Any, **changes: Any) -> dict[str, Any]:
    found = {
        "dataset": tiny.dataset,
        "config": tiny.config(steps=4),
        "sweep": sweep(),
        "out": tiny.folder / "sweep",
        "ledger": f"sqlite:///{tiny.folder / 'ledger.db'}",
    }
    return {**found, **changes}


def statuses(tiny: Any) -> list[tuple[str, str]]:
    with Ledger.open(f"sqlite:///{tiny.folder / 'ledger.db'}") as ledger:
        assert verify(ledger.entries()).problems == ()
        return [(run.purpose, run.status) for run in ledger.runs()]


# --- the mechanism ---------------------------------------------------------------------------------------------


def tuning_of(name: str, mean: float) -> Tuning:
    return Tuning(distribution=name, mean_trials=mean, metric="auc", score_noise_multiplier=1.0, digest="")


def test_what_a_sweep_costs() -> None:
    training = RunCost(
        TrainConfig.parse(
            {
                "model": {"kind": "two_tower"},
                "privacy_unit": "example",
                "sampling_prob": 0.01,
                "expected_batch_size": 10,
                "steps": 100,
                "noise_multiplier": 1.0,
                "target_delta": 1e-5,
            },
            where="test",
        ),
        None,
    ).of_run()
    noised = tuning_of("poisson", 8).event(training)
    public = tuning_of("poisson", 8).model_copy(update={"score_noise_multiplier": None}).event(training)
    one = epsilon(training, delta=1e-5)
    # More than one training, far less than the eight it may be; and the score's noise has its price.
    assert one < epsilon(public, delta=1e-5) < epsilon(noised, delta=1e-5)
    assert epsilon(public, delta=1e-5) < 4 * one
    assert event_to_json(public)["mean"] == 8


# --- the score -------------------------------------------------------------------------------------------------


def test_no_user_moves_the_sum_by_more_than_one() -> None:
    dice = np.random.default_rng(0)
    users = np.sort(dice.integers(0, 20, 200))
    scores = dice.normal(0.5, 3.0, 200)
    scores[dice.integers(0, 200, 5)] = np.inf
    scores[dice.integers(0, 200, 5)] = np.nan
    whole = mean_by_user(scores, users).sum()
    moved = [abs(whole - mean_by_user(scores[users != user], users[users != user]).sum()) for user in range(20)]
    assert 0.1 < max(moved) <= 1.0
    # The control: a mean over examples, as evaluation takes it, is moved by a user without bound.
    plain = [
        abs(np.nansum(scores[np.isfinite(scores)]) - np.nansum(scores[np.isfinite(scores) & (users != u)]))
        for u in range(20)
    ]
    assert max(plain) > 1.0


@pytest.mark.parametrize("metric", ["auc", "hit_at_10", "ndcg_at_10", "brier"])
def test_a_users_score_reads_that_users_rows_alone(metric: Any, tiny: Any) -> None:
    """Another user's rows in every column: only that user's score changes."""
    from lazydp.components.models.build import build_model
    from lazydp.components.models.recommender import initial_tables

    data = EncodedDataset.open(tiny.dataset)
    model = build_model(data.spec, tiny.config().model)
    tables = {name: 100 * table for name, table in initial_tables(model).items()}
    before = user_scores(data, model=model, tables=tables, metric=metric)
    test = data.split("test")
    assert before.shape == (60,)
    assert np.all((before >= 0) & (before <= 1))
    assert test.item is not None
    items = test.item.copy()
    items[7] = 1 + items[7] % 40
    (part,) = test._parts
    part.item = items
    after = user_scores(data, model=model, tables=tables, metric=metric)
    assert np.flatnonzero(before != after).tolist() in ([7], [])
    if metric != "hit_at_10":
        assert before[7] != after[7]


def test_a_score_without_noise_is_refused(tiny: Any) -> None:
    tiny.ledger()
    with pytest.raises(PrivacyError, match="training's privacy does not cover them"):
        tune(**given(tiny, sweep=sweep(score={"kind": "held_out", "noise_multiplier": 0})))
    with pytest.raises(PrivacyError, match="it is not public"):
        tune(**given(tiny, sweep=sweep(score={"kind": "public", "dataset": str(tiny.dataset)})))
    assert statuses(tiny) == []
    assert not (tiny.folder / "sweep").exists()


@pytest.mark.usefixtures("three")
def test_scores_are_noised_as_accounted(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The noise on a trial's score has the sweep's standard deviation, and is the same when scoring is repeated."""
    tiny.ledger()
    tune(**given(tiny))
    best = tiny.folder / "sweep" / "best"
    data = EncodedDataset.open(tiny.dataset)
    monkeypatch.setattr(trials, "_standard_normal", lambda key: 0.0)
    exact = trials._score(best, data)
    monkeypatch.setattr(trials, "_standard_normal", lambda key: 1.0)
    shifted = trials._score(best, data)
    monkeypatch.undo()
    assert exact is not None
    assert shifted == pytest.approx(exact + 5.0)
    assert trials._score(best, data) == trials._score(best, data) != exact


def test_the_normal_of_a_score_is_one() -> None:
    from lazydp.kernels.noise_key import NoiseKey

    drawn = np.array([trials._standard_normal(NoiseKey.for_tests(seed).derive("score")) for seed in range(2000)])
    assert abs(drawn.mean()) < 4 / math.sqrt(2000)
    assert abs(drawn.std() - 1) < 4 / math.sqrt(4000)


# --- a sweep from reservation to release -----------------------------------------------------------------------


@pytest.mark.usefixtures("three")
def test_a_sweep_leaves_one_run_that_export_releases(tiny: Any) -> None:
    url = tiny.ledger()
    found = tune(**given(tiny))
    assert statuses(tiny) == [("tuning", "reserved")]
    out = tiny.folder / "sweep"
    assert sorted(path.name for path in out.iterdir()) == ["best", "lock", "sweep.json"]
    assert len(list(out.rglob("noise.key"))) == len(list((out / "best").rglob("noise.key"))) > 0
    assert stat.S_IMODE((out / "sweep.json").stat().st_mode) == 0o600
    manifest = export(run=found.folder, dataset=tiny.dataset, out=tiny.folder / "bundle", ledger=url)
    assert statuses(tiny) == [("tuning", "committed")]
    assert manifest.lineage.run_id == found.run_id
    statement = Bundle.open(tiny.folder / "bundle").statement
    assert statement.tuning is not None
    expected = statement.tuning.event(RunCost(tiny.config(steps=4), 20).of_run())
    assert statement.epsilon == epsilon(expected, delta=1e-5)
    assert statement.accountant == "rdp"
    assert not any("hyper-parameters" in line for line in statement.not_covered)
    with Ledger.open(url) as ledger:
        [run] = ledger.runs()
        assert run.reserved_event == run.released_event == event_to_json(expected)
        assert ledger.show("tiny").charged_epsilon == pytest.approx(statement.epsilon)
        # How many trials there were is told nowhere.
        told = (
            "".join(entry.body for entry in ledger.entries()) + (tiny.folder / "bundle" / "manifest.json").read_text()
        )
    assert "trial-" not in told
    # A retry finds it over.
    assert tune(**given(tiny, resume=True)) == found


@pytest.mark.usefixtures("three")
def test_public_data_scores_without_noise_and_without_cost(tiny: Any, tmp_path: Path) -> None:
    url = tiny.ledger()
    source = tiny.dataset.parent
    table = pq.read_table(source / "interactions.parquet")
    pq.write_table(table.slice(0, 300), tmp_path / "interactions.parquet")  # other bytes, standing for other people
    ingest([str(tmp_path / "interactions.parquet")], str(source / "spec.yaml"), tmp_path / "public")
    public = sweep(score={"kind": "public", "dataset": str(tmp_path / "public")})
    found = tune(**given(tiny, sweep=public))
    assert 0 <= found.score <= 1
    export(run=found.folder, dataset=tiny.dataset, out=tiny.folder / "bundle", ledger=url)
    statement = Bundle.open(tiny.folder / "bundle").statement
    assert statement.tuning is not None
    assert statement.tuning.score_noise_multiplier is None
    assert any("on which the trials of the sweep were scored" in line for line in statement.assumed_public)
    with_noise = statement.tuning.model_copy(update={"score_noise_multiplier": 5.0})
    training = RunCost(tiny.config(steps=4), 20).of_run()
    assert statement.epsilon == epsilon(statement.tuning.event(training), delta=1e-5)
    assert statement.epsilon < epsilon(with_noise.event(training), delta=1e-5)


def test_nothing_is_drawn_before_the_budget_is_reserved(tiny: Any) -> None:
    tiny.ledger(epsilon=0.05)
    with pytest.raises(BudgetExceededError):
        tune(**given(tiny))
    assert '"trials": null' in (tiny.folder / "sweep" / "sweep.json").read_text()


@pytest.mark.usefixtures("three")
def test_a_trial_of_its_own_is_never_released(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    url = tiny.ledger()
    monkeypatch.setattr(sweeps, "_choose", lambda *arguments: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        tune(**given(tiny))
    trial = tiny.folder / "sweep" / "trial-00001"
    with pytest.raises(PrivacyError, match="one trial of sweep"):
        export(run=trial, dataset=tiny.dataset, out=tiny.folder / "bundle", ledger=url)
    with pytest.raises(InputError, match="sweep: None"):
        train(dataset=tiny.dataset, config=tiny.config(steps=4), out=trial, ledger=url, resume=True)
    assert statuses(tiny) == [("tuning", "reserved")]


@pytest.mark.parametrize("moment", ["first trial", "second trial", "score", "choice", "erase", "rename"])
@pytest.mark.usefixtures("three")
def test_a_killed_sweep_goes_on_with_what_it_drew(moment: str, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lazydp.components.train.engine.step import Engine

    tiny.ledger()
    whole = tune(**given(tiny, out=tiny.folder / "whole", test_key=5))
    owner, name, at = {
        "first trial": (Engine, "step", 2),
        "second trial": (Engine, "step", 6),
        "score": (trials, "user_scores", 2),
        "choice": (sweeps, "_choose", 1),
        "erase": (RunFolder, "erase", 2),
        "rename": (Path, "rename", 10**9),
    }[moment]
    original = getattr(owner, name)
    calls = Counter[str]()

    def killed(*arguments: Any, **named: Any) -> Any:
        calls[name] += 1
        if calls[name] == at or (name == "rename" and str(arguments[1]).endswith("best")):
            raise Killed
        return original(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, killed)
        with pytest.raises(Killed):
            tune(**given(tiny, test_key=5))
    drawn = yaml.safe_load((tiny.folder / "sweep" / "sweep.json").read_text())["trials"]
    # No number is drawn a second time.
    monkeypatch.setattr(Tuning, "number_of_trials", lambda self, uniform: pytest.fail("drawn again"))
    with pytest.raises(InputError, match="say --resume"):
        tune(**given(tiny, test_key=5))
    found = tune(**given(tiny, test_key=5, resume=True))
    assert yaml.safe_load((tiny.folder / "sweep" / "sweep.json").read_text())["trials"] == drawn
    assert (found.settings, found.score) == (whole.settings, whole.score)
    assert sorted(path.name for path in (tiny.folder / "sweep").iterdir()) == ["best", "lock", "sweep.json"]


def test_a_sweep_without_a_trial_is_charged_all_the_same(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.ledger()
    monkeypatch.setattr(Tuning, "number_of_trials", lambda self, uniform: 0)
    with pytest.raises(PrivacyError, match="drew no trial"):
        tune(**given(tiny, sweep=sweep(distribution="poisson")))
    assert statuses(tiny) == [("tuning", "committed")]


@pytest.mark.usefixtures("three")
def test_the_best_is_kept(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its place; a model that is not finite never is, and a sweep of such alone releases nothing."""
    tiny.ledger()
    scores: list[float | None] = []
    monkeypatch.setattr(trials, "_score", lambda trial, data: scores[int(trial.name[-1]) - 1])
    for number, (given_scores, best) in enumerate(
        [([3.0, 1.0, 2.0], 1), ([1.0, None, 2.0], 3), ([None, -5.0, None], 2)]
    ):
        scores[:] = given_scores  # type: ignore[call-overload]
        found = tune(**given(tiny, out=tiny.folder / f"sweep-{number}", config=tiny.config(steps=1)))
        drawn = yaml.safe_load((tiny.folder / f"sweep-{number}" / "sweep.json").read_text())["trials"]
        assert (found.score, found.settings) == (given_scores[best - 1], drawn[best - 1])  # type: ignore[index]
        with RunFolder.locked(found.folder) as folder:
            kept = folder.identity()
        assert kept is not None
        assert kept.selected
        assert kept.config == with_settings(kept.config, drawn[best - 1])
    scores[:] = [None, None, None]
    with pytest.raises(PrivacyError, match="gave a finite model"):
        tune(**given(tiny, out=tiny.folder / "none", config=tiny.config(steps=1)))


def test_target_epsilon_is_that_of_the_whole_sweep(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    url = tiny.ledger()
    monkeypatch.setattr(Tuning, "number_of_trials", lambda self, uniform: 1)
    found = tune(**given(tiny, config=tiny.config(steps=4, noise_multiplier=None, target_epsilon=2.0)))
    export(run=found.folder, dataset=tiny.dataset, out=tiny.folder / "bundle", ledger=url)
    stated = Bundle.open(tiny.folder / "bundle").statement.epsilon
    assert stated is not None
    assert 1.9 < stated <= 2.0


# --- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"noise_multiplier": [1.0, 2.0]}, "part of the mechanism"),
        ({"steps": [4, 8]}, "part of the mechanism"),
        ({"sampling_prob": [0.05, 0.1]}, "part of the mechanism"),
        ({"mode": ["lazydp", "sgd"]}, "part of the mechanism"),
        ({"privacy_unit": ["example"]}, "part of the mechanism"),
        ({"target_epsilon": [1.0]}, "target_epsilon"),
        ({"embeddings.rate": [1.0]}, "no setting 'embeddings.rate'"),
        ({"nothing.at.all": [1.0]}, "no setting"),
        ({"embeddings.learning_rate": [1.0, -1.0]}, "learning_rate"),
    ],
    ids=str,
)
def test_settings_that_are_refused(settings: dict[str, Any], says: str, tiny: Any) -> None:
    tiny.ledger()
    with pytest.raises(InputError, match=says):
        tune(**given(tiny, sweep=sweep(settings=settings)))
    assert statuses(tiny) == []


def test_a_dataset_without_a_bound_has_no_users_to_protect(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lazydp.components.train.run import settings_check

    tiny.ledger(privacy_unit="user")
    monkeypatch.setattr(settings_check, "contribution_bound", lambda data: None)
    with pytest.raises(InputError, match="max_examples_per_user"):
        tune(**given(tiny, config=tiny.config(privacy_unit="user")))


def test_clipping_norms_may_be_tried(tiny: Any) -> None:
    changed = with_settings(tiny.config(), {"max_grad_norm": 2.0, "model.embedding_dim": 16})
    assert (changed.max_grad_norm, changed.model.embedding_dim) == (2.0, 16)


def test_sweep_files(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(SWEEP))
    assert Sweep.load(file) == sweep()
    examples = Path(__file__).parents[3] / "examples" / "sample"
    for name in Sweep.load(examples / "sweep.yaml").settings:
        with_settings(TrainConfig.load(examples / "train.yaml"), {name: 0.5})
    for text, says in (
        ("mean_trials: 0.5", "mean_trials"),
        ("[]", "expected a mapping of fields"),
        ("{", "not YAML"),
        (yaml.safe_dump({**SWEEP, "score": {"kind": "held_out"}}), "noise_multiplier"),
    ):
        file.write_text(text)
        with pytest.raises(InputError, match=says) as error:
            Sweep.load(file)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="no sweep at"):
        Sweep.load(tmp_path / "none")
