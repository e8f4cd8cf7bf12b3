"""A step of the eager and of the lazy mechanism, against the size of the tables: the headline of LazyDP.

Eager noise visits every row at every step; lazy noise visits the rows of the batch, and every row once at a flush. So a
lazy step is counted with its part of a flush: one flush in so many steps. All contestants do a whole step of a DLRM of
the MLPerf shape, on the same tables, in turn.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from lazydp.components.bench.shapes import SHAPES, Access, StepShape
from lazydp.components.bench.trainers import LEARNING_RATE, TorchSgd, Trainer, engine
from lazydp.components.shared.bench_harness import Contestant, measure
from lazydp.components.shared.errors import InputError
from lazydp.components.train.data.examples import Examples

CONTESTANTS = ("torch_sgd", "torch_eager", "dpsgd", "lazydp")
FLUSH = "flush"
_BATCHES = 4
_GIB = 2**30


@dataclass(frozen=True, slots=True)
class Scale:
    """What one size of tables, batch and access gave.

    Attributes:
        gib: of all tables together.
        rows: of each table.
        batch_size: examples of a step.
        access: how the rows of a batch are drawn.
        threads: of torch.
        repeats: rounds.
        flush_every: steps to a flush.
        seconds: median of a step of each contestant, and of a flush.
        peak_rss_bytes: of the process so far.
    """

    gib: float
    rows: int
    batch_size: int
    access: Access
    threads: int
    repeats: int
    flush_every: int
    seconds: Mapping[str, float]
    peak_rss_bytes: int

    def step_s(self, contestant: str) -> float:
        """Seconds of a step; of `lazydp` with its part of a flush."""
        flush = self.seconds[FLUSH] / self.flush_every if contestant == "lazydp" else 0.0
        return self.seconds[contestant] + flush

    def times(self, contestant: str) -> float:
        """How many times as long as a lazy step, its part of a flush counted in."""
        return self.step_s(contestant) / self.step_s("lazydp")

    def to_json(self) -> str:
        """One line; `step_s` and `times` by contestant beside the fields."""
        derived = {name: {one: getattr(self, name)(one) for one in CONTESTANTS} for name in ("step_s", "times")}
        return json.dumps({"bench": "scale"} | asdict(self) | derived)


class TorchEager:
    """Plain torch's step without privacy, then what eager noise adds to it: `normal_` and add, table by table.

    It clips nothing, so that a real eager step takes longer. The noise of a table is drawn into one buffer, which is
    kept.
    """

    def __init__(self, shape: StepShape, weights: Mapping[str, Tensor]) -> None:
        self._plain = TorchSgd(shape, weights)
        self._weights = weights
        self._std = 1.0 / shape.batch_size
        self._noise = torch.empty(shape.rows, shape.dim)

    def step(self, micro_batches: Sequence[Examples], /) -> object:
        """One step on the examples of all micro-batches."""
        self._plain.step(micro_batches)
        with torch.no_grad():
            for weight in self._weights.values():
                weight.add_(self._noise.normal_(std=self._std), alpha=-LEARNING_RATE)
        return self._weights


def run(
    *,
    gib: Sequence[float],
    batch_sizes: Sequence[int],
    accesses: Sequence[Access],
    repeats: int,
    flush_every: int = 1000,
    shape: StepShape = SHAPES["mlperf"],
) -> Iterator[Scale]:
    """Measure each combination; what one gave comes before the next begins.

    Args:
        gib: sizes of all tables together; the largest has to fit into memory once, with room for a table more.
        batch_sizes: examples of a step.
        accesses: how rows are drawn.
        repeats: rounds of each combination.
        flush_every: steps to a flush.
        shape: dense layers, number of tables and dimension.

    Raises:
        InputError: tables of less than one row.
    """
    for size in gib:
        rows = int(size * _GIB) // (shape.table_bytes // shape.rows)
        if rows < 1:
            raise InputError(f"{size} GiB is less than one row of each of {shape.tables} tables")
        weights = replace(shape, rows=rows).weights()
        for batch_size, access in itertools.product(batch_sizes, accesses):
            workload = replace(shape, rows=rows, batch_size=batch_size, access=access)
            yield _measured(workload, weights, gib=size, repeats=repeats, flush_every=flush_every)
        del weights  # before the next ones are made


def _measured(shape: StepShape, weights: Mapping[str, Tensor], *, gib: float, repeats: int, flush_every: int) -> Scale:
    lazy = engine(shape, weights, "lazydp")
    trainers: dict[str, Trainer] = {
        "torch_sgd": TorchSgd(shape, weights),
        "torch_eager": TorchEager(shape, weights),
        "dpsgd": engine(shape, weights, "dpsgd"),
        "lazydp": lazy,
    }
    batches = [shape.batch(number) for number in range(1, _BATCHES + 1)]
    contestants = [_contestant(name, trainers[name], batches) for name in CONTESTANTS]
    of_flush = Contestant(FLUSH, lazy.flush, bytes=0, prepare=lambda: lazy.step(batches[0]))
    results = measure("scale", shape=shape.figures(), contestants=[*contestants, of_flush], repeats=repeats)
    return Scale(
        gib=gib,
        rows=shape.rows,
        batch_size=shape.batch_size,
        access=shape.access,
        threads=torch.get_num_threads(),
        repeats=repeats,
        flush_every=flush_every,
        seconds={result.contestant: result.median_s for result in results},
        peak_rss_bytes=results[0].peak_rss_bytes,
    )


def _contestant(name: str, trainer: Trainer, batches: Sequence[Sequence[Examples]]) -> Contestant:
    turn = itertools.cycle(batches)
    return Contestant(name, lambda: trainer.step(next(turn)), bytes=0)  # times alone are shown
