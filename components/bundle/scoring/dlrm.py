"""Scores a DLRM bundle: candidates of a request in one batch, or the whole of a small catalogue in blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from lazydp.components.bundle.query import Query, Ranking, Source
from lazydp.components.bundle.reader import Bundle
from lazydp.components.bundle.scoring.base import Matrix, Scorer
from lazydp.components.bundle.scoring.pooled_items import pooled_items
from lazydp.components.bundle.scoring.selection import EXCLUDED
from lazydp.components.bundle.topk import Codes, Scores
from lazydp.components.models.recommender import ModelInputs, pool

_DLRM_BLOCK = 8192


class DlrmScorer(Scorer):
    """Candidates of a request through the DLRM in one batch, or the whole of a small catalogue in blocks."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle)
        assert bundle.catalogue is not None
        self._dense = bundle.catalogue.dense
        self._pooled = pooled_items(bundle.model, bundle.tables, bundle.catalogue)

    def scores(self, queries: Sequence[Query]) -> Matrix:
        scores: Matrix = np.full((len(queries), self.num_items + 1), EXCLUDED, dtype=np.float32)
        starts = range(1, self.num_items + 1, _DLRM_BLOCK)
        for row, (own, dense) in enumerate(self._inputs(queries)):
            for start in starts:
                block = slice(start, min(start + _DLRM_BLOCK, self.num_items + 1))
                scores[row, block] = self._logits(own, dense, block)
        return scores

    def _rank_known(self, known: Sequence[tuple[Query, Source]]) -> list[Ranking]:
        named = [number for number, (query, _) in enumerate(known) if query.candidates is not None]
        if not named:
            return super()._rank_known(known)
        answers = dict(zip(named, self._rank_candidates([known[number] for number in named]), strict=True))
        rest = [number for number in range(len(known)) if number not in answers]
        if rest:
            answers |= zip(rest, super()._rank_known([known[number] for number in rest]), strict=True)
        return [answers[number] for number in range(len(known))]

    def _rank_candidates(self, known: Sequence[tuple[Query, Source]]) -> list[Ranking]:
        """Rankings of the candidates that the queries name, each query's in one batch."""
        rankings = []
        with torch.inference_mode():
            inputs = self._inputs([query for query, _ in known])
            for (query, source), (own, dense) in zip(known, inputs, strict=True):
                assert query.candidates is not None
                codes: Codes = np.unique(np.asarray(self.encoder.item_codes(query.candidates), dtype=np.int64))
                scores = self._logits(own, dense, torch.from_numpy(codes)) if len(codes) else np.empty(0, np.float32)
                rankings.append(self._ranking_among(query, codes, scores, source))
        return rankings

    def _inputs(self, queries: Sequence[Query]) -> list[tuple[dict[str, Tensor], Tensor]]:
        """Pooled example-side features [1, D] and dense features [1, n] of each query."""
        encoded = self.encoder.encode(queries)
        example = pool(self.bundle.model.layout.example, self.bundle.tables, encoded.bags, encoded.weights)
        return [
            ({name: vectors[row : row + 1] for name, vectors in example.items()}, encoded.dense[row : row + 1])
            for row in range(len(queries))
        ]

    def _logits(self, example: Mapping[str, Tensor], dense: Tensor, codes: slice | Tensor) -> Scores:
        """Scores of the items `codes` for one query."""
        logits = self.bundle.model(
            ModelInputs(
                example=example,
                candidate={name: vectors[codes].unsqueeze(0) for name, vectors in self._pooled.items()},
                dense=dense,
                item_dense=self._dense[codes].unsqueeze(0),
            )
        )
        scores: Scores = logits[0].numpy()
        return scores

    def _item_vectors(self) -> Matrix:
        return torch.cat(list(self._pooled.values()), dim=1).numpy()
