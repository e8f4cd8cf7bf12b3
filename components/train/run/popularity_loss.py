"""What the loss would be if a model knew how often each item is wanted, and nothing else. Private: counts are exact."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.ingest.manifest import TRAIN
from lazydp.components.ingest.split import Split
from lazydp.components.models.recommender import example_losses
from lazydp.components.train.config import TrainConfig

# Counts are taken of the first examples, and the loss is a mean over some of these: enough for three digits.
_MOST_COUNTED = 1 << 24
_MOST_MEASURED = 1 << 14
_POSITIVE = 0.5


def popularity_loss(data: EncodedDataset, config: TrainConfig) -> float:
    """Mean loss of the training examples under scores by counts alone, with uniform negatives as in the run's steps.

    The score of an item is the logarithm of its positive examples + 1. For `bce` it is the log-odds: less the logarithm
    of the expected number of examples in which the item has label 0, + 1. Without items all scores are the log-odds of
    label 1.

    Args:
        data: with at least one training example.
        config: of the run: its loss and its number of negatives.
    """
    train = data.split(TRAIN)
    counted = min(len(train), _MOST_COUNTED)
    rows = np.unique(np.linspace(0, counted - 1, num=min(counted, _MOST_MEASURED), dtype=np.int64))
    labels = torch.from_numpy(train.label[rows])
    loss = config.model.loss
    if train.item is None:
        wanted = int((train.label[:counted] >= _POSITIVE).sum())
        log_odds = torch.tensor((wanted + 1) / (counted - wanted + 1), dtype=torch.float64).log()
        return float(example_losses(log_odds.expand(len(rows), 1), labels, loss=loss).mean())
    num_items = data.items.num_items
    scores = _scores(train, counted, num_items, negatives=config.negatives if loss == "bce" else None)
    generator = torch.Generator().manual_seed(0)
    negatives = torch.randint(1, num_items + 1, (len(rows), config.negatives), generator=generator)
    codes = torch.cat([torch.from_numpy(train.item[rows]).long().unsqueeze(1), negatives], dim=1)
    return float(example_losses(scores[codes], labels, loss=loss).mean())


def _scores(train: Split, counted: int, num_items: int, *, negatives: int | None) -> Tensor:
    """Scores [num_items + 1] by item code; without `negatives` no item is ever told not to be wanted."""
    assert train.item is not None
    items, wanted = train.item[:counted], train.label[:counted] >= _POSITIVE
    positive = np.bincount(items[wanted], minlength=num_items + 1)
    scores = np.log1p(positive)
    if negatives is not None:
        others = np.bincount(items[~wanted], minlength=num_items + 1) + negatives * counted / num_items
        scores -= np.log1p(others)
    return torch.from_numpy(scores)
