"""Every operator against its reference, over random shapes, lookups and bags."""

from __future__ import annotations

from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from lazydp.kernels import ops, reference
from lazydp.kernels.noise_key import NoiseKey

KEY = NoiseKey.for_tests(6).tensor()


@dataclass(frozen=True)
class Case:
    """A table, and bags of lookups into it: empty bags, repeated rows and zero lookups included."""

    weight: Tensor
    indices: Tensor
    offsets: Tensor
    per_lookup: Tensor | None
    generator: torch.Generator

    @property
    def bags(self) -> int:
        return self.offsets.numel() - 1

    def normals(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)


ANY_LENGTH = st.integers(0, 6)
MOSTLY_ONE = st.sampled_from([1, 1, 1, 1, 0, 3])
# Where all bags are of one length, the bag of a lookup is found by division.
LONG, OF_LENGTH_5 = st.integers(3, 9), st.just(5)


@st.composite
def cases(draw: st.DrawFn, bag_multiple: int = 1, length: st.SearchStrategy[int] = ANY_LENGTH) -> Case:
    num_rows, columns = draw(st.integers(1, 30)), draw(st.sampled_from([1, 2, 3, 4, 7, 8, 16, 33, 128]))
    lengths = draw(st.lists(length, min_size=0, max_size=12))
    lengths = lengths[: len(lengths) // bag_multiple * bag_multiple]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    indices = torch.randint(0, num_rows, (sum(lengths),), generator=generator)
    per_lookup = torch.randn(sum(lengths), generator=generator) if draw(st.booleans()) else None
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return Case(torch.randn(num_rows, columns, generator=generator), indices, offsets, per_lookup, generator)


@settings(deadline=None, max_examples=80)
@given(case=cases())
def test_group_rows(case: Case) -> None:
    found = ops.group_rows(case.indices, num_rows=case.weight.shape[0])
    wanted = reference.group_rows(case.indices, num_rows=case.weight.shape[0])
    assert torch.equal(found.rows, wanted.rows)
    assert torch.equal(found.order, wanted.order)
    assert torch.equal(found.starts, wanted.starts)


@pytest.mark.parametrize("num_rows", [2**11, 2**11 + 1, 2**22, 2**31 + 5, 2**48])
def test_group_rows_of_wide_ids(num_rows: int) -> None:
    indices = torch.randint(0, num_rows, (5000,), generator=torch.Generator().manual_seed(1))
    indices[::7] = num_rows - 1
    found = ops.group_rows(indices, num_rows=num_rows)
    wanted = reference.group_rows(indices, num_rows=num_rows)
    assert torch.equal(found.rows, wanted.rows)
    assert torch.equal(found.order, wanted.order)
    assert torch.equal(found.starts, wanted.starts)


@settings(deadline=None, max_examples=80)
@given(case=cases())
def test_bag_sum(case: Case) -> None:
    found = ops.bag_sum(case.weight, case.indices, case.offsets, case.per_lookup)
    wanted = reference.bag_sum(case.weight, case.indices, case.offsets, case.per_lookup)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=80)
@given(case=cases() | cases(length=MOSTLY_ONE))
def test_catch_up_bag_sum(case: Case) -> None:
    groups, bags = ops.group_rows(case.indices, num_rows=case.weight.shape[0]), ops.bag_ids(case.offsets)
    last = torch.randint(0, 3, (case.weight.shape[0],), generator=case.generator, dtype=torch.int32)
    transition, factor = case.normals(3, 1), case.normals(3, 1)
    sums, states = [], []
    for implementation in (ops, reference):
        weight, since = case.weight.clone(), last.clone()
        total = implementation.catch_up_bag_sum_(
            weight,
            since,
            groups,
            KEY,
            case.indices,
            case.offsets,
            bags,
            table=1,
            step=2,
            transition=transition,
            factor=factor,
            per_lookup_weights=case.per_lookup,
        )
        sums.append(total)
        states.append((weight, since))
    torch.testing.assert_close(sums[0], sums[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(states[0][0], states[1][0], rtol=2e-6, atol=5e-6)
    assert torch.equal(states[0][1], states[1][1])


@pytest.mark.parametrize("longest", [1, 3])
def test_catch_up_bag_sum_is_catch_up_then_bag_sum(longest: int) -> None:
    generator = torch.Generator().manual_seed(longest)
    lengths = torch.randint(1, longest + 1, (3000,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    indices = torch.randint(0, 2000, (int(offsets[-1]),), generator=generator)
    weight, last = torch.randn(2000, 64, generator=generator), torch.randint(0, 3, (2000,), generator=generator).int()
    groups, transition, factor = ops.group_rows(indices, num_rows=2000), torch.rand(3, 1), torch.rand(3, 1)
    catch_up = {"table": 1, "step": 2, "transition": transition, "factor": factor}
    apart, since = weight.clone(), last.clone()
    ops.catch_up_(apart, since, groups.rows, KEY, **catch_up)  # type: ignore[arg-type]
    wanted = ops.bag_sum(apart, indices, offsets)
    found = ops.catch_up_bag_sum_(weight, last, groups, KEY, indices, offsets, ops.bag_ids(offsets), **catch_up)  # type: ignore[arg-type]
    assert torch.equal(found, wanted)
    assert torch.equal(weight, apart)
    assert torch.equal(last, since)


@settings(deadline=None, max_examples=80)
@given(case=cases(bag_multiple=3))
def test_bag_sq_norms(case: Case) -> None:
    grad = case.normals(3, case.bags // 3, case.weight.shape[1])
    found = ops.bag_sq_norms(case.indices, case.offsets, grad, case.per_lookup)
    wanted = reference.bag_sq_norms(case.indices, case.offsets, grad, case.per_lookup)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("far", [0, 2**40])
@pytest.mark.parametrize("weights", ["none", "equal", "any"])
def test_bag_sq_norms_of_one_feature(weights: str, far: int) -> None:
    """Short bags are compared lookup by lookup, long ones hashed; 192 is the longest of the short."""
    generator = torch.Generator().manual_seed(4)
    lengths = torch.tensor([0, 1, 2, 15, 16, 17, 80, 191, 192, 193, 400])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    # Row 0 among them: what pads a short bag must not count as a lookup of it.
    indices = torch.randint(0, 30, (int(offsets[-1]),), generator=generator)
    indices[::3] += far
    per_lookup = {
        "none": None,
        "equal": torch.repeat_interleave(1.0 / lengths.clamp(min=1), lengths),
        "any": torch.randn(indices.numel(), generator=generator),
    }[weights]
    grad = torch.randn(1, lengths.numel(), 39, generator=generator)
    found = ops.bag_sq_norms(indices, offsets, grad, per_lookup)
    torch.testing.assert_close(found, reference.bag_sq_norms(indices, offsets, grad, per_lookup), rtol=1e-6, atol=1e-6)


def test_an_empty_bag_has_no_norm_whatever_its_gradient() -> None:
    grad = torch.tensor([[[torch.inf], [torch.nan], [2.0]]])
    found = ops.bag_sq_norms(torch.tensor([5]), torch.tensor([0, 0, 0, 1]), grad)
    assert found.tolist() == [0.0, 0.0, 4.0]


def test_bag_sq_norms_adds_equal_rows_of_all_features_first() -> None:
    grad = torch.tensor([[[3.0, 0.0]], [[0.0, 4.0]]])
    apart = ops.bag_sq_norms(torch.tensor([1, 2]), torch.tensor([0, 1, 2]), grad)
    together = ops.bag_sq_norms(torch.tensor([1, 1]), torch.tensor([0, 1, 2]), -grad + torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(apart, torch.tensor([25.0]).double(), rtol=1e-12, atol=0)
    torch.testing.assert_close(together, torch.tensor([1.0 + 16.0]).double(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("size", [1e-38, 1.0, 3e38])
def test_lookups_that_cancel_keep_a_part_of_the_largest(size: float) -> None:
    weights = torch.tensor([size, size, -size, -size])
    grad = torch.tensor([[[3.0, -4.0]]])
    found = ops.bag_sq_norms(torch.tensor([7, 7, 7, 7]), torch.tensor([0, 4]), grad, weights)
    floor = float(weights[0].double()) * 4.0 / 4096
    assert float(found.sqrt()) == pytest.approx(floor, rel=1e-9)


def test_small_gradients_have_their_norm() -> None:
    grad = torch.full((1, 1, 3), 2e-42)
    found = ops.bag_sq_norms(torch.tensor([0]), torch.tensor([0, 1]), grad)
    torch.testing.assert_close(found, grad.double().square().sum(dim=2)[0], rtol=1e-12, atol=0)


@settings(deadline=None, max_examples=80)
@given(case=cases() | cases(length=LONG) | cases(length=OF_LENGTH_5), bound=st.sampled_from([1.0, 0.3, 2.0**-20]))
def test_exact_sums_are_those_of_the_reference_to_the_bit(case: Case, bound: float) -> None:
    groups = ops.group_rows(case.indices, num_rows=case.weight.shape[0])
    bags, scale = ops.bag_ids(case.offsets), case.normals(case.bags) * bound
    grad = case.normals(case.bags, case.weight.shape[1]) * 10.0 ** case.normals(case.bags, 1).clamp(-2, 2)
    options = {"alpha": -0.3, "per_lookup_weights": case.per_lookup, "bound": bound}
    found, wanted = case.weight.clone(), case.weight.clone()
    ops.scatter_add_(found, groups, bags, grad, scale, **options)  # type: ignore[arg-type]
    reference.scatter_add_(wanted, groups, bags, grad, scale, **options)  # type: ignore[arg-type]
    assert torch.equal(found, wanted)


def test_what_one_term_adds_does_not_depend_on_the_others() -> None:
    """Small terms of one example beside large ones of others, in any order: the difference is the example's own sum."""
    generator = torch.Generator().manual_seed(5)
    small, others = torch.full((2040,), 1.3e-4), torch.full((9000,), 0.25)
    huge = torch.tensor([1000.0, -1000.0]).repeat(500)

    def total(parts: list[Tensor], bound: float | None) -> float:
        terms = torch.cat(parts)
        if bound is not None:
            terms = terms[torch.randperm(terms.numel(), generator=generator)]
        row = torch.zeros(1, 1)
        groups = ops.group_rows(torch.zeros(terms.numel(), dtype=torch.int64), num_rows=1)
        bags = torch.arange(terms.numel())
        ops.scatter_add_(row, groups, bags, terms[:, None], torch.ones(terms.numel()), alpha=1.0, bound=bound)
        return float(row)

    def moved(bound: float | None) -> float:
        return total([others, huge, small], bound) - total([others, huge], bound)

    own = 2040 * 1.3e-4
    assert total([small, huge], 1.0) == pytest.approx(own, rel=1e-6)
    assert moved(1.0) == pytest.approx(own, abs=2.0**-12), "to the rounding of the row, about 2250"
    assert moved(None) > 1.5 * own, "control: in float32 each is rounded up beside the others"


@pytest.mark.parametrize("bound", [0.0, -1.0, 1e-40, float("inf"), float("nan")])
def test_a_bound_is_a_normal_number(bound: float) -> None:
    with pytest.raises(ValueError, match="bound: expected"):
        ops.exact_grid(bound)


@settings(deadline=None, max_examples=80)
@given(case=cases())
def test_scatter_add(case: Case) -> None:
    groups = ops.group_rows(case.indices, num_rows=case.weight.shape[0])
    bags, scale = ops.bag_ids(case.offsets), case.normals(case.bags)
    grad = case.normals(case.bags, case.weight.shape[1])
    found, wanted = case.weight.clone(), case.weight.clone()
    for implementation, weight in ((ops, found), (reference, wanted)):
        implementation.scatter_add_(weight, groups, bags, grad, scale, alpha=-0.3, per_lookup_weights=case.per_lookup)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_rows", [1, 7, 5000, 2**21, 2**33])
def test_group_rows_in_chunks(num_rows: int) -> None:
    """So many lookups that threads share the sort, of row ids that take one to three digits, or two words."""
    indices = torch.randint(0, num_rows, (100_003,), generator=torch.Generator().manual_seed(num_rows))
    indices[5:50] = num_rows - 1
    found, wanted = ops.group_rows(indices, num_rows=num_rows), reference.group_rows(indices, num_rows=num_rows)
    assert torch.equal(found.rows, wanted.rows)
    assert torch.equal(found.order, wanted.order)
    assert torch.equal(found.starts, wanted.starts)


@settings(deadline=None, max_examples=40)
@given(case=cases())
def test_bag_ids(case: Case) -> None:
    assert torch.equal(ops.bag_ids(case.offsets), reference.bag_ids(case.offsets))


@settings(deadline=None, max_examples=60)
@given(
    data=st.data(),
    num_rows=st.integers(1, 40),
    columns=st.sampled_from([1, 3, 11, 12, 13, 16, 128]),
    momentum=st.booleans(),
    flush=st.booleans(),
    noise=st.sampled_from(["gaussian", "ones"]),
)
def test_catch_up_and_flush(
    data: st.DataObject, *, num_rows: int, columns: int, momentum: bool, flush: bool, noise: ops.Distribution
) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    step = data.draw(st.integers(0, 9))
    last = torch.randint(0, step + 1, (num_rows,), generator=generator, dtype=torch.int32)
    weight = torch.randn(num_rows, columns, generator=generator)
    velocity = torch.randn(num_rows, columns, generator=generator) if momentum else None
    rows = torch.nonzero(torch.rand(num_rows, generator=generator) < 0.6).flatten()
    transition = torch.randn(step + 1, 4 if momentum else 1, generator=generator)
    factor = torch.randn(step + 1, 3 if momentum else 1, generator=generator)
    shared = {"table": 3, "step": step, "first_row": data.draw(st.sampled_from([0, 7, 2**32 - 3, 2**48 - 40]))}
    states = []
    for implementation in (ops, reference):
        w, n, v = weight.clone(), last.clone(), None if velocity is None else velocity.clone()
        if flush:
            implementation.flush_(w, n, KEY, transition=transition, factor=factor, momentum=v, noise=noise, **shared)
        else:
            implementation.catch_up_(
                w, n, rows, KEY, transition=transition, factor=factor, momentum=v, noise=noise, **shared
            )
        states.append((w, n, v))
    (w, n, v), (wanted_w, wanted_n, wanted_v) = states
    torch.testing.assert_close(w, wanted_w, rtol=2e-6, atol=5e-6)
    assert torch.equal(n, wanted_n)
    if v is not None and wanted_v is not None:
        torch.testing.assert_close(v, wanted_v, rtol=2e-6, atol=5e-6)
    touched = torch.arange(num_rows) if flush else rows
    assert (n[touched] == step).all()
    untouched = torch.ones(num_rows, dtype=torch.bool)
    untouched[touched] = False
    untouched |= last == step
    assert torch.equal(w[untouched], weight[untouched])


def test_catch_up_of_rows_is_the_flush_of_those_rows() -> None:
    weight, last = torch.randn(50, 24), torch.zeros(50, dtype=torch.int32)
    one = torch.ones(1, 1)
    flushed, caught = weight.clone(), weight.clone()
    ops.flush_(flushed, last.clone(), KEY, table=0, step=4, transition=one, factor=one)
    rows = torch.tensor([3, 4, 30])
    ops.catch_up_(caught, last, rows, KEY, table=0, step=4, transition=one, factor=one)
    assert torch.equal(flushed[rows], caught[rows])
    assert torch.equal(caught[5], weight[5])


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(0, 20),
    columns=st.integers(0, 40),
    table=st.integers(0, 0xFFFE),
    first_row=st.one_of(st.integers(0, 100), st.sampled_from([2**32 - 3, 2**48 - 40])),
    step=st.integers(0, 2**31 - 1),
)
def test_normal(rows: int, columns: int, table: int, first_row: int, step: int) -> None:
    where = {"table": table, "first_row": first_row, "step": step}
    found = ops.normal_(torch.empty(rows, columns), KEY, **where)
    wanted = reference.normal_(torch.empty(rows, columns, dtype=torch.float64), KEY, **where)
    torch.testing.assert_close(found.double(), wanted, rtol=2e-6, atol=5e-7)


@settings(deadline=None, max_examples=40)
@given(stream=st.integers(0, 2**63 - 1), counter=st.integers(0, 2**32 - 100), n=st.integers(0, 1000))
def test_chacha_words(stream: int, counter: int, n: int) -> None:
    found = ops.chacha_words(KEY, stream=stream, counter=counter, n=n)
    assert torch.equal(found, reference.chacha_words(KEY, stream=stream, counter=counter, n=n))


def test_chacha_words_go_on_from_block_to_block() -> None:
    whole = ops.chacha_words(KEY, stream=7, counter=0, n=64)
    assert torch.equal(whole[32:], ops.chacha_words(KEY, stream=7, counter=2, n=32))


def test_ids_beyond_two_to_the_31() -> None:
    """A table of more than 2^31 rows and elements; its pages are never touched but for those of the rows in use."""
    num_rows = 2**31 + 16
    weight, last = torch.empty(num_rows, 1), torch.empty(num_rows, dtype=torch.int32)
    rows = torch.tensor([5, 2**31 - 1, 2**31, num_rows - 1])
    weight[rows], last[rows] = 0.0, 0
    one = torch.ones(1, 1)
    ops.catch_up_(weight, last, rows, KEY, table=1, step=3, transition=one, factor=one)
    wanted = reference.noise(KEY, table=1, rows=rows, step=3, columns=1).float()
    torch.testing.assert_close(weight[rows], wanted, rtol=1e-5, atol=1e-6)
    assert last[rows].tolist() == [3] * 4
    found = ops.bag_sum(weight, rows, torch.tensor([0, 2, 4]))
    torch.testing.assert_close(found, torch.stack([weight[rows[:2]].sum(0), weight[rows[2:]].sum(0)]))
    groups = ops.group_rows(rows.flip(0), num_rows=num_rows)
    assert torch.equal(groups.rows, rows)
    before = weight[rows].clone()
    ops.scatter_add_(weight, groups, torch.zeros(4, dtype=torch.int64), torch.ones(1, 1), torch.ones(1), alpha=2.0)
    torch.testing.assert_close(weight[rows], before + 2.0)
