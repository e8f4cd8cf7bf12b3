"""The order in which units are added up: uniformly random, its own at each step, and in blocks that keep the bound."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from lazydp.components.train.mechanism import unit_order
from lazydp.components.train.mechanism.double_sums import DoubleSums, LayerSums
from lazydp.components.train.mechanism.norm_rules import LayerNormRule, LinearRule, NormRule
from lazydp.components.train.mechanism.unit_order import ROUNDING, UnitOrder, block_size
from lazydp.kernels import ops
from lazydp.kernels.noise_key import NoiseKey
from support.simd import at_level

KEY = NoiseKey.for_tests(3)


def of_step(step: int, units: int, key: NoiseKey = KEY) -> Tensor:
    order = UnitOrder(key)
    order.begin(step, exchanges=1)
    found = order.of(units)
    assert found is not None
    return found


def p_value(orders: Iterable[tuple[int, ...]], units: int) -> float:
    """Of a chi-squared test that all permutations are equally likely."""
    counts = Counter(orders)
    return float(stats.chisquare([counts[order] for order in itertools.permutations(range(units))]).pvalue)


def test_every_permutation_is_equally_likely() -> None:
    drawn = [tuple(of_step(step, 4).tolist()) for step in range(2400)]
    assert p_value(drawn, 4) > 1e-3
    turned = [tuple((torch.arange(4) + order[0]).remainder(4).tolist()) for order in drawn]  # the control
    assert p_value(turned, 4) < 1e-9


def test_an_order_belongs_to_key_step_and_micro_batch() -> None:
    order = UnitOrder(KEY)
    for step in (1, 2):
        order.begin(step, exchanges=1)
        first, second = order.of(100), order.of(100)
        assert first is not None
        assert second is not None
        assert torch.equal(first, of_step(step, 100))
        assert not torch.equal(first, second)
        assert torch.equal(first.sort().values, torch.arange(100))
    assert not torch.equal(of_step(1, 100), of_step(2, 100))
    assert not torch.equal(of_step(1, 100), of_step(1, 100, NoiseKey.for_tests(4)))
    order.draw_under(NoiseKey.for_tests(4))
    order.begin(1, exchanges=1)
    assert torch.equal(torch.as_tensor(order.of(100)), of_step(1, 100, NoiseKey.for_tests(4)))
    assert of_step(1, 0).tolist() == []
    assert UnitOrder(None).of(5) is None


def test_equal_words_are_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stable sort would put the units of equal words in the order in which they lie."""
    counters = []

    def words(key: Tensor, *, stream: int, counter: int, n: int) -> Tensor:
        counters.append(counter)
        drawn = torch.arange(n, 0, -1, dtype=torch.int32)
        return torch.ones_like(drawn) if len(counters) == 1 else drawn

    monkeypatch.setattr(unit_order, "chacha_words", words)
    assert of_step(7, 20).tolist() == list(range(19, -1, -1))
    assert counters == [0, 3]  # 40 words are three blocks


LONGEST: dict[ops.SimdLevel, list[int]] = {"avx2": [63, 63, 31, 15, 1], "amx": [96, 96, 32, 18, 1]}


@pytest.mark.parametrize("level", LONGEST)
def test_blocks_are_the_longest_within_the_bound(level: ops.SimdLevel) -> None:
    with at_level(level):
        assert [block_size(exchanges) for exchanges in (0, 1, 4, 16, 10**6)] == LONGEST[level]
        for exchanges in range(1, 600):
            n = block_size(exchanges)
            moved = n * (n + 1) + n if level == "avx2" or n < 16 else moved_on_amx(n)
            assert n == 1 or exchanges * moved * 2.0**-24 <= ROUNDING


def moved_on_amx(n: int) -> float:
    """The bound of docs/floating-point.md, operation by operation: the largest partial sum that each of them rounds."""
    largest: dict[str, list[float]] = {"chain": [], "group": [], "block": [], "last": []}
    for first in range(0, n, 32):
        units = min(32, n - first)
        for part in [2.0**-15, 2.0**-7, 2.0**-14, 2.0**-7, 2.0**-15, 1.0]:
            if first == 0:
                largest["chain"] += [part * (k + 1) for k in range(-(-units // 2))]
                largest["group"] += [part * units]
            before = first + (0.0 if part < 1 else units)
            largest["block"] += [before + part * units * (part < 1)]
        largest["last"] = largest["block"][-6:]
    exchanged = sum(sum(largest[name]) for name in ("chain", "group", "block"))
    return 2 * exchanged + largest["chain"][-1] + 2 * largest["group"][-1] + 2 * sum(largest["last"])


@pytest.mark.parametrize("shape", [(5, 4), (5, 1), (1, 4), (1, 1)])
@pytest.mark.parametrize("rule", [LinearRule(), LayerNormRule()])
def test_single_terms_add_up_to_what_float64_gives(rule: NormRule, shape: tuple[int, int]) -> None:
    """Float64 is what a GPU computes in."""
    num_in, num_out = shape
    layer: nn.Module = nn.Linear(num_in, num_out) if isinstance(rule, LinearRule) else nn.LayerNorm(num_out)
    generator = torch.Generator().manual_seed(0)
    grads = torch.randn(150, 1, num_out, generator=generator)
    inputs = torch.randn(150, 1, num_in if isinstance(rule, LinearRule) else num_out, generator=generator)
    scale = torch.rand(150, generator=generator)
    single, exact, strided, copied = (LayerSums(DoubleSums(), dict(layer.named_parameters())) for _ in range(4))
    rule.add_single(layer, inputs, grads, scale, single, order=of_step(1, 150), block=63)
    rule.add_exact(layer, inputs, grads, scale, exact)
    for name, total in exact.items():
        torch.testing.assert_close(single[name], total, rtol=1e-5, atol=1e-4 if name == "weight" else 1e-9)
    # Gradients of an expanded loss have strides of 0.
    one = grads[:, :, :1].expand(-1, -1, num_out)
    rule.add_single(layer, inputs, one, scale, strided, order=None, block=63)
    rule.add_single(layer, inputs, one.contiguous(), scale, copied, order=None, block=63)
    assert all(torch.equal(strided[name], copied[name]) for name in strided)
