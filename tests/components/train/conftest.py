"""A small made-up problem; what an oracle says about it, by `torch.func`; what the batches of a sampler show."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.func import functional_call, grad, vmap

from lazydp.components.features.batch import Bags, Batch, ItemCatalogue
from lazydp.components.features.spec import EmbeddedFeature
from lazydp.components.models.build import build_model
from lazydp.components.models.config import DlrmConfig, TwoTowerConfig
from lazydp.components.models.layout import FeatureLayout
from lazydp.components.models.recommender import ModelInputs, Recommender
from lazydp.components.train.data.examples import Examples
from lazydp.components.train.device.placement import Placement
from lazydp.components.train.engine.dense import DenseOptimizer
from lazydp.components.train.engine.step import Engine
from lazydp.components.train.mechanism.parameters import PrivacyParameters
from lazydp.components.train.tables import schedules
from lazydp.components.train.tables.skip_ahead import EmbeddingSgd
from lazydp.kernels.noise_key import NoiseKey

Members = npt.NDArray[np.int64]


def _bags(size: int, num_rows: int, longest: int, generator: torch.Generator) -> Bags:
    """Bags of 0 to `longest` rows; few rows, so that a bag repeats some."""
    lengths = torch.randint(0, longest + 1, (size,), generator=generator)
    offsets = torch.zeros(size + 1, dtype=torch.int64)
    offsets[1:] = lengths.cumsum(0)
    return Bags(torch.randint(0, num_rows, (int(offsets[-1]),), generator=generator), offsets)


@dataclass(frozen=True)
class World:
    """Users with a history over the item table, items with a list feature, dense features on both sides."""

    num_users: int = 6
    num_items: int = 9
    num_dense: int = 3
    num_item_dense: int = 2
    pooling: str = "mean"
    candidates: bool = True
    longest_bag: int = 5

    @property
    def layout(self) -> FeatureLayout:
        def feature(name: str, table: str, num_rows: int, pooling: str = "sum") -> EmbeddedFeature:
            return EmbeddedFeature(name=name, table=table, num_rows=num_rows, pooling=pooling)  # type: ignore[arg-type]

        rows = self.num_items + 1
        example = (feature("user", "user", self.num_users), feature("history", "item", rows, self.pooling))
        if not self.candidates:
            return FeatureLayout(example, (), self.num_dense, 0)
        candidate = (feature("item", "item", rows), feature("genres", "genre", 4, self.pooling))
        return FeatureLayout(example, candidate, self.num_dense, self.num_item_dense)

    def items(self) -> ItemCatalogue:
        generator = torch.Generator().manual_seed(1)
        rows = self.num_items + 1
        return ItemCatalogue(
            num_items=self.num_items,
            dense=torch.randn(rows, self.num_item_dense, generator=generator),
            bags={"item": Bags.single(torch.arange(rows)), "genres": _bags(rows, 4, 3, generator)},
        )

    def batch(self, size: int, *, seed: int) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        item = torch.randint(1, self.num_items + 1, (size,), generator=generator) if self.candidates else None
        return Batch(
            size=size,
            labels=torch.randint(0, 2, (size,), generator=generator).float(),
            dense=torch.randn(size, self.num_dense, generator=generator),
            bags={
                "user": Bags.single(torch.randint(0, self.num_users, (size,), generator=generator)),
                "history": _bags(size, self.num_items + 1, self.longest_bag, generator),
            },
            item=item,
            user_index=None,
        )

    def examples(self, size: int, *, seed: int, num_negatives: int = 3) -> Examples:
        batch = self.batch(size, seed=seed)
        if not self.candidates:
            return Examples.of(batch)
        generator = torch.Generator().manual_seed(seed + 1_000_000)
        negatives = torch.randint(1, self.num_items + 1, (size, num_negatives), generator=generator)
        return Examples.of(batch, negatives=negatives, items=self.items())


def _multiplicities(feature: EmbeddedFeature, bags: Bags) -> Tensor:
    """What multiplies each row of the table in each bag, [G, rows]."""
    result = torch.zeros(bags.size, feature.num_rows)
    for bag in range(bags.size):
        rows = bags.values[bags.offsets[bag] : bags.offsets[bag + 1]]
        for row in rows.tolist():
            result[bag, row] += 1.0 / len(rows) if feature.pooling == "mean" else 1.0
    return result


def per_example_gradients(
    model: Recommender, tables: Mapping[str, Tensor], examples: Examples
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradient of each example's loss, [B, ...] by dense parameter and by table: the oracle, by torch.func.

    Bags are written as products with a matrix of multiplicities, so that the oracle shares nothing with the kernels.
    """
    layout = model.layout
    of_example = {f.name: _multiplicities(f, examples.bags[f.name]) for f in layout.example}
    of_candidate = {
        f.name: _multiplicities(f, examples.candidate_bags[f.name])
        .view(examples.num_candidates, examples.size, -1)
        .transpose(0, 1)
        for f in layout.candidate
    }
    table_of = {f.name: f.table for f in layout.features}

    def loss(weights: tuple[dict[str, Tensor], dict[str, Tensor]], one: tuple[Any, ...]) -> Tensor:
        dense_weights, rows = weights
        in_example, in_candidate, dense, item_dense, label = one
        inputs = ModelInputs(
            example={name: (m @ rows[table_of[name]]).unsqueeze(0) for name, m in in_example.items()},
            candidate={name: (m @ rows[table_of[name]]).unsqueeze(0) for name, m in in_candidate.items()},
            dense=dense.unsqueeze(0),
            item_dense=item_dense.unsqueeze(0),
        )
        logits = functional_call(model, dense_weights, (inputs,))
        return model.losses(logits, label.unsqueeze(0)).squeeze(0)

    weights = ({name: p.detach() for name, p in model.named_parameters()}, dict(tables))
    arguments = (of_example, of_candidate, examples.dense, examples.item_dense, examples.labels)
    result: tuple[dict[str, Tensor], dict[str, Tensor]] = vmap(grad(loss), in_dims=(None, 0))(weights, arguments)
    return result


def norms_of(gradients: tuple[dict[str, Tensor], dict[str, Tensor]]) -> Tensor:
    """Norm of each example's whole gradient, float64 [B]."""
    parts = [g.double().flatten(1) for group in gradients for g in group.values()]
    return torch.cat(parts, dim=1).norm(dim=1)


PLACED_MODELS = {
    "dlrm": DlrmConfig(embedding_dim=4, bottom_widths=(5,), top_widths=(6,), embedding_init_std=0.5),
    "two tower": TwoTowerConfig(embedding_dim=4, user_widths=(6,), item_widths=(5,), embedding_init_std=0.5),
}


def placed_engine(world: Any, placement: Placement, *, model: str = "dlrm", **changes: Any) -> Engine:
    """An engine with noise and without surprises: SGD, so that a difference of rounding stays one."""
    settings: dict[str, Any] = {
        "mode": "lazydp",
        "privacy": PrivacyParameters(noise_multiplier=0.7, max_grad_norm=0.3, expected_batch_size=4.0),
        "embeddings": EmbeddingSgd(schedules.warmup_cosine(0.5, steps=20), 0.0, 0.01),
        "dense": DenseOptimizer.named("sgd", learning_rate=schedules.constant(0.1)),
        "key": NoiseKey.for_tests(5),
    }
    return Engine(build_model(world.layout, PLACED_MODELS[model]), placement=placement, **{**settings, **changes})  # type: ignore[arg-type]


def assert_close_weights(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name],
            value,
            rtol=1e-5,
            atol=1e-5,
            msg=lambda text, name=name: f"{name}: {text}",  # type: ignore[misc]
        )


@pytest.fixture(name="placed_engine", scope="session")
def _placed_engine() -> Callable[..., Engine]:
    return placed_engine


@pytest.fixture(name="assert_close_weights", scope="session")
def _assert_close_weights() -> Callable[..., None]:
    return assert_close_weights


def evidence_against_poisson(batches: list[Members], *, population: int, probability: float) -> dict[str, float]:
    """p-values of the properties of Poisson sampling."""
    steps = len(batches)
    included = np.zeros((steps, population))
    for step, members in enumerate(batches):
        included[step, members] = 1
    sizes = np.array([len(members) for members in batches])

    def two_sided(statistic: float, degrees: int) -> float:
        return float(2 * min(stats.chi2.cdf(statistic, degrees), stats.chi2.sf(statistic, degrees)))

    def from_normal(count: float, trials: float, p: float) -> float:
        return float(2 * stats.norm.sf(abs(count - trials * p) / np.sqrt(trials * p * (1 - p))))

    variance = probability * (1 - probability)
    per_example = included.sum(0)
    overlap = (included[1:] * included[:-1]).sum()
    return {
        "rate": from_normal(sizes.sum(), steps * population, probability),
        # the distribution of the size: cells of about equal probability
        "size": _chi2_of_sizes(sizes, population, probability),
        "inclusion of each example": two_sided(
            float(((per_example - steps * probability) ** 2 / (steps * variance)).sum()), population
        ),
        # independence over pairs: the variance of the size is the sum of all covariances
        "pairs of a step": two_sided(
            float(((sizes - population * probability) ** 2 / (population * variance)).sum()), steps
        ),
        "same example in steps that follow": from_normal(overlap, (steps - 1) * population, probability**2),
    }


def _chi2_of_sizes(sizes: Members, population: int, probability: float) -> float:
    binomial = stats.binom(population, probability)
    edges = np.unique(binomial.ppf(np.linspace(0.1, 0.9, 9)))
    cumulative = np.concatenate([[0.0], binomial.cdf(edges), [1.0]])
    observed = np.bincount(np.searchsorted(edges, sizes), minlength=edges.size + 1)
    return float(stats.chisquare(observed, np.diff(cumulative) * sizes.size).pvalue)


@pytest.fixture(name="evidence_against_poisson", scope="session")
def _evidence_against_poisson() -> Callable[..., dict[str, float]]:
    return evidence_against_poisson


@pytest.fixture(name="world", scope="session")
def _world() -> type[World]:
    return World


@pytest.fixture(name="oracle", scope="session")
def _oracle() -> Callable[..., tuple[dict[str, Tensor], dict[str, Tensor]]]:
    return per_example_gradients


@pytest.fixture(name="norms_of", scope="session")
def _norms_of() -> Callable[..., Tensor]:
    return norms_of


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from threads, and lose much where tests run side by side."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
