"""The CUDA kernels of bags, run by the host, agree with the CPU operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from lazydp.kernels import ops, reference
from lazydp.kernels.arguments import RowGroups
from lazydp.kernels.noise_key import NoiseKey

NO_ROW = -1
FEW_ULP = {"rtol": 1e-6, "atol": 1e-6}


@dataclass(frozen=True)
class Case:
    """A batch's reads of one table."""

    num_rows: int
    columns: int
    indices: Tensor
    offsets: Tensor
    per_lookup_weights: Tensor | None
    generator: torch.Generator

    @property
    def bags(self) -> int:
        return self.offsets.numel() - 1

    def floats(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)


def case(num_rows: int, columns: int, *, bags: int, longest: int, weighted: bool, seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, longest + 1, (bags,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    lookups = int(offsets[-1])
    indices = torch.randint(0, num_rows, (lookups,), generator=generator)
    weights = torch.randn(lookups, generator=generator) if weighted else None
    return Case(num_rows, columns, indices, offsets, weights, generator)


def cases() -> list[Any]:
    shapes = {
        "distinct": (1000, 16, 64, 1),
        "bags": (50, 128, 20, 9),
        "narrow": (50, 1, 20, 9),
        "odd": (30, 13, 25, 5),
        "one row": (1, 8, 40, 6),
        "hot": (3, 20, 150, 4),
        "nothing": (5, 4, 7, 0),
        "no bags": (5, 4, 0, 0),
    }
    return [
        pytest.param(case(rows, columns, bags=bags, longest=longest, weighted=weighted), id=f"{name} {weighted=}")
        for name, (rows, columns, bags, longest) in shapes.items()
        for weighted in (False, True)
    ]


def unpadded(groups: RowGroups) -> RowGroups:
    count = int((groups.rows != NO_ROW).sum())
    return RowGroups(groups.rows[:count], groups.order, groups.starts[: count + 1])


@pytest.mark.parametrize("batch", cases())
def test_groups_equal_the_cpu(cuda: Any, batch: Case) -> None:
    found = cuda.group_rows(batch.indices, num_rows=batch.num_rows)
    expected = ops.group_rows(batch.indices, num_rows=batch.num_rows)
    count = expected.rows.numel()
    assert torch.equal(unpadded(found).rows, expected.rows)
    assert torch.equal(found.order, expected.order)
    assert torch.equal(unpadded(found).starts, expected.starts)
    assert (found.rows[count:] == NO_ROW).all()
    assert (found.starts[count:] == batch.indices.numel()).all()


def test_groups_of_rows_beyond_32_bits(cuda: Any) -> None:
    num_rows = (1 << 40) + 3
    indices = torch.tensor([num_rows - 1, 5, (1 << 32) + 5, 5, num_rows - 1, 0])
    groups = unpadded(cuda.group_rows(indices, num_rows=num_rows))
    assert groups.rows.tolist() == [0, 5, (1 << 32) + 5, num_rows - 1]
    assert groups.order.tolist() == [5, 1, 3, 2, 0, 4]


@pytest.mark.parametrize("wrong", [-1, 10, 1 << 40])
def test_an_index_out_of_range_is_refused(cuda: Any, wrong: int) -> None:
    indices = torch.tensor([1, wrong, 2])
    with pytest.raises(ValueError, match="indices"):
        cuda.group_rows(indices, num_rows=10)
    with pytest.raises(ValueError, match="indices"):
        cuda.bag_sum(torch.zeros(10, 4), indices, torch.tensor([0, 3]))


def test_offsets_that_decrease_are_refused(cuda: Any) -> None:
    with pytest.raises(ValueError, match="offsets"):
        cuda.bag_sum(torch.zeros(10, 4), torch.tensor([1, 2, 3]), torch.tensor([0, 2, 1, 3]))


@pytest.mark.parametrize("batch", cases())
def test_sums_agree_with_the_cpu(cuda: Any, batch: Case) -> None:
    weight = batch.floats(batch.num_rows, batch.columns)
    arguments = (weight, batch.indices, batch.offsets, batch.per_lookup_weights)
    torch.testing.assert_close(cuda.bag_sum(*arguments), ops.bag_sum(*arguments), **FEW_ULP)  # type: ignore[arg-type]


@pytest.mark.parametrize("batch", cases())
@pytest.mark.parametrize("momentum", [False, True], ids=["sgd", "momentum"])
def test_fused_gather_equals_catch_up_then_sum(cuda: Any, batch: Case, momentum: bool) -> None:
    key = NoiseKey.for_tests(3).tensor()
    weight = batch.floats(batch.num_rows, batch.columns)
    velocity = batch.floats(batch.num_rows, batch.columns) if momentum else None
    last = torch.randint(0, 4, (batch.num_rows,), dtype=torch.int32, generator=batch.generator)
    transition, factor = batch.floats(3, 4 if momentum else 1), batch.floats(3, 3 if momentum else 1)
    options: dict[str, Any] = {"table": 1, "step": 3, "transition": transition, "factor": factor}

    expected = [tensor.clone() for tensor in (weight, last)]
    expected_velocity = None if velocity is None else velocity.clone()
    rows = ops.group_rows(batch.indices, num_rows=batch.num_rows).rows
    ops.catch_up_(expected[0], expected[1], rows, key, **options, momentum=expected_velocity)
    sums = cuda.bag_sum(expected[0], batch.indices, batch.offsets, batch.per_lookup_weights)

    groups = cuda.group_rows(batch.indices, num_rows=batch.num_rows)
    bags = (batch.indices, batch.offsets, ops.bag_ids(batch.offsets))
    weights = batch.per_lookup_weights
    found = cuda.catch_up_bag_sum_(weight, last, groups, key, bags, weights, **options, momentum=velocity)
    assert torch.equal(found, sums)
    assert torch.equal(weight, expected[0])
    assert torch.equal(last, expected[1])
    if velocity is not None and expected_velocity is not None:
        assert torch.equal(velocity, expected_velocity)


@pytest.mark.parametrize("features", [1, 2, 3])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("columns", [4, 9, 200])
def test_norms_agree_with_the_cpu(cuda: Any, features: int, weighted: bool, columns: int) -> None:
    examples = 21
    batch = case(6, columns, bags=features * examples, longest=40, weighted=weighted)
    grad = batch.floats(features, examples, columns)
    arguments = (batch.indices, batch.offsets, grad, batch.per_lookup_weights)
    wanted = ops.bag_sq_norms(*arguments)
    torch.testing.assert_close(cuda.bag_sq_norms(*arguments), wanted, **FEW_ULP)  # type: ignore[arg-type]
    of_other_tables = torch.full((examples,), 3.0, dtype=torch.float64)
    torch.testing.assert_close(cuda.bag_sq_norms(*arguments, add_to=of_other_tables), wanted + 3.0, **FEW_ULP)  # type: ignore[arg-type]


def test_gradients_that_cancel_leave_no_negative_norm(cuda: Any) -> None:
    grad = torch.full((2, 1, 5), 0.1)
    weights = torch.tensor([1.0, -1.0])
    found = cuda.bag_sq_norms(torch.tensor([3, 3]), torch.tensor([0, 1, 2]), grad, weights)
    wanted = ops.bag_sq_norms(torch.tensor([3, 3]), torch.tensor([0, 1, 2]), grad, weights)
    assert 0.0 < float(found) < 1e-8
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)


def test_norms_of_gradients_that_are_not_finite(cuda: Any) -> None:
    grad = torch.tensor([[[torch.nan, 1.0], [torch.inf, 1.0], [torch.inf, 1.0]]])
    found = cuda.bag_sq_norms(torch.tensor([0, 0]), torch.tensor([0, 1, 2, 2]), grad)
    assert found[0].isnan()
    assert found[1].isinf()
    assert found[2] == 0.0, "an example that read nothing"


@pytest.mark.parametrize("batch", cases())
def test_gradients_agree_with_the_reference(cuda: Any, batch: Case) -> None:
    weight = batch.floats(batch.num_rows, batch.columns)
    grad, scale = batch.floats(batch.bags, batch.columns), torch.rand(batch.bags, generator=batch.generator)
    bag_of_lookup = ops.bag_ids(batch.offsets)
    options: dict[str, Any] = {"alpha": -0.25, "per_lookup_weights": batch.per_lookup_weights}
    expected = weight.clone()
    groups = ops.group_rows(batch.indices, num_rows=batch.num_rows)
    reference.scatter_add_(expected, groups, bag_of_lookup, grad, scale, **options)
    groups = cuda.group_rows(batch.indices, num_rows=batch.num_rows)
    cuda.scatter_add_(weight, groups, bag_of_lookup, grad, scale, **options)
    torch.testing.assert_close(weight, expected, rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize("batch", cases())
def test_exact_sums_equal_the_cpu_to_the_bit(cuda: Any, batch: Case) -> None:
    weight = batch.floats(batch.num_rows, batch.columns)
    grad, scale = batch.floats(batch.bags, batch.columns), torch.rand(batch.bags, generator=batch.generator)
    bag_of_lookup = ops.bag_ids(batch.offsets)
    options: dict[str, Any] = {"alpha": -0.25, "per_lookup_weights": batch.per_lookup_weights, "bound": 0.7}
    expected = weight.clone()
    groups = ops.group_rows(batch.indices, num_rows=batch.num_rows)
    ops.scatter_add_(expected, groups, bag_of_lookup, grad, scale, **options)
    groups = cuda.group_rows(batch.indices, num_rows=batch.num_rows)
    cuda.scatter_add_(weight, groups, bag_of_lookup, grad, scale, **options)
    assert torch.equal(weight, expected)


@pytest.mark.parametrize("multiplicity", [31, 32, 33, 63, 64, 65, 200])
@pytest.mark.parametrize("before", [0, 1, 31, 32])
def test_rows_that_many_lookups_read(cuda: Any, multiplicity: int, before: int) -> None:
    """The hot row begins anywhere in a chunk of lookups, ends anywhere, and another hot row follows."""
    generator = torch.Generator().manual_seed(multiplicity)
    indices = torch.cat(
        [torch.arange(before), torch.full((multiplicity,), 40), torch.full((50,), 41), torch.tensor([42])]
    )
    indices = indices[torch.randperm(indices.numel(), generator=generator)]
    grad = torch.randn(indices.numel(), 6, generator=generator)
    scale = torch.rand(indices.numel(), generator=generator)
    bag_of_lookup = torch.arange(indices.numel())
    weight = torch.zeros(50, 6)
    expected = weight.clone()
    groups = ops.group_rows(indices, num_rows=50)
    reference.scatter_add_(expected, groups, bag_of_lookup, grad, scale, alpha=1.0)
    cuda.scatter_add_(weight, cuda.group_rows(indices, num_rows=50), bag_of_lookup, grad, scale, alpha=1.0)
    torch.testing.assert_close(weight, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("field", ["rows", "order", "starts", "bag"])
def test_groups_that_point_outside_are_refused(cuda: Any, field: str) -> None:
    indices = torch.tensor([4, 4, 2])
    groups = cuda.group_rows(indices, num_rows=5)
    bag_of_lookup = torch.tensor([0, 1, 1])
    wrong = {"rows": groups.rows, "order": groups.order, "starts": groups.starts, "bag": bag_of_lookup}[field]
    wrong[1] = 99
    with pytest.raises(ValueError, match=field):
        cuda.scatter_add_(torch.zeros(5, 4), groups, bag_of_lookup, torch.zeros(2, 4), torch.ones(2), alpha=1.0)
