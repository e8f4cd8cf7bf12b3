"""The micro-batches of a step: drawn from the secure stream, read from the dataset, set beside their negatives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lazydp.components.features.encode import ranges
from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.ingest.manifest import TRAIN
from lazydp.components.ingest.split import Rows, Split
from lazydp.components.shared.memory import available_memory
from lazydp.components.train.config import TrainConfig
from lazydp.components.train.data.examples import Examples
from lazydp.components.train.data.read_ahead import ReadAhead
from lazydp.components.train.data.sampler import NegativeSampler, PoissonSampler
from lazydp.kernels.noise_key import NoiseKey

# Files that take more of the memory that is available are read ahead: tables and gradients need some too.
_SHARE_OF_MEMORY = 0.5


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


@dataclass(frozen=True, slots=True)
class BatchMaker:
    """Makes the micro-batches of a step: a pure function of the step, run in the background.

    Attributes:
        sampler: draws all that a step reads, and says by its `dp_event` what that is to the accountant.
        make: step (1, 2, ...) -> its micro-batches.
    """

    sampler: PoissonSampler
    make: Callable[[int], Sequence[Examples]]

    def __call__(self, step: int) -> Sequence[Examples]:
        """The micro-batches of a step; none where nothing was drawn."""
        return self.make(step)


def batch_maker(
    data: EncodedDataset, config: TrainConfig, secret: NoiseKey, *, read_ahead: bool | None = None
) -> BatchMaker:
    """What makes the micro-batches of a step, with the sampler that draws them.

    A run is charged for the event of a sampler: `spending.check_event` asks this one before the first step.

    Args:
        data: the dataset.
        config: says what is drawn, and how it is parted.
        secret: the run's key.
        read_ahead: whether the rows of coming steps are read from disk ahead; None: where the files are unlikely to
            stay in memory. The batches are the same.
    """
    split = data.split(TRAIN)
    population, drawn_by = (data.num_users, _users) if config.sampling == "user" else (len(split), _examples)
    sampler = PoissonSampler(secret, population=population, sampling_prob=config.sampling_prob, sampled=config.sampling)
    items = data.items if data.spec.item is not None else None
    negatives = NegativeSampler(secret, num_items=items.num_items, negatives=config.negatives) if items else None

    def draw(step: int) -> Drawn:
        return drawn_by(split, sampler.members(step))

    if read_ahead if read_ahead is not None else split.num_bytes > _SHARE_OF_MEMORY * available_memory():
        draw = ReadAhead(split, draw, last=config.steps)

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

    return BatchMaker(sampler, make)


def _examples(_split: Split, members: Rows) -> Drawn:
    return Drawn(members, None)


def _users(split: Split, members: Rows) -> Drawn:
    """All examples of the users drawn."""
    starts, sizes = split.rows_of(members)
    # By size, so that the norms meet few runs of equal ones; a user without a training example adds nothing.
    order = np.argsort(sizes, kind="stable")
    order = order[np.searchsorted(sizes[order], 1) :]
    return Drawn(ranges(starts[order], sizes[order]), sizes[order])
