"""The page tells what a model cost a person, not only an interaction, and of no dataset but the model's own."""

from pathlib import Path
from typing import Any

import pytest

from lazydp.components.budget.accounting.events import dpsgd_event
from lazydp.components.budget.ledger.ledger import Ledger
from lazydp.components.budget.statement import PrivacyStatement
from lazydp.components.bundle.reader import Bundle
from lazydp.service.routes.privacy_view import PrivacyView, privacy_view
from lazydp.service.schemas import ModelStatement


@pytest.fixture(scope="module")
def statement(bundles: dict[str, Path]) -> PrivacyStatement:
    return Bundle.open(bundles["towers"], allow_test_key=True).statement


def view(statement: PrivacyStatement, **changes: Any) -> PrivacyView:
    private = {"private": True, "why_not_private": None, "test_key": False, "epsilon": 2.0, **changes}
    model = ModelStatement(
        name="m", version="1", dataset="d", run_id="r", statement=statement.model_copy(update=private)
    )
    return privacy_view(model, warn_above=10)


def test_the_person_comes_first(statement: PrivacyStatement) -> None:
    seen = view(statement, privacy_unit="example", epsilon=7.994, epsilon_user_level=1092.0, delta=1e-5)
    assert [(figure.per, figure.epsilon) for figure in seen.figures] == [("person", 1092.0), ("example", 7.994)]
    assert "practically certain" in seen.figures[0].sentence
    assert len(seen.warnings) == 1
    assert "1092" in seen.warnings[0]
    assert "above 10" in seen.warnings[0]


def test_a_figure_is_said_in_words(statement: PrivacyStatement) -> None:
    seen = view(statement, privacy_unit="user", epsilon=1.0, delta=1e-5)
    assert [figure.per for figure in seen.figures] == ["person"]
    # exp(1) / (1 + exp(1)) is 0.7311.
    assert "at most 73.11 % sure" in seen.figures[0].sentence
    assert seen.warnings == ()


def test_a_figure_per_person_that_is_missing_is_a_warning(statement: PrivacyStatement) -> None:
    seen = view(statement, privacy_unit="example", epsilon_user_level=None)
    assert seen.figures[0].epsilon is None
    assert "Nothing is known" in seen.warnings[0]


def test_no_privacy_is_no_figure(statement: PrivacyStatement) -> None:
    seen = view(statement, private=False, epsilon=None, why_not_private="it was trained without noise")
    assert seen.figures == ()
    assert "trained without noise" in seen.warnings[0]


def test_each_model_shows_its_own_dataset_only(start: Any, bundles: dict[str, Path], tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    event = dpsgd_event(noise_multiplier=2.0, sampling_prob=0.01, steps=10)
    with Ledger.open(url) as ledger:
        ledger.register_dataset("e" * 64, name="another one")
        ledger.set_budget("another one", epsilon=9.0, delta=1e-5)
        ledger.reserve(dataset="another one", event=event, run_id="one")
        ledger.commit("one", event=event, release="abc")
    with start(bundles["towers"], bundles["dlrm"], ledger=url) as client:
        budget = client.get("/v1/privacy/budget").json()
        assert budget["source"] == "ledger"
        assert budget["notice"] == "the ledger does not know the dataset of: untrained, dlrm"
        assert [model["budget"] for model in budget["models"]] == [None, None]
        assert all("does not know this model's dataset" in model["notice"] for model in budget["models"])
        for name in ("untrained", "dlrm"):
            page = client.get("/", params={"model": name}).text
            assert "another one" not in page
            assert "ledger does not know this model" in page


def test_a_model_shows_the_budget_of_its_dataset(start: Any, bundles: dict[str, Path], tmp_path: Path) -> None:
    dataset = Bundle.open(bundles["towers"], allow_test_key=True).manifest.lineage.dataset
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    with Ledger.open(url) as ledger:
        ledger.register_dataset(dataset, name="films")
        ledger.set_budget("films", epsilon=3.0, delta=1e-5)
    with start(bundles["towers"], ledger=url) as client:
        (model,) = client.get("/v1/privacy/budget").json()["models"]
        assert model["budget"]["name"] == "films"
        assert model["notice"] is None
        page = client.get("/").text
        assert "films: epsilon of 3" in page
