"""`lazydp train` from beginning to end, beside a training loop as one writes it in plain torch: examples per second.

The loop has a `DataLoader` that shuffles, fetches a batch at a time and draws negatives. Its step trains the same
model, by SGD with sparse gradients for the tables and by the run's optimizer for the dense layers. It reads the same
encoded dataset, and writes its weights at the end. Everything that a run does counts: opening the dataset, reserving
the budget, steps, checkpoints.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from lazydp.components.bench.dataset_workload import DatasetWorkload
from lazydp.components.bench.trainers import TorchSgd
from lazydp.components.budget.ledger.identifiers import register
from lazydp.components.budget.ledger.ledger import Ledger
from lazydp.components.features.batch import Batch
from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.ingest.manifest import TRAIN
from lazydp.components.shared.bench_harness import Contestant, Result, measure
from lazydp.components.shared.errors import InputError
from lazydp.components.train.config import TrainConfig
from lazydp.components.train.data.examples import Examples
from lazydp.components.train.engine.dense import DenseOptimizer
from lazydp.components.train.run.costs import calibrated_noise_multiplier
from lazydp.components.train.run.settings_check import contribution_bound
from lazydp.components.train.run.train import train

CONTESTANTS = ("torch_loop", "sgd", "lazydp")
UNIT = "examples"
_OF_PRIVACY = ("noise_multiplier", "target_epsilon", "target_delta", "popularity", "minimum_quality", "publish_every")
_PLENTY = 1e6
"""Epsilon of the budget: the ledger is thrown away."""


def run(dataset: Path, config: Path, *, steps: int | None = None, repeats: int = 3) -> list[Result]:
    """Measure whole runs of each contestant; results in the order of `CONTESTANTS`.

    Args:
        dataset: what ingest wrote.
        config: of the run, with privacy and steps.
        steps: instead of the configuration's; the noise stays what it is for the configuration's.
        repeats: rounds.

    Raises:
        InputError: a configuration without privacy or steps, or that samples users.
    """
    data, settings = EncodedDataset.open(dataset), TrainConfig.load(config)
    settings = _shortened(data, settings, steps)
    examples = round(settings.steps * settings.sampling_prob * len(data.split(TRAIN)))
    with tempfile.TemporaryDirectory(prefix="lazydp-bench-") as folder:
        places = _places(Path(folder))
        ledger = _ledger(data, settings, Path(folder))
        plain = _changed(settings, dict.fromkeys(_OF_PRIVACY) | {"mode": "sgd"})
        runs: dict[str, Callable[[], object]] = {
            "torch_loop": lambda: torch_loop(data, settings, next(places)),
            "sgd": lambda: train(dataset=dataset, config=plain, out=next(places)),
            "lazydp": lambda: train(dataset=dataset, config=settings, out=next(places), ledger=ledger),
        }
        contestants = [Contestant(name, runs[name], bytes=0) for name in CONTESTANTS]
        shape = {UNIT: examples, "steps": settings.steps, "threads": torch.get_num_threads()}
        return measure(f"train {dataset.name}", shape=shape, contestants=contestants, repeats=repeats)


def torch_loop(data: EncodedDataset, config: TrainConfig, out: Path) -> TorchSgd:
    """The loop in plain torch: as many steps of as many examples as the run has on average; weights go to `out`."""
    workload = DatasetWorkload(data, config)
    dense = DenseOptimizer.named(
        config.dense.optimizer, learning_rate=config.dense.learning_rate, **config.dense.options
    )
    trainer = TorchSgd(workload, workload.weights(), dense=dense)
    rows = _TrainingRows(data, config.negatives)
    size = max(1, round(config.sampling_prob * len(rows)))
    loader: DataLoader[Examples] = DataLoader(rows, batch_size=size, shuffle=True, collate_fn=_as_it_is)
    left = config.steps
    while left:
        for examples in loader:
            trainer.step([examples])
            left -= 1
            if not left:
                break
    torch.save({"dense": trainer.model.state_dict(), "tables": trainer.bags.state_dict()}, out)
    return trainer


class _TrainingRows(Dataset[Examples]):
    """The training split as a `DataLoader` reads it, a batch at a time, with uniform negatives."""

    def __init__(self, data: EncodedDataset, negatives: int) -> None:
        self._split = data.split(TRAIN)
        self._items = data.items if data.spec.item is not None else None
        self._negatives = negatives

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, number: int) -> Examples:
        return self.__getitems__([number])

    def __getitems__(self, numbers: list[int]) -> Examples:
        batch: Batch = self._split.take(np.asarray(numbers, dtype=np.int64))
        if self._items is None:
            return Examples.of(batch)
        negatives = torch.randint(0, self._items.num_items, (batch.size, self._negatives))
        return Examples.of(batch, negatives=negatives, items=self._items)


def _as_it_is(examples: Any) -> Examples:
    """The rows of a batch come together."""
    return examples  # type: ignore[no-any-return]


def _shortened(data: EncodedDataset, config: TrainConfig, steps: int | None) -> TrainConfig:
    if not config.private or not config.steps:
        raise InputError("bench train compares a private run of steps: give a configuration with both")
    if config.sampling == "user":
        raise InputError("bench train counts examples: give a configuration that samples examples, not users")
    if steps is None:
        return config
    noise = calibrated_noise_multiplier(config, contribution_bound(data))
    return _changed(config, {"steps": steps, "noise_multiplier": noise, "target_epsilon": None})


def _changed(config: TrainConfig, changes: Mapping[str, object]) -> TrainConfig:
    return TrainConfig.parse({**config.model_dump(mode="json"), **changes}, where="bench train")


def _ledger(data: EncodedDataset, config: TrainConfig, folder: Path) -> str:
    url = f"sqlite:///{folder / 'ledger.db'}"
    with Ledger.open(url) as ledger:
        register(ledger, fingerprint=data.manifest.fingerprint, name="bench")
        ledger.set_budget("bench", epsilon=_PLENTY, delta=0.5, privacy_unit=config.privacy_unit)
    return url


def _places(folder: Path) -> Iterator[Path]:
    number = 0
    while True:
        number += 1
        yield folder / f"run{number}"
