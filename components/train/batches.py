"""The micro-batches of a step: drawn from the secure stream, read from the dataset, set beside their negatives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lazydp.components.features.encode import ranges
from lazydp.components.ingest.dataset import TRAIN, EncodedDataset, Rows, Split
from lazydp.components.train.config import TrainConfig
from lazydp.components.train.examples import Examples
from lazydp.components.train.sampler import NegativeSampler, PoissonSampler
from lazydp.kernels.noise_key import NoiseKey


@dataclass(frozen=True, slots=True)
class Drawn:
    """The examples of a step.

    Attributes:
        rows: of the split, int64 [B].
        user_sizes: where users are sampled, examples of each, int64 [U], each at least 1; the rows lie in their order.
    """

    rows: Rows
    user_sizes: Rows | None

    def parts(self, micro_batch_size: int) -> Iterator[tuple[slice, Tensor | None]]:
        """Parts of at most `micro_batch_size` examples, with the sizes of their users; no user is parted."""
        if self.user_sizes is None:
            for first in range(0, len(self.rows), micro_batch_size):
                yield slice(first, min(first + micro_batch_size, len(self.rows))), None
            return
        ends = np.cumsum(self.user_sizes)
        user = example = 0
        while user < len(ends):
            until = max(user + 1, int(np.searchsorted(ends, example + micro_batch_size, side="right")))
            yield slice(example, int(ends[until - 1])), torch.from_numpy(self.user_sizes[user:until])
            user, example = until, int(ends[until - 1])


def batch_maker(data: EncodedDataset, config: TrainConfig, secret: NoiseKey) -> Callable[[int], Sequence[Examples]]:
    """What makes the micro-batches of a step: a pure function of the step, run in the background."""
    split = data.split(TRAIN)
    draw = _user_draw(data, split, config, secret) if config.sampling == "user" else _draw(split, config, secret)
    items = data.items if data.spec.item is not None else None
    negatives = NegativeSampler(secret, num_items=items.num_items, negatives=config.negatives) if items else None

    def make(step: int) -> Sequence[Examples]:
        drawn = draw(step)
        batch = split.take(drawn.rows)
        codes = torch.from_numpy(negatives.draw(step, batch.size)) if negatives is not None else None
        return [
            Examples.of(
                batch.take(torch.arange(part.start, part.stop)) if part.stop - part.start < batch.size else batch,
                negatives=codes[part] if codes is not None else None,
                items=items,
                user_sizes=user_sizes,
            )
            for part, user_sizes in drawn.parts(config.micro_batch_size)
        ]

    return make


def _draw(split: Split, config: TrainConfig, secret: NoiseKey) -> Callable[[int], Drawn]:
    sampler = PoissonSampler(secret, population=len(split), sampling_prob=config.sampling_prob)
    return lambda step: Drawn(sampler.members(step), None)


def _user_draw(data: EncodedDataset, split: Split, config: TrainConfig, secret: NoiseKey) -> Callable[[int], Drawn]:
    sampler = PoissonSampler(
        secret, population=data.num_users, sampling_prob=config.sampling_prob, sampled=config.sampling
    )

    def draw(step: int) -> Drawn:
        starts, sizes = split.rows_of(sampler.members(step))
        # By size, so that the norms meet few runs of equal ones; a user without a training example adds nothing.
        order = np.argsort(sizes, kind="stable")
        order = order[np.searchsorted(sizes[order], 1) :]
        return Drawn(ranges(starts[order], sizes[order]), sizes[order])

    return draw
