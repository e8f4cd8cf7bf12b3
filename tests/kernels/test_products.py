"""Weighted products and sums: the bits of the reference, at every level and on any number of threads."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lazydp.kernels import ops, products, reference
from support.simd import at_level

SIZES = st.one_of(st.integers(1, 20), st.sampled_from([31, 32, 33, 48, 70]))


def tensors(
    units: int, outputs: int, columns: int, *, seed: int = 0, spread: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Grads, inputs and scales; their sizes are 10^-spread to 10^spread, at most 1e9: products may be subnormal."""
    generator = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> Tensor:
        exponents = (torch.rand(*shape, generator=generator) * 2 - 1) * spread
        return (torch.randn(*shape, generator=generator) * 10.0**exponents).clamp(-1e9, 1e9)

    return some(units, outputs), some(units, columns), some(units).abs()


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.int64), other.view(torch.int64))


def at_each_level(call: Callable[[], Tensor]) -> dict[ops.SimdLevel, Tensor]:
    found = {}
    for level in ops.simd_levels():
        with at_level(level):
            found[level] = call()
    return found


@settings(deadline=None, max_examples=60)
@given(
    units=st.one_of(st.integers(0, 12), st.sampled_from([63, 64, 65, 140])),
    outputs=SIZES,
    columns=SIZES,
    block=st.sampled_from([1, 2, 7, 16, 63, 96, 512]),
    spread=st.sampled_from([0.0, 2.0, 19.0]),
    seed=st.integers(0, 1000),
)
def test_every_level_gives_the_bits_of_the_reference(
    units: int, outputs: int, columns: int, block: int, spread: float, seed: int
) -> None:
    grads, inputs, scale = tensors(units, outputs, columns, seed=seed, spread=spread)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(units, generator=generator) if seed % 2 else None
    start = torch.randn(outputs, columns, dtype=torch.float64, generator=generator)
    overwrite = seed % 3 == 0
    if overwrite:
        start.fill_(torch.nan)  # what is overwritten is not read

    def added(add: Callable[..., None], **of_reference: bool) -> Tensor:
        out = start.clone()
        add(out, grads, inputs, scale, order=order, block=block, overwrite=overwrite, **of_reference)
        return out

    for level, found in at_each_level(lambda: added(products.weighted_product_)).items():
        assert same_bits(found, added(reference.weighted_product_, amx=level == "amx")), level


@pytest.mark.parametrize("shape", [(1200, 130, 100), (700, 5, 260), (1030, 300, 13)])
@pytest.mark.parametrize("block", [63, 500])
def test_threads_and_levels_give_the_same_bits(shape: tuple[int, int, int], block: int) -> None:
    grads, inputs, scale = tensors(*shape)
    order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(1))

    def product() -> Tensor:
        out = torch.full((shape[1], shape[2]), torch.nan, dtype=torch.float64)
        products.weighted_product_(out, grads, inputs, scale, order=order, block=block, overwrite=True)
        return out

    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(at_each_level(product))
    finally:
        torch.set_num_threads(before)
    exact = (grads * scale.unsqueeze(1))[order].double().t() @ inputs[order].double()
    absolute = (grads * scale.unsqueeze(1)).abs().double().t() @ inputs.abs().double()
    for level in found[0]:
        assert same_bits(found[0][level], found[1][level])
        if level != "amx":  # which has an order of its own
            assert same_bits(found[0][level], found[0]["portable"])
        assert ((found[0][level] - exact).abs() <= block * 2.0**-24 * absolute + 1e-12 * absolute).all()


def test_blocks_are_added_in_float64() -> None:
    """In one float32 chain 2^24 ones stop growing; in blocks they do not."""
    units = 3 * products.MAX_BLOCK
    grads, inputs, scale = torch.full((units, 2), 3.0), torch.full((units, 2), 2.0**20), torch.ones(units)
    inputs[0] = 2.0**45
    out = torch.zeros(2, 2, dtype=torch.float64)
    products.weighted_product_(out, grads, inputs, scale, block=1)
    assert (out == 3.0 * (2.0**45 + (units - 1) * 2.0**20)).all()
    out.zero_()
    products.weighted_product_(out, grads, inputs, scale, block=products.MAX_BLOCK)
    # The first block lost its small terms; on AMX, which adds 32 at a time, those of the large one's chain.
    kept = products.MAX_BLOCK - 16 if ops.simd_level() == "amx" else 0
    assert (out == 3.0 * 2.0**45 + (2 * products.MAX_BLOCK + kept) * 3.0 * 2.0**20).all()


def test_a_scaled_gradient_below_the_least_normal_is_zero() -> None:
    """Rounded to a subnormal number it could come out twice as large, and inputs may be 1e38."""

    def product() -> Tensor:
        out = torch.zeros(2, 2, dtype=torch.float64)
        grads, inputs, scale = torch.tensor([[1e-30, 1.0]]), torch.full((1, 2), 1e38), torch.tensor([7e-16])
        products.weighted_product_(out, grads, inputs, scale)
        return out

    for found in at_each_level(product).values():
        assert found[0].tolist() == [0.0, 0.0]
        assert (found[1] > 0).all()


@settings(deadline=None, max_examples=30)
@given(count=st.integers(0, 20), columns=st.sampled_from([1, 2, 7, 128, 129, 300]), seed=st.integers(0, 1000))
def test_weighted_sums_and_noised_sums(count: int, columns: int, seed: int) -> None:
    rows, noise, weights = tensors(count, columns, columns, seed=seed, spread=3.0)
    for sum_ in (products.weighted_sum_, reference.weighted_sum_):
        out = torch.ones(columns, dtype=torch.float64)
        sum_(out, rows, weights.double())
        if sum_ is products.weighted_sum_:
            found = out
    assert same_bits(found, out)
    for drawn in [None, *noise[:1]]:
        both = [torch.empty(columns), torch.empty(columns)]
        products.noised_sum_(both[0], found, drawn, scale=1e-3)
        reference.noised_sum_(both[1], found, drawn, scale=1e-3)
        assert torch.equal(*both)


@settings(deadline=None, max_examples=40)
@given(
    units=st.sampled_from([0, 1, 5, 40]),
    widths=st.lists(st.tuples(SIZES, SIZES, st.booleans(), st.booleans()), min_size=1, max_size=3),
    spread=st.sampled_from([0.0, 5.0, 44.0]),
    seed=st.integers(0, 1000),
)
def test_norms_of_products_are_never_below_the_truth(
    units: int, widths: list[tuple[int, int, bool, bool]], spread: float, seed: int
) -> None:
    layers = [
        tensors(units, outputs, columns, seed=seed + n, spread=spread)
        for n, (outputs, columns, *_) in enumerate(widths)
    ]
    grads, inputs = [of_layer[0] for of_layer in layers], [of_layer[1] for of_layer in layers]
    added = {"weight": [layer[2] for layer in widths], "bias": [layer[3] for layer in widths]}
    found = at_each_level(lambda: products.foreach_product_sq_norms(inputs, grads, **added))
    expected = reference.foreach_product_sq_norms(inputs, grads, **added)
    for norms in found.values():
        assert same_bits(norms, found["portable"])
        torch.testing.assert_close(norms, expected, rtol=1e-12, atol=0.0)
    for unit in range(units):
        exact = sum(
            _exact_square(grad[unit]) * (_exact_square(of_inputs[unit]) * with_weight + with_bias)
            for grad, of_inputs, with_weight, with_bias in zip(
                grads, inputs, added["weight"], added["bias"], strict=True
            )
        )
        assert Fraction(float(found["portable"][unit])) >= exact


def _exact_square(values: Tensor) -> Fraction:
    return sum((Fraction(value) ** 2 for value in values.tolist()), Fraction(0))


def test_a_norm_of_what_is_not_finite_is_not_finite() -> None:
    for value in (torch.inf, torch.nan):
        inputs, grads = torch.tensor([[1.0, value], [1.0, 1.0]]), torch.ones(2, 3)
        norms = products.foreach_product_sq_norms([inputs], [grads], weight=[True], bias=[True])
        assert not norms[0].isfinite()
        assert norms[1].isfinite()
    large, small = torch.full((1, 2), 3e38), torch.full((1, 2), 1e-45)
    for one, other in ((large, large), (small, small), (large, small)):
        norms = products.foreach_product_sq_norms([one], [other], weight=[True], bias=[False])
        assert norms.isfinite().all()
        assert (norms > 0).all()


@pytest.mark.parametrize(
    ("inputs", "grads", "message"),
    [
        ([torch.ones(2, 3)], [], "expected one for each"),
        ([torch.ones(2, 3)], [torch.ones(3, 3)], "grads: expected size 2"),
        ([torch.ones(2, 3, dtype=torch.float64)], [torch.ones(2, 3)], "inputs: expected float32"),
    ],
)
def test_wrong_layers_are_refused(inputs: list[Tensor], grads: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        torch.ops.lazydp.foreach_product_sq_norms(inputs, grads, [3] * len(inputs))


F64 = torch.float64
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "units": ({"inputs": torch.ones(4, 3)}, "inputs: expected size 5 in dimension 0"),
    "scale": ({"scale": torch.ones(4)}, "scale: expected size 5"),
    "float32 sum": ({"out": torch.zeros(2, 3)}, "out: expected float64, found float32"),
    "shape": ({"out": torch.zeros(3, 3, dtype=F64)}, "out: expected size 2 in dimension 0"),
    "layout": ({"grads": torch.ones(2, 5).t()}, "grads: expected a contiguous tensor"),
    "order": ({"order": torch.tensor([0, 1, 2, 3, 5])}, r"order\[4\]: expected 0 <= unit < 5, found 5"),
    "short order": ({"order": torch.arange(4)}, "order: expected size 5"),
    "no block": ({"block": 0}, "block: expected 1 <= block <= 512, found 0"),
    "large block": ({"block": 513}, "block: expected 1 <= block <= 512, found 513"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_refused_before_anything_is_written(name: str) -> None:
    given_, message = WRONG[name]
    arguments = {
        "out": torch.zeros(2, 3, dtype=F64),
        "grads": torch.ones(5, 2),
        "inputs": torch.ones(5, 3),
        "scale": torch.ones(5),
    } | given_
    with pytest.raises(ValueError, match=message):
        products.weighted_product_(**arguments)
    assert not arguments["out"].any()


def test_sums_that_do_not_fit_are_refused() -> None:
    total = torch.zeros(3, dtype=F64)
    with pytest.raises(ValueError, match="weights: expected float64, found float32"):
        products.weighted_sum_(total, torch.ones(2, 3), torch.ones(2))
    with pytest.raises(ValueError, match="weights: expected size 2"):
        products.weighted_sum_(total, torch.ones(2, 3), torch.ones(3, dtype=F64))
    with pytest.raises(ValueError, match="noise: expected size 3"):
        products.noised_sum_(torch.zeros(3), total, torch.zeros(2), scale=1.0)
    with pytest.raises(ValueError, match="overlap"):
        products.weighted_sum_(total, total.view(torch.float32).view(2, 3), torch.ones(2, dtype=F64))
