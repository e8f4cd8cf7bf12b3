"""A small dataset for tests of the path from rows to a release, and what a run on it needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lazydp.components.budget.ledger.identifiers import register
from lazydp.components.budget.ledger.ledger import Ledger
from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.train.config import TrainConfig

TINY_SPEC = """
name: tiny
user: {column: user, vocabulary: {kind: hashed, buckets: 64, salt: tiny}}
item: {column: item, vocabulary: {kind: integer, size: 40, first: 1}}
timestamp: at
label: {kind: implicit}
max_examples_per_user: 20
history: {max_length: 5, pooling: mean}
features:
  - {name: device, source: context, kind: single, vocabulary: {kind: declared, values: [phone, desktop]}}
  - {name: hour, source: context, kind: dense, bounds: [0, 24]}
"""
TINY_CONFIG: dict[str, Any] = {
    "model": {"kind": "two_tower", "embedding_dim": 8},
    "privacy_unit": "example",
    "sampling_prob": 0.05,
    "expected_batch_size": 40,
    "steps": 30,
    "noise_multiplier": 4.0,
    "target_delta": 1e-5,
    "max_grad_norm": 0.5,
    "negatives": 4,
    "embeddings": {"learning_rate": 1.0},
    "checkpoint_every": 10,
}
SAMPLE_CONFIG: dict[str, Any] = {
    "privacy_unit": "example",
    "model": {"kind": "two_tower", "embedding_dim": 8},
    "sampling_prob": 0.1,
    "expected_batch_size": 32,
    "steps": 4,
    "noise_multiplier": 4.0,
    "target_delta": 1e-5,
    "checkpoint_every": 1,
    "negatives": 2,
}
"""Of the packages that tests run in pods."""
RUN_CONFIG = """
format_version: 1
model: {kind: two_tower, embedding_dim: 8}
privacy_unit: example
sampling_prob: 0.02
expected_batch_size: 64
steps: 10
noise_multiplier: 1.0
target_delta: 1.0e-5
popularity: {noise_multiplier: 5.0}
negatives: 2
embeddings: {learning_rate: 1.0}
"""
"""Of a run of the whole pipeline on this machine."""


def write_interactions(path: Path) -> None:
    """60 users, 40 items, 900 interactions: users of one half like the items of one half."""
    generator = np.random.default_rng(7)
    users = np.repeat(np.arange(60), 15)
    items = np.concatenate([1 + (user % 2) * 20 + generator.permutation(20)[:15] for user in range(60)])
    columns = {
        "user": [f"u{user}" for user in users],
        "item": items,
        "at": np.arange(900),
        "device": np.where(generator.random(900) < 0.5, "phone", "desktop"),
        "hour": generator.uniform(0, 24, 900),
    }
    pq.write_table(pa.table(columns), path)


@dataclass(frozen=True)
class Tiny:
    """A dataset, configurations for it, and a ledger with room for it."""

    dataset: Path
    folder: Path

    def config(self, **changes: Any) -> TrainConfig:
        """A training configuration that runs in a second."""
        return TrainConfig.parse({**TINY_CONFIG, **changes}, where="test")

    def ledger(self, *, epsilon: float = 1000.0, delta: float = 1e-5, privacy_unit: str = "example") -> str:
        """URL of a ledger in which the dataset has a budget."""
        url = f"sqlite:///{self.folder / 'ledger.db'}"
        with Ledger.open(url) as ledger:
            register(ledger, fingerprint=EncodedDataset.open(self.dataset).manifest.fingerprint, name="tiny")
            ledger.set_budget("tiny", epsilon=epsilon, delta=delta, privacy_unit=privacy_unit)
        return url
