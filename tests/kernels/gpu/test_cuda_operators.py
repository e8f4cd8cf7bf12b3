"""The CUDA operators against their CPU twins, on a GPU (`make gpu`)."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from lazydp.kernels import ops
from lazydp.kernels.arguments import RowGroups
from lazydp.kernels.noise_key import NoiseKey

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that torch can use")

KEY = NoiseKey.for_tests(11).tensor()
STEP = 6
NO_ROW = -1


@dataclass(frozen=True)
class Batch:
    """Bags of lookups into one table, on the CPU."""

    num_rows: int
    columns: int
    indices: Tensor
    offsets: Tensor
    bag_of_lookup: Tensor
    weights: Tensor | None

    @property
    def bags(self) -> int:
        return self.offsets.numel() - 1


def make_batch(num_rows: int, columns: int, bags: int, longest: int, *, weighted: bool) -> Batch:
    lengths = torch.randint(0, longest + 1, (bags,))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    lookups = int(offsets[-1])
    weights = torch.randn(lookups) if weighted else None
    indices = torch.randint(0, num_rows, (lookups,))
    return Batch(num_rows, columns, indices, offsets, ops.bag_ids(offsets), weights)


BATCHES = [(5000, 128, 2048, 1), (300, 64, 500, 20), (50, 13, 77, 4), (3, 16, 4000, 3), (10, 1, 40, 2), (4, 8, 6, 0)]


@pytest.fixture(params=BATCHES, ids=str)
def shape(request: pytest.FixtureRequest) -> tuple[int, int, int, int]:
    torch.manual_seed(torch.randint(0, 1 << 31, ()).item())
    return request.param  # type: ignore[no-any-return]


def cuda(value: Any) -> Any:
    return value.cuda() if isinstance(value, Tensor) else value


def unpadded(groups: RowGroups) -> RowGroups:
    count = int((groups.rows != NO_ROW).sum())
    return RowGroups(groups.rows[:count], groups.order, groups.starts[: count + 1])


def skip_ahead(momentum: bool) -> dict[str, Tensor]:
    return {"transition": torch.randn(STEP, 4 if momentum else 1), "factor": torch.randn(STEP, 3 if momentum else 1)}


def state(num_rows: int, columns: int, momentum: bool) -> dict[str, Tensor | None]:
    return {
        "weight": torch.randn(num_rows, columns),
        "last": torch.randint(0, STEP + 1, (num_rows,), dtype=torch.int32),
        "momentum": torch.randn(num_rows, columns) if momentum else None,
    }


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        if value is not None:
            assert torch.equal(found[name].cpu(), value), name


@pytest.mark.parametrize("columns", [1, 4, 12, 13, 128, 1000])
def test_normals_are_those_of_the_cpu(columns: int) -> None:
    where = {"table": 0x8001, "first_row": (1 << 40) + 7, "step": 99}
    expected = ops.normal_(torch.empty(300, columns), KEY, **where)
    found = ops.normal_(torch.empty(300, columns, device="cuda"), KEY, **where)
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("momentum", [False, True], ids=["sgd", "momentum"])
@pytest.mark.parametrize("noise", ["gaussian", "ones"])
def test_flush(shape: tuple[int, int, int, int], momentum: bool, noise: Any) -> None:
    num_rows, columns = shape[:2]
    expected = state(num_rows, columns, momentum)
    found = {name: None if value is None else value.cuda() for name, value in expected.items()}
    skip = skip_ahead(momentum)
    ops.flush_(key=KEY, table=1, step=STEP, noise=noise, **expected, **skip)  # type: ignore[arg-type]
    ops.flush_(key=KEY, table=1, step=STEP, noise=noise, **found, **{n: t.cuda() for n, t in skip.items()})  # type: ignore[arg-type]
    assert_equal(found, expected)


@pytest.mark.parametrize("num_rows", [1, 2, 3000, 1 << 20, (1 << 32) - 2, 1 << 33])
def test_groups_of_many_tables_of_every_size(num_rows: int) -> None:
    """Small tables are grouped together in one launch, large ones each by itself; the border lies at 4096 lookups."""
    sizes = [0, 1, 2, 31, 257, 4095, 4096, 4097, 9000, *[40] * 40]
    indices = [torch.randint(0, num_rows, (size,)) for size in sizes]
    found = ops.foreach_group_rows([one.cuda() for one in indices], num_rows=[num_rows] * len(sizes))
    for one, groups in zip(indices, found, strict=True):
        expected, trimmed = ops.group_rows(one, num_rows=num_rows), unpadded(groups)
        assert torch.equal(trimmed.rows.cpu(), expected.rows)
        assert torch.equal(trimmed.order.cpu(), expected.order)
        assert torch.equal(trimmed.starts.cpu(), expected.starts)
        count = expected.rows.numel()
        assert (groups.rows[count:] == NO_ROW).all()
        assert (groups.starts[count:] == one.numel()).all()


def test_groups(shape: tuple[int, int, int, int]) -> None:
    batch = make_batch(*shape, weighted=False)
    expected = ops.group_rows(batch.indices, num_rows=batch.num_rows)
    found = unpadded(ops.group_rows(batch.indices.cuda(), num_rows=batch.num_rows))
    for name in ("rows", "order", "starts"):
        assert torch.equal(getattr(found, name).cpu(), getattr(expected, name)), name


def test_bag_ids(shape: tuple[int, int, int, int]) -> None:
    batch = make_batch(*shape, weighted=False)
    for known in ({}, {"num_lookups": batch.indices.numel()}):
        assert torch.equal(ops.bag_ids(batch.offsets.cuda(), **known).cpu(), batch.bag_of_lookup)


@pytest.mark.parametrize("momentum", [False, True], ids=["sgd", "momentum"])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_whole_step(shape: tuple[int, int, int, int], momentum: bool, weighted: bool) -> None:
    """Catch-up with gather, norms, gradient: the state and every result, CPU beside CUDA."""
    batch = make_batch(*shape, weighted=weighted)
    values = state(batch.num_rows, batch.columns, momentum)
    skip = skip_ahead(momentum)
    grad, scale = torch.randn(batch.bags, batch.columns), torch.rand(batch.bags)
    features = 2 if batch.bags % 2 == 0 else 1
    results = []
    for move in (lambda value: value, cuda):
        own = {name: move(None if value is None else value.clone()) for name, value in values.items()}
        indices, offsets, bags, weights = map(move, (batch.indices, batch.offsets, batch.bag_of_lookup, batch.weights))
        groups = ops.group_rows(indices, num_rows=batch.num_rows)
        sums = ops.catch_up_bag_sum_(
            own["weight"],
            own["last"],
            groups,
            KEY,
            indices,
            offsets,
            bags,
            table=2,
            step=STEP,
            momentum=own["momentum"],
            per_lookup_weights=weights,
            **{name: move(value) for name, value in skip.items()},
        )
        woken = own["weight"].clone()
        again = ops.bag_sum(own["weight"], indices, offsets, weights)
        norms = ops.bag_sq_norms(indices, offsets, move(grad).view(features, -1, batch.columns), weights)
        ops.scatter_add_(own["weight"], groups, bags, move(grad), move(scale), alpha=-0.2, per_lookup_weights=weights)
        results.append([own["last"], woken, sums, again, norms, own["weight"]])
    (last, woken, *expected), (last_cuda, woken_cuda, *found) = results
    assert torch.equal(last_cuda.cpu(), last)
    assert torch.equal(woken_cuda.cpu(), woken)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=2e-6, atol=1e-4 * float(1 + other.abs().max()) / 50)


@pytest.mark.parametrize("momentum", [False, True], ids=["sgd", "momentum"])
def test_several_tables_at_once(momentum: bool) -> None:
    """The operators on lists: the state of every table and every result, CPU beside CUDA."""
    sizes = [(900, 128, 200, 1), (7, 13, 200, 4), (2000, 33, 200, 2)]
    batches = [make_batch(*size, weighted=number == 1) for number, size in enumerate(sizes)]
    states = [state(batch.num_rows, batch.columns, momentum) for batch in batches]
    skip = skip_ahead(momentum)
    grads, scales = [torch.randn(200, batch.columns) for batch in batches], [torch.rand(200) for _ in batches]
    results = []
    for move in (lambda value: value, cuda):
        own = [{name: move(None if value is None else value.clone()) for name, value in s.items()} for s in states]
        indices, offsets, bags, weights = (
            [move(getattr(batch, name)) for batch in batches]
            for name in ("indices", "offsets", "bag_of_lookup", "weights")
        )
        tables = [table["weight"] for table in own]
        groups = ops.foreach_group_rows(indices, num_rows=[batch.num_rows for batch in batches])
        counts = [batch.indices.numel() for batch in batches]
        assert all(map(torch.equal, ops.foreach_bag_ids(offsets, num_lookups=counts), bags))
        settings: dict[str, Any] = {
            "tables": [4, 0, 9],
            "momenta": [table["momentum"] for table in own] if momentum else None,
            **{name: move(value) for name, value in skip.items()},
        }
        last = [table["last"] for table in own]
        sums = ops.foreach_catch_up_bag_sum_(
            tables, last, groups, KEY, indices, offsets, bags, step=STEP, per_lookup_weights=weights, **settings
        )
        again = ops.foreach_bag_sum(tables, indices, offsets, weights)
        norms = ops.foreach_bag_sq_norms(indices, offsets, [move(grad)[None] for grad in grads], weights)
        ops.foreach_scatter_add_(
            tables,
            groups,
            bags,
            list(map(move, grads)),
            list(map(move, scales)),
            alpha=-0.2,
            per_lookup_weights=weights,
        )
        results.append([*sums, *again, norms, *tables, *last])
    for one, other in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=2e-6, atol=1e-4 * float(1 + other.abs().max()) / 50)


def test_what_draws_no_noise_can_be_captured() -> None:
    """Captured once, replayed on other contents: what it launches neither allocates nor waits."""
    batch = make_batch(2000, 64, 512, 2, weighted=False)
    indices, offsets, bags = batch.indices.cuda(), batch.offsets.cuda(), batch.bag_of_lookup.cuda()
    weight, before = torch.empty(2000, 64, device="cuda"), torch.randn(2000, 64, device="cuda")
    grad, scale = torch.randn(512, 64, device="cuda"), torch.rand(512, device="cuda")

    def step() -> list[Tensor]:
        weight.copy_(before)
        groups = ops.group_rows(indices, num_rows=2000)
        results = [ops.bag_sum(weight, indices, offsets), ops.bag_sq_norms(indices, offsets, grad.view(1, 512, 64))]
        ops.scatter_add_(weight, groups, bags, grad, scale, alpha=-0.2)
        return [*results, weight]

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for other in (batch.indices, batch.indices.flip(0)):
        indices.copy_(other)
        graph.replay()
        replayed = [result.clone() for result in captured]
        for one, two in zip(replayed, step(), strict=True):
            assert torch.equal(one, two)


def test_noise_cannot_be_captured() -> None:
    out = torch.zeros(4, 8, device="cuda")
    torch.cuda.synchronize()

    def capture() -> None:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            out.add_(1.0)
            ops.normal_(out, KEY, table=1, first_row=0, step=1)

    with pytest.raises((ValueError, RuntimeError), match="captured"):
        capture()


def test_the_current_stream_is_used() -> None:
    """Work queued behind a slow stream must wait for it."""
    stream = torch.cuda.Stream()
    weight = torch.zeros(1000, 64, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        weight.fill_(1.0)
        sums = ops.bag_sum(weight, torch.arange(1000, device="cuda"), torch.arange(1001, device="cuda"))
    torch.cuda.synchronize()
    assert (sums == 1.0).all()


def test_no_call_waits() -> None:
    batch = make_batch(500, 32, 100, 2, weighted=False)
    indices, offsets, bags = batch.indices.cuda(), batch.offsets.cuda(), batch.bag_of_lookup.cuda()
    table = {name: cuda(value) for name, value in state(500, 32, False).items()}
    skip = {name: value.cuda() for name, value in skip_ahead(False).items()}
    grad, scale = torch.randn(100, 32, device="cuda"), torch.rand(100, device="cuda")

    def step() -> None:
        ops.bag_ids(offsets, num_lookups=indices.numel())
        groups = ops.group_rows(indices, num_rows=500)
        ops.catch_up_(table["weight"], table["last"], groups.rows, KEY, table=2, step=STEP, **skip)  # type: ignore[arg-type]
        ops.bag_sum(table["weight"], indices, offsets)
        ops.bag_sq_norms(indices, offsets, grad.view(1, 100, 32))
        ops.scatter_add_(table["weight"], groups, bags, grad, scale, alpha=1.0)
        ops.flush_(table["weight"], table["last"], KEY, table=2, step=STEP, **skip)  # type: ignore[arg-type]

    step()  # the first call of a kernel loads it, and may wait
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda._sleep(1_000_000_000)
    step()
    done.record()
    assert not done.query(), "the host came here only after the device had finished"
    torch.cuda.synchronize()


def test_a_table_beyond_two_to_the_31_elements() -> None:
    num_rows, columns = (1 << 31) // 128 + 100, 128
    if torch.cuda.mem_get_info()[0] < 3 * num_rows * columns * 4:
        pytest.skip("the GPU is too small for this table")
    weight = torch.zeros(num_rows, columns, device="cuda")
    last = torch.zeros(num_rows, dtype=torch.int32, device="cuda")
    one = torch.ones(1, 1, device="cuda")
    ops.flush_(weight, last, KEY, table=1, step=3, transition=one, factor=one)
    tail = ops.normal_(torch.empty(50, columns), KEY, table=1, first_row=num_rows - 50, step=3)
    assert torch.equal(weight[-50:].cpu(), tail)
    rows = torch.tensor([5, num_rows - 1], device="cuda")
    sums = ops.bag_sum(weight, rows, torch.tensor([0, 1, 2], device="cuda"))
    assert torch.equal(sums, weight[rows])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(4, 4).double()}, "weight"),
        ({"indices": torch.zeros(3, dtype=torch.int32)}, "indices"),
        ({"offsets": torch.zeros(0, dtype=torch.int64)}, "offsets"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(change: dict[str, Tensor], message: str) -> None:
    good = {"weight": torch.zeros(4, 4), "indices": torch.tensor([1, 2, 3]), "offsets": torch.tensor([0, 3])}
    with pytest.raises((ValueError, RuntimeError), match=message):
        ops.bag_sum(**{name: value.cuda() for name, value in {**good, **change}.items()})


def test_an_index_out_of_range_is_an_error_of_the_device() -> None:
    """In a process of its own: a failed assertion leaves the context unusable."""
    program = """
import torch
from lazydp.kernels import ops
ops.bag_sum(torch.zeros(4, 4).cuda(), torch.tensor([9]).cuda(), torch.tensor([0, 1]).cuda())
torch.cuda.synchronize()
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "indices: expected 0 <= index < rows of weight" in result.stderr + result.stdout
