"""What a step reads: sampled examples or whole users, in micro-batches of bounded size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.train.data.sampler import PoissonSampler
from lazydp.components.train.run import batches
from lazydp.components.train.run.batches import Drawn, batch_maker
from lazydp.kernels.noise_key import NoiseKey

KEY = NoiseKey.for_tests(5)
USERS = {"privacy_unit": "user", "sampling": "user", "user_gradient": "sum"}


@given(
    sizes=st.lists(st.integers(1, 9), max_size=12).map(sorted), micro_batch_size=st.integers(1, 20), users=st.booleans()
)
def test_parts_cover_every_example_once_and_part_no_user(sizes: list[int], micro_batch_size: int, users: bool) -> None:
    rows = np.arange(sum(sizes))
    drawn = Drawn(rows, np.array(sizes, dtype=np.int64) if users else None)
    parts = list(drawn.parts(micro_batch_size))
    assert [row for part, _ in parts for row in rows[part]] == rows.tolist()
    for part, user_sizes in parts:
        length = part.stop - part.start
        if user_sizes is None:
            assert length <= micro_batch_size
        else:
            assert int(user_sizes.sum()) == length
            assert length <= micro_batch_size or len(user_sizes) == 1
    if users:
        assert [size for _, part in parts for size in part.tolist()] == sizes  # type: ignore[union-attr]


@pytest.mark.parametrize("micro_batch_size", [20, 4096])
def test_a_step_holds_all_examples_of_the_users_drawn_and_no_others(tiny: Any, micro_batch_size: int) -> None:
    data = EncodedDataset.open(tiny.dataset)
    split = data.split("train")
    assert split.user_index is not None
    config = tiny.config(**USERS, sampling_prob=0.2, micro_batch_size=micro_batch_size)
    make = batch_maker(data, config, KEY)
    sampler = PoissonSampler(KEY, population=data.num_users, sampling_prob=0.2, sampled="user")
    seen = 0
    for step in range(1, 30):
        members = sampler.members(step)
        expected = split.take(np.flatnonzero(np.isin(split.user_index, members)))
        made = make(step)
        assert all(examples.size <= micro_batch_size for examples in made)
        sizes = [size for examples in made for size in examples.user_sizes.tolist()]  # type: ignore[union-attr]
        assert sizes == sorted(sizes)
        assert len(sizes) == len(members)  # every user of this dataset trains
        assert sum(sizes) == expected.size
        found = torch.cat([examples.bags["user"].values for examples in made]) if made else torch.empty(0)
        assert sorted(found.tolist()) == sorted(expected.bags["user"].values.tolist())
        for examples in made:
            assert examples.user_sizes is not None
            for of_user in examples.bags["user"].values.split(examples.user_sizes.tolist()):
                assert of_user.unique().numel() == 1
        seen += len(made)
    assert seen > 29 if micro_batch_size == 20 else seen <= 29


def holds_what_was_drawn(tiny: Any) -> bool:
    """Whether 30 batches hold the examples of the sampler that the accountant is told of, and no others."""
    data = EncodedDataset.open(tiny.dataset)
    split = data.split("train")
    make = batch_maker(data, tiny.config(sampling_prob=0.05), KEY)
    sampler = PoissonSampler(KEY, population=len(split), sampling_prob=0.05)
    for step in range(1, 31):
        expected = split.take(sampler.members(step))
        for feature, bags in expected.bags.items():
            found = torch.cat([examples.bags[feature].values for examples in make(step)])
            if not torch.equal(found, bags.values):
                return False
    return True


def test_a_step_holds_the_examples_drawn_and_no_others(tiny: Any) -> None:
    assert holds_what_was_drawn(tiny)


@pytest.mark.parametrize("mistake", ["twice the probability", "shuffled batches of equal size"])
def test_examples_that_are_drawn_otherwise_are_seen(tiny: Any, mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: either breaks the guarantee, and neither stops a run."""

    def drawn(split: Any, members: Members) -> Drawn:
        if mistake == "twice the probability":
            sampler = PoissonSampler(NoiseKey.for_tests(6), population=len(split), sampling_prob=0.05)
            return Drawn(np.union1d(members, sampler.members(1 + len(members))), None)
        order = np.random.default_rng(len(members)).permutation(len(split))
        return Drawn(np.sort(order[: len(split) // 20]), None)

    monkeypatch.setattr(batches, "_examples", drawn)
    assert not holds_what_was_drawn(tiny)


def test_batches_are_a_function_of_the_step(tiny: Any) -> None:
    data = EncodedDataset.open(tiny.dataset)
    config = tiny.config(**USERS)
    forwards, backwards = batch_maker(data, config, KEY), batch_maker(data, config, KEY)
    made = {step: forwards(step) for step in range(1, 6)}
    for step in range(5, 0, -1):
        for ours, theirs in zip(made[step], backwards(step), strict=True):
            assert torch.equal(ours.bags["user"].values, theirs.bags["user"].values)
            assert torch.equal(ours.candidate_bags["item"].values, theirs.candidate_bags["item"].values)


def test_every_user_is_drawn_alike_however_many_examples_there_are() -> None:
    """Per-user rates are Binomial(T, q); sampling examples instead would favour those who have many (the control)."""
    generator = np.random.default_rng(0)
    sizes = generator.integers(1, 30, 40)
    owners = np.repeat(np.arange(40), sizes)

    def p_value(*, by_example: bool) -> float:
        population = len(owners) if by_example else 40
        sampler = PoissonSampler(
            KEY, population=population, sampling_prob=0.1 if not by_example else 0.1 / sizes.mean()
        )
        counts = np.zeros(40)
        for step in range(1, 1001):
            members = sampler.members(step)
            counts[np.unique(owners[members]) if by_example else members] += 1
        return float(stats.chi2.sf(((counts - 100) ** 2 / 90).sum(), 40))

    assert p_value(by_example=False) > 1e-3
    assert p_value(by_example=True) < 1e-6


def test_users_without_a_training_example_add_nothing(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = EncodedDataset.open(tiny.dataset)
    more = data.num_users + 40
    monkeypatch.setattr(EncodedDataset, "num_users", property(lambda self: more))
    make = batch_maker(data, tiny.config(**USERS, sampling_prob=1.0), KEY)
    assert sum(len(examples.user_sizes) for examples in make(1)) == more - 40  # type: ignore[arg-type, misc]


# --- the distribution of what is really read ---------------------------------------------------------------------

STEPS, Q = 1000, 0.05
Members = npt.NDArray[np.int64]
Draw = Callable[[PoissonSampler, int], Members]
MEMBERS: Draw = PoissonSampler.members


def twice_as_often(sampler: PoissonSampler, step: int) -> Members:
    return MEMBERS(PoissonSampler(KEY, population=sampler.population, sampling_prob=2 * Q), step)


def shuffled_epochs(sampler: PoissonSampler, step: int) -> Members:
    """Batches of equal size out of a dataset that is shuffled anew, without a key, for every epoch."""
    size = round(sampler.population * Q)
    epoch, place = divmod(step - 1, sampler.population // size)
    order = np.random.default_rng(epoch).permutation(sampler.population)
    return np.sort(order[place * size : (place + 1) * size])


def units_read(data: EncodedDataset, make: Callable[[int], Any], *, users: bool) -> list[Members]:
    """For every step the examples (or users) whose rows are in its micro-batches, told by a feature that is unique."""
    split = data.split("train")
    rows = {value: row for row, value in enumerate(split.take(np.arange(len(split))).dense[:, 0].tolist())}
    assert len(rows) == len(split)
    assert split.user_index is not None
    found = []
    for step in range(1, STEPS + 1):
        values = [value for examples in make(step) for value in examples.dense[:, 0].tolist()]
        read = np.array(sorted(rows[value] for value in values), dtype=np.int64)
        assert np.unique(read).size == read.size
        if users:
            owners = np.unique(split.user_index[read])
            # whole users, or the distribution of users says nothing about what was read of them
            assert read.tolist() == np.flatnonzero(np.isin(split.user_index, owners)).tolist()
            read = owners
        found.append(read)
    return found


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("users", [False, True], ids=["examples", "users"])
@pytest.mark.parametrize("draw", [MEMBERS, twice_as_often, shuffled_epochs])
def test_the_rows_that_are_read_have_the_law_that_is_charged(
    draw: Draw,
    users: bool,
    tiny: Any,
    evidence_against_poisson: Callable[..., dict[str, float]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows as the engine gets them. The controls draw otherwise behind a sampler that says `poisson`."""
    monkeypatch.setattr(PoissonSampler, "members", draw)
    data = EncodedDataset.open(tiny.dataset)
    config = tiny.config(**(USERS if users else {}), sampling_prob=Q, micro_batch_size=64, negatives=1)
    made = batch_maker(data, config, KEY)
    read = units_read(data, made, users=users)
    evidence = evidence_against_poisson(read, population=made.sampler.population, probability=Q)
    assert made.sampler.population == (data.num_users if users else len(data.split("train")))
    if draw in (twice_as_often, shuffled_epochs):
        assert min(evidence.values()) < 1e-6, evidence
    else:
        assert min(evidence.values()) > 1e-3, evidence
