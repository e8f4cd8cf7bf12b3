"""make_private on another device: it trains where the model is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lazydp.components.shared.errors import InputError
from lazydp.components.train.engine.dense import DenseOptimizer
from lazydp.components.train.mechanism.coupling import STEPS_LOOKED_AT
from lazydp.components.train.mechanism.parameters import PrivacyParameters
from lazydp.components.train.private import PrivateTrainer, make_private
from lazydp.components.train.tables import schedules
from lazydp.components.train.tables.skip_ahead import EmbeddingSgd
from lazydp.kernels.noise_key import NoiseKey

pytestmark = pytest.mark.usefixtures("one_thread")


class Bags(nn.Module):
    """Rows one by one and bags of both poolings; with `across`, embeddings on the host and the rest on the GPU."""

    def __init__(self, *, across: bool = False) -> None:
        super().__init__()
        self.across = across
        self.tokens = nn.Embedding(9, 4)
        self.tags = nn.EmbeddingBag(9, 4, mode="mean")
        self.words = nn.EmbeddingBag(9, 4, mode="sum")
        self.top = nn.Sequential(nn.Linear(16, 8), nn.LayerNorm(8), nn.ReLU(inplace=True), nn.Linear(8, 1))

    def forward(self, ids: Tensor) -> Tensor:
        starts = torch.arange(0, ids.numel(), ids.shape[1], device=ids.device)
        parts = [self.tokens(ids).tanh().sum(dim=1), self.tags(ids), self.words(ids)]
        pooled = torch.cat([*parts, self.tags(ids.reshape(-1), starts)], dim=1)
        return self.top(pooled.to("cuda") if self.across else pooled).squeeze(1)  # type: ignore[no-any-return]


def own_trainer(model: nn.Module, *, user_gradient: Any = None) -> PrivateTrainer:
    return make_private(
        model,
        privacy=PrivacyParameters(
            noise_multiplier=0.5, max_grad_norm=0.3, expected_batch_size=4.0, user_gradient=user_gradient
        ),
        embeddings=EmbeddingSgd(schedules.constant(0.3), 0.5),
        dense=DenseOptimizer.named("sgd", learning_rate=schedules.constant(0.1)),
        key=NoiseKey.for_tests(2),
    )


def own_run(place: str, *, users: bool = False, steps: int = 3) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = Bags(across=place == "embeddings on the host")
    if place == "gpu":
        model.to("cuda")
    elif model.across:
        model.top.to("cuda")
    trainer = own_trainer(model, user_gradient="mean" if users else None)
    for number in range(steps):
        ids = torch.randint(0, 9, (6, 5), generator=torch.Generator().manual_seed(number))
        ids = ids.to("cuda") if place == "gpu" else ids
        sizes = [torch.tensor([1, 2]), torch.tensor([3])] if users else None
        trainer.step(lambda: model(ids[:3]).square(), lambda: model(ids[3:]).square(), user_sizes=sizes)  # noqa: B023
    trainer.flush()
    assert trainer.model(ids).device == torch.device("cpu" if place == "cpu" else "cuda:0")
    return {name: value.cpu() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("users", [False, True])
@pytest.mark.parametrize("place", ["gpu", "embeddings on the host"])
@pytest.mark.usefixtures("gpu")
def test_make_private_trains_where_the_model_is(assert_close_weights: Any, place: str, users: bool) -> None:
    assert_close_weights(own_run(place, users=users), own_run("cpu", users=users))


def test_make_private_on_the_gpu_waits_for_the_report_and_the_sizes_of_rows_alone(simulated_gpu: Any) -> None:
    model = Bags().to("cuda")
    trainer = own_trainer(model)
    ids = torch.randint(0, 9, (6, 5)).to("cuda")
    for _ in range(STEPS_LOOKED_AT + 1):  # the first ones look for coupled examples, and wait for what they see
        simulated_gpu.reset()
        trainer.step(lambda: model(ids[:3]).square(), lambda: model(ids[3:]).square())
    assert (simulated_gpu.waits, simulated_gpu.reads) == (2, [])
    assert not any(crossing.blocking for crossing in simulated_gpu.crossings)


def test_a_model_that_is_trained_stays_where_it_is(simulated_gpu: Any) -> None:
    model = Bags()
    own_trainer(model)
    assert model.to("cpu") is model
    for move in (lambda: model.to("cuda"), model.double):
        with pytest.raises(InputError, match="'tokens' cannot be moved or converted"):
            move()
    scattered = Bags()
    scattered.tags.to("cuda")
    with pytest.raises(InputError, match="embedding layers are trained on one device, found cpu, cuda:0"):
        own_trainer(scattered)
    upside_down = Bags()
    for layer in (upside_down.tokens, upside_down.tags, upside_down.words):
        layer.to("cuda")
    with pytest.raises(InputError, match="tables live with the dense layers or in host memory"):
        own_trainer(upside_down)
