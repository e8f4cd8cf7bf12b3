"""A training step of a module of one's own, private (`make_private`) and not: a SASRec-like and a DCN-like model.

Both have layers that take the slow path: attention and a positional table in the first, the bare matrices of the cross
network in the second. Opacus takes neither as it stands; `OPACUS` says why.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from lazydp.components.bench.trainers import LEARNING_RATE
from lazydp.components.bench.workload import FLOAT_BYTES
from lazydp.components.shared.bench_harness import Contestant, Result, measure
from lazydp.components.shared.errors import InputError
from lazydp.components.train.engine.dense import DenseOptimizer
from lazydp.components.train.mechanism.gradient_check import STEPS_LOOKED_AT
from lazydp.components.train.mechanism.parameters import PrivacyParameters
from lazydp.components.train.private import make_private
from lazydp.components.train.tables.embedding_tables import Mode
from lazydp.components.train.tables.skip_ahead import EmbeddingSgd
from lazydp.kernels.noise_key import NoiseKey

CONTESTANTS = ("torch_sgd", "lazydp", "dpsgd")
OPACUS = {
    "sasrec": "opacus is left out: its validator refuses nn.MultiheadAttention",
    "dcn": "opacus is left out: it finds no per-sample gradients of the parameters in an nn.ParameterList",
}
"""Why Opacus 1.6 is no contestant of each kind."""
ROWS = 100_000
"""Of each table."""
_LENGTH, _FIELDS, _DENSE = 50, 26, 13
_BATCHES = 8
_SEED = 0


class SequenceModel(nn.Module):
    """As SASRec (Kang and McAuley 2018): two blocks of causal self-attention over a padded history.

    Args:
        rows: items; 0 is padding.
        dim: columns.
    """

    def __init__(self, rows: int, dim: int = 64) -> None:
        super().__init__()
        self.items = nn.Embedding(rows, dim, padding_idx=0, sparse=True)
        self.positions = nn.Parameter(torch.randn(_LENGTH, dim) * 0.02)
        self.norms = nn.ModuleList([nn.LayerNorm(dim) for _ in range(4)])
        self.attentions = nn.ModuleList([nn.MultiheadAttention(dim, 2, batch_first=True) for _ in range(2)])
        self.feeds = nn.ModuleList(
            [nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim)) for _ in range(2)]
        )

    def forward(self, ids: Tensor) -> Tensor:
        """Losses [B] of ids [B, 3 * length]: a history, what comes next at each position, and something else."""
        history, positive, negative = ids.chunk(3, dim=1)
        sequence = self.items(history) + self.positions
        later = torch.ones(_LENGTH, _LENGTH, dtype=torch.bool, device=ids.device).triu(1)
        for number, (attend, feed) in enumerate(zip(self.attentions, self.feeds, strict=True)):
            query = self.norms[2 * number](sequence)
            sequence = query + attend(query, sequence, sequence, attn_mask=later, need_weights=False)[0]
            sequence = sequence + feed(self.norms[2 * number + 1](sequence))
        better, worse = ((sequence * self.items(items)).sum(dim=2) for items in (positive, negative))
        return -(functional.logsigmoid(better) + functional.logsigmoid(-worse)).mean(dim=1)


class CrossModel(nn.Module):
    """As DCN v2 (Wang et al. 2021): a cross network of bare matrices beside a deep network.

    Args:
        rows: of each field's table.
        dim: columns.
    """

    def __init__(self, rows: int, dim: int = 16) -> None:
        super().__init__()
        self.tables = nn.ModuleList([nn.Embedding(rows, dim, sparse=True) for _ in range(_FIELDS)])
        width = _FIELDS * dim + _DENSE
        self.cross = Cross(width, rank=64, layers=2)
        self.deep = nn.Sequential(nn.Linear(width, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU())
        self.top = nn.Linear(width + 64, 1)

    def forward(self, ids: Tensor) -> Tensor:
        """Losses [B] of ids [B, fields]; dense features are made of them."""
        rows = [table(column) for table, column in zip(self.tables, ids.unbind(dim=1), strict=True)]
        inputs = torch.cat([*rows, torch.cos(ids[:, :_DENSE].float())], dim=1)
        logits = self.top(torch.cat([self.cross(inputs), self.deep(inputs)], dim=1)).squeeze(1)
        return functional.binary_cross_entropy_with_logits(logits, (ids[:, 0] % 2).float(), reduction="none")


class Cross(nn.Module):
    """Cross layers of low rank: x_0 * (U V x + b) + x."""

    def __init__(self, width: int, *, rank: int, layers: int) -> None:
        super().__init__()
        self.into = nn.ParameterList([torch.randn(width, rank) / width**0.5 for _ in range(layers)])
        self.back = nn.ParameterList([torch.randn(rank, width) / rank**0.5 for _ in range(layers)])
        self.bias = nn.ParameterList([torch.zeros(width) for _ in range(layers)])

    def forward(self, inputs: Tensor) -> Tensor:
        """[B, width] of [B, width]."""
        found = inputs
        for into, back, bias in zip(self.into, self.back, self.bias, strict=True):
            found = inputs * (found @ into @ back + bias) + found
        return found


@dataclass(frozen=True, slots=True)
class _Kind:
    make: Callable[[int], nn.Module]
    columns: int
    batch_size: int


_KINDS = {
    "sasrec": _Kind(SequenceModel, 3 * _LENGTH, 128),
    "dcn": _Kind(CrossModel, _FIELDS, 1024),
}
KINDS = tuple(_KINDS)


def run(
    kind: str, *, rows: int, repeats: int, batch_size: int | None = None, contestants: Sequence[str] | None = None
) -> list[Result]:
    """Measure a step of each contestant, interleaved; results in their order.

    Args:
        kind: `sasrec` or `dcn`.
        rows: of each table.
        repeats: rounds.
        batch_size: examples of a step; the kind's own where None.
        contestants: names from `CONTESTANTS`; all where None.

    Raises:
        InputError: an unknown contestant.
    """
    names = CONTESTANTS if contestants is None else contestants
    for name in names:
        if name not in CONTESTANTS:
            raise InputError(f"no contestant {name!r} for a module: choose from {', '.join(CONTESTANTS)}")
    of_kind = _KINDS[kind]
    size = batch_size or of_kind.batch_size
    generator = torch.Generator().manual_seed(_SEED)
    batches = [torch.randint(1, rows, (size, of_kind.columns), generator=generator) for _ in range(_BATCHES)]
    entered = [_contestant(name, of_kind, rows, batches) for name in names]
    return measure("step", shape={"examples": size, "rows": rows}, contestants=entered, repeats=repeats, warm_ups=2)


def _contestant(name: str, kind: _Kind, rows: int, batches: Sequence[Tensor]) -> Contestant:
    torch.manual_seed(_SEED)
    model = kind.make(rows)
    tables = [layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Embedding)]
    # An eager step moves every weight; the others the rows of the batch: read, and read and written for the gradient.
    values = 2 * sum(tables) if name == "dpsgd" else 3 * batches[0].numel() * sum(tables) // (rows * len(tables))
    step = _plain(model, len(batches[0])) if name == "torch_sgd" else _private(model, name, batches)  # type: ignore[arg-type]
    turn = itertools.cycle(batches)
    return Contestant(name, lambda: step(next(turn)), bytes=FLOAT_BYTES * values)


def _plain(model: nn.Module, size: int) -> Callable[[Tensor], object]:
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)

    def step(ids: Tensor) -> object:
        optimizer.zero_grad(set_to_none=True)
        (model(ids).sum() / size).backward()
        return optimizer.step()

    return step


def _private(model: nn.Module, mode: Mode, batches: Sequence[Tensor]) -> Callable[[Tensor], object]:
    size = len(batches[0])
    trainer = make_private(
        model,
        privacy=PrivacyParameters(noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=float(size)),
        embeddings=EmbeddingSgd(LEARNING_RATE),
        dense=DenseOptimizer.named("sgd", learning_rate=LEARNING_RATE),
        key=NoiseKey.generate(),
        mode=mode,
    )
    for ids in batches[:STEPS_LOOKED_AT]:  # the first steps look for what a model must not do
        few = ids[:8]
        trainer.step(lambda few=few: model(few))  # type: ignore[misc]
    return lambda ids: trainer.step(lambda: model(ids))
