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
from lazydp.components.train.data.lanes import Lanes, lanes_of
from lazydp.components.train.data.read_ahead import ReadAhead
from lazydp.components.train.data.sampler import NegativeSampler, PoissonSampler
from lazydp.components.train.data.share import Share
from lazydp.components.train.ranks.ranks import Alone, Ranks
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

    @property
    def units(self) -> int:
        """How many examples, or users, are clipped apart."""
        return len(self.rows if self.user_sizes is None else self.user_sizes)

    def of_units(self, units: Rows) -> tuple[Drawn, Rows]:
        """Some units, in the order of `units` (ascending), and which of the examples are theirs."""
        if self.user_sizes is None:
            return Drawn(self.rows[units], None), units
        sizes = self.user_sizes[units]
        examples = ranges((np.cumsum(self.user_sizes) - self.user_sizes)[units], sizes)
        return Drawn(self.rows[examples], sizes), examples

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
        make: step (1, 2, ...) -> its micro-batches; see `Share`.
    """

    sampler: PoissonSampler
    make: Callable[[int], Share]

    def __call__(self, step: int) -> Share:
        """What this rank computes of a step; empty lanes where nothing was drawn."""
        return self.make(step)


def batch_maker(
    data: EncodedDataset,
    config: TrainConfig,
    secret: NoiseKey,
    *,
    read_ahead: bool | None = None,
    ranks: Ranks | None = None,
) -> BatchMaker:
    """What makes the micro-batches of a step, with the sampler that draws them.

    A run is charged for the event of a sampler: `spending.check_event` asks this one before the first step.

    Args:
        data: the dataset.
        config: says what is drawn, and how it is parted.
        secret: the run's key.
        read_ahead: whether the rows of coming steps are read from disk ahead; None: where the files are unlikely to
            stay in memory. The batches are the same.
        ranks: that divide the lanes of a step; None: this process has them all. A rank reads the examples of its lanes.
    """
    split = data.split(TRAIN)
    sampler = sampler_of(data, config, secret)
    drawn_by = _users if config.sampling == "user" else _examples
    items = data.items if data.spec.item is not None else None
    negatives = NegativeSampler(secret, num_items=items.num_items, negatives=config.negatives) if items else None

    def draw(step: int) -> Drawn:
        return drawn_by(split, sampler.members(step))

    if read_ahead if read_ahead is not None else split.num_bytes > _SHARE_OF_MEMORY * available_memory():
        draw = ReadAhead(split, draw, last=config.steps)

    def micro_batches(drawn: Drawn, codes: Tensor | None) -> Sequence[Examples]:
        batch = split.take(drawn.rows)
        return [
            Examples.of(
                batch.take(torch.arange(part.start, part.stop)) if part.stop - part.start < batch.size else batch,
                negatives=codes[part] if codes is not None else None,
                items=items,
                user_sizes=user_sizes,
            )
            for part, user_sizes in drawn.parts(config.micro_batch_size)
        ]

    lanes = Lanes(secret, config.lanes)
    here = ranks or Alone()
    own = lanes_of(here.rank, lanes=config.lanes, ranks=here.size)

    def make(step: int) -> Share:
        drawn = draw(step)
        codes = torch.from_numpy(negatives.draw(step, len(drawn.rows))) if negatives is not None else None
        of_lanes = [drawn.of_units(units) for units in lanes.divided(step, drawn.units)]
        made = [
            micro_batches(of_lane, codes if codes is None else codes[torch.from_numpy(examples)])
            for of_lane, examples in of_lanes[own.start : own.stop]
        ]
        most_parts = max(sum(1 for _ in of_lane.parts(config.micro_batch_size)) for of_lane, _ in of_lanes)
        return Share(made, own.start, len(drawn.rows), most_parts)

    return BatchMaker(sampler, make)


def sampler_of(data: EncodedDataset, config: TrainConfig, secret: NoiseKey) -> PoissonSampler:
    """What draws the batches of a run."""
    population = data.num_users if config.sampling == "user" else len(data.split(TRAIN))
    return PoissonSampler(secret, population=population, sampling_prob=config.sampling_prob, sampled=config.sampling)


def _examples(_split: Split, members: Rows) -> Drawn:
    return Drawn(members, None)


def _users(split: Split, members: Rows) -> Drawn:
    """All examples of the users drawn."""
    starts, sizes = split.rows_of(members)
    # By size, so that the norms meet few runs of equal ones; a user without a training example adds nothing.
    order = np.argsort(sizes, kind="stable")
    order = order[np.searchsorted(sizes[order], 1) :]
    return Drawn(ranges(starts[order], sizes[order]), sizes[order])
