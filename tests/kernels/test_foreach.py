"""Several tables at once: bit for bit what one table after the other gives, and all or nothing where one is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from lazydp.kernels import ops
from lazydp.kernels.noise_key import NoiseKey

KEY = NoiseKey.for_tests(11).tensor()
EXAMPLES = 200
STEP = 2


@dataclass
class Table:
    """A table and what one batch reads of it."""

    weight: Tensor
    last: Tensor
    momentum: Tensor
    indices: Tensor
    offsets: Tensor
    per_lookup: Tensor | None
    grad: Tensor
    scale: Tensor

    @classmethod
    def of(cls, seed: int, num_rows: int, columns: int, features: int, longest: int, *, weighted: bool) -> Table:
        generator = torch.Generator().manual_seed(seed)
        bags = features * EXAMPLES
        lengths = torch.randint(min(1, longest), longest + 1, (bags,), generator=generator)
        lookups = int(lengths.sum())
        return cls(
            torch.randn(num_rows, columns, generator=generator),
            torch.randint(0, STEP + 1, (num_rows,), generator=generator, dtype=torch.int32),
            torch.randn(num_rows, columns, generator=generator),
            torch.randint(0, num_rows, (lookups,), generator=generator),
            torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
            torch.rand(lookups, generator=generator) if weighted else None,
            torch.randn(features, EXAMPLES, columns, generator=generator),
            torch.rand(bags, generator=generator),
        )

    @property
    def groups(self) -> ops.RowGroups:
        return ops.group_rows(self.indices, num_rows=self.weight.shape[0])

    @property
    def bags(self) -> Tensor:
        return ops.bag_ids(self.offsets)


def some_tables() -> list[Table]:
    """Single lookups, long bags, one row for all, nothing read, weights of lookups, and several features."""
    return [
        Table.of(1, 900, 128, 1, 1, weighted=False),
        Table.of(2, 50, 16, 2, 4, weighted=False),
        Table.of(3, 1, 5, 1, 1, weighted=True),
        Table.of(4, 300, 33, 1, 0, weighted=False),
        Table.of(5, 4000, 24, 1, 1, weighted=True),
        Table.of(6, 2000, 8, 3, 100, weighted=True),
    ]


def catch_up_arguments(*, with_momentum: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    shape = (4, 3) if with_momentum else (1, 1)
    transition, factor = (torch.rand(STEP, width, generator=generator) for width in shape)
    return {"step": STEP, "transition": transition, "factor": factor}


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def assert_same(tables: list[Table], wanted: list[Table]) -> None:
    for table, other in zip(tables, wanted, strict=True):
        assert torch.equal(table.weight, other.weight)
        assert torch.equal(table.last, other.last)
        assert torch.equal(table.momentum, other.momentum)


def test_groups_and_bags(threads: int) -> None:
    tables = some_tables()
    found = ops.foreach_group_rows([t.indices for t in tables], num_rows=[t.weight.shape[0] for t in tables])
    for groups, table in zip(found, tables, strict=True):
        assert torch.equal(groups.rows, table.groups.rows)
        assert torch.equal(groups.order, table.groups.order)
        assert torch.equal(groups.starts, table.groups.starts)
    bags = ops.foreach_bag_ids([t.offsets for t in tables])
    assert all(torch.equal(some, table.bags) for some, table in zip(bags, tables, strict=True))


@pytest.mark.parametrize("with_momentum", [False, True])
def test_catch_up(threads: int, with_momentum: bool) -> None:
    tables, wanted = some_tables(), some_tables()
    arguments = catch_up_arguments(with_momentum=with_momentum)
    ops.foreach_catch_up_(
        [t.weight for t in tables],
        [t.last for t in tables],
        [t.groups.rows for t in tables],
        KEY,
        tables=[7 + j for j in range(len(tables))],
        momenta=[t.momentum for t in tables] if with_momentum else None,
        **arguments,
    )
    for j, t in enumerate(wanted):
        momentum = t.momentum if with_momentum else None
        ops.catch_up_(t.weight, t.last, t.groups.rows, KEY, table=7 + j, momentum=momentum, **arguments)
    assert_same(tables, wanted)
    assert not torch.equal(tables[0].weight, some_tables()[0].weight)


@pytest.mark.parametrize("with_momentum", [False, True])
def test_catch_up_and_sums(threads: int, with_momentum: bool) -> None:
    tables, wanted = some_tables(), some_tables()
    arguments = catch_up_arguments(with_momentum=with_momentum)
    found = ops.foreach_catch_up_bag_sum_(
        [t.weight for t in tables],
        [t.last for t in tables],
        [t.groups for t in tables],
        KEY,
        [t.indices for t in tables],
        [t.offsets for t in tables],
        [t.bags for t in tables],
        tables=[3 * j for j in range(len(tables))],
        momenta=[t.momentum for t in tables] if with_momentum else None,
        per_lookup_weights=[t.per_lookup for t in tables],
        **arguments,
    )
    for j, (t, sums) in enumerate(zip(wanted, found, strict=True)):
        momentum = t.momentum if with_momentum else None
        ops.catch_up_(t.weight, t.last, t.groups.rows, KEY, table=3 * j, momentum=momentum, **arguments)
        assert torch.equal(sums, ops.bag_sum(t.weight, t.indices, t.offsets, t.per_lookup))
    assert_same(tables, wanted)
    again = ops.foreach_bag_sum(
        [t.weight for t in tables],
        [t.indices for t in tables],
        [t.offsets for t in tables],
        [t.per_lookup for t in tables],
    )
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


def test_norms_add_up_over_tables(threads: int) -> None:
    tables = some_tables()
    found = ops.foreach_bag_sq_norms(
        [t.indices for t in tables],
        [t.offsets for t in tables],
        [t.grad for t in tables],
        [t.per_lookup for t in tables],
    )
    apart = [ops.bag_sq_norms(t.indices, t.offsets, t.grad, t.per_lookup) for t in tables]
    torch.testing.assert_close(found, torch.stack(apart).sum(dim=0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("bound", [None, 0.25])
def test_gradients(threads: int, bound: float | None) -> None:
    tables, wanted = some_tables(), some_tables()
    ops.foreach_scatter_add_(
        [t.weight for t in tables],
        [t.groups for t in tables],
        [t.bags for t in tables],
        [t.grad.flatten(0, 1) for t in tables],
        [t.scale for t in tables],
        alpha=-0.3,
        per_lookup_weights=[t.per_lookup for t in tables],
        bound=bound,
    )
    for t in wanted:
        options = {"alpha": -0.3, "per_lookup_weights": t.per_lookup, "bound": bound}
        ops.scatter_add_(t.weight, t.groups, t.bags, t.grad.flatten(0, 1), t.scale, **options)  # type: ignore[arg-type]
    assert_same(tables, wanted)


def test_no_table_is_no_error() -> None:
    one = torch.ones(1, 1)
    assert ops.foreach_group_rows([], num_rows=[]) == []
    assert ops.foreach_bag_ids([]) == []
    assert ops.foreach_bag_sum([], [], []) == []
    ops.foreach_catch_up_([], [], [], KEY, tables=[], step=1, transition=one, factor=one)
    ops.foreach_scatter_add_([], [], [], [], [], alpha=1.0)


Change = Callable[[Any, list[Table]], Any]
Call = Callable[[list[Table]], object]


def changed(arguments: dict[str, Any], changes: dict[str, Change], tables: list[Table]) -> dict[str, Any]:
    return arguments | {name: change(arguments[name], tables) for name, change in changes.items()}


def catch_up_lists(tables: list[Table]) -> dict[str, Any]:
    return {
        "weights": [t.weight for t in tables],
        "last": [t.last for t in tables],
        "tables": list(range(len(tables))),
        "momenta": [t.momentum for t in tables],
        **catch_up_arguments(with_momentum=True),
    }


def catch_up(**changes: Change) -> Call:
    """Catch-up of all tables, with other arguments where `changes` says so."""

    def call(tables: list[Table]) -> object:
        arguments = {**catch_up_lists(tables), "rows": [t.groups.rows for t in tables]}
        return ops.foreach_catch_up_(key=KEY, **changed(arguments, changes, tables))  # type: ignore[func-returns-value]

    return call


def fused(**changes: Change) -> Call:
    """The same with the sums of bags."""

    def call(tables: list[Table]) -> object:
        arguments = {
            **catch_up_lists(tables),
            "groups": [t.groups for t in tables],
            "indices": [t.indices for t in tables],
            "offsets": [t.offsets for t in tables],
            "bag_of_lookup": [t.bags for t in tables],
        }
        return ops.foreach_catch_up_bag_sum_(key=KEY, **changed(arguments, changes, tables))

    return call


def scatter(**changes: Change) -> Call:
    """The gradient of all tables."""

    def call(tables: list[Table]) -> object:
        arguments = {
            "weights": [t.weight for t in tables],
            "groups": [t.groups for t in tables],
            "bag_of_lookup": [t.bags for t in tables],
            "grads": [t.grad.flatten(0, 1) for t in tables],
            "scales": [t.scale for t in tables],
        }
        return ops.foreach_scatter_add_(alpha=1.0, **changed(arguments, changes, tables))  # type: ignore[func-returns-value]

    return call


def last_is(tensor: Tensor) -> Change:
    return lambda tensors, _: [*tensors[:-1], tensor]


def as_steps(tensor: Tensor, count: int) -> Tensor:
    return tensor.view(torch.int32).view(-1)[:count]


SHARED = "expected tensors without common memory"
WRONG: dict[str, tuple[Call, str]] = {
    "a table twice": (catch_up(weights=lambda w, _: [*w[:-1], w[0]]), rf"weights\[\d\] and weights\[\d\]: {SHARED}"),
    "part of a table": (
        fused(weights=lambda w, _: [w[-1][:900], *w[1:]]),
        rf"weights\[\d\] and weights\[\d\]: {SHARED}",
    ),
    "last steps twice": (catch_up(last=lambda n, _: [n[-1][:900], *n[1:]]), rf"last\[\d\] and last\[\d\]: {SHARED}"),
    "momenta that are weights": (catch_up(momenta=lambda v, t: [t[1].weight, *v[1:]]), SHARED),
    "last steps in a weight": (catch_up(last=lambda n, t: [as_steps(t[4].weight, 900), *n[1:]]), SHARED),
    "last steps in a momentum": (fused(last=lambda n, t: [*n[:-1], as_steps(t[4].momentum, 2000)]), SHARED),
    "rows in a weight": (
        catch_up(rows=lambda rows, t: [*rows[:-1], t[0].weight.view(torch.int64).view(-1)[:9]]),
        rf"rows\[5\] and weights\[0\]: {SHARED}",
    ),
    "a number twice": (
        fused(tables=lambda numbers, _: [0, *numbers[:-1]]),
        "tables: expected distinct numbers, found 0",
    ),
    "a number too few": (catch_up(tables=lambda numbers, _: numbers[:-1]), r"tables: expected one for each of 6 table"),
    "rows too few": (catch_up(rows=lambda rows, _: rows[:-1]), r"rows: expected one for each of 6 table\(s\), found 5"),
    "rows outside the last table": (
        catch_up(rows=last_is(torch.tensor([1, 2000]))),
        r"table 5 of 6: rows\[1\]: expected 0 <= index < 2000, found 2000",
    ),
    "lookups outside the last table": (
        fused(indices=lambda indices, _: [*indices[:-1], indices[-1] + 1500]),
        r"table 5 of 6: indices\[\d+\]: expected 0 <= index < 2000",
    ),
    "a last table of another dtype": (
        fused(weights=last_is(torch.zeros(2000, 8, dtype=torch.float64))),
        "table 5 of 6: weight: expected float32",
    ),
    "a table without memory": (fused(weights=last_is(torch.zeros(2000, 8, device="meta"))), "all on one device"),
    "a gradient to a table twice": (scatter(weights=lambda w, _: [w[-1], *w[1:]]), SHARED),
    "a gradient that is a table": (
        scatter(grads=lambda g, t: [t[4].weight.view(-1)[: 200 * 128].view(200, 128), *g[1:]]),
        rf"grads\[0\] and weights\[4\]: {SHARED}",
    ),
    "a gradient of other columns": (scatter(grads=last_is(torch.zeros(600, 9))), "table 5 of 6: grad: expected size 8"),
    "bags outside the last gradient": (
        scatter(grads=last_is(torch.zeros(10, 8)), scales=last_is(torch.zeros(10))),
        r"table 5 of 6: bag_of_lookup\[\d+\]: expected 0 <= index < 10",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_one_wrong_table_and_nothing_is_written(name: str, threads: int) -> None:
    call, message = WRONG[name]
    tables = some_tables()
    with pytest.raises(ValueError, match=message):
        call(tables)
    assert_same(tables, some_tables())


def test_tables_side_by_side_in_one_tensor_are_not_the_same_table() -> None:
    """The control of "part of a table"."""
    whole, last = torch.zeros(40, 8), torch.zeros(40, dtype=torch.int32)
    weights, starts = whole.split([10, 30]), last.split([10, 30])
    one, rows = torch.ones(1, 1), torch.tensor([3, 9])
    ops.foreach_catch_up_(weights, starts, [rows, rows], KEY, tables=[0, 1], step=1, transition=one, factor=one)
    assert last.nonzero().flatten().tolist() == [3, 9, 13, 19]


@pytest.mark.parametrize("part", ["last", "momentum"])
def test_one_table_whose_parts_share_memory(part: str) -> None:
    table = Table.of(1, 30, 8, 1, 1, weighted=False)
    parts = {"last": table.last, "momentum": table.momentum}
    parts[part] = as_steps(table.weight, 30) if part == "last" else table.weight
    arguments = {"table": 0, "momentum": parts["momentum"], **catch_up_arguments(with_momentum=True)}
    with pytest.raises(ValueError, match=SHARED):
        ops.flush_(table.weight, parts["last"], KEY, **arguments)
    with pytest.raises(ValueError, match=SHARED):
        ops.catch_up_(table.weight, parts["last"], torch.tensor([3]), KEY, **arguments)


def test_norms_of_no_table() -> None:
    with pytest.raises(ValueError, match="grads: expected one table at least"):
        ops.foreach_bag_sq_norms([], [], [])


def test_norms_of_tables_that_disagree_on_the_examples() -> None:
    none = torch.tensor([], dtype=torch.int64)
    offsets = [torch.zeros(examples + 1, dtype=torch.int64) for examples in (3, 4)]
    grads = [torch.zeros(1, 3, 2), torch.zeros(1, 4, 2)]
    with pytest.raises(ValueError, match="table 1 of 2: grad: expected size 3 in dimension 1"):
        ops.foreach_bag_sq_norms([none, none], offsets, grads)
