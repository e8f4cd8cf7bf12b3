"""One step of training, private or not: read this file from top to bottom.

    lookups       which rows the batch reads
    catch-up      those rows get the noise they owe
    gather        and are pooled into bags
    forward, backward       one pass; no weight gradients, no per-example gradients
    norms         of each example's gradient, over all layers and tables
    weighted products       one per layer: the sum of clipped gradients
    scatter       the same for the rows that were read
    dense noise, optimizer  the dense layers move
    advance       the noise of this step is owed by every row

With c_i = min(1, C / ||g_i||) and a fixed expected batch size b, the step follows

    g_hat = ( sum_i c_i g_i  +  sigma C xi ) / b,     xi ~ N(0, I) over every parameter and every row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lazydp.components.models.recommender import Recommender, initial_tables
from lazydp.components.shared.errors import FormatError, InputError
from lazydp.components.train.allocator import keep_freed_memory
from lazydp.components.train.clipping import Capture, clip_coefficients, trained_layers, without
from lazydp.components.train.dense import DenseLayers, DenseOptimizer
from lazydp.components.train.examples import Examples
from lazydp.components.train.lookups import Lookups, lookups_of, model_inputs
from lazydp.components.train.skip_ahead import EmbeddingSgd
from lazydp.components.train.tables import EmbeddingTables, Mode, TableGradient
from lazydp.components.train.timer import Phase, StepTimer
from lazydp.kernels import ops
from lazydp.kernels.arguments import Law
from lazydp.kernels.noise_key import NoiseKey


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivacyParameters:
    """What the mechanism of a step is made of; all of it public, none of it derived from the dataset.

    Attributes:
        noise_multiplier: sigma, >= 0; 0 gives no privacy and exists for tests.
        max_grad_norm: C > 0; infinity (no clipping) only with noise_multiplier 0.
        expected_batch_size: b > 0, the fixed divisor; never the number of examples that a step happened to draw.

    Raises:
        InputError: a value outside its range.
    """

    noise_multiplier: float
    max_grad_norm: float
    expected_batch_size: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.noise_multiplier < math.inf:
            raise InputError(f"noise_multiplier must be finite and at least 0, found {self.noise_multiplier}")
        if not self.max_grad_norm > 0.0:
            raise InputError(f"max_grad_norm must be above 0, found {self.max_grad_norm}")
        if self.noise_multiplier and math.isinf(self.max_grad_norm):
            raise InputError("noise without clipping protects nobody: give a finite max_grad_norm")
        if not 0.0 < self.expected_batch_size < math.inf:
            raise InputError(f"expected_batch_size must be finite and above 0, found {self.expected_batch_size}")

    @property
    def noise_scale(self) -> float:
        """sigma C / b: standard deviation of the noise on the averaged gradient."""
        return self.noise_multiplier * self.max_grad_norm / self.expected_batch_size if self.noise_multiplier else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """Figures of one step. They depend on the data: private, like the data; show them only where the data may be seen.

    Attributes:
        step: number of the step, from 1.
        size: examples drawn.
        loss: mean loss of the examples; NaN for an empty batch.
        clipped: fraction of the examples whose gradient was scaled down.
        mean_norm: mean gradient norm before clipping, over examples with a finite one; NaN where there is none.
        non_finite: examples that counted zero because their gradient was not finite.
    """

    step: int
    size: int
    loss: float
    clipped: float
    mean_norm: float
    non_finite: int

    @classmethod
    def of(cls, step: int, *, losses: Tensor, coefficients: Tensor, sq_norms: Tensor) -> StepReport:
        """The figures of examples with these losses, clipping coefficients and squared norms, each [B]."""
        if not losses.shape[0]:
            return cls.empty(step)
        norms = sq_norms.sqrt()
        return cls(
            step=step,
            size=losses.shape[0],
            loss=float(losses.mean()),
            clipped=float((coefficients < 1.0).to(torch.float32).mean()),
            mean_norm=float(norms[torch.isfinite(norms)].mean()),
            non_finite=int((coefficients == 0.0).sum()),
        )

    @classmethod
    def empty(cls, step: int) -> StepReport:
        """Of a step that drew no example."""
        return cls(step=step, size=0, loss=math.nan, clipped=0.0, mean_norm=math.nan, non_finite=0)


class Engine:
    """Trains a recommender step by step.

    Args:
        model: dense layers; trained in place.
        mode: `lazydp`, `dpsgd` (the same step with noise on every row at every step) or `sgd` (no clipping, no noise:
            of `privacy` only the expected batch size counts).
        privacy: parameters of the mechanism.
        embeddings: optimizer of the tables.
        dense: optimizer of the dense layers.
        key: noise key; may be None where there is no noise.
        tables: initial weights by table; those of the model's public seed where None. Trained in place.
        noise: `gaussian`, or `ones` for tests of exactness.
        timer: collects the time of each phase.

    Raises:
        InputError: a layer without a rule for per-example norms, a missing key, or tables of the wrong names or shapes.
    """

    def __init__(
        self,
        model: Recommender,
        *,
        mode: Mode,
        privacy: PrivacyParameters,
        embeddings: EmbeddingSgd,
        dense: DenseOptimizer,
        key: NoiseKey | None,
        tables: Mapping[str, Tensor] | None = None,
        noise: Law = "gaussian",
        timer: StepTimer | None = None,
    ) -> None:
        keep_freed_memory()
        self.model = model
        self.mode: Mode = mode
        self.privacy = privacy
        self._private = mode != "sgd"
        self._layers = trained_layers(model) if self._private else {}
        noise_scale = privacy.noise_scale if self._private else 0.0
        if noise_scale and key is None:
            raise InputError(f"mode {mode!r} with noise needs a noise key")
        weights = _checked(model, tables if tables is not None else initial_tables(model))
        self.tables = EmbeddingTables(
            weights, mode=mode, optimizer=embeddings, noise_scale=noise_scale, key=key, noise=noise
        )
        self.dense = DenseLayers(model, optimizer=dense, noise_scale=noise_scale, key=key, noise=noise)
        self._timer = timer

    @property
    def steps_done(self) -> int:
        """Steps completed."""
        return self.tables.step

    def step(self, micro_batches: Examples | Sequence[Examples]) -> StepReport:
        """Do one step with the examples of all micro-batches: they sum to the same step as one large batch.

        No examples at all is a legal draw of a Poisson sample: the step then consists of noise alone, and counts.
        """
        if isinstance(micro_batches, Examples):
            micro_batches = [micro_batches]
        micro_batches = [examples for examples in micro_batches if examples.size]
        with self._phase("lookups"):
            reads = [lookups_of(self.model.layout, examples) for examples in micro_batches]
            groups = self.tables.group_rows(reads)
        with self._phase("catch-up"):
            self.tables.catch_up(groups)
        self.dense.zero_gradients()
        passes = [self._pass(examples, read) for examples, read in zip(micro_batches, reads, strict=True)]
        with self._phase("scatter"):
            gradients = {name: [done.tables[name] for done in passes] for name in groups}
            self.tables.add_gradient(groups, gradients)
        step = self.tables.step + 1
        with self._phase("dense noise"):
            self.dense.add_noise(step)
        with self._phase("optimizer"):
            self.dense.update(step)
        with self._phase("eager noise" if self.mode == "dpsgd" else "optimizer"):
            self.tables.advance()
        return _report(step, passes)

    def _pass(self, examples: Examples, reads: Mapping[str, Lookups]) -> _Pass:
        """Forward and backward of one micro-batch; its clipped sum is added to the dense gradients."""
        with self._phase("gather"):
            pooled = {name: rows.requires_grad_() for name, rows in self.tables.gather(reads).items()}
        with Capture(self._layers) as capture:
            with self._phase("forward"):
                inputs = model_inputs(self.model.layout, examples, pooled)
                losses = self.model.losses(self.model(inputs), examples.labels)
                # Private: clipping coefficients bring the divisor, once the norms are known.
                total = losses.sum() if self._private else losses.sum() / self.privacy.expected_batch_size
            with self._phase("backward"):
                total.backward()  # type: ignore[no-untyped-call]
        gradients = {name: _gradient(rows) for name, rows in pooled.items()}
        if not self._private:
            return _Pass.unclipped(losses.detach(), reads, gradients)
        with self._phase("norms"):
            sq_norms = capture.sq_norms(examples.size)
            for name, read in reads.items():
                by_bag = gradients[name].view(read.bags_per_example, examples.size, gradients[name].shape[1])
                sq_norms += ops.bag_sq_norms(read.indices, read.offsets, by_bag, read.weights)
            coefficients = clip_coefficients(sq_norms, max_grad_norm=self.privacy.max_grad_norm)
            finite = torch.isfinite(sq_norms)
            if not bool(finite.all()):
                capture.drop(~finite)
                gradients = {name: _without_bags(grad, ~finite) for name, grad in gradients.items()}
        with self._phase("weighted products"):
            scale = coefficients / self.privacy.expected_batch_size
            capture.add_weighted(scale)
        sent = {name: TableGradient(reads[name], gradients[name], scale) for name in reads}
        return _Pass(losses.detach(), sent, coefficients, sq_norms)

    def flush(self) -> None:
        """Give every row the noise it owes; needed before weights are released or evaluated. Training may go on."""
        self.tables.flush()

    def pending(self) -> int:
        """Number of rows that owe noise."""
        return self.tables.pending()

    def table_weights(self) -> dict[str, Tensor]:
        """The weights of every table (the very tensors), once nothing is pending and everything is finite.

        Raises:
            PendingNoiseError: a row owes noise; flush first.
            NonFiniteError: a weight or dense parameter is not finite.
        """
        self.dense.check_finite()
        return self.tables.weights()

    def state_dict(self) -> dict[str, Any]:
        """Everything that a private checkpoint needs beside key and sampler: references, not copies."""
        return {"mode": self.mode, "dense": self.dense.state_dict(), "embeddings": self.tables.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`, copied into this engine.

        Raises:
            FormatError: the state belongs to another mode, model or optimizer; the message names the difference.
        """
        if state["mode"] != self.mode:
            raise FormatError(f"the checkpoint was written in mode {state['mode']!r}, this run is {self.mode!r}")
        self.tables.load_state_dict(state["embeddings"])
        self.dense.load_state_dict(state["dense"])

    def _phase(self, name: Phase) -> AbstractContextManager[None]:
        return self._timer.phase(name) if self._timer is not None else nullcontext()


@dataclass(frozen=True, slots=True)
class _Pass:
    """What one micro-batch leaves for the end of the step."""

    losses: Tensor
    tables: dict[str, TableGradient]
    coefficients: Tensor
    sq_norms: Tensor

    @classmethod
    def unclipped(cls, losses: Tensor, reads: Mapping[str, Lookups], gradients: Mapping[str, Tensor]) -> _Pass:
        ones = torch.ones_like(losses)
        sent = {name: TableGradient(reads[name], gradients[name], ones) for name in reads}
        return cls(losses, sent, ones, torch.full_like(losses, math.nan))


def _report(step: int, passes: Sequence[_Pass]) -> StepReport:
    if not passes:
        return StepReport.empty(step)
    return StepReport.of(
        step,
        losses=torch.cat([done.losses for done in passes]),
        coefficients=torch.cat([done.coefficients for done in passes]),
        sq_norms=torch.cat([done.sq_norms for done in passes]),
    )


def _gradient(rows: Tensor) -> Tensor:
    return rows.grad if rows.grad is not None else torch.zeros_like(rows)


def _without_bags(gradient: Tensor, examples: Tensor) -> Tensor:
    """The gradient of bags [F * B, D] with zeros for the bags of `examples` (mask [B])."""
    return without(gradient, examples.repeat(gradient.shape[0] // examples.shape[0]))


def _checked(model: Recommender, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    expected = {name: (shape.num_rows, shape.dim) for name, shape in model.tables.items()}
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    if expected != found or list(expected) != list(found):
        raise InputError(f"the model has tables {expected}, weights were given for {found}")
    return weights
