"""The examples of a step as the engine reads them: a batch with its candidates looked up in the catalogue."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from lazydp.components.features.batch import Bags, Batch, ItemCatalogue
from lazydp.components.shared.errors import InputError


@dataclass(frozen=True, slots=True)
class Examples:
    """B examples with K candidates each.

    Attributes:
        size: B, at least 0.
        num_candidates: K, at least 1.
        labels: float32 [B].
        dense: float32 [B, n].
        item_dense: float32 [B, K, m].
        bags: B bags of each example-side feature.
        candidate_bags: K * B bags of each item-side feature, candidate by candidate: bag k * B + i is candidate k of
            example i. So every candidate is one more bag per example, like one more feature.
        user_sizes: where users are sampled, how many of the examples each user has, int64 [U]: a user's lie side by
            side, and all in one micro-batch. None where each example is clipped by itself.
    """

    size: int
    num_candidates: int
    labels: Tensor
    dense: Tensor
    item_dense: Tensor
    bags: Mapping[str, Bags]
    candidate_bags: Mapping[str, Bags]
    user_sizes: Tensor | None = None

    @classmethod
    def of(
        cls,
        batch: Batch,
        *,
        negatives: Tensor | None = None,
        items: ItemCatalogue | None = None,
        user_sizes: Tensor | None = None,
    ) -> Self:
        """The batch's examples, each with its observed item first and its negatives after it.

        Args:
            batch: the examples.
            negatives: item codes int64 [B, K - 1] drawn for each example alone; None for K = 1.
            items: the catalogue; needed where the batch has items.
            user_sizes: of the batch's users, where users are sampled.

        Raises:
            InputError: negatives or items without the other.
        """
        if batch.item is None:
            if negatives is not None:
                raise InputError("negatives were drawn for a batch that has no item column")
            empty = batch.dense.new_zeros(batch.size, 1, 0)
            return cls(batch.size, 1, batch.labels, batch.dense, empty, batch.bags, {}, user_sizes)
        if items is None:
            raise InputError("the batch has items: pass the catalogue they are looked up in")
        observed = batch.item.unsqueeze(0)
        codes = observed if negatives is None else torch.cat([observed, negatives.t()])  # [K, B]
        item_dense, candidate_bags = items.take(codes)
        return cls(
            size=batch.size,
            num_candidates=codes.shape[0],
            labels=batch.labels,
            dense=batch.dense,
            item_dense=item_dense.transpose(0, 1),
            bags=batch.bags,
            candidate_bags=candidate_bags,
            user_sizes=user_sizes,
        )
