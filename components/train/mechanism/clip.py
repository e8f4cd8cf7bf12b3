"""Clipping coefficients: by what each unit's gradient is multiplied, so that its norm is at most C."""

from __future__ import annotations

import torch
from torch import Tensor

_SAFETY = 1.0 + 1e-5


def clip_coefficients(sq_norms: Tensor, *, max_grad_norm: float) -> Tensor:
    """min(1, C / ||g_i||) for each unit, float32 [U]; zero where the norm is not finite.

    Norms are rounded; the coefficient is taken smaller by 1e-5, relative, so that no contribution passes C by rounding.
    """
    norms = sq_norms.sqrt()
    coefficients = (max_grad_norm / (norms * _SAFETY)).clamp(max=1.0)
    return coefficients.masked_fill(~torch.isfinite(norms), 0.0)
