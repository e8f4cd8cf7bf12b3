"""AVX-512, AVX2 and portable give the same bits; so does any number of threads."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lazydp.kernels import ops
from lazydp.kernels.noise_key import NoiseKey
from support.simd import at_level

KEY = NoiseKey.for_tests(5).tensor()
OTHERS = ops.simd_levels()[1:]


def assert_all_levels_agree(call: Callable[[], list[Tensor]]) -> None:
    with at_level("portable"):
        expected = call()
    for level in OTHERS:
        with at_level(level):
            found = call()
        for wanted, one in zip(expected, found, strict=True):
            assert torch.equal(wanted.view(torch.int32), one.view(torch.int32)), level


@pytest.mark.parametrize("level", ["portable", "avx2", "avx512", "amx"])
def test_level_can_be_chosen_where_the_machine_has_it(level: ops.SimdLevel) -> None:
    before = ops.simd_level()
    if level in ops.simd_levels():
        ops.set_simd_level(level)
        assert ops.simd_level() == level
        ops.set_simd_level(before)
    else:
        with pytest.raises(ValueError, match="expected one of"):
            ops.set_simd_level(level)
        pytest.skip(f"this machine does not run {level}; it runs {', '.join(ops.simd_levels())}")


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(0, 40),
    columns=st.one_of(st.integers(0, 40), st.sampled_from([127, 128, 500, 5000])),
    table=st.integers(0, 0xFFFE),
    first_row=st.one_of(st.integers(0, 100), st.sampled_from([2**32 - 3, 2**48 - 40])),
    step=st.integers(0, 2**31 - 1),
)
def test_normals_have_the_same_bits(rows: int, columns: int, table: int, first_row: int, step: int) -> None:
    def call() -> list[Tensor]:
        return [ops.normal_(torch.empty(rows, columns), KEY, table=table, first_row=first_row, step=step)]

    assert_all_levels_agree(call)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), num_rows=st.integers(1, 60), columns=st.integers(1, 40), momentum=st.booleans())
def test_catch_up_has_the_same_bits(data: st.DataObject, num_rows: int, columns: int, momentum: bool) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    step = data.draw(st.integers(1, 9))
    weight = torch.randn(num_rows, columns, generator=generator)
    velocity = torch.randn(num_rows, columns, generator=generator) if momentum else None
    last = torch.randint(0, step + 1, (num_rows,), generator=generator, dtype=torch.int32)
    rows = torch.nonzero(torch.rand(num_rows, generator=generator) < 0.7).flatten()
    transition = torch.randn(step, 4 if momentum else 1, generator=generator)
    factor = torch.randn(step, 3 if momentum else 1, generator=generator)

    def call() -> list[Tensor]:
        w, n, v = weight.clone(), last.clone(), None if velocity is None else velocity.clone()
        ops.catch_up_(w, n, rows, KEY, table=2, step=step, transition=transition, factor=factor, momentum=v)
        return [w, n, *([] if v is None else [v])]

    assert_all_levels_agree(call)


@pytest.mark.parametrize("momentum", [False, True], ids=["sgd", "momentum"])
@pytest.mark.parametrize("first_of_table", [0, 2**32 - 20])
def test_a_shard_gets_the_noise_of_its_rows_of_the_table(momentum: bool, first_of_table: int) -> None:
    generator = torch.Generator().manual_seed(4)
    rows, columns, step = 53, 29, 5
    weight = torch.randn(rows, columns, generator=generator)
    velocity = torch.randn(rows, columns, generator=generator) if momentum else None
    last = torch.randint(0, step + 1, (rows,), generator=generator, dtype=torch.int32)
    transition = torch.randn(step, 4 if momentum else 1, generator=generator)
    factor = torch.randn(step, 3 if momentum else 1, generator=generator)
    skip_ahead = {"table": 2, "step": step, "transition": transition, "factor": factor}
    read = torch.nonzero(torch.rand(rows, generator=generator) < 0.7).flatten()

    def after(ends: list[int], call: Callable[..., Tensor | None]) -> list[Tensor]:
        """The table after `call` on each of the shards between `ends`."""
        w, n, v = weight.clone(), last.clone(), None if velocity is None else velocity.clone()
        given = []
        for first, end in itertools.pairwise(ends):
            found = call(
                w[first:end],
                n[first:end],
                read[(read >= first) & (read < end)] - first,
                momentum=None if v is None else v[first:end],
                first_row=first_of_table + first,
                **skip_ahead,
            )
            given += [] if found is None else [found]
        return [w, n, *([] if v is None else [v]), torch.cat([w[:0], *given])]

    def pooled(w: Tensor, n: Tensor, rows: Tensor, **options: Any) -> Tensor:
        offsets = torch.arange(len(rows) + 1)
        return ops.catch_up_bag_sum_(
            w, n, ops.group_rows(rows, num_rows=len(w)), KEY, rows, offsets, offsets[:-1].clone(), **options
        )

    def elsewhere(call: Callable[..., Tensor | None], *arguments: Any, **options: Any) -> Tensor | None:
        return call(*arguments, **{**options, "first_row": options["first_row"] + 1})

    calls: list[Callable[..., Tensor | None]] = [
        lambda w, n, rows, **options: ops.flush_(w, n, KEY, **options),
        lambda w, n, rows, **options: ops.catch_up_(w, n, rows, KEY, **options),
        pooled,
    ]
    for call in calls:
        whole = after([0, rows], call)
        for level in ops.simd_levels():
            with at_level(level):
                sharded = after([0, 17, 18, 40, rows], call)
            assert all(torch.equal(*pair) for pair in zip(whole, sharded, strict=True)), level
        # The noise of other rows is other noise: a shard that forgot where it begins would be seen.
        assert not torch.equal(after([0, rows], functools.partial(elsewhere, call))[0], whole[0])


@pytest.mark.parametrize("first_row", [-1, 2**48 - 2])
def test_a_shard_outside_the_addresses_is_refused(first_row: int) -> None:
    weight, last, one = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int32), torch.ones(1, 1)
    arguments = {"table": 0, "step": 1, "transition": one, "factor": one, "first_row": first_row}
    with pytest.raises(ValueError, match="first_row: expected 0 <= first_row and first_row"):
        ops.flush_(weight, last, KEY, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="first_row: expected 0 <= first_row and first_row"):
        ops.catch_up_(weight, last, torch.tensor([1]), KEY, **arguments)  # type: ignore[arg-type]
    assert not weight.any()
    assert not last.any()


def test_extreme_words_have_the_same_bits() -> None:
    edges = np.array([0, 1, 2, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFFE, 0x3FFFFFFF, 0x40000000, 0xC0000000])
    words = np.random.default_rng(3).choice(edges, size=(4000, 16)).astype(np.uint32).view(np.int32)
    assert_all_levels_agree(lambda: [ops.normals_of_blocks(torch.from_numpy(words))])


@pytest.mark.parametrize("length", [1, 3, 8])
@pytest.mark.parametrize("columns", [1, 13, 32, 64, 200])
def test_exact_sums_have_the_same_bits(length: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(2)
    bags, rows = 60, 40
    equal = torch.arange(0, bags * length + 1, length)
    unequal = torch.cat([equal[:1], equal[1:-1] + torch.randint(0, 2, (bags - 1,), generator=generator), equal[-1:]])
    indices = torch.randint(0, rows, (bags * length,), generator=generator)
    start = torch.randn(rows, columns, generator=generator)
    grad, scale = torch.randn(bags, columns, generator=generator), torch.rand(bags, generator=generator)
    groups = ops.group_rows(indices, num_rows=rows)

    def results() -> list[Tensor]:
        out = []
        for offsets in (equal, unequal):
            for weights in (None, torch.ones(indices.numel())):
                weight = start.clone()
                bag = ops.bag_ids(offsets)
                ops.scatter_add_(
                    weight, groups, bag, grad, scale, alpha=-0.1, per_lookup_weights=weights, bound=2.0**-9
                )
                out.append(weight)
        return out

    without_weights, with_ones = results()[::2], results()[1::2]
    assert all(torch.equal(*pair) for pair in zip(without_weights, with_ones, strict=True))
    assert_all_levels_agree(results)


@pytest.mark.parametrize("shape", [(1, 100_000), (3, 7000), (1000, 128), (5, 5), (30_000, 2)])
def test_no_result_depends_on_the_number_of_threads(shape: tuple[int, int], one_thread: None) -> None:
    def results() -> list[Tensor]:
        generator = torch.Generator().manual_seed(1)
        weight = torch.randn(shape, generator=generator)
        last = torch.zeros(shape[0], dtype=torch.int32)
        one = torch.ones(1, 1)
        ops.flush_(weight, last, KEY, table=1, step=1, transition=one, factor=one)
        indices = torch.randint(0, shape[0], (4 * shape[0],), generator=generator)
        offsets = torch.arange(0, 4 * shape[0] + 1, 4)
        grad = torch.randn(shape, generator=generator)
        out = ops.bag_sum(weight, indices, offsets)
        norms = ops.bag_sq_norms(indices, offsets, grad[None])
        groups = ops.group_rows(indices, num_rows=shape[0])
        scale = norms.float()
        ops.scatter_add_(weight, groups, ops.bag_ids(offsets), grad, scale, alpha=-0.1)
        ops.scatter_add_(weight, groups, ops.bag_ids(offsets), grad, scale, alpha=-0.1, bound=1.0)
        noise = ops.normal_(torch.empty(shape), KEY, table=1, first_row=0, step=2)
        words = ops.chacha_words(KEY, stream=1, counter=0, n=shape[1])
        return [weight, last, out, norms, noise, words, groups.rows, groups.order, groups.starts]

    alone = results()
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        for wanted, found in zip(alone, results(), strict=True):
            assert torch.equal(wanted, found)
