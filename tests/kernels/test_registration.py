"""The operators as torch sees them: schemas, aliasing, fake shapes, torch.compile's tracing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lazydp.kernels import ops
from lazydp.kernels.noise_key import NoiseKey

KEY = NoiseKey.for_tests(8).tensor()


def int64(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def samples() -> dict[str, tuple[Any, ...]]:
    weight, last = torch.randn(6, 8), torch.zeros(6, dtype=torch.int32)
    m, chol = torch.randn(3, 4), torch.randn(3, 3)
    one = torch.ones(3, 1)
    indices, offsets = int64(3, 1, 3, 5), int64(0, 2, 2, 3, 4)
    groups = ops.group_rows(indices, num_rows=6)
    grad = torch.randn(4, 8)
    return {
        "normal_": (torch.empty(3, 5), KEY, 1, 2, 3),
        "foreach_group_rows": ([indices, indices[:2]], [6, 7]),
        "foreach_catch_up_": (
            [weight.clone(), weight.clone()],
            [last.clone(), last.clone()],
            [groups.rows, groups.rows[:1]],
            KEY,
            [1, 2],
            [0, 9],
            2,
            m,
            chol,
            [torch.randn(6, 8), torch.randn(6, 8)],
            False,
        ),
        "flush_": (weight.clone(), last.clone(), KEY, 1, 5, 2, one, one, None, True),
        "foreach_bag_sum": ([weight, weight[:, :3].clone()], [indices] * 2, [offsets] * 2, [torch.rand(4), None]),
        "foreach_catch_up_bag_sum_": (
            [weight.clone()],
            [last.clone()],
            [groups.rows],
            [groups.order],
            [groups.starts],
            KEY,
            [1],
            [3],
            2,
            one,
            one,
            [],
            False,
            [indices],
            [offsets],
            [ops.bag_ids(offsets)],
            [None],
            [torch.empty(4, 8)],
        ),
        "foreach_bag_ids": ([offsets, offsets[:2]],),
        "foreach_bag_sq_norms": ([indices] * 2, [offsets] * 2, [grad.view(2, 2, 8)] * 2, [None, torch.rand(4)]),
        "foreach_scatter_add_": (
            [weight.clone(), weight.clone()],
            [groups.rows] * 2,
            [groups.order] * 2,
            [groups.starts] * 2,
            [ops.bag_ids(offsets)] * 2,
            [grad] * 2,
            [torch.rand(4)] * 2,
            0.5,
            [None, torch.rand(4)],
            2.0**-40,
        ),
        "weighted_product_": (
            torch.zeros(8, 3, dtype=torch.float64),
            grad,
            torch.randn(4, 3),
            torch.rand(4),
            torch.randperm(4),
            2,
            False,
        ),
        "foreach_product_sq_norms": ([grad, grad[:, :1].contiguous()], [grad, grad], [3, 1]),
        "weighted_sum_": (torch.zeros(8, dtype=torch.float64), grad, torch.rand(4, dtype=torch.float64)),
        "noised_sum_": (torch.empty(8), torch.randn(8, dtype=torch.float64), torch.randn(8), 0.5),
        "chacha_words": (KEY, 1, 2, 33),
        "chacha20_blocks": (
            torch.tensor([[0x61707865, 0x3320646E, 0x79622D32, 0x6B206574] + [7] * 12], dtype=torch.int32),
        ),
        "normals_of_blocks": (torch.arange(32, dtype=torch.int32).view(2, 16),),
    }


@pytest.mark.parametrize("name", samples())
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.lazydp, name).default, samples()[name])


def test_every_operator_is_checked() -> None:
    registered = {name for name in dir(torch.ops.lazydp) if not name.startswith("_")} - {"name"}
    schemas = {s.name.split("::")[1] for s in torch._C._jit_get_all_schemas() if s.name.startswith("lazydp::")}
    assert registered <= schemas
    assert schemas - {"simd_level", "best_simd_level", "set_simd_level"} == set(samples())
