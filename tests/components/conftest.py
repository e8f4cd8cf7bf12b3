"""A small dataset that went through the real ingest, and a ledger with room for it."""

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

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


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 users, 40 items, 900 interactions: users of one half like the items of one half."""
    # Imported here: the tests that run on a GPU machine without pyarrow share this file.
    import pyarrow as pa
    import pyarrow.parquet as pq

    from lazydp.components.ingest.ingest import ingest

    folder = tmp_path_factory.mktemp("tiny")
    generator = np.random.default_rng(7)
    users = np.repeat(np.arange(60), 15)
    items = np.concatenate([1 + (user % 2) * 20 + generator.permutation(20)[:15] for user in range(60)])
    table = pa.table(
        {
            "user": [f"u{user}" for user in users],
            "item": items,
            "at": np.arange(900),
            "device": np.where(generator.random(900) < 0.5, "phone", "desktop"),
            "hour": generator.uniform(0, 24, 900),
        }
    )
    pq.write_table(table, folder / "interactions.parquet")
    (folder / "spec.yaml").write_text(TINY_SPEC)
    ingest([str(folder / "interactions.parquet")], str(folder / "spec.yaml"), folder / "dataset")
    return folder / "dataset"


@dataclass(frozen=True)
class Tiny:
    """What a test of the path needs: a dataset, configurations for it, a ledger with room for it."""

    dataset: Path
    folder: Path

    def config(self, **changes: Any) -> Any:
        """A training configuration that runs in a second."""
        from lazydp.components.train.config import TrainConfig

        document = {
            "model": {"kind": "two_tower", "embedding_dim": 8},
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
        return TrainConfig.parse({**document, **changes}, where="test")

    def ledger(self, *, epsilon: float = 1000.0, delta: float = 1e-5, privacy_unit: str = "example") -> str:
        """URL of a ledger in which the dataset has a budget."""
        from lazydp.components.budget.ledger.identifiers import register
        from lazydp.components.budget.ledger.ledger import Ledger
        from lazydp.components.ingest.dataset import EncodedDataset

        url = f"sqlite:///{self.folder / 'ledger.db'}"
        with Ledger.open(url) as ledger:
            register(ledger, fingerprint=EncodedDataset.open(self.dataset).manifest.fingerprint, name="tiny")
            ledger.set_budget("tiny", epsilon=epsilon, delta=delta, privacy_unit=privacy_unit)
        return url


@pytest.fixture
def tiny(tiny_dataset: Path, tmp_path: Path) -> Tiny:
    """The tiny dataset, with a ledger of the test's own."""
    return Tiny(tiny_dataset, tmp_path)


@pytest.fixture
def simulated_gpu() -> Iterator[Any]:
    """A GPU that isn't there (`simulated_gpu.py`), for as long as the test lasts."""
    location = Path(__file__).with_name("simulated_gpu.py")
    specification = importlib.util.spec_from_file_location("simulated_gpu", location)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["simulated_gpu"] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    with module.SimulatedGpu() as gpu:
        yield gpu


@pytest.fixture
def gpu(request: pytest.FixtureRequest) -> Any:
    """The GPU of this machine, where torch and the extension can use it (then None); else a simulated one."""
    import torch

    from lazydp.kernels import ops

    if torch.cuda.is_available() and ops.built_with_cuda():
        return None
    return request.getfixturevalue("simulated_gpu")
