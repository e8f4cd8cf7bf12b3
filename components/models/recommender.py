"""What every model is to training and to serving: dense layers over pooled embeddings, K candidates an example.

A `Recommender` holds the dense layers only. Tables live outside it, because training keeps them with their pending
noise and serving maps them from a file; both hand the pooled rows to the same `forward`.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from lazydp.components.features.batch import Bags
from lazydp.components.features.pooling import lookup_weights
from lazydp.components.features.spec import EmbeddedFeature
from lazydp.components.models.config import DlrmConfig, Loss, TwoTowerConfig
from lazydp.components.models.layout import FeatureLayout, TableShape
from lazydp.kernels import ops


@dataclass(frozen=True, slots=True)
class ModelInputs:
    """What the dense layers read, for B examples with K candidates each and tables of D columns.

    Attributes:
        example: pooled rows of each example-side feature, [B, D].
        candidate: pooled rows of each item-side feature, [B, K, D]; empty where the layout has none (then K = 1).
        dense: dense features of the examples, [B, n].
        item_dense: dense features of the candidates, [B, K, m].
        items: codes of the candidates, int64 [B, K]; needed where the model has a prior.
    """

    example: Mapping[str, Tensor]
    candidate: Mapping[str, Tensor]
    dense: Tensor
    item_dense: Tensor
    items: Tensor | None = None


class Recommender(nn.Module, ABC):
    """Dense layers of a model, and the layout of the tables that feed them.

    Attributes:
        has_prior: whether the logit of an item begins with its prior (`TwoTowerConfig.prior`).
    """

    has_prior = False

    def __init__(self, layout: FeatureLayout, config: DlrmConfig | TwoTowerConfig) -> None:
        super().__init__()
        self.layout = layout
        self.config = config
        self.tables: dict[str, TableShape] = layout.tables(config.embedding_dim)

    @abstractmethod
    def forward(self, inputs: ModelInputs) -> Tensor:
        """Logits [B, K] of the candidates."""

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss of each example, [B]; no example's loss depends on another example.

        Args:
            logits: [B, K]; column 0 is the observed item, the others are negatives drawn for that example.
            labels: [B], 1 where the observed item was wanted, 0 where it was not.
        """
        return example_losses(logits, labels, loss=self.config.loss)


def example_losses(logits: Tensor, labels: Tensor, *, loss: Loss) -> Tensor:
    """Loss [B] of `logits` [B, K] under `labels` [B].

    `sampled_softmax`: cross entropy of the observed item among the K candidates, times the label (an example
    without a wanted item has nothing to rank). `bce`: binary cross entropy, averaged over the K candidates, where
    negatives have label 0. Negatives shared within the batch are not offered: they would couple examples, and then
    no clipping bounds what one example contributes.
    """
    if loss == "sampled_softmax":
        return labels * (torch.logsumexp(logits, dim=1) - logits[:, 0])
    targets = torch.zeros_like(logits)
    targets[:, 0] = labels
    return functional.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=1)


def initial_tables(model: Recommender) -> dict[str, Tensor]:
    """Initial weights of every table, float32 [num_rows, dim]: a pure function of the model's public seed."""
    weights = {}
    for name, shape in model.tables.items():
        generator = torch.Generator().manual_seed(_seed_of(model.config.seed, name))
        weight = torch.empty(shape.num_rows, shape.dim)
        weights[name] = weight.normal_(std=model.config.embedding_init_std, generator=generator)
    return weights


def addressed_tables(model: Recommender, places: Mapping[str, range]) -> dict[str, Tensor]:
    """Initial weights of some rows of every table, each a function of the public seed, the table and the row's place.

    So several processes can each begin with rows of their own, and none has to hold, or draw, a whole table. The
    weights are others than those of `initial_tables`, of the same distribution.

    Args:
        model: says the seed, and the standard deviation.
        places: of the rows, by table.
    """
    weights = {}
    for name, shape in model.tables.items():
        rows = places[name]
        digest = hashlib.sha256(f"lazydp initial weights {model.config.seed} {name}".encode()).digest()
        key = torch.frombuffer(bytearray(digest), dtype=torch.uint8)  # public: it keeps no secret
        weight = ops.normal_(torch.empty(len(rows), shape.dim), key, table=0, first_row=rows.start, step=0)
        weights[name] = weight.mul_(model.config.embedding_init_std)
    return weights


def _seed_of(seed: int, table: str) -> int:
    """A seed for each table: 32 bits, all that the CPU generator takes."""
    return int.from_bytes(hashlib.sha256(f"{seed} {table}".encode()).digest()[:4])


def pool(
    features: Sequence[EmbeddedFeature],
    tables: Mapping[str, Tensor],
    bags: Mapping[str, Bags],
    weights: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Pooled rows [G, D] of each feature, read from plain tensors: for serving and evaluation.

    Args:
        features: what to read; `bags` holds one entry of G bags for each.
        tables: weights [num_rows, D] by table name, flushed.
        bags: rows to pool; an empty bag gives zeros.
        weights: of some features, float32 [N] for its N lookups, by which the weights of its pooling are multiplied.
    """
    given = weights or {}
    return {
        feature.name: _pooled(feature, tables[feature.table], bags[feature.name], given.get(feature.name))
        for feature in features
    }


def _pooled(feature: EmbeddedFeature, table: Tensor, bags: Bags, given: Tensor | None) -> Tensor:
    weights: Tensor | None
    if feature.pooling in ("sum", "mean") and given is None:
        mode, weights = feature.pooling, None
    else:
        mode, weights = "sum", lookup_weights(bags, feature.pooling)
        if given is not None:
            weights = given if weights is None else weights * given
    return functional.embedding_bag(
        bags.values, table, bags.offsets, mode=mode, per_sample_weights=weights, include_last_offset=True
    )
