"""Canaries: made-up examples that go through the ordinary training path and are as visible as an example can be.

The model under audit gets one more embedded feature, with a table of its own and a row for every canary. An example of
the data has an empty bag there. A canary has nothing else: its loss is a linear function of its row, so its gradient
lies in that row alone, always in the same direction, and is far longer than the clipping norm. After clipping it is
as long as an example's gradient may be, and no other example reaches its row: what remains is the canary's
contribution and the noise, which is the worst case that the claimed epsilon is about.

Everything else is what every run goes through: the Poisson sampler, the loader, the micro-batches, the norms over all
layers and tables, clipping, the lazy noise and the flush.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from lazydp.components.audit.guesses import Coins
from lazydp.components.features.batch import Bags, Batch
from lazydp.components.features.spec import EmbeddedFeature
from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.ingest.manifest import TRAIN
from lazydp.components.ingest.split import Rows, Split
from lazydp.components.models.recommender import ModelInputs, Recommender
from lazydp.components.train.data.sampler import Keystream
from lazydp.kernels.noise_key import NoiseKey

CANARY = "lazydp:canary"
"""Name of the feature and of its table; no feature spec can name one like it."""

LABEL = -1.0
"""Label of a canary; those of examples are 0 or 1."""

REPEATS = 4
"""A canary's bag names its row this often: a norm that forgets to add up equal rows lets it contribute twice C."""

EXCESS = 100.0
"""Length of a canary's gradient over the clipping norm."""


def toss(key: NoiseKey, count: int) -> Coins:
    """`count` fair coins: which canaries are in."""
    words = Keystream(key.derive("canaries"), stream=0).words(count)
    return (words & np.uint64(1)).astype(bool)


class CanaryModel(Recommender):
    """A recommender that also trains canaries.

    Args:
        base: the model under audit; canaries leave it as it is.
        num_canaries: rows of the canaries' table.
        max_grad_norm: C.
    """

    def __init__(self, base: Recommender, *, num_canaries: int, max_grad_norm: float) -> None:
        feature = EmbeddedFeature(name=CANARY, table=CANARY, num_rows=num_canaries, pooling="sum")
        super().__init__(replace(base.layout, example=(*base.layout.example, feature)), base.config)
        self.base = base
        self._pull = EXCESS * max_grad_norm / REPEATS

    def forward(self, inputs: ModelInputs) -> Tensor:
        """Logits [B, K + 1]: those of the base, and in the last column the loss of a canary."""
        example = dict(inputs.example)
        rows = example.pop(CANARY)
        logits = self.base(replace(inputs, example=example))
        of_canaries = self._pull * (rows @ direction(rows.shape[1]))
        return torch.cat([logits, of_canaries.unsqueeze(1)], dim=1)

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss [B]: the base's, and for canaries the last column."""
        of_examples = self.base.losses(logits[:, :-1], labels.clamp(min=0.0))
        return torch.where(labels < 0.0, logits[:, -1], of_examples)


def direction(dim: int) -> Tensor:
    """The unit vector [dim] along which every canary's gradient lies: all columns alike."""
    return torch.full((dim,), 1.0 / math.sqrt(dim))


class AuditedDataset(EncodedDataset):
    """A dataset whose training split also holds canaries.

    To a run that samples users each canary is one more user, after those of the data.

    Args:
        data: the dataset.
        canaries: numbers of the canaries that are in, int64 [n].
        examples_each: examples of one canary: 1, or a user's most where the privacy unit is a user.
    """

    def __init__(self, data: EncodedDataset, canaries: Rows, *, examples_each: int = 1) -> None:
        super().__init__(data.path, data.manifest, data.spec)
        self._canaries = canaries
        self._examples_each = examples_each

    @property
    def num_users(self) -> int:
        """Users of the data, and the canaries that are in."""
        return super().num_users + len(self._canaries)

    def split(self, name: str) -> Split:
        """The split; that for training ends with the canaries' examples."""
        found = super().split(name)
        if name != TRAIN:
            return found
        return _SplitWithCanaries(found, self._canaries, self._examples_each, first_user=super().num_users)


class _SplitWithCanaries(Split):
    def __init__(self, split: Split, canaries: Rows, examples_each: int, *, first_user: int) -> None:
        # Not a split of files: it answers what a run asks, about the examples and then about canaries.
        self._examples = split
        self._canaries = np.repeat(canaries, examples_each)
        self._examples_each = examples_each
        self._first_user = first_user

    def __len__(self) -> int:
        return len(self._examples) + len(self._canaries)

    @property
    def num_bytes(self) -> int:
        return self._examples.num_bytes

    def read_at_random(self) -> None:
        self._examples.read_at_random()

    def will_need(self, rows: Rows) -> None:
        self._examples.will_need(rows[rows < len(self._examples)])

    def will_need_lists(self, rows: Rows) -> None:
        self._examples.will_need_lists(rows[rows < len(self._examples)])

    def rows_of(self, users: Rows) -> tuple[Rows, Rows]:
        is_canary = users >= self._first_user
        starts, counts = self._examples.rows_of(users)
        of_canaries = len(self._examples) + (users - self._first_user) * self._examples_each
        return np.where(is_canary, of_canaries, starts), np.where(is_canary, self._examples_each, counts)

    def take(self, rows: Rows) -> Batch:
        rows = np.asarray(rows, dtype=np.int64)
        is_canary = rows >= len(self._examples)
        examples = self._examples.take(rows[~is_canary])
        canaries = torch.from_numpy(self._canaries[rows[is_canary] - len(self._examples)])
        order = torch.from_numpy(np.argsort(np.argsort(is_canary, kind="stable"), kind="stable"))
        return with_canaries(examples, canaries).take(order)


def with_canaries(examples: Batch, canaries: Tensor) -> Batch:
    """The examples, followed by one example of each of `canaries` (int64 [n]).

    A canary has no user, no item (the unknown one, code 0), dense features of 0 and empty bags.
    """
    none = torch.zeros(0, dtype=torch.int64)
    more = canaries.numel()

    def longer(bags: Bags, values: Tensor, per_bag: int) -> Bags:
        ends = bags.offsets[-1] + per_bag * torch.arange(1, more + 1)
        return Bags(torch.cat([bags.values, values]), torch.cat([bags.offsets, ends]))

    bags = {name: longer(bags, none, 0) for name, bags in examples.bags.items()}
    empty = Bags(none, torch.zeros(examples.size + 1, dtype=torch.int64))
    bags[CANARY] = longer(empty, canaries.repeat_interleave(REPEATS), REPEATS)
    return Batch(
        size=examples.size + more,
        labels=torch.cat([examples.labels, torch.full((more,), LABEL)]),
        dense=torch.cat([examples.dense, torch.zeros(more, examples.dense.shape[1])]),
        bags=bags,
        item=None if examples.item is None else torch.cat([examples.item, torch.zeros(more, dtype=torch.int64)]),
        user_index=None,
    )
