"""A training step on the user's own encoded dataset, as something to measure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lazydp.components.bench.workload import FLOAT_BYTES
from lazydp.components.features.spec import FeatureSpec
from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.ingest.manifest import TRAIN
from lazydp.components.models.build import build_model
from lazydp.components.models.config import DlrmConfig, TwoTowerConfig
from lazydp.components.models.recommender import Recommender, initial_tables
from lazydp.components.shared.errors import InputError
from lazydp.components.shared.huge_pages import huge_pages_in_use
from lazydp.components.train.config import TrainConfig
from lazydp.components.train.data.examples import Examples
from lazydp.components.train.run.batches import batch_maker
from lazydp.components.train.tables.lookups import lookups_of
from lazydp.kernels.noise_key import NoiseKey

_DEFAULT_BATCH = 2048


class DatasetWorkload:
    """The user's own data: its tables, skew, pooling, batch and sampling.

    Everything comes from the configuration but the optimizers, which the bench sets for all contestants alike.

    Raises:
        InputError: a configuration that the dataset doesn't fit.
    """

    def __init__(self, data: EncodedDataset, config: TrainConfig) -> None:
        self._data = data
        self._config = config
        self._make = batch_maker(data, config, NoiseKey.generate())
        tables = self.model().tables
        self._dims = {name: shape.dim for name, shape in tables.items()}
        self.table_bytes = sum(shape.num_rows * shape.dim * FLOAT_BYTES for shape in tables.values())
        self.expected_batch_size = float(config.expected_batch_size)
        self.user_gradient = config.user_gradient

    @classmethod
    def open(cls, dataset: Path, config: Path | None = None) -> DatasetWorkload:
        """The workload of an encoded dataset under a training configuration; a plain one where none is given.

        Raises:
            InputError: the dataset or the configuration can't be read, or the dataset has no examples.
        """
        data = EncodedDataset.open(dataset)
        if not len(data.split(TRAIN)):
            raise InputError(f"{dataset} has no training examples to measure a step on")
        return cls(data, TrainConfig.load(config) if config is not None else plain_config(data))

    def figures(self) -> dict[str, int]:
        """See `Workload.figures`; the batch is that of the first step."""
        examples = self.batch(1)
        tables = self.model().tables.values()
        return {
            "tables": len(tables),
            "rows": sum(shape.num_rows for shape in tables),
            "dim": self._config.model.embedding_dim,
            "examples": sum(part.size for part in examples),
            "lookups": sum(
                read.indices.numel() for part in examples for read in lookups_of(self.model().layout, part).values()
            ),
            "threads": torch.get_num_threads(),
            "huge_pages": int(huge_pages_in_use()),
        }

    def model(self) -> Recommender:
        """See `Workload.model`."""
        return build_model(self._data.spec, self._config.model)

    def weights(self) -> dict[str, Tensor]:
        """See `Workload.weights`."""
        return initial_tables(self.model())

    def batch(self, number: int) -> Sequence[Examples]:
        """A Poisson sample of the training split, as training draws it; never empty."""
        drawn = list(self._make(number))
        if not any(part.size for part in drawn):
            raise InputError(
                f"a step drew no example: sampling_prob {self._config.sampling_prob} is too small for this dataset"
            )
        return drawn

    def embedding_bytes(self) -> int:
        """See `Workload.embedding_bytes`; of the first step."""
        layout = self.model().layout
        total = 0
        reads = [lookups_of(layout, part) for part in self.batch(1)]
        for table, dim in self._dims.items():
            indices = torch.cat([read[table].indices for read in reads if table in read])
            total += (indices.numel() + 2 * torch.unique(indices).numel()) * dim * FLOAT_BYTES
        return total

    def matmul_flops(self) -> int | None:
        """Not counted for models of the user."""
        return None


def plain_config(data: EncodedDataset) -> TrainConfig:
    """Batches of 2048 examples, and a model that the dataset's spec admits."""
    examples = len(data.split(TRAIN))
    probability = min(1.0, _DEFAULT_BATCH / examples)
    return TrainConfig(
        model=_plain_model(data.spec),
        sampling_prob=probability,
        expected_batch_size=probability * examples,
        steps=1,
        noise_multiplier=1.0,
        target_delta=1e-5,
    )


def _plain_model(spec: FeatureSpec) -> DlrmConfig | TwoTowerConfig:
    return TwoTowerConfig() if spec.item is not None else DlrmConfig()
