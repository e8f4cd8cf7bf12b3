"""The adversary's units through the CUDA kernels, run by the host: norms, clipping and sum move a row by C at most."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lazydp.components.train.mechanism.clip import clip_coefficients, rounded
from lazydp.kernels import ops

ROWS, DIM, BOUND = 5, 3, 1.0
SIZES = [1e-38, 2e-23, 1.0, 1e7, 1e38]

# Rows, weights of the lookups and gradients of the unit's bags: one for each of F features, of one lookup or several.
UNITS: dict[str, tuple[list[list[int]], list[list[float]], list[float]]] = {
    "two reads that cancel": ([[2], [2]], [[1.0], [1.0]], [1.0, -1.0]),
    "two reads that nearly cancel": ([[2], [2]], [[1.0], [1.0]], [1.0, -0.9999999]),
    "weights that cancel": ([[2, 2], [1, 1]], [[1.0, -1.0], [1.0, -1.0]], [1.0, 1.0]),
    "one row again and again": ([[3] * 200, [3] * 40], [[1.0] * 200, [1.0] * 40], [1.0, 1.0]),
    "different rows": ([[0, 1], [2, 3]], [[1.0, 2.0], [0.5, -3.0]], [1.0, -1.0]),
}


def total(cuda: Any, features: list[tuple[Tensor, Tensor, Tensor, Tensor]]) -> Tensor:
    """What the clipped sum of all examples adds to an empty table; of each rows, lengths, weights, gradients [F, D]."""
    bags = [
        (rows.split(lengths.tolist())[f], weights.split(lengths.tolist())[f], gradient[f])
        for f in range(2)
        for rows, lengths, weights, gradient in features
    ]
    indices = torch.cat([rows for rows, _, _ in bags])
    weights = torch.cat([weights for _, weights, _ in bags])
    offsets = torch.tensor([0, *(rows.numel() for rows, _, _ in bags)]).cumsum(0)
    grad = torch.stack([gradient for _, _, gradient in bags])
    sq_norms = cuda.bag_sq_norms(indices, offsets, grad.view(2, len(features), DIM), weights)
    scale = rounded(clip_coefficients(sq_norms, max_grad_norm=BOUND)).repeat(2)
    table = torch.zeros(ROWS, DIM)
    groups = cuda.group_rows(indices, num_rows=ROWS)
    options: dict[str, Any] = {"alpha": 1.0, "per_lookup_weights": weights, "bound": BOUND}
    cuda.scatter_add_(table, groups, ops.bag_ids(offsets), grad, scale, **options)
    return table.double()


def example(rows: list[list[int]], weights: list[list[float]], gradients: list[float]) -> Any:
    lengths = torch.tensor([len(bag) for bag in rows])
    flat = torch.tensor([row for bag in rows for row in bag])
    return (
        flat,
        lengths,
        torch.tensor([w for bag in weights for w in bag]),
        torch.tensor(gradients)[:, None].repeat(1, DIM),
    )


@pytest.mark.parametrize("what", ["gradients", "weights"])
@pytest.mark.parametrize("name", UNITS)
def test_units_made_by_hand_move_a_table_by_the_bound_at_most(cuda: Any, name: str, what: str) -> None:
    others = [example([[i % ROWS, 2], [3]], [[1.0, 0.5], [1.0]], [0.2, 0.1]) for i in range(40)]
    without = total(cuda, others)
    largest = 0.0
    for size in SIZES:
        rows, weights, gradients = UNITS[name]
        scaled = torch.tensor(gradients if what == "gradients" else [0.0]) * size
        heavy = [[w * size for w in bag] for bag in weights] if what == "weights" else weights
        unit = example(rows, heavy, scaled.tolist() if what == "gradients" else gradients)
        largest = max(largest, float((total(cuda, [*others[:9], unit, *others[9:]]) - without).norm()) / BOUND)
    print(f"{name}, large {what}: the largest factor is {largest:.6f}")
    assert largest <= 1.001
