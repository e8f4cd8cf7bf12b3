"""An adversary against clipped sums: by how much does one privacy unit move what a step really adds up?

Its model has every supported layer and pooling, and a batch decides every gradient: raw inputs, ids, weights of
lookups, and what each output of each example counts in the loss. `Step.factor` is the norm of the difference of two
real steps, with the unit and without it, over C. What it may be is 1, up to the rounding of the result itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor, nn

from lazydp.components.train.mechanism.coupling import CouplingCheck
from lazydp.components.train.mechanism.unit_order import UnitOrder
from lazydp.components.train.private import DenseOptimizer, EmbeddingSgd, PrivacyParameters, make_private
from lazydp.kernels.noise_key import NoiseKey

ROWS, DIM, POSITIONS, WIDTH, BAG = 5, 3, 3, 4, 4
PARTS = ("difference", "scaled", "bag", "mean", "positions", "norm", "deep", "column", "row", "flat", "slow")
LARGEST = 1.001


class Slow(nn.Module):
    """A parameter without a rule: its per-example gradients are formed."""

    def __init__(self) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.ones(WIDTH))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.factors


class Everything(nn.Module):
    """Outputs [B, PARTS] of a table that is read in every way, and of layers with one position or several."""

    def __init__(self) -> None:
        super().__init__()
        torch.default_generator.manual_seed(0)  # without a word to GPUs, which takes longer than all the rest
        self.table = nn.Embedding(ROWS, DIM)
        self.bag = nn.EmbeddingBag(ROWS, DIM, mode="sum")
        self.mean = nn.EmbeddingBag(ROWS, DIM, mode="mean")
        self.scaled = nn.Linear(DIM, 2)
        self.positions = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.deep = nn.Linear(WIDTH, 2)
        self.column, self.row, self.flat = nn.Linear(1, 16), nn.Linear(WIDTH, 1), nn.LayerNorm(WIDTH)
        self.slow = Slow()
        with torch.no_grad():
            for table in (self.table, self.bag, self.mean):
                table.weight.zero_()  # so that what a step adds is not rounded beside what was there

    def forward(self, batch: Batch) -> Tensor:
        """The parts of every example, [B, len(PARTS)]."""
        first, second = self.table(batch.ids[:, 0]), self.table(batch.ids[:, 1])
        passed = self.positions(batch.inputs)
        parts = {
            "difference": (first - second).sum(dim=1),
            "scaled": self.scaled((first - second) * batch.amount.unsqueeze(1)).sum(dim=1),
            "bag": self.bag(batch.bags, per_sample_weights=batch.weights).sum(dim=1),
            "mean": self.mean(batch.bags).sum(dim=1),
            "positions": (passed * batch.signs.unsqueeze(2)).sum(dim=(1, 2)),
            "norm": (self.norm(passed) * batch.signs.unsqueeze(2)).sum(dim=(1, 2)),
            "slow": (self.slow(batch.inputs) * batch.signs.unsqueeze(2)).sum(dim=(1, 2)),
            "deep": self.deep(batch.inputs[:, 0]).sum(dim=1),
            "column": (self.column(batch.inputs[:, 0, :1]) * batch.signs[:, :1]).sum(dim=1),
            "row": self.row(batch.inputs[:, 0]).sum(dim=1),
            "flat": self.flat(batch.inputs[:, 0]).sum(dim=1),
        }
        return torch.stack([parts[name] for name in PARTS], dim=1)


@dataclass(frozen=True)
class Batch:
    """B examples.

    Attributes:
        ids: int64 [B, 2], read from one table and subtracted.
        amount: float32 [B], what the difference is multiplied by before a linear layer.
        bags: int64 [B, BAG].
        weights: float32 [B, BAG], of the lookups.
        inputs: float32 [B, POSITIONS, WIDTH], raw.
        signs: float32 [B, POSITIONS], what each position counts.
        counts: float32 [B, PARTS], what each part counts in the loss: its gradient.
    """

    ids: Tensor
    amount: Tensor
    bags: Tensor
    weights: Tensor
    inputs: Tensor
    signs: Tensor
    counts: Tensor

    @property
    def size(self) -> int:
        """B."""
        return self.ids.shape[0]

    def join(self, other: Batch) -> Batch:
        """These examples, then those."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Batch(*(torch.cat(pair) for pair in pairs))

    def repeated(self, times: int) -> Batch:
        """Every example so many times."""
        return Batch(*(part.repeat_interleave(times, dim=0) for part in vars(self).values()))


def examples(count: int = 1, *, part: str = "bag", size: float = 1.0, **fields: Tensor) -> Batch:
    """Ordinary examples that count in one part of the loss, with some fields of one's own (one row for all)."""
    ids = torch.arange(count)
    counts = torch.zeros(count, len(PARTS))
    counts[:, PARTS.index(part)] = size
    batch = Batch(
        ids=torch.stack([ids % ROWS, (ids + 1) % ROWS], dim=1),
        amount=torch.ones(count),
        bags=(ids.unsqueeze(1) + torch.arange(BAG)) % ROWS,
        weights=torch.ones(count, BAG),
        inputs=torch.ones(count, POSITIONS, WIDTH),
        signs=torch.ones(count, POSITIONS),
        counts=counts,
    )
    return replace(batch, **{name: value.expand(count, *value.shape).clone() for name, value in fields.items()})


@dataclass(frozen=True)
class Step:
    """How the batches are summed.

    Attributes:
        max_grad_norm: C, or one for each group.
        users: whether all examples of the unit are one user, and every other example a user.
        micro_batches: how many the others are cut into; the unit's stands first, last or in the middle.
        place: of the unit.
        threads: of torch.
        coupled: where the unit stands in the order of addition, instead of an order that is drawn: the others are added
            as they lie, and the one at that place goes to the end. That is how a drawn order with the unit and one
            without it belong together in the proof; one micro-batch, with the unit joined to the others.
    """

    max_grad_norm: Any = 1.0
    users: Literal["sum", "mean"] | None = None
    micro_batches: int = 1
    place: str = "first"
    threads: int = 1
    coupled: int | None = None
    _known: dict[int, tuple[Batch, tuple[Tensor, Tensor]]] = field(default_factory=dict, repr=False)

    def sums(self, batches: Sequence[tuple[Batch, Tensor]]) -> tuple[Tensor, Tensor]:
        """What one step adds to dense layers and to tables, float64 [P] each; b is 1 and the learning rate 1."""
        model = Everything()
        privacy = PrivacyParameters(
            noise_multiplier=0.0, max_grad_norm=self.max_grad_norm, expected_batch_size=1.0, user_gradient=self.users
        )
        trainer = make_private(
            model,
            privacy=privacy,
            embeddings=EmbeddingSgd(lambda step: 1.0),
            dense=DenseOptimizer(lambda parameters: torch.optim.SGD(parameters, lr=0.0)),
            key=NoiseKey.for_tests(0),
        )
        threads = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            losses = [lambda batch=batch: (model(batch) * batch.counts).sum(dim=1) for batch, _ in batches]
            # What the first steps look for is not looked for here: extreme losses are no sign of a wrong model.
            with mock.patch.object(CouplingCheck, "looks_at", return_value=False):
                trainer.step(*losses, user_sizes=[sizes for _, sizes in batches] if self.users else None)
        finally:
            torch.set_num_threads(threads)
        tables = [table.weight.reshape(-1).double() for table in (model.table, model.bag, model.mean)]
        dense = [p.grad.reshape(-1).double() for p in model.parameters() if p.grad is not None]
        return torch.cat(dense), torch.cat(tables)

    def factor(self, unit: Batch, others: Batch | None = None) -> float:
        """The norm of what `unit` moves beside `others`, over C; infinite where the sums are not finite."""
        rest = [] if others is None else self._cut(others)
        alone = (unit, torch.tensor([unit.size]))
        whole = {"first": [alone, *rest], "last": [*rest, alone], "joined": self._joined(alone, rest)}[self.place]
        without = self._without(others) if others is not None else self.sums([])
        with self._ordered():
            found_with = self.sums(whole)
        dense, tables = (float((a - b).norm()) for a, b in zip(found_with, without, strict=True))
        if isinstance(self.max_grad_norm, float):
            found = math.hypot(dense, tables) / self.max_grad_norm
        else:
            found = max(dense / self.max_grad_norm.dense, tables / self.max_grad_norm.embeddings)
        return found if math.isfinite(found) else math.inf

    @contextmanager
    def _ordered(self) -> Iterator[None]:
        """With the unit, which is the first of its micro-batch, at the place `coupled`."""
        if self.coupled is None:
            yield
            return
        place = self.coupled

        def order(_: UnitOrder, units: int) -> Tensor:
            others = torch.arange(1, units)
            return torch.cat([others[:place], torch.zeros(1, dtype=torch.int64), others[place + 1 :], others[[place]]])

        with mock.patch.object(UnitOrder, "of", order):
            yield

    @contextmanager
    def _as_they_lie(self) -> Iterator[None]:
        if self.coupled is None:
            yield
            return
        with mock.patch.object(UnitOrder, "of", return_value=None):
            yield

    def _without(self, others: Batch) -> tuple[Tensor, Tensor]:
        if id(others) not in self._known:
            with self._as_they_lie():
                self._known[id(others)] = others, self.sums(self._cut(others))
        return self._known[id(others)][1]

    def _cut(self, others: Batch) -> list[tuple[Batch, Tensor]]:
        size = -(-others.size // self.micro_batches)
        parts = zip(*(part.split(size) for part in vars(others).values()), strict=True)
        return [(batch, torch.ones(batch.size, dtype=torch.int64)) for batch in (Batch(*part) for part in parts)]

    def _joined(self, alone: tuple[Batch, Tensor], rest: list[tuple[Batch, Tensor]]) -> list[tuple[Batch, Tensor]]:
        """The unit in one micro-batch with others."""
        if not rest:
            return [alone]
        (batch, sizes), *later = rest
        return [(alone[0].join(batch), torch.cat([alone[1], sizes])), *later]
