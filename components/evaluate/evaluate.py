"""Measures a bundle on the held-out split of a dataset, beside a popularity baseline. The figures are private."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lazydp.components.bundle.reader import Bundle
from lazydp.components.evaluate.candidates import read_candidates
from lazydp.components.evaluate.metrics import RankingMetrics, Ranks, label_auc, ranking_metrics, ranks
from lazydp.components.evaluate.scoring import Scorer, catalogue_scorer, observed_scores
from lazydp.components.features.batch import Bags, Batch
from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.ingest.split import Split
from lazydp.components.shared.errors import InputError
from lazydp.components.shared.files import PRIVATE_FILE, write_json
from lazydp.components.shared.progress import Progress

_log = logging.getLogger("lazydp.evaluate")

FORMAT_VERSION = 1
PRIVATE = "private: computed from private data without noise; internal use only, not a release"

# Scores held at once: examples x items, about 128 MB.
SCORES_AT_ONCE = 1 << 25


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How a bundle ranks, and how popularity alone ranks the same held-out items.

    Attributes:
        model: the bundle's metrics; None where the dataset has no items to rank.
        popularity: items by their number of positive training examples.
        label_auc: AUC of the observed examples' scores against their labels; None with one kind of label only.
        examples: held-out examples read.
        epsilon: of the bundle's privacy statement; None without privacy.
        bundle: version of the bundle.
    """

    model: RankingMetrics | None
    popularity: RankingMetrics | None
    label_auc: float | None
    examples: int
    epsilon: float | None
    bundle: str

    def to_json(self) -> dict[str, Any]:
        """As stored in metrics.json."""
        return {
            "notice": PRIVATE,
            "bundle": self.bundle,
            "epsilon": self.epsilon,
            "examples": self.examples,
            "model": self.model.to_json() if self.model is not None else None,
            "popularity": self.popularity.to_json() if self.popularity is not None else None,
            "label_auc": self.label_auc,
        }

    def figures(self) -> dict[str, float]:
        """Every figure by a flat name, as plain floats."""
        found = {} if self.label_auc is None else {"label_auc": self.label_auc}
        for who, metrics in (("model", self.model), ("popularity", self.popularity)):
            if metrics is not None:
                found |= {f"{who}_{name}": float(value) for name, value in metrics.to_json().items()}
        return found

    def save(self, path: Path) -> None:
        """Write metrics.json, readable by its owner only."""
        write_json(path, self.to_json(), format_version=FORMAT_VERSION, mode=PRIVATE_FILE)

    def table(self) -> str:
        """For people."""
        if self.examples == 0:
            return "no metrics: the dataset has no held-out examples"
        lines = [f"metrics ({PRIVATE})"]
        if self.model is not None and self.popularity is not None:
            lines += [
                f"{'':12}{'AUC':>9}{'HR@10':>9}{'NDCG@10':>9}{'Recall@20':>11}   users",
                _row("model", self.model),
                _row("popularity", self.popularity),
            ]
        if self.label_auc is not None:
            lines.append(f"AUC of the observed labels: {self.label_auc:.4f}   examples: {self.examples}")
        return "\n".join(lines)


def _row(name: str, metrics: RankingMetrics) -> str:
    return (
        f"{name:12}{metrics.auc:9.4f}{metrics.hr_at_10:9.4f}{metrics.ndcg_at_10:9.4f}{metrics.recall_at_20:11.4f}"
        f"   {metrics.users}"
    )


def evaluate(*, bundle: Path, dataset: Path, candidates: Path | None = None) -> Evaluation:
    """Rank the held-out items of `dataset` by the released weights of `bundle`.

    Args:
        bundle: an exported model; one for tests or without privacy is accepted too, since nothing is released here.
        dataset: the encoded dataset; without held-out examples nothing is measured, and the log says so.
        candidates: a file of what each user's held-out items are ranked among (`candidates.read_candidates`), for the
            users that it names; None for the whole catalogue and all users.

    Raises:
        InputError: the bundle was made for other features, or the candidates do not fit the dataset.
    """
    released = Bundle.open(bundle, allow_test_key=True, allow_non_private=True)
    data = EncodedDataset.open(dataset)
    if released.spec.document() != data.spec.document():
        raise InputError(
            f"bundle {bundle} was made for another feature spec than dataset {dataset}: evaluate it on its own dataset"
        )
    test = data.split("test")
    if len(test) == 0:
        _log.warning("dataset %s has no held-out examples, so nothing is measured: ingest it with a split", dataset)
        return _nothing(released)
    observed, labels = _observed(released, test)
    found = None
    if released.catalogue is not None:
        scorer = catalogue_scorer(released.model, released.tables, released.catalogue)
        found = _rank_both(scorer, data, test, read_candidates(candidates, data) if candidates is not None else None)
    return Evaluation(
        model=found[0] if found else None,
        popularity=found[1] if found else None,
        label_auc=label_auc(observed, labels),
        examples=len(test),
        epsilon=released.statement.epsilon,
        bundle=released.manifest.version,
    )


def _nothing(released: Bundle) -> Evaluation:
    """What is known of a bundle without held-out examples."""
    epsilon, version = released.statement.epsilon, released.manifest.version
    return Evaluation(model=None, popularity=None, label_auc=None, examples=0, epsilon=epsilon, bundle=version)


def _rank_both(
    scorer: Scorer, data: EncodedDataset, test: Split, candidates: Bags | None = None
) -> tuple[RankingMetrics, RankingMetrics]:
    num_items = data.items.num_items
    seen = data.seen_items() if data.spec.user is not None else None
    popularity = item_counts(data.split("train"), num_items=num_items)
    at_once = max(1, SCORES_AT_ONCE // (num_items + 1))
    model_ranks, popularity_ranks, users = [], [], []
    read = 0
    with Progress("evaluate", total=len(test), unit="examples") as progress:
        for batch in batches(test, at_once):
            wanted = torch.nonzero(_measured(batch, candidates)).squeeze(1)
            first, read = read, read + batch.size
            progress.advance(batch.size)
            if not wanted.numel():
                continue
            positives = batch.take(wanted)
            assert positives.item is not None
            # Without a user column every example is a user of its own, who has seen nothing.
            of = positives.user_index if positives.user_index is not None else wanted + first
            known = seen.take(of) if seen is not None else Bags.single(torch.zeros_like(of))
            among = candidates.take(of) if candidates is not None else None
            model_ranks.append(ranks(scorer(positives), positives.item, known, among))
            popularity_ranks.append(ranks(popularity.expand(wanted.numel(), -1), positives.item, known, among))
            users.append(of.numpy())
    everyone = np.concatenate(users) if users else np.empty(0, dtype=np.int64)
    return ranking_metrics(_join(model_ranks), everyone), ranking_metrics(_join(popularity_ranks), everyone)


def _measured(batch: Batch, candidates: Bags | None) -> Tensor:
    """Which examples count: bool [B]."""
    wanted = batch.labels >= 0.5
    if candidates is not None and batch.user_index is not None:
        wanted &= candidates.lengths()[batch.user_index] > 0
    return wanted


def _join(parts: list[Ranks]) -> Ranks:
    return Ranks(
        rank=np.concatenate([part.rank for part in parts]) if parts else np.empty(0),
        competitors=np.concatenate([part.competitors for part in parts]) if parts else np.empty(0),
    )


def item_counts(train: Split, *, num_items: int) -> Tensor:
    """Positive training examples of each item, float32 [num_items + 1]: what the model is trained on, no more."""
    assert train.item is not None
    return torch.from_numpy(np.bincount(train.item[train.label >= 0.5], minlength=num_items + 1)).float()


def batches(split: Split, size: int) -> Iterator[Batch]:
    """The split in order, `size` examples at a time."""
    for start in range(0, len(split), size):
        yield split.take(np.arange(start, min(start + size, len(split))))


def _observed(released: Bundle, test: Split) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Scores and labels of the test examples."""
    scores, labels = [], []
    for batch in batches(test, 1 << 14):
        scores.append(observed_scores(released.model, released.tables, released.catalogue, batch).numpy())
        labels.append(batch.labels.numpy())
    return np.concatenate(scores), np.concatenate(labels)
