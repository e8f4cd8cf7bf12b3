"""Who runs in `lazydp bench step`: plain PyTorch, our engine in its three modes, and Opacus by ghost clipping."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lazydp.components.bench.shapes import StepShape
from lazydp.components.bench.workload import Workload
from lazydp.components.models.recommender import ModelInputs
from lazydp.components.shared.errors import UnavailableError
from lazydp.components.train.data.examples import Examples
from lazydp.components.train.device.placement import HOST, Placement
from lazydp.components.train.engine.dense import DenseOptimizer
from lazydp.components.train.engine.step import Engine
from lazydp.components.train.engine.timer import StepTimer
from lazydp.components.train.engine.transfers import send_examples, send_lookups
from lazydp.components.train.mechanism.parameters import PrivacyParameters
from lazydp.components.train.tables import schedules
from lazydp.components.train.tables.embedding_tables import Mode
from lazydp.components.train.tables.lookups import Lookups, lookups_of, model_inputs
from lazydp.components.train.tables.skip_ahead import EmbeddingSgd
from lazydp.kernels.noise_key import NoiseKey

# As real runs have it (examples/): at 1e-3 rows of float32 would round away much of the noise (tables/precision.py).
LEARNING_RATE = 1.0
_NOISE_MULTIPLIER, _MAX_GRAD_NORM = 1.0, 1.0


class Trainer(Protocol):
    """Something that does a training step."""

    def step(self, micro_batches: Sequence[Examples], /) -> object:
        """One step on the examples of all micro-batches."""


class TorchSgd:
    """Non-private SGD as one writes it in PyTorch, with what makes it fastest.

    Sparse gradients for the tables (dense ones would cost a pass over every table), `include_last_offset` (no copy of
    the offsets), the fused optimizer for the dense layers, gradients set to None.

    Args:
        workload: the model and its batches.
        weights: of the tables.
        placement: of dense layers and tables.
        dense: another optimizer of the dense layers.
    """

    def __init__(
        self,
        workload: Workload,
        weights: Mapping[str, Tensor],
        placement: Placement = HOST,
        dense: DenseOptimizer | None = None,
    ) -> None:
        self._divisor = workload.expected_batch_size
        self._placement = placement
        self.model = workload.model().to(placement.device)
        self.bags = torch_bags(weights)
        self._of_tables = torch.optim.SGD(self.bags.parameters(), lr=LEARNING_RATE)
        dense = dense or DenseOptimizer.named("sgd", learning_rate=LEARNING_RATE, fused=True)
        self._of_dense = dense.make(self.model.parameters())

    def step(self, micro_batches: Sequence[Examples], /) -> object:
        """One step on the examples of all micro-batches."""
        self._of_tables.zero_grad(set_to_none=True)
        self._of_dense.zero_grad(set_to_none=True)
        layout, device = self.model.layout, self._placement.device
        reads = send_lookups([lookups_of(layout, examples) for examples in micro_batches], self._placement.table_device)
        for examples, read in zip(send_examples(micro_batches, device), reads, strict=True):
            pooled = {name: rows.to(device) for name, rows in read_bags(self.bags, read).items()}
            inputs = model_inputs(layout, examples, pooled)
            loss = self.model.losses(self.model(inputs), examples.labels).sum() / self._divisor
            loss.backward()  # type: ignore[no-untyped-call]
        self._of_tables.step()
        self._of_dense.step()
        return self.model


def torch_bags(weights: Mapping[str, Tensor]) -> nn.ModuleDict:
    """The tables as PyTorch has them, with sparse gradients; they share the memory of `weights`."""
    return nn.ModuleDict(
        {
            name: nn.EmbeddingBag.from_pretrained(
                weight, freeze=False, mode="sum", sparse=True, include_last_offset=True
            )
            for name, weight in weights.items()
        }
    )


def read_bags(bags: nn.ModuleDict, reads: Mapping[str, Lookups]) -> dict[str, Tensor]:
    """Pooled rows of each table."""
    return {
        name: bags[name](read.indices, read.offsets, per_sample_weights=read.weights) for name, read in reads.items()
    }


def engine(
    workload: Workload,
    weights: Mapping[str, Tensor],
    mode: Mode,
    *,
    placement: Placement = HOST,
    timer: StepTimer | None = None,
) -> Engine:
    """Our engine; all modes with the same optimizers."""
    rate = schedules.constant(LEARNING_RATE)
    return Engine(
        workload.model(),
        mode=mode,
        privacy=PrivacyParameters(
            noise_multiplier=_NOISE_MULTIPLIER,
            max_grad_norm=_MAX_GRAD_NORM,
            expected_batch_size=workload.expected_batch_size,
            user_gradient=workload.user_gradient,
        ),
        embeddings=EmbeddingSgd(rate),
        dense=DenseOptimizer.named("sgd", learning_rate=rate, fused=True),
        key=NoiseKey.generate(),
        tables=weights,
        timer=timer,
        placement=placement,
    )


class _WithEmbeddings(nn.Module):
    """The model as one module of layers that Opacus knows norms for: rows looked up one by one, then summed."""

    def __init__(self, shape: StepShape, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.pooling = shape.pooling
        self.dense = shape.model()
        for layer in self.dense.modules():
            if isinstance(layer, nn.ReLU):
                layer.inplace = False  # the hooks of Opacus forbid it
        self.rows = nn.ModuleDict(
            {name: nn.Embedding(shape.rows, shape.dim, _weight=weight) for name, weight in weights.items()}
        )

    def forward(self, examples: Examples) -> Tensor:
        """Logits [B] of the examples."""
        pooled = {
            name: rows(examples.bags[name].values.view(-1, self.pooling)).sum(dim=1) for name, rows in self.rows.items()
        }
        logits: Tensor = self.dense(ModelInputs(pooled, {}, examples.dense, examples.item_dense))
        return logits.squeeze(1)


class OpacusGhost:
    """Opacus with ghost clipping: norms in one backward pass, the clipped gradient in a second one.

    Raises:
        UnavailableError: Opacus is not installed.
    """

    def __init__(self, shape: StepShape, weights: Mapping[str, Tensor]) -> None:
        try:
            from opacus.grad_sample import GradSampleModuleFastGradientClipping  # noqa: PLC0415 - a peer, optional
            from opacus.optimizers import DPOptimizerFastGradientClipping  # noqa: PLC0415
            from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping  # noqa: PLC0415
        except ImportError as error:
            raise UnavailableError("opacus is not installed: pip install lazydp[peers]") from error
        self._model = GradSampleModuleFastGradientClipping(
            _WithEmbeddings(shape, weights), max_grad_norm=_MAX_GRAD_NORM, use_ghost_clipping=True
        )
        self._optimizer = DPOptimizerFastGradientClipping(
            torch.optim.SGD(self._model.parameters(), lr=LEARNING_RATE),
            noise_multiplier=_NOISE_MULTIPLIER,
            max_grad_norm=_MAX_GRAD_NORM,
            expected_batch_size=shape.batch_size,
        )
        criterion = nn.BCEWithLogitsLoss(reduction="mean")
        self._loss: Any = DPLossFastGradientClipping(self._model, self._optimizer, criterion, loss_reduction="mean")

    def step(self, micro_batches: Sequence[Examples], /) -> object:
        """One step on the one batch that a named shape has."""
        (examples,) = micro_batches
        self._optimizer.zero_grad()
        loss = self._loss(self._model(examples), examples.labels)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Full backward hook")  # its hooks, on layers that read plain inputs
            loss.backward()
        self._optimizer.step()
        return loss
