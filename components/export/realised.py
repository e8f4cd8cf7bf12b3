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
from lazydp.components.train.tables.second_float import catch_up_rows
from lazydp.components.train.tables.skip_ahead import EmbeddingSgd
from lazydp.kernels import ops
from lazydp.kernels.noise_key import NoiseKey

SAMPLED_ROWS = 256


def realised_noise(
    tables: Mapping[str, Mapping[str, Any]], *, optimizer: EmbeddingSgd, noise_scale: float, key: NoiseKey, step: int
) -> RealisedNoise | None:
    """The variance that the noise of a step has once it is added, over the promised one; None where no step has noise.

    The step is a typical one: its learning rate is the root of the mean square of all.

    Args:
        tables: `weight` and `rest` of each table, flushed.
        optimizer: of the tables.
        noise_scale: sigma C / b.
        key: the run's; a key derived from it draws.
        step: the run's step T.
    """
    rates = [optimizer.rate(at) for at in range(1, step + 1)]
    spread = noise_scale * math.sqrt(math.fsum(rate**2 for rate in rates) / max(1, step))
    if spread == 0.0:
        return None
    squares, count = 0.0, 0
    own = key.derive(f"realised noise of step {step}")
    for number, table in enumerate(tables.values()):
        size = table["weight"].shape[0]
        rows = torch.unique(torch.linspace(0, size - 1, min(size, SAMPLED_ROWS)).long()).to(table["weight"].device)
        weight = table["weight"][rows].clone()
        added = _added(weight, own, number, two_floats=table.get("rest") is not None, spread=spread) / spread
        squares += float(added.square().sum())
        count += added.numel()
    return (
        RealisedNoise(elements=count, variance=squares / count, standard_error=math.sqrt(2.0 / count))
        if count
        else None
    )


def _added(weight: Tensor, key: NoiseKey, number: int, *, two_floats: bool, spread: float) -> Tensor:
    """What noise of this standard deviation changes of `weight`, float64."""
    before = weight.double()
    last = torch.zeros(weight.shape[0], dtype=torch.int32, device=weight.device)
    one = torch.ones(1, 1, device=weight.device)
    arguments: dict[str, Any] = {"step": 1, "transition": one, "factor": one * spread, "noise": "gaussian"}
    if not two_floats:
        ops.flush_(weight, last, key.tensor(), table=number, **arguments)
        return weight.double() - before
    rest = torch.zeros_like(weight)
    rows = torch.arange(weight.shape[0], device=weight.device)
    catch_up_rows(weight, rest, last, None, rows, key.tensor(), number=number, arguments=arguments)
    return (weight.double() - before) + rest.double()
