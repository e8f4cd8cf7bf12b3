"""Flush of a table in which every row has pending noise, against the same run's memory copy and in-place scale.

Flush reads and writes each weight once, so a copy of the table, which moves the same bytes, bounds it where memory is
the limit. Where arithmetic is (ChaCha20 and Box-Muller, the operations that the table shows), the rate of
`lazydp bench noise` is the bound.
"""

from __future__ import annotations

import torch

from lazydp.components.bench import operations
from lazydp.components.shared.bench_harness import Contestant, Result, measure
from lazydp.kernels import ops
from lazydp.kernels.noise_key import NoiseKey

UNIT = "rows"
_FLOAT_BYTES = 4
_LAST_BYTES = 4


class _Table:
    """A table of which every row has one more step of pending noise each time it is flushed."""

    def __init__(self, rows: int, columns: int, steps: int) -> None:
        self.weight = torch.zeros(rows, columns)
        self.last = torch.zeros(rows, dtype=torch.int32)
        self.key = NoiseKey.generate().tensor()
        self.transition = torch.ones(steps + 1, 1)
        self.factor = torch.full((steps + 1, 1), 1e-3)
        self.step = 0

    def flush(self) -> None:
        self.step += 1
        ops.flush_(
            self.weight,
            self.last,
            self.key,
            table=0,
            step=self.step,
            transition=self.transition,
            factor=self.factor,
        )


def run(*, table_bytes: int = 2 * 2**30, columns: int = 128, repeats: int = 9) -> list[Result]:
    """Measures `lazydp`, `copy` and `scale` on a float32 table of `table_bytes`, rounded down to whole rows.

    Needs twice `table_bytes` of memory (`copy` has a destination). Raises ValueError for less than one row.
    """
    rows = table_bytes // (columns * _FLOAT_BYTES)
    if rows < 1:
        raise ValueError(
            f"table_bytes: expected at least one row of {columns * _FLOAT_BYTES} bytes, found {table_bytes}"
        )
    warm_ups = 1
    table = _Table(rows, columns, steps=repeats + warm_ups)
    destination = torch.zeros_like(table.weight)
    moved = 2 * rows * columns * _FLOAT_BYTES
    contestants = [
        Contestant(
            "lazydp", table.flush, bytes=moved + 2 * rows * _LAST_BYTES, flops=operations.of_wake(rows, columns)
        ),
        Contestant("copy", lambda: destination.copy_(table.weight), bytes=moved, flops=0),
        Contestant("scale", lambda: destination.mul_(0.999), bytes=moved, flops=rows * columns),
    ]
    shape = {UNIT: rows, "columns": columns, "threads": torch.get_num_threads()}
    return measure("flush", shape=shape, contestants=contestants, repeats=repeats, warm_ups=warm_ups)
