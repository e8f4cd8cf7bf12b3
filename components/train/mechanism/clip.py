"""Clipping coefficients: by what each unit's gradient is multiplied, so that its norm is at most C."""

from __future__ import annotations

import torch
from torch import Tensor

from lazydp.components.train.mechanism.unit_order import ROUNDING

# What the coefficient and its products are rounded by, and what a unit may change in the rounding of the others' terms.
_SAFETY = 1.0 + 1e-5 + ROUNDING
_LEAST = torch.finfo(torch.float32).tiny


def clip_coefficients(sq_norms: Tensor, *, max_grad_norm: float) -> Tensor:
    """min(1, C / ||g_i||) for each unit, [U] like the norms; zero where the norm is not finite.

    The coefficient is taken smaller by 1e-5, relative: it is rounded once more, and so is what it multiplies. It is
    taken smaller by `ROUNDING` too, which is left for what the unit changes in the rounding of other units' terms.
    """
    norms = sq_norms.sqrt()
    coefficients = (max_grad_norm / (norms * _SAFETY)).clamp(max=1.0)
    return coefficients.masked_fill(~torch.isfinite(norms), 0.0)


def rounded(scale: Tensor) -> Tensor:
    """Coefficients as the products take them, float32. One that is no normal number is 0: it would be rounded up."""
    single = scale.float()
    return single.masked_fill_(single.abs() < _LEAST, 0.0)
