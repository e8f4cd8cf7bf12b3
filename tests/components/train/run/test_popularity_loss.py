"""The loss of popularity is that of the best scores that no example has a part in."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.ingest.ingest import ingest
from lazydp.components.ingest.manifest import TRAIN
from lazydp.components.models.recommender import example_losses
from lazydp.components.train.run.popularity_loss import popularity_loss

CLICKS = """
name: clicks
label: {kind: column, column: label}
split: {kind: none}
features: [{name: x, kind: dense, bounds: [0, 1]}]
"""


@pytest.mark.parametrize("loss", ["sampled_softmax", "bce"])
def test_no_constant_scores_of_items_are_better(tiny: Any, loss: Any) -> None:
    """Against scores trained by gradient descent on fresh negatives; no score at all is the negative control."""
    data = EncodedDataset.open(tiny.dataset)
    config = tiny.config(model={"kind": "two_tower", "embedding_dim": 8, "loss": loss})
    train, num_items = data.split(TRAIN), data.items.num_items
    assert train.item is not None
    items, labels = torch.tensor(train.item).long(), torch.tensor(train.label)
    generator = torch.Generator().manual_seed(1)

    def mean_loss(scores: torch.Tensor, draws: int) -> torch.Tensor:
        negatives = torch.randint(1, num_items + 1, (draws * len(items), config.negatives), generator=generator)
        codes = torch.cat([items.repeat(draws).unsqueeze(1), negatives], dim=1)
        return example_losses(scores[codes], labels.repeat(draws), loss=loss).mean()

    scores = torch.zeros(num_items + 1, requires_grad=True)
    descent = torch.optim.Adam([scores], lr=0.1)
    for _ in range(60):
        descent.zero_grad()
        mean_loss(scores, 2).backward()  # type: ignore[no-untyped-call]
        descent.step()
    with torch.no_grad():
        best, none = float(mean_loss(scores, 50)), float(mean_loss(torch.zeros(num_items + 1), 50))
    assert popularity_loss(data, config) == pytest.approx(best, abs=0.02)
    assert popularity_loss(data, config) < none


def test_without_items_it_is_the_entropy_of_the_labels(tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(CLICKS)
    pq.write_table(pa.table({"label": np.repeat([1, 0], [20, 80]), "x": np.zeros(100)}), tmp_path / "clicks.parquet")
    ingest([str(tmp_path / "clicks.parquet")], str(tmp_path / "spec.yaml"), tmp_path / "dataset")
    config = tiny.config(model={"kind": "dlrm", "embedding_dim": 4})
    found = popularity_loss(EncodedDataset.open(tmp_path / "dataset"), config)
    assert found == pytest.approx(-0.2 * math.log(0.2) - 0.8 * math.log(0.8), abs=5e-4)
