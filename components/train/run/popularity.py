"""Counts of items, released once a run with Gaussian noise: what the service answers to unknown users.

**What is counted.** The positive examples of the training split: what the model is trained on, and no more (not all
that a user has seen, for which the contribution bound does not hold).

- Unit `example`: for each item its examples. An example adds 1 to one item, so that adding or removing one moves all
  counts together by at most 1 (L2).
- Unit `user`: for each item the users who have an example of it, each once however many they have. Ingest keeps at
  most k training examples of a user, so a user adds 1 to at most k items and moves the counts by at most sqrt(k). To
  count a user's examples instead would let all k fall on one item, and ask for noise in proportion to k.

**The mechanism.** Noise of standard deviation noise_multiplier * sensitivity on the count of every item of the public
catalogue: the Gaussian mechanism of that noise_multiplier, one more release in the run's event (`RunCost.of_run`).
Items that nobody chose get noise too, because that nobody chose them is private. The entry of unknown items is zero
whatever the data: ingest takes no rows of them.

**Once.** The noise of item i has a fixed address under the run's key, (POPULARITY_TABLE, i, step 0), where nothing else
draws: dense parameters end below that table. Data, setting and key belong to the run, so its snapshots and its export
release the same bits, which is one release.

**Floating point.** Counts are exact in float64, and the noise is a float32 normal times a float64. The noised count is
rounded to a whole number: its low bits, which are those that can betray the count before the noise (Mironov 2012), stay
here. Rounding, and the cast to float32 (exact up to 2^24), are post-processing. No more is claimed for it than that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.ingest.manifest import TRAIN
from lazydp.components.ingest.split import Split
from lazydp.components.onepass.start import noised_counts as start_counts
from lazydp.components.shared.errors import InputError
from lazydp.components.shared.noise_addresses import POPULARITY_TABLE
from lazydp.components.train.config import PrivacyUnit, TrainConfig
from lazydp.kernels import ops
from lazydp.kernels.noise_key import NoiseKey

Counts = npt.NDArray[np.int64]

_POSITIVE = 0.5
# Examples counted at once: bounds the memory, whatever the dataset's size.
_AT_ONCE = 1 << 20


def noised_counts(
    data: EncodedDataset, config: TrainConfig, key: NoiseKey, *, noise_multiplier: float | None = None
) -> Tensor | None:
    """The counts that a run releases, float32 [num_items + 1] by item code; None where it releases none.

    Those of a start are the start's own (`onepass.statistics`).

    Args:
        data: what the run is trained on.
        config: of the run.
        key: the run's noise key.
        noise_multiplier: sigma of the run, by which a start's noise goes.

    Raises:
        InputError: the dataset has no items, or no users or bound on their examples where they are the unit.
    """
    noise = config.start_noise(noise_multiplier)
    if noise is not None:
        return start_counts(data, config.privacy_unit, noise, key) if config.private else None
    if config.popularity is None:
        return None
    num_items = data.items.num_items
    counts = item_histogram(data.split(TRAIN), num_items=num_items, privacy_unit=config.privacy_unit)
    normals = torch.empty(num_items, 1)
    ops.normal_(normals, key.derive("noise").tensor(), table=POPULARITY_TABLE, first_row=1, step=0)
    noised = np.rint(counts[1:] + noise_of_counts(data, config) * normals.squeeze(1).double().numpy())
    return torch.from_numpy(np.concatenate([[0.0], noised])).float()


def exact_counts(data: EncodedDataset, config: TrainConfig) -> Tensor:
    """The same without noise, for the prior of a run without privacy."""
    num_items = data.items.num_items
    counts = item_histogram(data.split(TRAIN), num_items=num_items, privacy_unit=config.privacy_unit)
    return torch.from_numpy(counts).float()


def noise_of_counts(data: EncodedDataset, config: TrainConfig) -> float:
    """Standard deviation of the noise on every count; 0 where the run releases none."""
    if config.popularity is None:
        return 0.0
    return config.popularity.noise_multiplier * sensitivity(
        config.privacy_unit, max_examples_per_user=data.manifest.max_examples_per_user
    )


def sensitivity(privacy_unit: PrivacyUnit, *, max_examples_per_user: int | None) -> float:
    """The most (L2) by which adding or removing one privacy unit moves what `item_histogram` counts.

    Raises:
        InputError: the unit is a user, and nothing bounds a user's examples.
    """
    if privacy_unit == "example":
        return 1.0
    if max_examples_per_user is None:
        raise InputError("max_examples_per_user: counts per user need a bound on the examples of a user")
    return math.sqrt(max_examples_per_user)


def item_histogram(train: Split, *, num_items: int, privacy_unit: PrivacyUnit) -> Counts:
    """Positive examples of each item, or users who have one: int64 [num_items + 1] by item code; exact, hence private.

    Raises:
        InputError: the split has no items, or no users where they are counted.
    """
    if train.item is None:
        raise InputError("popularity counts items, and this dataset has none")
    counts = np.zeros(num_items + 1, dtype=np.int64)
    for part in _parts(train):
        positive = train.label[part] >= _POSITIVE
        items = train.item[part][positive]
        if privacy_unit == "user":
            if train.user_index is None:
                raise InputError("this dataset has no user column: its privacy unit can only be the example")
            pairs = train.user_index[part][positive] * (num_items + 1) + items
            items = np.unique(pairs) % (num_items + 1)
        counts += np.bincount(items, minlength=num_items + 1)
    return counts


def _parts(train: Split) -> Iterator[slice]:
    """The split in order, some examples at a time; all examples of a user are in one part."""
    start = 0
    while start < len(train):
        end = min(start + _AT_ONCE, len(train))
        if train.user_index is not None:
            end = int(np.searchsorted(train.user_index, train.user_index[end - 1], side="right"))
        yield slice(start, end)
        start = end
