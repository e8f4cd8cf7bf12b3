"""Every CUDA operator once on small and awkward shapes: what compute-sanitizer watches (`make gpu`)."""

from __future__ import annotations

import torch

from lazydp.kernels import ops
from lazydp.kernels.noise_key import NoiseKey

DEVICE = torch.device("cuda")
KEY = NoiseKey.for_tests(1).tensor()
STEP = 4


def run(num_rows: int, columns: int, bags: int, longest: int, *, momentum: bool, weighted: bool) -> None:
    """One step on one table, then the flush."""
    lengths = torch.randint(0, longest + 1, (bags,))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    lookups = int(offsets[-1])
    bag_of_lookup = ops.bag_ids(offsets).to(DEVICE)
    offsets = offsets.to(DEVICE)
    indices = torch.randint(0, num_rows, (lookups,), device=DEVICE)
    weights = torch.rand(lookups, device=DEVICE) if weighted else None
    weight = torch.randn(num_rows, columns, device=DEVICE)
    velocity = torch.randn(num_rows, columns, device=DEVICE) if momentum else None
    last = torch.randint(0, STEP - 1, (num_rows,), dtype=torch.int32, device=DEVICE)
    transition = torch.rand(STEP + 2, 4 if momentum else 1, device=DEVICE)
    factor = torch.rand(STEP + 2, 3 if momentum else 1, device=DEVICE)

    groups = ops.group_rows(indices, num_rows=num_rows)
    half = ops.group_rows(indices[::2].contiguous(), num_rows=num_rows)
    skip = {"transition": transition, "factor": factor, "momentum": velocity}
    ops.catch_up_(weight, last, half.rows, KEY, table=1, step=STEP - 1, **skip)  # type: ignore[arg-type]
    ops.catch_up_bag_sum_(
        weight,
        last,
        groups,
        KEY,
        indices,
        offsets,
        bag_of_lookup,
        table=1,
        step=STEP,
        per_lookup_weights=weights,
        **skip,  # type: ignore[arg-type]
    )
    ops.bag_sum(weight, indices, offsets, weights)
    ops.foreach_bag_sum([weight, weight], [indices, indices], [offsets, offsets], [weights, None])
    grad, scale = torch.randn(bags, columns, device=DEVICE), torch.rand(bags, device=DEVICE)
    features = 2 if bags % 2 == 0 else 1
    by_bag = grad.view(features, bags // features, columns)
    ops.foreach_bag_sq_norms([indices, indices], [offsets, offsets], [by_bag, by_bag], [weights, None])
    ops.scatter_add_(weight, groups, bag_of_lookup, grad, scale, alpha=-0.1, per_lookup_weights=weights)
    ops.flush_(weight, last, KEY, table=1, step=STEP + 1, **skip)  # type: ignore[arg-type]
    ops.normal_(torch.empty(num_rows, columns, device=DEVICE), KEY, table=1, first_row=3, step=1)
    torch.cuda.synchronize()


def main() -> None:
    torch.manual_seed(0)
    for momentum in (False, True):
        for weighted in (False, True):
            run(40, 128, 30, 3, momentum=momentum, weighted=weighted)
            run(7, 13, 21, 5, momentum=momentum, weighted=weighted)
            run(2, 4, 200, 2, momentum=momentum, weighted=weighted)
    run(5, 1, 3, 0, momentum=False, weighted=False)
    print("every operator ran")


if __name__ == "__main__":
    main()
