"""Users who are sampled and clipped as a whole, and norms of their own for dense layers and tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lazydp.components.models.build import build_model
from lazydp.components.models.config import DlrmConfig, TwoTowerConfig
from lazydp.components.models.recommender import initial_tables
from lazydp.components.shared.errors import InputError
from lazydp.components.train.data.examples import Examples
from lazydp.components.train.engine.dense import DenseOptimizer
from lazydp.components.train.engine.step import Engine
from lazydp.components.train.mechanism.parameters import GROUPS, Group, GroupNorms, PrivacyParameters
from lazydp.components.train.tables import schedules
from lazydp.components.train.tables.skip_ahead import EmbeddingSgd
from lazydp.kernels.noise_key import NoiseKey

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIGS = {
    "dlrm": DlrmConfig(embedding_dim=4, bottom_widths=(5,), top_widths=(6,), embedding_init_std=0.5),
    "two tower": TwoTowerConfig(embedding_dim=4, user_widths=(6,), item_widths=(5,), embedding_init_std=0.5),
}
B = 4.0
Sums = dict[Group, dict[str, Tensor]]


def privacy_of(
    max_grad_norm: float | GroupNorms, *, user_gradient: Any = "sum", noise_multiplier: float = 0.0
) -> PrivacyParameters:
    return PrivacyParameters(
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
        expected_batch_size=B,
        user_gradient=user_gradient,
    )


def engine_of(made: Any, name: str, privacy: PrivacyParameters, **more: Any) -> Engine:
    settings = {
        "mode": "lazydp",
        "embeddings": EmbeddingSgd(schedules.constant(1.0)),
        "dense": DenseOptimizer.named("sgd", learning_rate=schedules.constant(1.0)),
        "key": NoiseKey.for_tests(0),
    }
    return Engine(build_model(made.layout, CONFIGS[name]), privacy=privacy, **{**settings, **more})  # type: ignore[arg-type]


def weights_of(engine: Engine) -> Sums:
    engine.flush()
    return {
        "dense": {name: p.detach().double() for name, p in engine.model.named_parameters()},
        "embeddings": {name: weight.double() for name, weight in engine.table_weights().items()},
    }


def sent_by(engine: Engine, micro_batches: Examples | Sequence[Examples]) -> Sums:
    """The clipped sum and its noise by group: what a step at rate 1 takes off the parameters, times b."""
    before = weights_of(engine)
    engine.step(micro_batches)
    after = weights_of(engine)
    return difference(before, after, times=B)


def difference(one: Sums, other: Sums, *, times: float = 1.0) -> Sums:
    return {
        group: {name: (value - other[group][name]) * times for name, value in parts.items()}
        for group, parts in one.items()
    }


def norm(parts: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(part.square().sum()) for part in parts.values()))


def joint(sums: Sums) -> float:
    return math.hypot(*(norm(parts) for parts in sums.values()))


def of_users(made: Any, sizes: Sequence[int], *, seed: int) -> Examples:
    examples: Examples = made.examples(sum(sizes), seed=seed)
    return replace(examples, user_sizes=torch.tensor(sizes, dtype=torch.int64))


def by_user(oracle: Any, engine: Engine, examples: Examples, *, mean: bool) -> Sums:
    """Each user's gradient [U, ...], from `torch.func`'s per-example ones."""
    assert examples.user_sizes is not None
    sizes = examples.user_sizes.tolist()
    gradients = oracle(engine.model, initial_tables(engine.model), examples)

    def joined(each: Tensor) -> Tensor:
        return torch.stack([part.mean(dim=0) if mean else part.sum(dim=0) for part in each.double().split(sizes)])

    return {
        group: {name: joined(each) for name, each in parts.items()}
        for group, parts in zip(GROUPS, gradients, strict=True)
    }


def clipped(users: Sums, max_grad_norm: float | GroupNorms) -> Sums:
    """The sum of the users' gradients, each clipped, by definition."""
    norms = {
        group: torch.cat([value.flatten(1) for value in parts.values()], dim=1).norm(dim=1)
        for group, parts in users.items()
    }
    if isinstance(max_grad_norm, GroupNorms):
        factors = {group: (max_grad_norm.of(group) / norms[group]).clamp(max=1.0) for group in GROUPS}
    else:
        total = torch.hypot(norms["dense"], norms["embeddings"])
        factors = dict.fromkeys(GROUPS, (max_grad_norm / total).clamp(max=1.0))
    return {
        group: {name: torch.einsum("u,u...->...", factors[group], value) for name, value in parts.items()}
        for group, parts in users.items()
    }


NORMS = [0.05, 100.0, GroupNorms(dense=0.03, embeddings=0.1), GroupNorms(dense=100.0, embeddings=0.02)]


@pytest.mark.parametrize("name", CONFIGS)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    pooling=st.sampled_from(["sum", "mean"]),
    user_gradient=st.sampled_from(["sum", "mean"]),
    max_grad_norm=st.sampled_from(NORMS),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=25, deadline=None)
def test_a_step_is_the_sum_of_clipped_user_gradients_of_torch_func(
    *,
    world: Any,
    oracle: Any,
    name: str,
    sizes: list[int],
    pooling: str,
    user_gradient: Any,
    max_grad_norm: Any,
    seed: int,
) -> None:
    """Ten items, bags of up to five: rows repeat within a bag, over features of a table, over a user's examples."""
    made = world(pooling=pooling)
    engine = engine_of(made, name, privacy_of(max_grad_norm, user_gradient=user_gradient))
    examples = of_users(made, sizes, seed=seed)
    expected = clipped(by_user(oracle, engine, examples, mean=user_gradient == "mean"), max_grad_norm)
    found = sent_by(engine, examples)
    for group in GROUPS:
        for key, value in found[group].items():
            torch.testing.assert_close(value, expected[group][key], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("max_grad_norm", [0.3, GroupNorms(dense=0.2, embeddings=0.4)])
@pytest.mark.parametrize("name", CONFIGS)
def test_examples_clipped_one_by_one_with_norms_by_group(
    world: Any, oracle: Any, name: str, max_grad_norm: Any
) -> None:
    made = world()
    engine = engine_of(made, name, privacy_of(max_grad_norm, user_gradient=None))
    examples = of_users(made, [1] * 5, seed=3)
    expected = clipped(by_user(oracle, engine, examples, mean=False), max_grad_norm)
    found = sent_by(engine, replace(examples, user_sizes=None))
    for group in GROUPS:
        for key, value in found[group].items():
            torch.testing.assert_close(value, expected[group][key], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("name", CONFIGS)
@given(size=st.integers(1, 9), user_gradient=st.sampled_from(["sum", "mean"]), seed=st.integers(0, 10_000))
@settings(max_examples=10, deadline=None)
def test_no_user_contributes_more_than_the_norm_bound(
    *, world: Any, name: str, size: int, user_gradient: Any, seed: int
) -> None:
    made = world()
    examples = of_users(made, [size], seed=seed)
    sent = sent_by(engine_of(made, name, privacy_of(0.05, user_gradient=user_gradient)), examples)
    assert joint(sent) <= 0.05 * (1 + 1e-3)
    norms = GroupNorms(dense=0.02, embeddings=0.05)
    sent = sent_by(engine_of(made, name, privacy_of(norms, user_gradient=user_gradient)), examples)
    for group in GROUPS:
        assert norm(sent[group]) <= norms.of(group) * (1 + 1e-3)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_bound_catches_examples_that_are_clipped_before_the_sum(world: Any, name: str) -> None:
    """The control: the same user, clipped example by example, is far over C, and one norm for both over a group's."""
    made = world()
    examples = of_users(made, [6], seed=0)
    each = replace(examples, user_sizes=None)
    assert joint(sent_by(engine_of(made, name, privacy_of(0.05, user_gradient=None)), each)) > 1.5 * 0.05
    assert joint(sent_by(engine_of(made, name, privacy_of(0.05)), examples)) == pytest.approx(0.05, rel=1e-2)
    by_one_norm = sent_by(engine_of(made, name, privacy_of(0.2)), examples)
    assert max(norm(by_one_norm[group]) for group in GROUPS) > 2 * 0.05


@pytest.mark.parametrize("max_grad_norm", [0.2, GroupNorms(dense=0.1, embeddings=0.3)])
@pytest.mark.parametrize("name", CONFIGS)
def test_neighbouring_datasets_differ_by_at_most_the_norm_bound(world: Any, name: str, max_grad_norm: Any) -> None:
    """Record and replay: the same real steps under the same randomness, with and without one user."""
    made, largest = world(), 0.0
    privacy = privacy_of(max_grad_norm, noise_multiplier=0.5)
    for seed in range(4):
        results = []
        user = replace(of_users(made, [3], seed=50 + seed), labels=torch.ones(3))
        for present in (True, False):
            engine = engine_of(made, name, privacy, noise="gaussian")
            for step in range(3):
                engine.step(of_users(made, [2, 1, 4], seed=100 * seed + step))
            others = of_users(made, [1, 1, 2], seed=seed)
            results.append(sent_by(engine, [others, user] if present else [others]))
            assert engine.steps_done == 4
            assert engine.pending() == 0
        moved = difference(*results)
        if isinstance(max_grad_norm, GroupNorms):
            assert all(norm(moved[group]) <= max_grad_norm.of(group) * (1 + 1e-3) for group in GROUPS)
        # In units of the noise of each group the shift is what the event says: at most one over sigma.
        shift = math.hypot(*(norm(moved[group]) / privacy.noise_std(group) for group in GROUPS))
        assert shift <= (1 + 1e-3) / 0.5
        largest = max(largest, shift)
    assert largest > 0.5


@pytest.mark.parametrize("wrong", [lambda norms, group: norms.of(group), lambda norms, group: norms.dense])
def test_noise_without_the_factor_would_break_the_bound(wrong: Any) -> None:
    """The control: sigma C_g alone, or one group's noise for both, lets a unit shift by more than 1 / sigma."""
    norms = GroupNorms(dense=0.1, embeddings=0.3)
    privacy = privacy_of(norms, noise_multiplier=2.0)
    assert math.hypot(*(norms.of(group) / privacy.noise_std(group) for group in GROUPS)) == pytest.approx(1 / 2.0)
    assert math.hypot(*(norms.of(group) / (2.0 * wrong(norms, group)) for group in GROUPS)) > 1.4 / 2.0


def test_each_group_has_its_own_noise(world: Any) -> None:
    made = world(num_users=2000, num_items=2000)
    norms = GroupNorms(dense=0.5, embeddings=2.0)
    engine = engine_of(made, "dlrm", privacy_of(norms, noise_multiplier=1.5))
    sent = sent_by(engine, [])
    for group in GROUPS:
        values = torch.cat([part.flatten() for part in sent[group].values()])
        promised = 1.5 * math.sqrt(2) * norms.of(group)
        # 6 standard errors; the factor sqrt(2), or the other group's norm, is far outside.
        assert float(values.std()) == pytest.approx(promised, rel=min(0.25, 6 / math.sqrt(2 * values.numel())))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_lazy_equals_eager_with_ones_for_noise(world: Any, momentum: float) -> None:
    made, ends = world(), []
    for mode in ("lazydp", "dpsgd"):
        engine = engine_of(
            made,
            "two tower",
            privacy_of(GroupNorms(dense=0.2, embeddings=0.6), user_gradient="mean", noise_multiplier=0.3),
            mode=mode,
            noise="ones",
            embeddings=EmbeddingSgd(schedules.warmup_cosine(0.2, steps=8), momentum, 0.01),
        )
        for step in range(6):
            engine.step([of_users(made, sizes, seed=step) for sizes in ([1, 2], [3])[: step % 3]])
        ends.append(weights_of(engine))
    for group in GROUPS:
        for key, value in ends[0][group].items():
            torch.testing.assert_close(value, ends[1][group][key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("user_gradient", ["sum", "mean"])
def test_without_noise_and_clipping_the_private_step_is_that_of_sgd(world: Any, user_gradient: Any) -> None:
    made = world()
    sent = [
        sent_by(engine_of(made, "dlrm", privacy_of(1e6, user_gradient=user_gradient), mode=mode), batches)
        for mode in ("sgd", "lazydp")
        for batches in [[of_users(made, [1, 3], seed=0), of_users(made, [2], seed=1)]]
    ]
    for group in GROUPS:
        for key, value in sent[0][group].items():
            torch.testing.assert_close(value, sent[1][group][key], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("max_grad_norm", [0.2, GroupNorms(dense=0.1, embeddings=0.3)])
def test_a_user_with_a_gradient_that_is_not_finite_counts_zero(world: Any, max_grad_norm: Any) -> None:
    made = world()
    examples = of_users(made, [2, 3, 1], seed=4)
    dense = examples.dense.clone()
    dense[3] = math.nan  # one example of the second user
    engine = engine_of(made, "dlrm", privacy_of(max_grad_norm))
    before = weights_of(engine)
    report = engine.step(replace(examples, dense=dense))
    found = difference(before, weights_of(engine), times=B)
    assert (report.size, report.units, report.non_finite) == (6, 3, 1)
    expected = sent_by(engine_of(made, "dlrm", privacy_of(max_grad_norm)), examples)
    second = sent_by(engine_of(made, "dlrm", privacy_of(max_grad_norm)), [slice_of(examples, slice(2, 5), sizes=[3])])
    for group in GROUPS:
        for key, value in found[group].items():
            torch.testing.assert_close(value, expected[group][key] - second[group][key], rtol=1e-3, atol=2e-5)


def slice_of(examples: Examples, rows: slice, *, sizes: list[int]) -> Examples:
    """Some of the examples, as a micro-batch of their own."""
    chosen = torch.arange(rows.start, rows.stop)
    of_candidates = (torch.arange(examples.num_candidates).unsqueeze(1) * examples.size + chosen).reshape(-1)
    return Examples(
        size=len(chosen),
        num_candidates=examples.num_candidates,
        labels=examples.labels[chosen],
        dense=examples.dense[chosen],
        item_dense=examples.item_dense[chosen],
        bags={name: bags.take(chosen) for name, bags in examples.bags.items()},
        candidate_bags={name: bags.take(of_candidates) for name, bags in examples.candidate_bags.items()},
        user_sizes=torch.tensor(sizes),
    )


def test_the_report_tells_users_and_groups_apart(world: Any, oracle: Any) -> None:
    made = world()
    norms = GroupNorms(dense=1e-3, embeddings=100.0)
    engine = engine_of(made, "dlrm", privacy_of(norms))
    examples = of_users(made, [2, 3], seed=0)
    users = by_user(oracle, engine, examples, mean=False)
    report = engine.step(examples)
    assert (report.size, report.units, report.clipped) == (5, 2, 1.0)
    for group in GROUPS:
        flat = torch.cat([value.flatten(1) for value in users[group].values()], dim=1).norm(dim=1)
        assert report.groups[group].mean_norm == pytest.approx(float(flat.mean()), rel=1e-3)
        assert report.groups[group].signal == pytest.approx(2e-3 if group == "dense" else float(flat.sum()), rel=1e-3)
    assert (report.groups["dense"].clipped, report.groups["embeddings"].clipped) == (1.0, 0.0)
    empty = engine.step([])
    assert (empty.size, empty.units, empty.clipped, empty.groups["dense"].signal) == (0, 0, 0.0, 0.0)


def test_users_and_examples_are_not_mistaken_for_each_other(world: Any) -> None:
    made = world()
    with pytest.raises(InputError, match="user_gradient is sum, and the examples came with no user_sizes"):
        engine_of(made, "dlrm", privacy_of(1.0)).step(made.examples(3, seed=0))
    with pytest.raises(InputError, match="user_gradient is None, and the examples came with user_sizes"):
        engine_of(made, "dlrm", privacy_of(1.0, user_gradient=None)).step(of_users(made, [3], seed=0))
    wrong = replace(made.examples(3, seed=0), user_sizes=torch.tensor([2, 2]))
    with pytest.raises(InputError, match="add up to 4, in a micro-batch of 3"):
        engine_of(made, "dlrm", privacy_of(1.0)).step(wrong)
    with pytest.raises(InputError, match="user_gradient must be sum or mean"):
        privacy_of(1.0, user_gradient="median")
    for values in ((0.0, 1.0), (1.0, math.inf), (math.nan, 1.0)):
        with pytest.raises(InputError, match=r"max_grad_norm of (dense|embeddings) must lie in"):
            GroupNorms(dense=values[0], embeddings=values[1])
