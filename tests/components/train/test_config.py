"""The training configuration says what is wrong in one line, and its digest covers what matters."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from lazydp.components.shared.errors import InputError
from lazydp.components.train.config import ScheduleSettings, TrainConfig
from lazydp.components.train.mechanism.parameters import SMALLEST_NORM, GroupNorms

MINIMAL: dict[str, Any] = {
    "model": {"kind": "two_tower", "embedding_dim": 8},
    "privacy_unit": "example",
    "sampling_prob": 0.01,
    "expected_batch_size": 100,
    "steps": 50,
    "noise_multiplier": 1.0,
    "target_delta": 1e-5,
}

HISTORY_MODEL = {"kind": "two_tower", "embedding_dim": 8, "user": "history", "prior": True}


def parse(**changes: Any) -> TrainConfig:
    return TrainConfig.parse({**MINIMAL, **changes}, where="train.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stepz": 3}, "stepz: there is no such field; did you mean 'steps'?"),
        ({"steps": -1}, "steps: Input should be greater than or equal to 0, found -1"),
        ({"steps": 0, "start": None}, "steps: 0 trains nothing"),
        ({"steps": 0}, "start makes item vectors for a model of histories"),
        ({"start": {"noise_multiplier": 9}}, "start makes item vectors for a model of histories"),
        ({"start": {}, "model": HISTORY_MODEL}, "start.noise_multiplier is missing"),
        ({"steps": 0, "start": {"noise_multiplier": 9}, "model": HISTORY_MODEL}, "without steps it is the run's"),
        (
            {"start": {"noise_multiplier": 9}, "model": HISTORY_MODEL, "popularity": {"noise_multiplier": 9}},
            "a start releases counts itself",
        ),
        ({"model": {**HISTORY_MODEL, "user": "features"}}, "model.prior needs counts"),
        ({"model": {**HISTORY_MODEL, "user_widths": [8]}}, "user: history has no towers"),
        ({"sampling_prob": 1.5}, "sampling_prob: Input should be less than or equal to 1, found 1.5"),
        ({"model": {"kind": "transformer"}}, "model"),
        ({"noise_multiplier": None}, "give one of noise_multiplier and target_epsilon"),
        ({"target_epsilon": 8}, "give one of noise_multiplier and target_epsilon"),
        ({"target_delta": None}, "target_delta is missing"),
        ({"embeddings": {"optimizer": "adam"}}, "'adam' is not linear in the noise"),
        ({"max_grad_norm": float("inf")}, "max_grad_norm: Input should be a finite number, found inf"),
        ({"max_grad_norm": {"dense": 1.0}}, "max_grad_norm.embeddings: the field is missing"),
        (
            {"max_grad_norm": {"dense": 0, "embeddings": 1}},
            "max_grad_norm.dense: Input should be greater than or equal to 0.0000000001, found 0",
        ),
        ({"max_grad_norm": {"dense": 1, "embeddings": 1, "bias": 1}}, "max_grad_norm.bias: there is no such field"),
        ({"popularity": {}}, "popularity.noise_multiplier: the field is missing"),
        (
            {"popularity": {"noise_multiplier": 0.001}},
            "popularity.noise_multiplier: Input should be greater than or equal to 0.01, found 0.001",
        ),
        (
            {"popularity": {"noise_multiplier": 9}, "mode": "sgd"},
            "popularity: a run without privacy releases no counts; leave it out with mode sgd",
        ),
        ({"sampling": "user"}, "say privacy_unit: user as well"),
        ({"sampling": "user", "privacy_unit": "user"}, "user_gradient is missing"),
        ({"user_gradient": "sum"}, "user_gradient belongs to sampling: user"),
        ({"sampling": "users"}, "sampling: Input should be 'example' or 'user'"),
        ({"format_version": 2}, "format_version"),
    ],
)
def test_mistakes_are_named_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(**changes)
    assert message in str(caught.value)
    assert str(caught.value).startswith("training configuration train.yaml: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("- a\n- b\n", "expected a mapping"), ("a: [", r"train\.yaml:1: not YAML"), ("", "expected a mapping")],
)
def test_files_that_are_no_configuration(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "train.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=message):
        TrainConfig.load(file)
    with pytest.raises(InputError, match=r"no training configuration at .*absent\.yaml"):
        TrainConfig.load(tmp_path / "absent.yaml")


def test_sgd_needs_no_privacy_parameters() -> None:
    config = parse(mode="sgd", noise_multiplier=None, target_delta=None)
    assert not config.private


def test_digest_covers_what_has_a_part_in_the_result() -> None:
    assert parse().digest() == parse(checkpoint_every=7, log_every=3).digest()
    for changes in ({"steps": 51}, {"model": {"kind": "two_tower", "embedding_dim": 9}}, {"max_grad_norm": 2.0}):
        assert parse().digest() != parse(**changes).digest()


def test_counts_are_part_of_a_digest_and_none_leave_it_as_it_was() -> None:
    counting = parse(popularity={"noise_multiplier": 20.0})
    assert len({parse().digest(), counting.digest(), parse(popularity={"noise_multiplier": 21.0}).digest()}) == 3
    # Without counts the digest is told nothing of them, and so is what it was before there were any.
    assert "popularity" in str(counting._deciding())
    assert "popularity" not in str(parse()._deciding())
    assert parse().differences(counting) == ["popularity.noise_multiplier: None != 20.0"]
    assert counting.differences(parse()) == ["popularity.noise_multiplier: 20.0 != None"]


def test_a_run_made_non_private_by_its_mode_drops_the_counts() -> None:
    counting = parse(popularity={"noise_multiplier": 20.0})
    assert counting.with_changes(mode="sgd").popularity is None
    assert counting.with_changes(mode="dpsgd").popularity == counting.popularity


def test_differences_name_the_settings() -> None:
    other = parse(steps=51, model={"kind": "two_tower", "embedding_dim": 9})
    assert parse().differences(other) == ["model.embedding_dim: 8 != 9", "steps: 50 != 51"]
    assert parse().differences(parse(log_every=3)) == []


def test_changes_are_validated() -> None:
    assert parse().with_changes(mode="dpsgd").mode == "dpsgd"
    with pytest.raises(InputError, match="command line"):
        parse().with_changes(mode="fast")


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_schedules(kind: str) -> None:
    schedule = ScheduleSettings(kind=kind, warmup_steps=10, final_fraction=0.25)  # type: ignore[arg-type]
    rates = schedule.rates(0.5, steps=100)
    fractions = [rates(step) / 0.5 for step in range(1, 101)]
    assert fractions[0] == pytest.approx(1 / 10)
    assert all(late > early for early, late in itertools.pairwise(fractions[:10]))
    assert max(fractions) <= 1
    assert fractions[-1] == pytest.approx(1.0 if kind == "constant" else 0.25)
    decay = fractions[9:]
    assert all(late <= early for early, late in itertools.pairwise(decay))


def test_a_norm_outside_its_bounds_is_refused() -> None:
    """The configuration says so itself, before the mechanism does."""
    for norms, field in ((9e-11, "max_grad_norm"), ({"dense": 1.0, "embeddings": 9e-11}, "max_grad_norm.embeddings")):
        with pytest.raises(InputError, match=rf"{field}: .*greater than or equal to 0.0000000001"):
            parse(max_grad_norm=norms)
    with pytest.raises(InputError, match=r"max_grad_norm: .*less than or equal to"):
        parse(max_grad_norm=2e10)
    assert parse(max_grad_norm=SMALLEST_NORM).privacy_parameters(1.0).max_grad_norm == SMALLEST_NORM


def test_the_mechanism_follows_from_the_settings() -> None:
    one = parse().privacy_parameters(1.5)
    assert (one.noise_multiplier, one.max_grad_norm, one.expected_batch_size, one.user_gradient) == (
        1.5,
        1.0,
        100,
        None,
    )
    assert one.noise_std("dense") == one.noise_std("embeddings") == 1.5
    config = parse(
        privacy_unit="user",
        sampling="user",
        user_gradient="mean",
        max_grad_norm={"dense": 0.5, "embeddings": 2},
    )
    both = config.privacy_parameters(1.5)
    assert both.max_grad_norm == GroupNorms(dense=0.5, embeddings=2.0)
    assert both.user_gradient == "mean"
    assert config.stated_norms() == {"dense": 0.5, "embeddings": 2.0}
    assert config.digest() != parse().digest()
    assert "max_grad_norm.dense: 0.5 != None" in config.differences(parse())


def test_an_epsilon_alone_is_a_whole_configuration() -> None:
    alone = TrainConfig.parse({"target_epsilon": 3}, where="train.yaml")
    assert (alone.privacy_unit, alone.steps, alone.target_delta) == ("user", 0, 1e-5)
    assert alone.start is not None
    assert alone.model.model_dump(exclude_defaults=True) == {"embedding_dim": 48, "user": "history", "prior": True}
    # Said in full it is the same configuration; and what is said wins over what is filled in.
    said = alone.model_dump(exclude={"sampling_prob", "expected_batch_size"})
    assert TrainConfig.parse(said, where="train.yaml").digest() == alone.digest()
    assert TrainConfig.parse({"target_epsilon": 3, "target_delta": 1e-7}, where="").target_delta == 1e-7
    # The control: who says something of sampling is asked for the rest.
    with pytest.raises(InputError, match="steps: the field is missing"):
        TrainConfig.parse({key: value for key, value in MINIMAL.items() if key != "steps"}, where="train.yaml")


def test_without_steps_or_towers_an_older_configuration_keeps_its_digest() -> None:
    assert set(parse()._deciding()["model"]) == {
        "kind", "embedding_dim", "embedding_init_std", "seed", "user_widths", "item_widths", "temperature", "loss",
    }  # fmt: skip
    assert not {"start", "popularity"} & set(parse()._deciding())
    assert parse(model={**HISTORY_MODEL, "prior": False}).digest() != parse().digest()
