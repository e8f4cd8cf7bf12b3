"""How much of a step's noise arrives at the weights' precision, measured on the weights that are released.

What the final flush itself added is told nobody: together with the released weights its variance would be an equation
in the weights before their noise. So noise under a key of its own is added to copies of released rows. What it tells
is a function of the release and of noise that nothing else uses; a repeated export states the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lazydp.components.budget.statement import RealisedNoise
from lazydp.components.shared.errors import PrivacyError
from lazydp.components.train.tables.precision import Rounding, rates_that_matter
from lazydp.components.train.tables.second_float import TwoFloats
from lazydp.kernels import ops
from lazydp.kernels.noise_key import NoiseKey

SAMPLED_ROWS = 256
_LOST = 0.05
_STANDARD_ERRORS = 5.0


def realised_noise(
    weights: Mapping[str, Tensor], *, rounding: Rounding, key: NoiseKey, step: int
) -> RealisedNoise | None:
    """The variance that the noise of a step has once it is added, over the promised one; None where no step has noise.

    The step is a typical one: its learning rate is the root of the mean square of all that matter.

    Args:
        weights: of each table, as they are released. They and public numbers alone decide whether the noise is added
            to one float or to two: which of them the run had, its rows decided before they had their noise.
        rounding: optimizer, C / b and sigma C / b of the tables.
        key: the run's; a key derived from it draws.
        step: the run's step T.

    Raises:
        PrivacyError: it is less than was promised: float32 rounds noise away.
    """
    rates = rates_that_matter([rounding.optimizer.rate(at) for at in range(1, step + 1)])
    if not rates:
        return None
    spread = rounding.noise_scale * math.sqrt(math.fsum(rate**2 for rate in rates) / len(rates))
    squares, count = 0.0, 0
    own = key.derive(f"realised noise of step {step}")
    for number, released in enumerate(weights.values()):
        size = released.shape[0]
        rows = torch.unique(torch.linspace(0, size - 1, min(size, SAMPLED_ROWS)).long()).to(released.device)
        added = _added(released[rows], own, number, two=rounding.begins_with_two(released), spread=spread) / spread
        squares += float(added.square().sum())
        count += added.numel()
    if not count:
        return None
    found = RealisedNoise(elements=count, variance=squares / count, standard_error=math.sqrt(2.0 / count))
    if found.variance < 1.0 - _LOST - _STANDARD_ERRORS * found.standard_error:
        raise PrivacyError(
            f"noise is lost to rounding: at the precision of the released weights the noise of a step keeps "
            f"{found.variance:.3g} of its variance (1 within {_STANDARD_ERRORS * found.standard_error:.2g}); nothing "
            "is released: train with a higher learning rate, a smaller expected_batch_size or smaller initial weights"
        )
    return found


def _added(weight: Tensor, key: NoiseKey, number: int, *, two: bool, spread: float) -> Tensor:
    """What noise of this standard deviation changes of `weight`, float64."""
    before = weight.double()
    last = torch.zeros(weight.shape[0], dtype=torch.int32, device=weight.device)
    one = torch.ones(1, 1, device=weight.device)
    arguments: dict[str, Any] = {"step": 1, "transition": one, "factor": one * spread, "noise": "gaussian"}
    if not two:
        ops.flush_(weight, last, key.tensor(), table=number, **arguments)
        return weight.double() - before
    rest = torch.zeros_like(weight)
    rows = torch.arange(weight.shape[0], device=weight.device)
    TwoFloats(weight, rest).catch_up(
        last, rows, key.tensor(), number=number, arguments=arguments, exact_transition=one.double()
    )
    return (weight.double() - before) + rest.double()
