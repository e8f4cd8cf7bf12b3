"""Shapes, losses and initial weights of the models, and that no example reads another."""

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from lazydp.components.features.batch import Bags
from lazydp.components.features.spec import EmbeddedFeature
from lazydp.components.models.build import build_model
from lazydp.components.models.config import DlrmConfig, ModelConfig, TwoTowerConfig
from lazydp.components.models.dlrm import Dlrm
from lazydp.components.models.layout import FeatureLayout
from lazydp.components.models.recommender import ModelInputs, Recommender, example_losses, initial_tables, pool
from lazydp.components.models.two_tower import TwoTower
from lazydp.components.shared.errors import InputError


def feature(name: str, table: str, num_rows: int, pooling: Any = "sum") -> EmbeddedFeature:
    return EmbeddedFeature(name=name, table=table, num_rows=num_rows, pooling=pooling)


LAYOUT = FeatureLayout(
    example=(feature("user", "user", 5), feature("history", "item", 8, "mean")),
    candidate=(feature("item", "item", 8), feature("genres", "genres", 3)),
    num_dense=2,
    num_item_dense=3,
)
CONFIGS = [
    DlrmConfig(embedding_dim=4, bottom_widths=(6,), top_widths=(7,)),
    TwoTowerConfig(embedding_dim=4, user_widths=(6,), item_widths=()),
]


def inputs_of(size: int, candidates: int) -> ModelInputs:
    generator = torch.Generator().manual_seed(size)
    return ModelInputs(
        example={f.name: torch.randn(size, 4, generator=generator) for f in LAYOUT.example},
        candidate={f.name: torch.randn(size, candidates, 4, generator=generator) for f in LAYOUT.candidate},
        dense=torch.randn(size, 2, generator=generator),
        item_dense=torch.randn(size, candidates, 3, generator=generator),
    )


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)
@pytest.mark.parametrize(("size", "candidates"), [(1, 1), (3, 5), (0, 2)])
def test_one_logit_a_candidate(config: Any, size: int, candidates: int) -> None:
    model = build_model(LAYOUT, config)
    assert model(inputs_of(size, candidates)).shape == (size, candidates)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)
def test_candidates_and_examples_are_scored_independently(config: Any) -> None:
    model = build_model(LAYOUT, config)
    inputs = inputs_of(4, 3)
    whole = model(inputs)
    for example in range(4):
        for candidate in range(3):
            one = ModelInputs(
                example={name: rows[example : example + 1] for name, rows in inputs.example.items()},
                candidate={
                    name: rows[example : example + 1, candidate : candidate + 1]
                    for name, rows in inputs.candidate.items()
                },
                dense=inputs.dense[example : example + 1],
                item_dense=inputs.item_dense[example : example + 1, candidate : candidate + 1],
            )
            torch.testing.assert_close(model(one).squeeze(), whole[example, candidate])


def test_a_dlrm_needs_no_items() -> None:
    layout = FeatureLayout(tuple(feature(f"f{i}", f"f{i}", 4) for i in range(3)), (), num_dense=2)
    model = build_model(layout, DlrmConfig(embedding_dim=4))
    inputs = ModelInputs(
        example={f.name: torch.randn(6, 4) for f in layout.example},
        candidate={},
        dense=torch.randn(6, 2),
        item_dense=torch.zeros(6, 1, 0),
    )
    assert model(inputs).shape == (6, 1)


def test_dlrm_interactions_are_the_pairwise_dot_products() -> None:
    """With a top layer that passes its inputs on, the logit is what Naumov et al. write down."""
    layout = FeatureLayout((feature("a", "a", 4), feature("b", "b", 4)), (), num_dense=0)
    model = build_model(layout, DlrmConfig(embedding_dim=4, top_widths=()))
    assert isinstance(model, Dlrm)
    a, b = torch.randn(3, 4), torch.randn(3, 4)
    top = model.top[0]
    inputs = ModelInputs(
        example={"a": a, "b": b}, candidate={}, dense=torch.zeros(3, 0), item_dense=torch.zeros(3, 1, 0)
    )
    expected = a @ top.weight[0, :4] + (a * b).sum(dim=1) * top.weight[0, 4] + top.bias  # type: ignore[index, operator]
    torch.testing.assert_close(model(inputs).squeeze(1), expected)


def test_the_towers_meet_in_a_dot_product() -> None:
    model = build_model(LAYOUT, TwoTowerConfig(embedding_dim=4, temperature=0.5))
    assert isinstance(model, TwoTower)
    inputs = inputs_of(3, 5)
    users = model.user_vector(inputs.example, inputs.dense)
    items = model.item_vector(inputs.candidate, inputs.item_dense)
    torch.testing.assert_close(model(inputs), torch.einsum("bd,bkd->bk", users, items) / 0.5)


def test_towers_need_something_to_read() -> None:
    with pytest.raises(InputError, match="at least one user, context or history feature"):
        build_model(FeatureLayout((), LAYOUT.candidate), TwoTowerConfig())
    with pytest.raises(InputError, match="at least one item feature"):
        build_model(FeatureLayout(LAYOUT.example, ()), TwoTowerConfig())
    with pytest.raises(InputError, match="at least one feature"):
        build_model(FeatureLayout((), ()), DlrmConfig())


def test_tables_of_one_name_need_one_size() -> None:
    with pytest.raises(InputError, match="'item' has 8 rows for one feature and 9 for 'other'"):
        FeatureLayout((feature("history", "item", 8), feature("other", "item", 9)), ()).tables(4)
    with pytest.raises(InputError, match="two embedded features are called 'a'"):
        FeatureLayout((feature("a", "x", 8), feature("a", "y", 9)), ()).tables(4)


def test_losses_are_those_of_their_formulas() -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.5, 0.5, 0.5]])
    labels = torch.tensor([1.0, 0.0])
    softmax = example_losses(logits, labels, loss="sampled_softmax")
    torch.testing.assert_close(softmax, torch.stack([-torch.log_softmax(logits[0], 0)[0], torch.tensor(0.0)]))
    targets = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    bce = example_losses(logits, labels, loss="bce")
    probability = torch.sigmoid(logits)
    expected = -(targets * probability.log() + (1 - targets) * (1 - probability).log()).mean(dim=1)
    torch.testing.assert_close(bce, expected)


def weights_of(model: Recommender) -> list[torch.Tensor]:
    return [*(p.detach() for p in model.parameters()), *initial_tables(model).values()]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)
def test_initial_weights_come_from_the_public_seed_alone(config: Any) -> None:
    first = weights_of(build_model(LAYOUT, config))
    torch.manual_seed(123)
    before = torch.get_rng_state()
    second = weights_of(build_model(LAYOUT, config))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    other = weights_of(build_model(LAYOUT, config.model_copy(update={"seed": 1})))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_tables_start_apart() -> None:
    tables = initial_tables(build_model(LAYOUT, CONFIGS[0]))  # type: ignore[arg-type]
    assert {name: tuple(weight.shape) for name, weight in tables.items()} == {
        "user": (5, 4),
        "item": (8, 4),
        "genres": (3, 4),
    }
    assert not torch.equal(tables["user"][:3], tables["genres"])


def test_pooling_for_serving() -> None:
    tables = {"item": torch.arange(16.0).view(8, 2)}
    bags = Bags(torch.tensor([1, 2, 2]), torch.tensor([0, 3, 3]))
    of_sum = pool((feature("h", "item", 8),), tables, {"h": bags})["h"]
    of_mean = pool((feature("h", "item", 8, "mean"),), tables, {"h": bags})["h"]
    assert of_sum.tolist() == [[10.0, 13.0], [0.0, 0.0]]
    torch.testing.assert_close(of_mean, of_sum / 3)


def test_configurations_are_told_apart_by_kind() -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(ModelConfig)
    for config in CONFIGS:
        assert adapter.validate_json(adapter.dump_json(config)) == config
    with pytest.raises(ValidationError):
        adapter.validate_python({"kind": "two_tower", "embeding_dim": 3})
