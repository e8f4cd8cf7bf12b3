"""A small dataset to audit on, and a run short enough to be audited many times."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lazydp.components.ingest.ingest import ingest
from lazydp.components.train.config import TrainConfig

SPEC = """
name: tiny
user: {column: user, vocabulary: {kind: integer, size: 20}}
item: {column: item, vocabulary: {kind: integer, size: 12}}
timestamp: at
label: {kind: implicit}
max_examples_per_user: 4
history: {max_length: 3}
features:
  - {name: device, kind: single, vocabulary: {kind: integer, size: 3}}
  - {name: hour, kind: dense, bounds: [0, 24]}
"""


@pytest.fixture(scope="session", name="dataset")
def _dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("audited")
    generator = np.random.default_rng(0)
    size = 120
    log = {
        "user": generator.integers(0, 20, size),
        "item": generator.integers(0, 12, size),
        "at": np.arange(size),
        "device": generator.integers(0, 3, size),
        "hour": generator.random(size) * 24,
    }
    pq.write_table(pa.table(log), folder / "log.parquet")
    ingest([str(folder / "log.parquet")], SPEC, folder / "dataset")
    return folder / "dataset"


@pytest.fixture(name="configured")
def _configured() -> Callable[..., TrainConfig]:
    """A configuration with changes; unchanged it claims epsilon 1.99 at delta 1e-5: eight steps of everything."""

    def make(**changes: Any) -> TrainConfig:
        settings: dict[str, Any] = {
            "model": {"kind": "two_tower", "embedding_dim": 8},
            "privacy_unit": "example",
            "sampling_prob": 1.0,
            "expected_batch_size": 1000,
            "steps": 8,
            "noise_multiplier": 2 * 8**0.5,
            "target_delta": 1e-5,
            "negatives": 1,
            "embeddings": {"learning_rate": 0.1},
        }
        return TrainConfig.parse(settings | changes, where="test")

    return make
