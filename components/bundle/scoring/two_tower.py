"""Scores a two-tower bundle: item vectors computed once, then one matrix product or an approximate index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from lazydp.components.bundle.encoder import EncodedQueries
from lazydp.components.bundle.index import DEPTHS, TARGET_RECALL, ApproximateIndex
from lazydp.components.bundle.query import Query, Ranking, Source
from lazydp.components.bundle.reader import Bundle
from lazydp.components.bundle.scoring.base import Matrix, Scorer
from lazydp.components.bundle.scoring.pooled_items import pooled_items
from lazydp.components.bundle.topk import Codes
from lazydp.components.features.batch import Bags
from lazydp.components.features.spec import HISTORY, USER
from lazydp.components.models.recommender import pool
from lazydp.components.models.two_tower import TwoTower
from lazydp.components.shared.errors import NonFiniteError, UnavailableError

# Vectors of users that are kept, and made at once.
_MAX_USER_BYTES = 2**27
_USER_BLOCK = 8192
# Item vectors of which a copy is kept with the items side by side: the product of few queries with it is up to three
# times faster. For large catalogues the copy would cost more than it gains.
_MAX_TURNED_BYTES = 2**23
# Queries that recall is measured with, and items of their histories.
_SAMPLED_QUERIES = 256
_SAMPLED_HISTORY = 10


class TwoTowerScorer(Scorer):
    """One matrix product of user vectors with the item vectors, which are computed once.

    A catalogue of `approximate_from` items or more is searched through an approximate index, where that reaches its
    target of recall. Queries that name what to choose from (candidates, filters, a cap), that boost scores, or
    whose pages must not shift, are answered exactly.
    """

    def __init__(self, bundle: Bundle, *, approximate_from: int | None = None) -> None:
        super().__init__(bundle)
        assert isinstance(bundle.model, TwoTower)
        assert bundle.catalogue is not None
        self._model: TwoTower = bundle.model
        pooled = pooled_items(bundle.model, bundle.tables, bundle.catalogue)
        with torch.inference_mode():
            vectors = self._model.item_vector(pooled, bundle.catalogue.dense)
        if not bool(torch.isfinite(vectors).all()):
            raise NonFiniteError(f"bundle {bundle.path}: an item's vector is not finite; export the run again")
        self._vectors = vectors
        self._by_dimension = vectors.T.contiguous() if vectors.nbytes <= _MAX_TURNED_BYTES else vectors.T
        self._users = self._vectors_of_users()
        self._index: ApproximateIndex | None = None
        if approximate_from is not None and self.num_items >= approximate_from:
            self._index, self.index = self._build_index()
            self.recall = None if self._index is None else self._index.recall

    def user_vectors(self, queries: Sequence[Query]) -> Tensor:
        """Vectors [B, D] of the people who ask."""
        if self._users is not None:
            codes = [self.encoder.user_alone(query) for query in queries]
            if all(codes):
                # A copy of torch's own lies at an aligned address: products of the same values are then the same bits.
                return torch.from_numpy(self._users.take(codes, axis=0)).clone()
        return self._towards(self.encoder.encode(queries))

    def _vectors_of_users(self) -> Matrix | None:
        """Vectors [num_users + 1, D] of users who give nothing but their id; None where there are too many to keep.

        Most requests are theirs, and pooling and the tower take longer than scoring a small catalogue.
        """
        users = self.bundle.spec.tables()[USER] if self.encoder.reads_users else 0
        if not 0 < users * self._model.config.embedding_dim * self._vectors.itemsize <= _MAX_USER_BYTES:
            return None
        blocks = [torch.arange(start, min(start + _USER_BLOCK, users)) for start in range(0, users, _USER_BLOCK)]
        with torch.inference_mode():
            made = torch.cat([self._towards(self.encoder.encode_users(codes)) for codes in blocks])
        vectors: Matrix = made.numpy()
        return vectors

    def _towards(self, encoded: EncodedQueries) -> Tensor:
        pooled = pool(self._model.layout.example, self.bundle.tables, encoded.bags, encoded.weights)
        user = self._model.user_vector(pooled, encoded.dense)
        # The temperature divides every score alike; here it divides the shorter factor of the product.
        return user / self._model.config.temperature

    def scores(self, queries: Sequence[Query]) -> Matrix:
        scores: Matrix = torch.mm(self.user_vectors(queries), self._by_dimension).numpy()
        return scores

    def _rank_known(self, known: Sequence[tuple[Query, Source]]) -> list[Ranking]:
        if self._index is None:
            return super()._rank_known(known)
        by_depth: dict[int | None, list[int]] = {}
        for number, (query, _) in enumerate(known):
            by_depth.setdefault(_search_depth(query), []).append(number)
        answers: dict[int, Ranking] = {}
        for depth, numbers in by_depth.items():
            part = [known[number] for number in numbers]
            found = super()._rank_known(part) if depth is None else self._rank_found(self._index, part, depth)
            answers.update(zip(numbers, found, strict=True))
        return [answers[number] for number in range(len(known))]

    def _rank_found(self, index: ApproximateIndex, known: Sequence[tuple[Query, Source]], depth: int) -> list[Ranking]:
        """Rankings of what the index finds, by exact scores."""
        with torch.inference_mode():
            users: Matrix = self.user_vectors([query for query, _ in known]).numpy()
        vectors: Matrix = self._vectors.numpy()
        rankings = []
        for (query, source), found, user in zip(known, index.search(users, depth), users, strict=True):
            codes: Codes = np.unique(found[found > 0])
            ranking = self._ranking_among(query, codes, vectors[codes] @ user, source)
            rankings.append(replace(ranking, approximate=True))
        return rankings

    def _build_index(self) -> tuple[ApproximateIndex | None, str]:
        """The index and what it is; None and why not where search stays exact."""
        with torch.inference_mode():
            queries: Matrix = self._towards(self._sampled_inputs()).numpy()
        try:
            index = ApproximateIndex.build(self._vectors.numpy(), queries)
        except UnavailableError as error:
            return None, f"exact ({error})"
        if index.recall < TARGET_RECALL:
            return None, f"exact (an approximate index found only {index.recall:.4f} of the best items)"
        return index, index.description

    def _sampled_inputs(self) -> EncodedQueries:
        """Inputs of people who might ask: every feature given by half of them, drawn uniformly from what is public."""
        generator = torch.Generator().manual_seed(0)
        features = self._model.layout.example
        given = torch.randint(2, (len(features), _SAMPLED_QUERIES), generator=generator)
        # Of somebody who gives nothing at all there is nothing to rank by.
        given[:1, given.sum(dim=0) == 0] = 1
        bags = {}
        for number, feature in enumerate(features):
            lengths = given[number] * (_SAMPLED_HISTORY if feature.name == HISTORY else 1)
            offsets = torch.zeros(_SAMPLED_QUERIES + 1, dtype=torch.int64)
            torch.cumsum(lengths, 0, out=offsets[1:])
            values = torch.randint(1, max(2, feature.num_rows), (int(offsets[-1]),), generator=generator)
            bags[feature.name] = Bags(values.clamp_(max=feature.num_rows - 1), offsets)
        dense = torch.rand(_SAMPLED_QUERIES, self._model.layout.num_dense, generator=generator) * 2 - 1
        return EncodedQueries(bags, dense)

    def _item_vectors(self) -> Matrix:
        # The prior says how popular an item is, not what it is like.
        vectors: Matrix = self._vectors[:, : self._model.config.embedding_dim].numpy()
        return vectors


def _search_depth(query: Query) -> int | None:
    """How deep an index must search so that no item is missing once some are left out; None for exact search."""
    narrowed = query.candidates is not None or query.filters or query.boosts or query.cap is not None
    if narrowed or query.alone or query.after is not None:
        return None
    seen = len(query.history) if query.exclude_seen else 0
    needed = query.offset + query.k + len(query.exclude) + seen
    return next((depth for depth in DEPTHS if needed < depth), None)
