"""Counts of items in a release: the same in every release of a run, charged with it, and told in its statement."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from dp_accounting import dp_event
from dp_accounting.pld import privacy_loss_distribution as pld
from dp_accounting.rdp import RdpAccountant

from lazydp.components.budget.accounting.epsilon import epsilon
from lazydp.components.budget.accounting.events import composed, event_to_json, user_level_event
from lazydp.components.budget.ledger.ledger import Ledger
from lazydp.components.budget.ledger.verify import verify
from lazydp.components.bundle import untrained
from lazydp.components.bundle.reader import Bundle
from lazydp.components.bundle.writer import write_bundle
from lazydp.components.evaluate.evaluate import item_counts
from lazydp.components.export import export as export_module
from lazydp.components.export.export import export
from lazydp.components.export.publish import Snapshots
from lazydp.components.export.statement import statement_of
from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.shared.errors import BudgetExceededError, FormatError, NonFiniteError, PrivacyError
from lazydp.components.train.data.sampler import PoissonSampler
from lazydp.components.train.run.costs import RunCost
from lazydp.components.train.run.folder import RunFolder
from lazydp.components.train.run.identity import RunIdentity
from lazydp.components.train.run.spending import check_event
from lazydp.components.train.run.train import train
from lazydp.components.tune.sweep import Sweep
from lazydp.components.tune.tune import tune
from lazydp.kernels.noise_key import NoiseKey

DELTA, NOISE, K = 1e-5, 3.0, 20
COUNTING: dict[str, Any] = {"popularity": {"noise_multiplier": NOISE}}
OF_USERS: dict[str, Any] = {
    "privacy_unit": "user",
    "sampling": "user",
    "user_gradient": "mean",
    "sampling_prob": 0.2,
    "expected_batch_size": 12,
}


class Killed(BaseException):
    """Stands for `kill -9`."""


def url_of(tiny: Any) -> str:
    return f"sqlite:///{tiny.folder / 'ledger.db'}"


def trained(tiny: Any, name: str = "run", **changes: Any) -> Path:
    config = tiny.config(**changes)
    tiny.ledger(privacy_unit=config.privacy_unit)
    out: Path = train(dataset=tiny.dataset, config=config, out=tiny.folder / name, ledger=url_of(tiny)).folder
    return out


def released(tiny: Any, run: Path, **options: Any) -> Bundle:
    out = run.with_name(f"{run.name}-bundle")
    export(run=run, dataset=tiny.dataset, out=out, ledger=url_of(tiny), **options)
    return Bundle.open(out, allow_test_key=True, allow_non_private=True)


def by_hand(noise_multiplier: float, sampling_prob: float, steps: int, counts: float) -> float:
    """Epsilon of DP-SGD and one Gaussian, composed by dp-accounting itself."""
    grid = {"value_discretization_interval": 1e-4}
    steps_of = pld.from_gaussian_mechanism(noise_multiplier, sampling_prob=sampling_prob, **grid).self_compose(steps)
    return float(steps_of.compose(pld.from_gaussian_mechanism(counts, **grid)).get_epsilon_for_delta(DELTA))


# --- what is released --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("unit", "scale"), [({}, NOISE), (OF_USERS, NOISE * math.sqrt(K))], ids=["example", "user"])
def test_a_release_carries_the_noised_counts(unit: dict[str, Any], scale: float, tiny: Any) -> None:
    bundle = released(tiny, trained(tiny, **COUNTING, **unit))
    assert bundle.popularity is not None
    exact = item_counts(EncodedDataset.open(tiny.dataset).split("train"), num_items=40)
    noise = (bundle.popularity - exact)[1:]  # nobody of this dataset takes an item twice
    assert bundle.popularity[0] == 0
    # A secret key: bounds that 40 normals leave once in 10^9. The other unit's variance is 20 times as large or small.
    assert 0.166 < float(noise.square().mean()) / scale**2 < 3.02


def test_without_the_setting_or_without_privacy_there_are_none(tiny: Any) -> None:
    plain = released(tiny, trained(tiny, "plain"))
    assert plain.popularity is None
    assert plain.statement.popularity is None
    config = tiny.config(**COUNTING).with_changes(mode="sgd")
    run = train(dataset=tiny.dataset, config=config, out=tiny.folder / "sgd").folder
    assert released(tiny, run, allow_non_private=True).popularity is None


def test_snapshots_and_export_release_the_same_bits(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the run was killed in between, and where its export was."""
    settings = {**COUNTING, "steps": 25, "publish_every": 10}
    tiny.ledger()
    snapshots = tiny.folder / "snapshots"
    given = {
        "dataset": tiny.dataset,
        "config": tiny.config(**settings),
        "out": tiny.folder / "run",
        "ledger": url_of(tiny),
        "publish": Snapshots(snapshots, url_of(tiny)).release,
    }
    with monkeypatch.context() as patch:
        patch.setattr(Snapshots, "release", _killed_at_second(Snapshots.release))
        with pytest.raises(Killed):
            train(**given | {"publish": Snapshots(snapshots, url_of(tiny)).release})
    run = train(**given, resume=True).folder
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "destroy_keys", _killed)
        with pytest.raises(Killed):
            released(tiny, run)
    with monkeypatch.context() as patch:
        patch.setattr(export_module, "commit", _killed)
        with pytest.raises(Killed):
            released(tiny, run)
    bundles = [Bundle.open(snapshots / f"step-{step:09d}") for step in (10, 20)] + [released(tiny, run)]
    assert [bundle.manifest.step for bundle in bundles] == [10, 20, 25]
    counts = [bundle.popularity for bundle in bundles]
    assert all(found is not None and torch.equal(found, counts[0]) for found in counts)  # type: ignore[arg-type]
    # The control: another run of the same data and settings has a key, and so counts, of its own.
    other = released(tiny, trained(tiny, "other", **COUNTING)).popularity
    assert other is not None
    assert not torch.equal(other, counts[0])  # type: ignore[arg-type]
    # Charged once: at the latest step, with one release of counts.
    with Ledger.open(url_of(tiny)) as ledger:
        first = ledger.runs()[0]
        assert verify(ledger.entries()).problems == ()
    config = tiny.config(**settings)
    at = {step: epsilon(RunCost(config, K).of_run(steps=step), delta=DELTA) for step in (10, 20, 25)}
    assert {release.step or 25: release.epsilon for release in first.releases} == pytest.approx(at)
    assert [bundle.statement.epsilon for bundle in bundles] == pytest.approx(list(at.values()))
    assert at[10] == pytest.approx(by_hand(4.0, 0.05, 10, NOISE), rel=1e-6)


def _killed(*arguments: Any, **named: Any) -> None:
    raise Killed


def _killed_at_second(release: Any) -> Any:
    def killed(self: Snapshots, engine: Any, *arguments: Any, **named: Any) -> None:
        if engine.steps_done >= 20:
            raise Killed
        release(self, engine, *arguments, **named)

    return killed


# --- what it costs -----------------------------------------------------------------------------------------------


def test_the_statement_covers_the_counts(tiny: Any) -> None:
    statement = released(tiny, trained(tiny, **COUNTING)).statement
    assert statement.epsilon == pytest.approx(by_hand(4.0, 0.05, 30, NOISE), rel=1e-6)
    renyi = RdpAccountant()
    renyi.compose(dp_event.PoissonSampledDpEvent(0.05, dp_event.GaussianDpEvent(4.0)), 30)
    renyi.compose(dp_event.GaussianDpEvent(NOISE))
    assert statement.epsilon_rdp == pytest.approx(renyi.get_epsilon(DELTA), rel=1e-6)
    # 30 Gaussians of sigma 4 and one of NOISE are one Gaussian.
    one = pld.from_gaussian_mechanism((30 / 4.0**2 + NOISE**-2) ** -0.5)
    assert statement.epsilon_without_amplification == pytest.approx(one.get_epsilon_for_delta(DELTA), rel=1e-3)
    assert statement.epsilon_over_steps[-1].epsilon >= statement.epsilon  # type: ignore[operator]
    assert statement.epsilon_over_steps[0].epsilon > epsilon(dp_event.GaussianDpEvent(NOISE), delta=DELTA)
    # A user's k examples may all be of one item.
    training = user_level_event(noise_multiplier=4.0, sampling_prob=0.05, steps=30, max_examples_per_user=K)
    of_user = epsilon(composed([training, dp_event.GaussianDpEvent(NOISE / K)]), delta=DELTA)
    assert statement.epsilon_user_level == pytest.approx(of_user, rel=1e-9)
    assert of_user > 1.05 * epsilon(composed([training, dp_event.GaussianDpEvent(NOISE)]), delta=DELTA)

    told = statement.popularity
    assert told is not None
    assert (told.counted, told.sensitivity, told.noise_multiplier) == ("positive training examples", 1.0, NOISE)
    assert told.epsilon_without == pytest.approx(epsilon(RunCost(tiny.config(), K).of_run(), delta=DELTA))
    assert told.epsilon_without < 0.9 * statement.epsilon  # type: ignore[operator]
    assert "whole numbers" in statement.floating_point


@pytest.mark.parametrize("sampling", ["example", "user"])
def test_the_statement_of_a_run_per_user(sampling: str, tiny: Any) -> None:
    """Its counts have noise in proportion to sqrt(k), and so cost one Gaussian of their noise multiplier per user."""
    k = 3  # accounting of 20, which the dataset has, takes a dozen seconds
    unit = OF_USERS if sampling == "user" else {"privacy_unit": "user"}
    config = tiny.config(**COUNTING, **unit)
    data = EncodedDataset.open(tiny.dataset)
    identity = RunIdentity("run", config, data.manifest.fingerprint, "version", 4.0)
    statement = statement_of(identity, spec=data.spec, max_examples_per_user=k, steps=30, test_key=False)
    training = RunCost(tiny.config(**unit), k).of_run()
    whole = epsilon(composed([training, dp_event.GaussianDpEvent(NOISE)]), delta=DELTA)
    assert statement.epsilon == statement.epsilon_user_level == pytest.approx(whole, rel=1e-9)
    steps = 30 * (1 if sampling == "user" else k**2) / 4.0**2
    one = pld.from_gaussian_mechanism((steps + NOISE**-2) ** -0.5)
    assert statement.epsilon_without_amplification == pytest.approx(one.get_epsilon_for_delta(DELTA), rel=1e-3)
    assert statement.popularity is not None
    assert statement.popularity.counted == "users, once for each item"
    assert statement.popularity.sensitivity == math.sqrt(k)
    assert statement.popularity.epsilon_without == pytest.approx(epsilon(training, delta=DELTA))


def test_a_statement_under_a_test_key_claims_nothing_of_them(tiny: Any) -> None:
    tiny.ledger()
    key = NoiseKey.for_tests(1)
    run = train(
        dataset=tiny.dataset, config=tiny.config(**COUNTING), out=tiny.folder / "run", key=key, ledger=url_of(tiny)
    )
    bundle = released(tiny, run.folder)
    assert bundle.popularity is not None
    assert bundle.manifest.test_key
    assert bundle.statement.popularity is not None
    assert bundle.statement.popularity.epsilon_without is None


def test_a_budget_for_training_alone_does_not_admit_the_counts(tiny: Any) -> None:
    training, whole = (epsilon(RunCost(tiny.config(**changes), K).of_run(), delta=DELTA) for changes in ({}, COUNTING))
    assert whole == pytest.approx(by_hand(4.0, 0.05, 30, NOISE), rel=1e-6)
    between = tiny.ledger(epsilon=(training + whole) / 2)
    with pytest.raises(BudgetExceededError, match=f"with the run {whole:.4g}"):
        train(dataset=tiny.dataset, config=tiny.config(**COUNTING), out=tiny.folder / "refused", ledger=between)
    assert not list((tiny.folder / "refused").glob("checkpoints/*"))
    # The control: training alone is admitted by that budget.
    train(dataset=tiny.dataset, config=tiny.config(), out=tiny.folder / "without", ledger=between)


def test_the_ledger_charges_training_and_counts(tiny: Any) -> None:
    run = trained(tiny, **COUNTING)
    event = event_to_json(RunCost(tiny.config(**COUNTING), K).of_run())
    assert event["events"][-1] == {"type": "GaussianDpEvent", "noise_multiplier": NOISE}
    whole = by_hand(4.0, 0.05, 30, NOISE)
    with Ledger.open(url_of(tiny)) as ledger:
        [reserved] = ledger.state().runs.values()
        assert ledger.show("tiny").charged_epsilon == pytest.approx(whole, rel=1e-6)
    assert reserved.reserved_event == event
    released(tiny, run)
    with Ledger.open(url_of(tiny)) as ledger:
        [committed] = ledger.state().runs.values()
        assert verify(ledger.entries()).problems == ()
        assert ledger.show("tiny").committed_epsilon == pytest.approx(whole, rel=1e-6)
    assert committed.status == "committed"
    assert committed.released_event == event


def test_another_law_of_batches_is_refused_beside_counts_as_well(tiny: Any) -> None:
    config = tiny.config(**COUNTING)
    identity = RunIdentity("run", config, "fingerprint", "version", 4.0)

    def sampler(sampling_prob: float) -> PoissonSampler:
        return PoissonSampler(NoiseKey.for_tests(0), population=50, sampling_prob=sampling_prob)

    check_event(sampler(config.sampling_prob), identity, max_examples_per_user=K)
    with pytest.raises(PrivacyError, match="would be charged for"):
        check_event(sampler(0.06), identity, max_examples_per_user=K)


def test_every_trial_of_a_sweep_is_charged_with_its_counts(tiny: Any) -> None:
    sweep = Sweep.model_validate(
        {
            "distribution": "geometric",
            "mean_trials": 1.5,
            "metric": "auc",
            "score": {"kind": "held_out", "noise_multiplier": 5.0},
            "settings": {"embeddings.learning_rate": [0.5, 2.0]},
        }
    )
    config = tiny.config(steps=5, **COUNTING)
    tiny.ledger()
    found = tune(dataset=tiny.dataset, config=config, sweep=sweep, out=tiny.folder / "sweep", ledger=url_of(tiny))
    bundle = released(tiny, found.folder)
    assert bundle.popularity is not None
    trial = composed([RunCost(config, K).of_run(), dp_event.GaussianDpEvent(5.0)])
    expected = dp_event.RepeatAndSelectDpEvent(trial, 1.5, 1.0)
    with Ledger.open(url_of(tiny)) as ledger:
        run = ledger.state().runs[found.run_id]
    assert run.reserved_event == run.released_event == event_to_json(expected)
    assert bundle.statement.epsilon == pytest.approx(epsilon(expected, delta=DELTA))
    told = bundle.statement.popularity
    assert told is not None
    assert told.epsilon_without is not None
    assert told.epsilon_without < bundle.statement.epsilon  # type: ignore[operator]


# --- what a bundle refuses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "error"),
    [(torch.ones(30), ValueError), (torch.ones(31).double(), ValueError), (torch.ones(31) * math.inf, NonFiniteError)],
    ids=["too few", "another type", "not finite"],
)
def test_counts_must_be_those_of_the_items(
    counts: torch.Tensor, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(path: Path, **given: Any) -> Any:
        return write_bundle(path, **given | {"popularity": counts})

    monkeypatch.setattr(untrained, "write_bundle", write)
    with pytest.raises(error, match="popularity" if error is ValueError else "count"):
        untrained.write_untrained(tmp_path / "bundle", num_items=30)
    assert not (tmp_path / "bundle").exists()


def test_a_claim_that_is_silent_of_counts_is_refused(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trained(tiny, **COUNTING)

    def silent(*arguments: Any, **named: Any) -> Any:
        return statement_of(*arguments, **named).model_copy(update={"popularity": None})

    monkeypatch.setattr(export_module, "statement_of", silent)
    with pytest.raises(FormatError, match="says nothing of the counts"):
        released(tiny, run)
