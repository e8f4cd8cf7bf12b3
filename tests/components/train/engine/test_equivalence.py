"""Lazy noise is the same mechanism as eager noise: equal when noise is ones, equal in distribution when Gaussian."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from lazydp.components.features.batch import Bags, Batch
from lazydp.components.features.spec import EmbeddedFeature
from lazydp.components.models.build import build_model
from lazydp.components.models.config import DlrmConfig
from lazydp.components.models.layout import FeatureLayout
from lazydp.components.train.data.examples import Examples
from lazydp.components.train.engine.dense import DenseOptimizer
from lazydp.components.train.engine.step import Engine
from lazydp.components.train.mechanism.parameters import PrivacyParameters
from lazydp.components.train.tables import schedules
from lazydp.components.train.tables.skip_ahead import EmbeddingSgd
from lazydp.kernels.noise_key import NoiseKey

pytestmark = pytest.mark.usefixtures("one_thread")

Pattern = list[list[list[int]]]
"""For each step, for each example, the rows of its bag."""

patterns = st.lists(st.lists(st.lists(st.integers(0, 6), max_size=4), max_size=4), min_size=1, max_size=10)


def examples_of(bags: list[list[int]]) -> Examples:
    offsets = torch.zeros(len(bags) + 1, dtype=torch.int64)
    offsets[1:] = torch.tensor([len(bag) for bag in bags], dtype=torch.int64).cumsum(0)
    values = torch.tensor([row for bag in bags for row in bag], dtype=torch.int64)
    size = len(bags)
    labels = torch.tensor([float(sum(bag) % 2) for bag in bags])
    dense = torch.linspace(-1, 1, size).unsqueeze(1)
    return Examples.of(
        Batch(size=size, labels=labels, dense=dense, bags={"rows": Bags(values, offsets)}, item=None, user_index=None)
    )


def engine_of(
    *,
    mode: Any,
    rows: int = 7,
    dim: int = 3,
    pooling: Any = "sum",
    noise: Any = "ones",
    key: int = 0,
    embeddings: EmbeddingSgd | None = None,
) -> Engine:
    layout = FeatureLayout((EmbeddedFeature(name="rows", table="rows", num_rows=rows, pooling=pooling),), (), 1)
    return Engine(
        build_model(layout, DlrmConfig(embedding_dim=dim, bottom_widths=(), top_widths=(), embedding_init_std=0.5)),
        mode=mode,
        privacy=PrivacyParameters(noise_multiplier=0.8, max_grad_norm=0.5, expected_batch_size=2.0),
        embeddings=embeddings or EmbeddingSgd(schedules.constant(0.3)),
        dense=DenseOptimizer.named("sgd", learning_rate=schedules.constant(0.1)),
        key=NoiseKey.for_tests(key),
        noise=noise,
    )


def final_weights(engine: Engine) -> dict[str, Tensor]:
    engine.flush()
    dense = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
    return dense | engine.table_weights()


@given(
    pattern=patterns,
    rows=st.integers(7, 40),
    dim=st.sampled_from([1, 3, 8, 17]),
    pooling=st.sampled_from(["sum", "mean"]),
    rate=st.sampled_from(["constant", "cosine", "warm-up from zero", "some zeros"]),
    momentum=st.sampled_from([0.0, 0.5, 0.9]),
    decay=st.sampled_from([0.0, 0.1]),
    flush_at=st.sets(st.integers(0, 9), max_size=2),
)
@settings(max_examples=60, deadline=None)
def test_with_ones_for_noise_lazy_equals_eager(
    *,
    pattern: Pattern,
    rows: int,
    dim: int,
    pooling: str,
    rate: str,
    momentum: float,
    decay: float,
    flush_at: set[int],
) -> None:
    rates = {
        "constant": schedules.constant(0.3),
        "cosine": schedules.warmup_cosine(0.5, steps=10),
        "warm-up from zero": lambda step: 0.1 * (step - 1),
        "some zeros": lambda step: 0.3 * (step % 2),
    }
    results = []
    for mode in ("lazydp", "dpsgd"):
        optimizer = EmbeddingSgd(rates[rate], momentum, decay)
        engine = engine_of(mode=mode, rows=rows, dim=dim, pooling=pooling, embeddings=optimizer)
        for step, bags in enumerate(pattern):
            # Two micro-batches, so that a row may be read by both.
            engine.step([examples_of(bags[:2]), examples_of(bags[2:])])
            if step in flush_at:
                engine.flush()
        results.append(final_weights(engine))
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-4, atol=2e-5)


PATTERN: Pattern = [
    [[0, 1], [1, 1, 2]],
    [[0, 3], []],
    [],
    [[0, 3, 3]],
    [[2, 0], [2, 4]],
    [[1], [0]],
]
RATES = schedules.tabulated([0.5, 0.1, 0.4, 0.3, 0.2, 0.6])
RUNS = 160
# The controls must be seen in fewer.
FEW = 60
# A test passes above the first; a control must be below the second, and so fail the test by far.
PASSED, SEEN = 0.01, 0.001
Fault = Callable[[Engine], None]


def _nothing(engine: Engine) -> None:
    """No fault."""


def _stale_last(engine: Engine) -> None:
    """Rows forget that they have caught up, and pay again."""
    for table in engine.tables._tables.values():
        table.last.zero_()


def runs_of(
    mode: Any, *, first_key: int, momentum: float = 0.0, fault: Fault = _nothing, runs: int = RUNS
) -> tuple[Tensor, Tensor]:
    """Final weights and last loss of runs on the same batches with different keys, [runs, values].

    Returns:
        what a run ends with; and what it would end with if its flush were left out.
    """
    examples = [examples_of(bags) for bags in PATTERN]
    flushed, missed = [], []
    for key in range(first_key, first_key + runs):
        engine = engine_of(
            mode=mode, rows=6, dim=2, noise="gaussian", key=key, embeddings=EmbeddingSgd(RATES, momentum, 0.05)
        )
        for step in examples:
            report = engine.step(step)
            fault(engine)
        missed.append(_values(engine, report.loss))
        engine.flush()
        flushed.append(_values(engine, report.loss))
    return torch.stack(flushed), torch.stack(missed)


def _values(engine: Engine, loss: float) -> Tensor:
    parts = [p.detach().flatten() for p in engine.model.parameters()]
    parts += [table.weight.flatten() for table in engine.tables._tables.values()]
    return torch.cat([*parts, torch.tensor([loss])])


def least_p_value(first: Tensor, second: Tensor) -> float:
    """Two-sample test of each value, of each row's product of columns and of neighbouring rows' products (dependence).

    Kolmogorov-Smirnov for shape and Levene for spread; the least p-value, Bonferroni-corrected.
    """
    p_values = []
    for a, b in ((first, second), (first[:, 1:] * first[:, :-1], second[:, 1:] * second[:, :-1])):
        for column in range(a.shape[1]):
            one, other = a[:, column].double().numpy(), b[:, column].double().numpy()
            p_values.append(float(stats.ks_2samp(one, other).pvalue))
            p_values.append(float(stats.levene(one, other).pvalue))
    return min(p_values) * len(p_values)


@pytest.fixture(scope="module", name="eager")
def _eager() -> Tensor:
    return runs_of("dpsgd", first_key=10_000)[0]


@pytest.fixture(scope="module", name="lazy")
def _lazy() -> tuple[Tensor, Tensor]:
    return runs_of("lazydp", first_key=0)


def test_lazy_runs_have_the_distribution_of_eager_runs(lazy: tuple[Tensor, Tensor], eager: Tensor) -> None:
    assert least_p_value(lazy[0], eager) > PASSED


@pytest.mark.parametrize(
    ("momentum", "runs"),
    [(0.8, 100), *(pytest.param(momentum, 250, marks=pytest.mark.slow) for momentum in (0.0, 0.8))],
)
def test_with_momentum_and_in_more_runs(momentum: float, runs: int) -> None:
    eager, _ = runs_of("dpsgd", first_key=10_000, momentum=momentum, runs=runs)
    assert least_p_value(runs_of("lazydp", first_key=0, momentum=momentum, runs=runs)[0], eager) > PASSED


def test_noise_missed_at_flush_is_seen(lazy: tuple[Tensor, Tensor], eager: Tensor) -> None:
    assert least_p_value(lazy[1], eager) < SEEN


def test_a_stale_last_is_seen(eager: Tensor) -> None:
    assert least_p_value(runs_of("lazydp", first_key=0, fault=_stale_last, runs=FEW)[0], eager) < SEEN


def test_variance_by_the_delay_squared_is_seen(eager: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    from lazydp.components.train.tables import skip_ahead

    def advance(self: Any, moments: Tensor, rate: float, noise_scale: float, distribution: str) -> None:
        transition, spread = moments[:, 0], moments[:, 1]
        transition *= 1.0 - rate * self._decay
        # Adds standard deviations where variances add.
        spread.copy_((spread.sqrt() * (1.0 - rate * self._decay) + rate * noise_scale).square())

    monkeypatch.setattr(skip_ahead._Weight, "advance", advance)
    assert least_p_value(runs_of("lazydp", first_key=0, runs=FEW)[0], eager) < SEEN
