"""A run reserves before it steps, resumes as the same run, and keeps its key to itself."""

import base64
import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lazydp.components.budget.accounting.epsilon import epsilon
from lazydp.components.budget.accounting.events import dpsgd_event, event_from_json, without_amplification
from lazydp.components.budget.ledger.ledger import Ledger
from lazydp.components.export.statement import statement_of
from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.shared.errors import BudgetExceededError, InputError, IntegrityError, PrivacyError
from lazydp.components.train.data.sampler import PoissonSampler
from lazydp.components.train.engine.step import Engine
from lazydp.components.train.run import batches, checkpoint
from lazydp.components.train.run.batches import batch_maker
from lazydp.components.train.run.checkpoint import Checkpoint
from lazydp.components.train.run.folder import RunFolder
from lazydp.components.train.run.identity import RunIdentity
from lazydp.components.train.run.train import build_engine, train
from lazydp.kernels.noise_key import NoiseKey

# What is resumed ends in the same bits, whatever two threads do.
pytestmark = pytest.mark.usefixtures("two_threads")

KEY_SEED = 11


def latest(run: Path) -> Checkpoint:
    with RunFolder.locked(run) as folder:
        found = folder.latest()
    assert found is not None
    return found


def tensors(state: Any, name: str = "") -> dict[str, torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return {name: state}
    pairs = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    return {key: value for part, node in pairs for key, value in tensors(node, f"{name}/{part}").items()}


def assert_same_bits(ours: Checkpoint, theirs: Checkpoint) -> None:
    assert ours.step == theirs.step
    mine, others = tensors(ours.state), tensors(theirs.state)
    assert mine.keys() == others.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, others[name]), name


def test_a_run_reserves_trains_and_stops(tiny: Any, tmp_path: Path) -> None:
    url = tiny.ledger()
    run = train(dataset=tiny.dataset, config=tiny.config(), out=tmp_path / "run", ledger=url, run_id="mine")
    assert run.step == 30
    checkpoint = latest(tmp_path / "run")
    assert checkpoint.step == 30
    assert checkpoint.key is not None
    assert not checkpoint.key.is_test
    assert checkpoint.event is not None
    with Ledger.open(url) as ledger:
        assert [(entry.run_id, entry.status) for entry in ledger.runs()] == [("mine", "reserved")]
    # nothing is left to do, and a retry does nothing
    again = train(
        dataset=tiny.dataset, config=tiny.config(), out=tmp_path / "run", ledger=url, run_id="mine", resume=True
    )
    assert again.step == 30
    assert_same_bits(latest(tmp_path / "run"), checkpoint)


@pytest.mark.parametrize("mode", ["lazydp", "dpsgd", "sgd"])
@pytest.mark.parametrize("stop", [1, 17])
def test_an_interrupted_run_goes_on_to_the_same_bits(
    mode: str, stop: int, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.config(
        mode=mode, embeddings={"learning_rate": 1.0, "momentum": 0.5, "weight_decay": 0.01}, micro_batch_size=16
    )
    given: dict[str, Any] = {"dataset": tiny.dataset, "config": config, "ledger": tiny.ledger()}
    train(**given, out=tmp_path / "whole", key=NoiseKey.for_tests(KEY_SEED))

    from lazydp.components.train.engine.step import Engine

    step = Engine.step

    def interrupted(self: Engine, examples: Any) -> Any:
        if self.steps_done == stop:
            raise KeyboardInterrupt
        return step(self, examples)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(**given, out=tmp_path / "parts", key=NoiseKey.for_tests(KEY_SEED))
    assert latest(tmp_path / "parts").step == stop // 10 * 10
    with pytest.raises(InputError, match="say --resume"):
        train(**given, out=tmp_path / "parts")
    train(**given, out=tmp_path / "parts", resume=True)
    assert_same_bits(latest(tmp_path / "parts"), latest(tmp_path / "whole"))


USERS = {
    "privacy_unit": "user",
    "sampling": "user",
    "expected_batch_size": 12,
    "sampling_prob": 0.2,
    "micro_batch_size": 40,
    "max_grad_norm": {"dense": 0.2, "embeddings": 0.5},
}


def test_a_run_that_samples_users_resumes_and_is_stated(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from lazydp.components.export.export import export
    from lazydp.components.train.engine.step import Engine

    caplog.set_level(logging.INFO)
    config = tiny.config(**USERS, user_gradient="mean")
    url = tiny.ledger(privacy_unit="user")
    given: dict[str, Any] = {"dataset": tiny.dataset, "config": config, "ledger": url}
    train(**given, out=tmp_path / "whole", key=NoiseKey.for_tests(KEY_SEED))
    step = Engine.step

    def interrupted(self: Engine, examples: Any) -> Any:
        if self.steps_done == 17:
            raise KeyboardInterrupt
        return step(self, examples)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(**given, out=tmp_path / "parts", key=NoiseKey.for_tests(KEY_SEED))
    other = tiny.config(**USERS, user_gradient="sum")
    with pytest.raises(InputError, match="user_gradient: 'sum' != 'mean'"):
        train(**{**given, "config": other}, out=tmp_path / "parts", resume=True)
    run = train(**given, out=tmp_path / "parts", resume=True)
    assert_same_bits(latest(tmp_path / "parts"), latest(tmp_path / "whole"))
    for group in ("dense", "embeddings"):
        assert f"; {group}: gradient norm " in caplog.text

    statement = export(
        run=run.folder, dataset=tiny.dataset, out=tmp_path / "bundle", ledger=url, allow_non_private=True
    ).privacy
    assert statement["sampler"] == "poisson over users"
    assert statement["user_gradient"] == "mean"
    assert statement["max_grad_norm"] == {"dense": 0.2, "embeddings": 0.5}
    assert (statement["privacy_unit"], statement["expected_batch_size"]) == ("user", 12)


def test_the_ledger_holds_the_event_of_the_sampler(tiny: Any, tmp_path: Path) -> None:
    """Per user, and by no bound: the plain sampled Gaussian, and so a smaller figure than sampling examples gives."""
    charges = {}
    for name, settings in {"users": {**USERS, "user_gradient": "sum"}, "examples": {"privacy_unit": "user"}}.items():
        config = tiny.config(**{"sampling_prob": 0.2, **settings})  # type: ignore[dict-item]
        run = train(dataset=tiny.dataset, config=config, out=tmp_path / name, ledger=tiny.ledger(privacy_unit="user"))
        event = latest(run.folder).event
        assert event is not None
        charges[name] = event["event"]["type"]
        statement = statement_of(
            run.identity,
            spec=EncodedDataset.open(tiny.dataset).spec,
            max_examples_per_user=20,
            steps=30,
            test_key=False,
        )
        expected = epsilon(event_from_json(event), delta=1e-5)
        assert statement.epsilon == statement.epsilon_user_level == expected
        unbounded = epsilon(
            without_amplification(noise_multiplier=4.0 if name == "users" else 0.2, steps=30), delta=1e-5
        )
        assert statement.epsilon_without_amplification == pytest.approx(unbounded)
    assert charges == {"users": "PoissonSampledDpEvent", "examples": "MixtureOfGaussiansDpEvent"}


def test_a_user_must_fit_into_a_micro_batch(tiny: Any, tmp_path: Path) -> None:
    config = tiny.config(**{**USERS, "user_gradient": "sum", "micro_batch_size": 19})
    with pytest.raises(InputError, match=r"below max_examples_per_user 20 .* set micro_batch_size to 20 or more"):
        train(dataset=tiny.dataset, config=config, out=tmp_path / "run", ledger=tiny.ledger(privacy_unit="user"))


class TwiceAsOften(PoissonSampler):
    """Draws at 2 q, and says so."""

    def __init__(self, key: NoiseKey, *, sampling_prob: float, **more: Any) -> None:
        super().__init__(key, sampling_prob=2 * sampling_prob, **more)


class Shuffled(PoissonSampler):
    """Draws batches of equal size from shuffled epochs, and says so."""

    def dp_event(self, *, noise_multiplier: float, steps: int, max_examples_per_user: int | None = None) -> Any:
        return dpsgd_event(noise_multiplier=noise_multiplier, sampling_prob=0.05, steps=steps, sampler="shuffled")


@pytest.mark.parametrize("impostor", [TwiceAsOften, Shuffled])
@pytest.mark.parametrize("unit", ["example", "user", "whole users"])
def test_a_sampler_of_another_law_is_refused_before_anything_is_charged(
    impostor: type[PoissonSampler], unit: str, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"example": {}, "user": {"privacy_unit": "user"}, "whole users": {**USERS, "user_gradient": "sum"}}[unit]
    url = tiny.ledger(privacy_unit="example" if unit == "example" else "user")
    given: dict[str, Any] = {"dataset": tiny.dataset, "config": tiny.config(**settings, steps=2), "ledger": url}  # type: ignore[arg-type]
    with monkeypatch.context() as patch:
        patch.setattr(batches, "PoissonSampler", impostor)
        with pytest.raises(PrivacyError, match=r"would be charged for \{.*its sampler draws batches for \{"):
            train(**given, out=tmp_path / "run")
    with Ledger.open(url) as ledger:
        assert ledger.runs() == ()
    # the control: the same run with our sampler
    assert train(**given, out=tmp_path / "run").step == 2
    with Ledger.open(url) as ledger:
        assert len(ledger.runs()) == 1


def test_the_engine_steps_on_what_that_sampler_drew(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[float]] = []
    step = Engine.step

    def watched(self: Engine, micro_batches: Any) -> Any:
        seen.append([value for examples in micro_batches for value in examples.dense[:, 0].tolist()])
        return step(self, micro_batches)

    monkeypatch.setattr(Engine, "step", watched)
    config, key = tiny.config(micro_batch_size=16), NoiseKey.for_tests(KEY_SEED)
    train(dataset=tiny.dataset, config=config, out=tmp_path / "run", ledger=tiny.ledger(), key=key)
    split = EncodedDataset.open(tiny.dataset).split("train")
    sampler = PoissonSampler(NoiseKey.for_tests(KEY_SEED), population=len(split), sampling_prob=0.05)
    expected = [split.take(sampler.members(number)).dense[:, 0].tolist() for number in range(1, 31)]
    assert seen == expected
    assert len({tuple(values) for values in seen}) == 30


def test_two_runs_draw_different_noise(tiny: Any, tmp_path: Path) -> None:
    url = tiny.ledger()
    for name in ("a", "b"):
        train(dataset=tiny.dataset, config=tiny.config(steps=3), out=tmp_path / name, ledger=url)
    first, second = (tensors(latest(tmp_path / name).state) for name in ("a", "b"))
    item = "/embeddings/tables/item/weight"
    assert not torch.equal(first[item], second[item])


def test_a_run_over_the_budget_is_refused_before_training(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.config(noise_multiplier=None, target_epsilon=0.5)
    url = tiny.ledger(epsilon=0.6)
    train(dataset=tiny.dataset, config=config, out=tmp_path / "first", ledger=url)

    from lazydp.components.train.engine.step import Engine

    def never(self: Engine, examples: Any) -> None:
        raise AssertionError("a step was taken without a reservation")

    monkeypatch.setattr(Engine, "step", never)
    with pytest.raises(BudgetExceededError) as refused:
        train(dataset=tiny.dataset, config=config, out=tmp_path / "second", ledger=url)
    assert "0.6" in str(refused.value)
    with Ledger.open(url) as ledger:
        assert len(ledger.runs()) == 1
    # the refused folder is not in the way once there is room
    monkeypatch.undo()
    with Ledger.open(url) as ledger:
        ledger.set_budget("tiny", epsilon=9.0, delta=1e-5, by="tester", reason="room for two")
    assert train(dataset=tiny.dataset, config=config, out=tmp_path / "second", ledger=url).step == 30


def test_no_budget_no_training(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(PrivacyError, match="no budget"):
        train(dataset=tiny.dataset, config=tiny.config(), out=tmp_path / "run", ledger=f"sqlite:///{tmp_path / 'l.db'}")


def test_sgd_needs_no_ledger(tiny: Any, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'untouched.db'}"
    train(dataset=tiny.dataset, config=tiny.config(mode="sgd"), out=tmp_path / "run", ledger=url)
    assert not (tmp_path / "untouched.db").exists()


def test_another_run_is_not_resumed(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {"dataset": tiny.dataset, "out": tmp_path / "run", "ledger": tiny.ledger(), "resume": True}
    train(**given, config=tiny.config())
    with pytest.raises(InputError, match=r"max_grad_norm: 0\.7 != 0\.5"):
        train(**given, config=tiny.config(max_grad_norm=0.7))
    train(**given, config=tiny.config(log_every=7))
    with RunFolder.locked(tmp_path / "run") as folder:
        held = folder.identity()
        assert held is not None
        folder.begin(dataclasses.replace(held, code_version="0.0.1"))
    with pytest.raises(InputError, match=r"lazydp version: '[\d.]+\+[0-9a-f]{12}' != '0\.0\.1'"):
        train(**given, config=tiny.config())


def test_a_checkpoint_from_another_run_neither_goes_on_nor_is_released(tiny: Any, tmp_path: Path) -> None:
    """Two runs of one configuration: every shape fits, and so does all but the run's id (and the key)."""
    from lazydp.components.export.export import export

    given: dict[str, Any] = {"dataset": tiny.dataset, "config": tiny.config(steps=20), "ledger": tiny.ledger()}
    for name in ("ours", "theirs"):
        train(**given, out=tmp_path / name, run_id=name)
    ours, theirs = (tmp_path / name / "checkpoints" / "step-000000020" for name in ("ours", "theirs"))
    shutil.move(ours, tmp_path / "kept")
    shutil.copytree(theirs, ours)
    release = {"run": tmp_path / "ours", "dataset": tiny.dataset, "out": tmp_path / "bundle", "ledger": given["ledger"]}
    for attempt in (lambda: train(**given, out=tmp_path / "ours", resume=True), lambda: export(**release)):
        with pytest.raises(IntegrityError, match="run id: 'theirs' != 'ours'"):
            attempt()
    with Ledger.open(given["ledger"]) as ledger:
        assert ledger.releases() == ()
    # the control: its own
    shutil.rmtree(ours)
    shutil.move(tmp_path / "kept", ours)
    assert export(**release).lineage.run_id == "ours"


def test_a_checkpoint_that_spent_something_else_is_refused(tiny: Any, tmp_path: Path) -> None:
    given: dict[str, Any] = {"dataset": tiny.dataset, "config": tiny.config(), "ledger": tiny.ledger()}
    train(**given, out=tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / "step-000000030" / "checkpoint.json"
    document = json.loads(file.read_text())
    version, digest = document.pop("format_version"), document["sha256"].pop("checkpoint.json")
    assert digest == checkpoint._digest(document)
    document["dp_event"]["count"] = 29
    document["sha256"]["checkpoint.json"] = checkpoint._digest(document)
    file.write_text(json.dumps({"format_version": version, **document}))
    with pytest.raises(PrivacyError, match=r'"count": 29.* is charged for .*"count": 30'):
        train(**given, out=tmp_path / "run", resume=True)


def test_the_three_modes_are_the_same_computation(tiny: Any) -> None:
    """They draw the same batches; with no noise and nothing to clip lazydp, dpsgd and sgd give the same weights."""
    data = EncodedDataset.open(tiny.dataset)
    weights = {}
    for mode in ("lazydp", "dpsgd", "sgd"):
        # Adam would blow up rounding errors where a gradient is zero
        config = tiny.config(mode=mode, max_grad_norm=1e6, dense={"optimizer": "sgd", "learning_rate": 0.1})
        key = NoiseKey.for_tests(1)
        engine = build_engine(data.spec, RunIdentity("run", config, "dataset", "version", 0.0), key)
        make = batch_maker(data, config, key)
        for step in range(1, 31):
            engine.step(make(step))
        weights[mode] = {**engine.table_weights(), **engine.model.state_dict()}
    for mode in ("lazydp", "dpsgd"):
        for name, weight in weights[mode].items():
            torch.testing.assert_close(weight, weights["sgd"][name], rtol=1e-4, atol=1e-5)


def test_neither_log_nor_ledger_nor_run_json_holds_the_key(
    tiny: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    url = tiny.ledger()
    train(dataset=tiny.dataset, config=tiny.config(log_every=5), out=tmp_path / "run", ledger=url)
    key = latest(tmp_path / "run").key
    assert key is not None
    secrets = [key.to_bytes(), *(key.derive(label).to_bytes() for label in ("noise", "sampling", "negatives"))]
    texts = [caplog.text.encode(), (tmp_path / "ledger.db").read_bytes(), (tmp_path / "run" / "run.json").read_bytes()]
    assert "[private]" in caplog.text
    for secret in secrets:
        for spelling in (secret, secret.hex().encode(), base64.b64encode(secret), base64.urlsafe_b64encode(secret)):
            assert not any(spelling in text for text in texts)
    assert key.to_bytes() in (tmp_path / "run" / "checkpoints" / "step-000000030" / "noise.key").read_bytes()


def test_user_level_needs_a_bound(tiny: Any, tmp_path: Path) -> None:
    config = tiny.config(privacy_unit="user", noise_multiplier=20.0)
    run = train(dataset=tiny.dataset, config=config, out=tmp_path / "run", ledger=tiny.ledger(privacy_unit="user"))
    assert run.step == 30


def test_errors_of_the_loader_surface_and_leave_nothing_half_written(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lazydp.components.ingest.split import Split

    monkeypatch.setattr(Split, "take", lambda self, rows: (_ for _ in ()).throw(OSError("disk gone")))
    with pytest.raises(OSError, match="disk gone"):
        train(dataset=tiny.dataset, config=tiny.config(mode="sgd"), out=tmp_path / "run")
    assert latest(tmp_path / "run").step == 0
