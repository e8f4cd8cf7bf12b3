"""The approximate index beside exact search, on vectors without any structure and on vectors in clusters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch

from lazydp.components.bundle.index import DEPTHS, ApproximateIndex, Matrix
from lazydp.components.bundle.topk import top_k, top_k_rows
from lazydp.components.shared.bench_harness import Contestant, Result, measure

UNIT = "items"
Vectors: TypeAlias = Literal["gaussian", "clustered"]

# Queries searched together, as the service's batches are, and queries of one repeat.
_TOGETHER = 16
_QUERIES = 64
_SAMPLED = 256
_CLUSTERS = 500
_SPREAD = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexResult(Result):
    """A result with the vectors' distribution, and the share of the exact best items found (1 for exact search)."""

    vectors: Vectors
    recall: float
    index: str


def run(*, items: int = 1_000_000, k: int = 100, dim: int = 64, repeats: int = 5) -> list[list[IndexResult]]:
    """Measure `approximate` and `exact`, one list for each distribution; `median_s` is seconds a query, one thread.

    Args:
        items: vectors.
        k: items wanted, up to 127.
        dim: length of the vectors.
        repeats: interleaved rounds.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [_measured(vectors, items=items, k=k, dim=dim, repeats=repeats) for vectors in ("clustered", "gaussian")]
    finally:
        torch.set_num_threads(threads)


def _measured(vectors: Vectors, *, items: int, k: int, dim: int, repeats: int) -> list[IndexResult]:
    generator = np.random.default_rng(0)
    centres = generator.standard_normal((_CLUSTERS, dim), dtype=np.float32)

    def draw(rows: int) -> Matrix:
        drawn: Matrix = generator.standard_normal((rows, dim), dtype=np.float32)
        if vectors == "clustered":
            drawn *= np.float32(_SPREAD)
            drawn += centres[generator.integers(0, _CLUSTERS, rows)]
        return drawn

    matrix = draw(items + 1)
    index = ApproximateIndex.build(matrix, draw(_SAMPLED))
    asked = draw(_QUERIES)
    results = measure(
        "serve",
        shape={UNIT: items, "k": k, "dim": dim, "together": _TOGETHER},
        contestants=[
            Contestant("approximate", lambda: _approximate(index, matrix, asked, k), bytes=0),
            Contestant("exact", lambda: _exact(matrix, asked, k), bytes=matrix.nbytes, flops=2 * matrix.size),
        ],
        repeats=repeats,
    )
    stated = {"approximate": (index.recall, index.description), "exact": (1.0, "exact")}
    return [
        IndexResult(
            **{name: getattr(result, name) for name in Result.__dataclass_fields__ if not name.endswith("_s")},
            median_s=result.median_s / _QUERIES,
            p10_s=result.p10_s / _QUERIES,
            p90_s=result.p90_s / _QUERIES,
            vectors=vectors,
            recall=stated[result.contestant][0],
            index=stated[result.contestant][1],
        )
        for result in results
    ]


def _approximate(index: ApproximateIndex, matrix: Matrix, asked: Matrix, k: int) -> None:
    for start in range(0, len(asked), _TOGETHER):
        block = asked[start : start + _TOGETHER]
        for query, codes in zip(block, index.search(block, DEPTHS[0]), strict=True):
            top_k(matrix[codes] @ query, k)


def _exact(matrix: Matrix, asked: Matrix, k: int) -> None:
    for start in range(0, len(asked), _TOGETHER):
        scores = torch.mm(torch.from_numpy(asked[start : start + _TOGETHER]), torch.from_numpy(matrix).T)
        top_k_rows(scores.numpy(), k)
