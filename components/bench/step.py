"""A training step, private and not, in one interleaved run: what does privacy cost, and does it grow with the tables?

Contestants take turns on the same tables, so that tables may be as large as memory holds; each keeps its own dense
layers. `torch_sgd` is plain PyTorch; `sgd`, `lazydp` and `dpsgd` are one engine; `opacus` is Opacus with ghost
clipping, left out where its dense table gradients and noise would not fit into memory.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence

import torch

from lazydp.components.bench.harness import Contestant, Result, measure
from lazydp.components.bench.shapes import StepShape, shape_of
from lazydp.components.bench.trainers import OpacusGhost, TorchSgd, Trainer, engine
from lazydp.components.shared.errors import InputError
from lazydp.components.train.examples import Examples
from lazydp.components.train.timer import Phase, StepTimer

UNIT = "batch"
CONTESTANTS = ("torch_sgd", "sgd", "lazydp", "dpsgd", "opacus")
_BATCHES = 8
# Gradient, noise and the sum of both, each as large as the tables, beside the tables.
_OPACUS_COPIES = 4


def run(
    *,
    shape: str = "mlperf",
    rows: int | None = None,
    repeats: int = 9,
    contestants: Sequence[str] = CONTESTANTS,
) -> list[Result]:
    """Measure a step of each contestant; results in their order.

    Args:
        shape: `mlperf`, `pooled` or `small`.
        rows: rows of each table; None for the shape's own, or as many as fit into half of the free memory.
        repeats: rounds, each with one step of every contestant.
        contestants: names from `CONTESTANTS`.

    Raises:
        InputError: an unknown shape or contestant.
    """
    made = _fitted(shape, rows)
    names = [name for name in contestants if name != "opacus" or _opacus_fits(made)]
    weights = made.weights()
    trainers: dict[str, Callable[[], Trainer]] = {
        "torch_sgd": lambda: TorchSgd(made, weights),
        "sgd": lambda: engine(made, weights, "sgd"),
        "lazydp": lambda: engine(made, weights, "lazydp"),
        "dpsgd": lambda: engine(made, weights, "dpsgd"),
        "opacus": lambda: OpacusGhost(made, weights),
    }
    for name in names:
        if name not in trainers:
            raise InputError(f"no contestant {name!r}: choose from {', '.join(CONTESTANTS)}")
    entered = [_contestant(name, trainers[name](), made) for name in names]
    return measure("step", shape=_figures(made), contestants=entered, repeats=repeats, warm_ups=2)


def breakdown(*, shape: str = "mlperf", rows: int | None = None, repeats: int = 9) -> dict[Phase, float]:
    """Mean seconds that a step of `lazydp` spends in each phase, in the order of the step.

    Raises:
        InputError: an unknown shape.
    """
    made = _fitted(shape, rows)
    timer = StepTimer()
    trainer = engine(made, made.weights(), "lazydp", timer=timer)
    batches = _batches(made)
    for _ in range(2):
        trainer.step(next(batches))
    timer.reset()
    for _ in range(repeats):
        trainer.step(next(batches))
    return {phase: seconds / repeats for phase, seconds in timer.seconds.items()}


def _contestant(name: str, trainer: Trainer, shape: StepShape) -> Contestant:
    batches = _batches(shape)
    # A table-wide step moves every weight; a sparse one the rows of the batch.
    moved = 2 * shape.table_bytes if name in ("dpsgd", "opacus") else shape.embedding_bytes()
    return Contestant(name, lambda: trainer.step(next(batches)), bytes=moved, flops=shape.matmul_flops())


def _batches(shape: StepShape) -> itertools.cycle[Examples]:
    return itertools.cycle([shape.examples(seed) for seed in range(_BATCHES)])


def _figures(shape: StepShape) -> dict[str, int]:
    return {
        "tables": shape.tables,
        "rows": shape.rows,
        "dim": shape.dim,
        "batch": shape.batch_size,
        "pooling": shape.pooling,
        "threads": torch.get_num_threads(),
    }


def _fitted(name: str, rows: int | None) -> StepShape:
    made = shape_of(name, rows=rows)
    if rows is not None:
        return made
    fitting = made.rows * (_free_memory() // 2) // made.table_bytes
    return shape_of(name, rows=max(1, min(made.rows, fitting)))


def _opacus_fits(shape: StepShape) -> bool:
    return _OPACUS_COPIES * shape.table_bytes < _free_memory()


def _free_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
