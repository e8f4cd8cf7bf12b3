"""From a Parquet file to the answer for somebody whom the model does not know: the most popular items."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lazydp.components.budget.accounting.epsilon import epsilon
from lazydp.components.budget.ledger.identifiers import register
from lazydp.components.budget.ledger.ledger import Ledger
from lazydp.components.bundle.reader import Bundle
from lazydp.components.export.export import export
from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.ingest.ingest import ingest
from lazydp.components.train.config import TrainConfig
from lazydp.components.train.run.costs import RunCost
from lazydp.components.train.run.train import train

SPEC = """
name: shop
user: {column: user, vocabulary: {kind: integer, first: 0, size: 200}}
item: {column: item, vocabulary: {kind: integer, first: 1, size: 30}}
timestamp: at
label: {kind: implicit}
max_examples_per_user: 6
history: {max_length: 5, pooling: mean}
"""
CONFIG = {
    "model": {"kind": "two_tower", "embedding_dim": 8},
    "privacy_unit": "user",
    "sampling_prob": 0.05,
    "expected_batch_size": 40,
    "steps": 5,
    "noise_multiplier": 4.0,
    "target_delta": 1e-5,
}
COUNTING = {"popularity": {"noise_multiplier": 2.0}}
FAVOURITES = [21, 8, 13]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everybody takes the three favourites, and four other items."""
    folder = tmp_path_factory.mktemp("shop")
    dice = np.random.default_rng(2)
    others = np.setdiff1d(np.arange(1, 31), FAVOURITES)
    items = np.concatenate([[*dice.choice(others, 2), *FAVOURITES, *dice.choice(others, 2)] for _ in range(200)])
    table = pa.table({"user": np.repeat(np.arange(200), 7), "item": items, "at": np.arange(1400)})
    pq.write_table(table, folder / "log.parquet")
    (folder / "spec.yaml").write_text(SPEC)
    ingest([str(folder / "log.parquet")], str(folder / "spec.yaml"), folder / "data")
    return folder / "data"


def released(data: Path, folder: Path, **changes: Any) -> tuple[Path, str]:
    """A bundle under a secret key, and the URL of the ledger that paid for it."""
    url = f"sqlite:///{folder / 'ledger.db'}"
    with Ledger.open(url) as ledger:
        register(ledger, fingerprint=EncodedDataset.open(data).manifest.fingerprint, name="shop")
        ledger.set_budget("shop", epsilon=50.0, delta=1e-5, privacy_unit="user")
    config = TrainConfig.parse({**CONFIG, **changes}, where="test")
    train(dataset=data, config=config, out=folder / "run", ledger=url)
    export(run=folder / "run", dataset=data, out=folder / "bundle", ledger=url)
    return folder / "bundle", url


def ask(client: httpx.Client, **query: Any) -> httpx.Response:
    return client.post("/v1/recommendations", json={"k": 3, **query})


def test_an_unknown_user_gets_the_most_popular_items(start: Any, data: Path, tmp_path: Path) -> None:
    bundle, url = released(data, tmp_path, **COUNTING)
    counts = Bundle.open(bundle).popularity
    assert counts is not None
    with start(bundle, allow_test_key=False, ledger=url) as client:
        answer = ask(client, user_id="nobody").json()
        assert answer["source"] == "popular"
        # 200 users less noise of 2 sqrt(6) against 50 for others: the favourites, in the order of their noised counts.
        found = [int(item["id"]) for item in answer["items"]]
        assert sorted(found) == sorted(FAVOURITES)
        assert found == (torch.argsort(counts, descending=True, stable=True)[:3]).tolist()
        assert [item["score"] for item in answer["items"]] == counts[found].tolist()
        assert ask(client).json()["items"] == answer["items"]
        assert ask(client, user_id="7").json()["source"] == "user"
        budget = client.get("/v1/privacy/budget").json()
        assert "noise multiplier 2.0; epsilon without" in client.get("/").text
    # What the service says of the budget covers the counts.
    whole = epsilon(RunCost(TrainConfig.parse({**CONFIG, **COUNTING}, where="test"), 6).of_run(), delta=1e-5)
    assert budget["datasets"][0]["epsilon_spent"] == pytest.approx(whole)
    [statement] = [model["statement"] for model in budget["models"]]
    assert statement["epsilon"] == pytest.approx(whole)
    assert statement["popularity"]["noise_multiplier"] == 2.0
    assert statement["popularity"]["epsilon_without"] < 0.9 * whole


def test_without_counts_an_unknown_user_gets_none(start: Any, data: Path, tmp_path: Path) -> None:
    bundle, url = released(data, tmp_path)
    with start(bundle, allow_test_key=False, ledger=url) as client:
        answer = ask(client, user_id="nobody")
        assert answer.status_code == 404
        assert ask(client, user_id="7").json()["source"] == "user"
