"""Ten models of the literature train as they are written, or, with batch norm, after `fix`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lazydp.components.shared.errors import InputError
from lazydp.components.train.engine.dense import DenseOptimizer
from lazydp.components.train.mechanism.gradient_check import STEPS_LOOKED_AT
from lazydp.components.train.mechanism.parameters import PrivacyParameters
from lazydp.components.train.private import PrivateTrainer, make_private
from lazydp.components.train.tables.skip_ahead import EmbeddingSgd
from lazydp.kernels.noise_key import NoiseKey
from support.public_models import PUBLIC_MODELS, Batch, PublicModel, built, gradient_of_one, norm_of

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE, NORM = 5, 0.3
WITH_BATCH_NORM = {"DeepFM", "Wide&Deep", "BST", "DSSM"}
SLOW = {
    "FM": {"bias"},
    "DeepFM": {"bias", "deep.1.weight", "deep.1.bias", "deep.5.weight", "deep.5.bias"},
    "DLRM": set(),
    "NeuMF": set(),
    "GRU4Rec": {"gru.weight_ih_l0", "gru.weight_hh_l0"},
}


def trainer_of(model: nn.Module, *, noise_multiplier: float = 0.0) -> PrivateTrainer:
    return make_private(
        model,
        privacy=PrivacyParameters(
            noise_multiplier=noise_multiplier, max_grad_norm=NORM, expected_batch_size=float(SIZE)
        ),
        embeddings=EmbeddingSgd(1.0),
        dense=DenseOptimizer.named("sgd", learning_rate=1.0),
        key=NoiseKey.for_tests(0),
    )


def batch(public: PublicModel, seed: int, size: int = SIZE) -> Batch:
    return public.inputs(size, torch.Generator().manual_seed(seed))


def clipped_sum(model: nn.Module, public: PublicModel, inputs: Batch) -> dict[str, Tensor]:
    """Example by example, by autograd."""
    total = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for example in range(SIZE):
        gradient = gradient_of_one(model, public, inputs, example)
        for name, part in gradient.items():
            total[name] += part * min(1.0, NORM / norm_of(gradient))
    return total


@pytest.mark.parametrize("name", PUBLIC_MODELS)
def test_a_step_is_the_clipped_sum_of_per_example_gradients(name: str) -> None:
    public = PUBLIC_MODELS[name]
    model = built(public, dropout=False)
    plain = copy.deepcopy(model)
    inputs = batch(public, 1)
    expected = clipped_sum(plain, public, inputs)
    trainer = trainer_of(model)
    if name in SLOW:
        assert set(trainer.slow_paths) == SLOW[name]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert before.keys() == plain.state_dict().keys()
    trainer.step(lambda: public.losses(model(*inputs), inputs))
    after = model.state_dict()
    for key, gradient in expected.items():
        torch.testing.assert_close((before[key] - after[key]) * SIZE, gradient, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("name", PUBLIC_MODELS)
def test_it_trains_with_dropout_and_noise_and_goes_back_to_plain_torch(name: str) -> None:
    """Past the steps that are looked at, with batches of other sizes and none; then as a checkpoint, both ways."""
    public = PUBLIC_MODELS[name]
    model = built(public, dropout=True)
    plain = copy.deepcopy(model)
    trainer = trainer_of(model, noise_multiplier=0.5)
    model.load_state_dict(plain.state_dict())
    trainer.step()
    for step, size in enumerate([4, 1, 3, 5]):
        inputs = batch(public, step, size)
        trainer.step(lambda inputs=inputs: public.losses(model(*inputs), inputs))  # type: ignore[misc]
    assert trainer.steps_done > STEPS_LOOKED_AT
    trainer.flush()
    plain.load_state_dict(model.state_dict())
    inputs = batch(public, 9)
    torch.testing.assert_close(plain.eval()(*inputs), model.eval()(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", sorted(WITH_BATCH_NORM))
def test_batch_norm_is_refused_with_its_replacement(name: str) -> None:
    with pytest.raises(InputError, match=r"BatchNorm1d.*lazydp\.api\.fix\(model\)"):
        trainer_of(PUBLIC_MODELS[name].make())


def test_the_others_are_taken_as_they_are_written() -> None:
    for name in PUBLIC_MODELS.keys() - WITH_BATCH_NORM:
        trainer_of(PUBLIC_MODELS[name].make())
