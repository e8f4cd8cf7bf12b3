"""An approximate index over item vectors: which items may have the greatest inner products with a vector.

Scores from codes of 4 bits a dimension, kept in lists by cluster, find five times as many candidates as are wanted;
exact products then order these. Codes scanned in registers hold their recall on any distribution, and the lists spare
most of the scan where vectors form clusters. (A graph, HNSW, loses a fifth of the items on raw inner products.)

The index is a function of released vectors alone: post-processing, without cost in privacy. It is built when a
bundle is loaded, with fixed seeds, and its recall is measured on the index itself before it is used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import numpy as np
import torch

from lazydp.components.bundle.topk import top_k_rows
from lazydp.components.shared.errors import UnavailableError

Matrix: TypeAlias = np.ndarray[tuple[int, int], np.dtype[np.float32]]
CodeRows: TypeAlias = np.ndarray[tuple[int, int], np.dtype[np.int64]]

# What the index must reach to be used: the share of the exact best items that it finds, at every depth of search.
TARGET_RECALL = 0.99
# Depths of search, and of the best items that recall is measured on in each; deeper answers are for exact search. Few,
# so that an answer does not depend on the queries it happened to be searched together with.
DEPTHS = (128, 1_024)
_MEASURED = (100, 1_000)
RECALL_DEPTH = _MEASURED[0]
_CANDIDATES_PER_ITEM = 5
_TRAINING_VECTORS_PER_LIST = 64
_KMEANS_ROUNDS = 8
_FIRST_PROBES = 4
_SEED = 1
# Exact scores in memory at once while recall is measured.
_BLOCK = 16


@dataclass(frozen=True, slots=True)
class ApproximateIndex:
    """Searches lists of coarse scores. Safe to call from several threads.

    Attributes:
        recall: share of the exact best `RECALL_DEPTH` items found, averaged over `num_queries` sampled queries;
            or of the exact best 1,000, if that is less than the target.
        num_queries: queries that `recall` was measured with.
        num_lists: clusters that the items are kept in.
        num_probed: lists that a query reads, by depth of search.
    """

    recall: float
    num_queries: int
    num_lists: int
    num_probed: Mapping[int, int]
    _lists: Any

    @classmethod
    def build(cls, vectors: Matrix, queries: Matrix) -> Self:
        """Index `vectors` [n + 1, d] by their row, row 0 left out; reads the fewest lists that reach the target.

        Args:
            vectors: of the items, by code.
            queries: [Q, d], like those to come: recall is measured with them.

        Returns:
            The index; its `recall` may be below `TARGET_RECALL` where even all lists do not reach it.

        Raises:
            UnavailableError: faiss is not installed.
        """
        lists = _fill(vectors)
        best = _best(vectors, queries, _MEASURED[-1])
        probed, recalls = {}, []
        for depth, measured in zip(DEPTHS, _MEASURED, strict=True):
            probed[depth], recall = _fewest_lists(lists, queries, best[:, :measured], depth)
            recalls.append(recall)
        reached = min(recalls) >= TARGET_RECALL
        return cls(recalls[0] if reached else min(recalls), len(queries), lists.nlist, probed, lists)

    def search(self, queries: Matrix, depth: int) -> CodeRows:
        """Codes [Q, 5 depth] whose vectors may have the greatest inner products with each of `queries` [Q, d].

        In the order of coarse scores; 0 fills a row whose lists hold fewer. `depth` is one of `DEPTHS`.
        """
        return _search(self._lists, queries, depth, probed=self.num_probed[depth])

    @property
    def description(self) -> str:
        """For a person to read."""
        recall = math.floor(self.recall * 1e4) / 1e4
        return (
            f"approximate: {self.num_probed[DEPTHS[0]]} of {self.num_lists} lists of 4-bit codes, then exact scores; "
            f"recall at {RECALL_DEPTH} is {recall:.4f} on {self.num_queries} sampled queries"
        )


def _search(lists: Any, queries: Matrix, depth: int, *, probed: int) -> CodeRows:
    import faiss  # noqa: PLC0415 - an extra; it is there, it made the lists

    # OpenMP keeps this number for each calling thread.
    faiss.omp_set_num_threads(torch.get_num_threads())
    parameters = faiss.IVFSearchParameters()
    parameters.nprobe = probed
    found: CodeRows = lists.search(queries, _CANDIDATES_PER_ITEM * depth, params=parameters)[1]
    # faiss counts from 0 and fills with -1.
    return found + 1


def _fewest_lists(lists: Any, queries: Matrix, best: CodeRows, depth: int) -> tuple[int, float]:
    """Lists to read, by doubling, so that `best` [Q, n] of `queries` [Q, d] are found; and the recall reached."""
    probed = min(_FIRST_PROBES, lists.nlist)
    while True:
        recall = _recall(best, _search(lists, queries, depth, probed=probed))
        if recall >= TARGET_RECALL or probed == lists.nlist:
            return probed, recall
        probed = min(2 * probed, lists.nlist)


def _fill(vectors: Matrix) -> Any:
    try:
        import faiss  # noqa: PLC0415 - an extra
    except ModuleNotFoundError:
        raise UnavailableError("faiss is not installed: pip install 'lazydp[ann]'") from None
    faiss.omp_set_num_threads(torch.get_num_threads())
    items, dim = vectors.shape[0] - 1, vectors.shape[1]
    num_lists = 2 ** max(0, round(math.log2(math.sqrt(items) / 2)))
    lists = faiss.IndexIVFPQFastScan(faiss.IndexFlatL2(dim), dim, num_lists, dim, 4, faiss.METRIC_INNER_PRODUCT)
    lists.by_residual = False
    for clustering in (lists.cp, lists.pq.cp):
        clustering.seed = _SEED
        clustering.niter = _KMEANS_ROUNDS
        clustering.min_points_per_centroid = 1
    # Every so-maniest vector rather than a random sample: the same index from the same vectors.
    step = max(1, items // (_TRAINING_VECTORS_PER_LIST * num_lists))
    lists.train(np.ascontiguousarray(vectors[1::step]))
    lists.add(vectors[1:])
    return lists


def _best(vectors: Matrix, queries: Matrix, depth: int) -> CodeRows:
    """Codes [Q, depth] of the greatest inner products, best first; of all items where there are fewer."""
    rows = []
    for start in range(0, len(queries), _BLOCK):
        scores = queries[start : start + _BLOCK] @ vectors[1:].T
        rows += [row + 1 for row in top_k_rows(scores, depth)]
    return np.stack(rows)


def _recall(wanted: CodeRows, found: CodeRows) -> float:
    """Mean share of `wanted` among the candidates `found`: what is among them, exact scores put in its place."""
    return float(np.mean([np.isin(row, candidates).mean() for row, candidates in zip(wanted, found, strict=True)]))
