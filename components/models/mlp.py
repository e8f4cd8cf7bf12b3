"""The one network both models are built from."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import nn


def mlp(num_inputs: int, hidden_widths: Sequence[int], num_outputs: int) -> nn.Sequential:
    """Linear layers with ReLU between them (none after the last)."""
    widths = [num_inputs, *hidden_widths, num_outputs]
    layers: list[nn.Module] = []
    for width, following in itertools.pairwise(widths):
        layers += [nn.Linear(width, following), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])
