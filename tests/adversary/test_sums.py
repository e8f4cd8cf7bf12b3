"""One unit moves a step's sum by at most C, whatever it is and whatever else is in the step."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import pytest
import torch
from adversary.sums import BAG, LARGEST, PARTS, POSITIONS, WIDTH, Batch, Step, examples
from hypothesis import HealthCheck, given, settings, target
from hypothesis import strategies as st
from torch import Tensor

from lazydp.components.train.mechanism import unit_order
from lazydp.components.train.mechanism.unit_order import block_size
from lazydp.components.train.private import GroupNorms
from support.simd import at_level

EQUAL = torch.tensor([2, 2])
SIZES = [1e-38, 2e-23, 1e-6, 1.0, 1e6, 1e7, 1e12, 1e20, 3e38]
FEW = [2e-23, 1.0, 1e7, 3e38]
STEPS = {
    "examples": Step(),
    "examples, last": Step(place="last"),
    "examples, joined, threads": Step(place="joined", threads=3),
    "examples, groups": Step(max_grad_norm=GroupNorms(dense=0.3, embeddings=2.0)),
    "users": Step(users="sum"),
    "users, mean": Step(users="mean", place="joined", threads=2),
    "users, micro-batches": Step(users="sum", micro_batches=3, place="last"),
}


def cancelling(size: float) -> Tensor:
    return torch.tensor([size, -size, size, -size][:BAG])


def units(size: float) -> dict[str, Batch]:
    """Units that were made by hand: each is one example, or one user of several."""
    opposite = examples(2, part="bag", size=size)
    opposite.counts[1] *= -1
    opposite.bags[1] = opposite.bags[0]
    positions = torch.tensor([1.0, -1.0, 0.0])
    pairs = torch.tensor([size, size, -size, -size])
    large = torch.full((POSITIONS, WIDTH), size)
    normal = torch.randn(POSITIONS, WIDTH, generator=torch.Generator().manual_seed(1))
    return {
        "two reads of one row": examples(part="difference", size=size, ids=EQUAL),
        "a difference times an amount": examples(part="scaled", ids=EQUAL, amount=torch.tensor(size)),
        "a difference of two rows times an amount": examples(part="scaled", amount=torch.tensor(size)),
        "weights that cancel": examples(part="bag", weights=cancelling(size)),
        "weights that cancel in a row": examples(part="bag", weights=cancelling(size), bags=torch.full((BAG,), 1)),
        "pairs that cancel": examples(part="bag", weights=pairs, bags=torch.full((BAG,), 0)),
        "one row again and again": examples(part="mean", size=size, bags=torch.full((BAG,), 3)),
        "positions that cancel": examples(part="positions", size=size, signs=positions),
        "large positions that cancel": examples(part="positions", signs=positions, inputs=large),
        "normed positions that cancel": examples(part="norm", size=size, signs=positions, inputs=normal),
        "a small input": examples(part="deep", inputs=large),
        "a small gradient": examples(part="deep", size=size),
        "two examples that cancel": opposite,
    }


def some_others() -> Batch:
    """Ordinary examples that read every row of every table, and count in every part."""
    batch = examples(20, part=PARTS[0], size=0.5)
    for part in PARTS[1:]:
        batch = batch.join(examples(20, part=part, size=0.5))
    return batch


@pytest.mark.parametrize("name", STEPS)
def test_units_made_by_hand_move_a_step_by_the_norm_at_most(name: str) -> None:
    step, largest = STEPS[name], (0.0, "")
    others = some_others()
    for size in SIZES if name == "examples" else FEW:
        for of, unit in units(size).items():
            if step.users is None and unit.size > 1:
                continue
            largest = max(largest, (step.factor(unit, others), f"{of}, {size:g}"))
    print(f"{name}: the largest factor is {largest[0]:.6f} ({largest[1]})")
    assert largest[0] <= LARGEST, largest[1]


def test_a_row_read_again_and_again_beside_thousands_of_others() -> None:
    """Small terms are each rounded up beside a large sum: 2,040 examples of one user, and 8,000 aligned others."""
    step = Step(users="sum", place="last")
    row, weights = torch.full((BAG,), 1), torch.tensor([1.0, 0.0, 0.0, 0.0])
    unit, others = (examples(count, part="bag", bags=row, weights=weights) for count in (2040, 8000))
    found = step.factor(unit, others)
    print(f"again and again: the largest factor is {found:.6f}")
    assert found <= LARGEST


def just_below(aligned: int, others: int, *, part: str, size: float = 0.25, at_once: int = 1) -> Batch:
    """`aligned` equal units (a power of two, so that their sum is one), then units that are half a step below it.

    The step (ulp) of a float32 below a power of two is half as large as above. Each of the `others` takes a little more
    than half of the smaller step off the sum, less than half of the larger: it moves the sum by a whole smaller step,
    or, where one more unit lifted the sum above the power of two, not at all. Where `at_once` units are added up before
    the sum takes them, it is these together.
    """
    step = aligned * size * 2.0**-23 / at_once
    return examples(aligned, part=part, size=size).join(examples(others, part=part, size=-0.26 * step))


@pytest.mark.parametrize("part", ["deep", "column", "row", "flat"])
def test_a_unit_that_changes_how_thousands_of_others_are_rounded(part: str) -> None:
    """A float32 sum over all units gave 3.0 to 3.7 C: for biases, weights of one column or row, and small matrices."""
    others = just_below(8192, 8192, part=part, size=0.125 if part == "column" else 0.25)
    found = Step(place="joined").factor(examples(part=part), others)
    print(f"rounding of thousands of others, {part}: the largest factor is {found:.6f}")
    assert found <= LARGEST


def made_for_blocks(of: int, *, aligned: int, at_once: int = 1) -> Batch:
    """Blocks of `of` units, in each of which one unit more changes how the later ones are rounded."""
    block = just_below(aligned, of - aligned, part="deep", at_once=at_once)
    return block.join(block).join(block)


@pytest.fixture(params=["avx2", "amx"])
def order_of_additions(request: pytest.FixtureRequest) -> Iterator[str]:
    """AMX adds the units of a block in another order than all other instruction sets."""
    with at_level(request.param):
        yield request.param


@pytest.mark.parametrize("place", [0, 31, 62, 63, 100])
def test_whatever_the_order_one_more_unit_is_within_the_bound(place: int, order_of_additions: str) -> None:
    """The proof holds for each order of the units, of which a run draws one: here the adversary chooses it."""
    for aligned, at_once in itertools.product((16, 32, 48), (1, 16, 32) if order_of_additions == "amx" else (1,)):
        step = Step(place="joined", coupled=place)
        others = made_for_blocks(block_size(1), aligned=aligned, at_once=at_once)
        found = step.factor(examples(part="deep"), others)
        print(f"rounding within a block, place {place}, {aligned} aligned: the largest factor is {found:.7f}")
        assert found <= 1.0


def test_the_adversary_would_see_blocks_that_are_too_long(
    monkeypatch: pytest.MonkeyPatch, order_of_additions: str
) -> None:
    monkeypatch.setattr(unit_order, "block_size", lambda exchanges: 512)
    step = Step(place="joined", coupled=0)
    found = step.factor(examples(part="deep"), made_for_blocks(512, aligned=256))
    # AMX adds 32 units before they come to the sum, so that even the longest block is not long enough to see it.
    assert (found > LARGEST) == (order_of_additions != "amx")


def test_the_adversary_would_see_a_norm_that_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A control: without clipping the same units move the step by far more."""
    from lazydp.components.train.mechanism import contributions

    monkeypatch.setattr(
        contributions, "clip_coefficients", lambda sq_norms, *, max_grad_norm: torch.ones_like(sq_norms) * 1.01
    )
    assert Step().factor(examples(part="bag", weights=torch.full((BAG,), 0.5))) > LARGEST


numbers = st.one_of(
    st.sampled_from([*SIZES, *(-size for size in SIZES), 0.0, 1e-45]),
    st.floats(-(2.0**127), 2.0**127, width=32, allow_nan=False),
    st.floats(-10, 10, width=32),
)


@st.composite
def some_batches(draw: st.DrawFn, count: int) -> Batch:
    def tensor(*shape: int) -> Tensor:
        size = int(torch.tensor(shape).prod())
        few = draw(st.lists(numbers, min_size=1, max_size=4))
        picks = draw(st.lists(st.integers(0, len(few) - 1), min_size=size, max_size=size))
        return torch.tensor([few[pick] for pick in picks], dtype=torch.float32).view(shape)

    batch = examples(count)
    part = draw(st.sampled_from(PARTS))
    counts = torch.zeros_like(batch.counts)
    counts[:, PARTS.index(part)] = tensor(count)
    rows = st.integers(0, 1)
    return replace(
        batch,
        ids=torch.tensor(draw(st.lists(rows, min_size=2 * count, max_size=2 * count))).view(count, 2),
        bags=torch.tensor(draw(st.lists(rows, min_size=BAG * count, max_size=BAG * count))).view(count, BAG),
        amount=tensor(count),
        weights=tensor(count, BAG),
        inputs=tensor(count, POSITIONS, WIDTH),
        signs=tensor(count, POSITIONS),
        counts=counts,
    )


@pytest.mark.parametrize("users", [None, "sum"])
def test_a_search_finds_no_unit_that_moves_a_step_by_more(users: Literal["sum"] | None) -> None:
    found: list[float] = [0.0]

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
    @given(unit=some_batches(2 if users else 1), others=some_batches(2))
    def search(unit: Batch, others: Batch) -> None:
        factor = Step(users=users, place="joined").factor(unit, others)
        found[0] = max(found[0], factor)
        target(min(factor, 1e30))
        assert factor <= LARGEST

    search()
    print(f"search, {users or 'examples'}: the largest factor is {found[0]:.6f}")
