"""Noise of a release that is made once a run: fixed addresses under the run's key, and coarse results.

The noise of row i and column j has the address (table, i, j, step 0), where nothing else draws. Data, settings and key
belong to the run, so whoever computes the release again gets the same bits, and that is one release.

What is summed is exact (`contributions`), and the noise is a float32 normal times a float64. Noised values are rounded
to a power of two that is at most a 256th of the noise: the low bits, which are those that can betray a sum before its
noise (Mironov 2012), stay here. Rounding is post-processing. No more is claimed for it than that.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from lazydp.components.onepass.contributions import Matrix
from lazydp.kernels import ops
from lazydp.kernels.noise_key import NoiseKey

_ROWS_AT_ONCE = 4096
_FINEST = 2.0**-8


def add_noise(sums: Matrix, std: float, key: NoiseKey, *, table: int, first_row: int = 0) -> None:
    """Add noise to `sums` [R, D] in place, and round.

    Args:
        sums: exact sums.
        std: standard deviation; 0 adds nothing and rounds nothing.
        key: the run's noise key.
        table: the address of the release (`shared.noise_addresses`).
        first_row: the row of the address that belongs to sums[0].
    """
    if std == 0.0:
        return
    grid = 2.0 ** math.floor(math.log2(std * _FINEST))
    secret = key.derive("noise").tensor()
    for start in range(0, sums.shape[0], _ROWS_AT_ONCE):
        part = sums[start : start + _ROWS_AT_ONCE]
        normals = torch.empty(part.shape)
        ops.normal_(normals, secret, table=table, first_row=first_row + start, step=0)
        part += std * normals.double().numpy()
        np.rint(part / grid, out=part)
        part *= grid
