"""Filling a float32 tensor with standard normals: ours (ChaCha20) against torch's and numpy's (neither secure).

What bounds ours is arithmetic, not memory: 4 bytes written a normal stand against the operations that the table shows.
"""

from __future__ import annotations

import numpy as np
import torch

from lazydp.components.bench import operations
from lazydp.components.shared.bench_harness import Contestant, Result, measure
from lazydp.kernels import ops
from lazydp.kernels.noise_key import NoiseKey

UNIT = "normals"
COLUMNS = 128
DEFAULT_COUNT = 53_248 * COLUMNS  # 26 tables, batch 2048, dimension 128
_FLOAT_BYTES = 4


def run(*, count: int = DEFAULT_COUNT, repeats: int = 21) -> list[Result]:
    """Measures `lazydp`, `torch` and `numpy` on `count` normals, rounded down to whole rows of 128.

    Raises ValueError for less than one row.
    """
    rows = count // COLUMNS
    if rows < 1:
        raise ValueError(f"count: expected at least {COLUMNS} normals, found {count}")
    key = NoiseKey.generate().tensor()
    out = torch.zeros(rows, COLUMNS)
    array = out.numpy()
    generator = np.random.default_rng()
    written = rows * COLUMNS * _FLOAT_BYTES

    def fill() -> None:
        ops.normal_(out, key, table=0, first_row=0, step=1)

    def fill_by_numpy() -> None:
        generator.standard_normal(dtype=np.float32, out=array)

    contestants = [
        Contestant("lazydp", fill, bytes=written, flops=operations.of_draw(rows, COLUMNS)),
        Contestant("torch", out.normal_, bytes=written),
        Contestant("numpy", fill_by_numpy, bytes=written),
    ]
    shape = {UNIT: rows * COLUMNS, "threads": torch.get_num_threads()}
    return measure("noise", shape=shape, contestants=contestants, repeats=repeats)
