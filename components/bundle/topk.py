"""Exact top-k of scores: best first, ties by the smaller code, so that pages never overlap."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import numpy as np

from lazydp.kernels.rows import best_of_rows

Scores: TypeAlias = np.ndarray[tuple[int], np.dtype[np.float32]]
ScoreRows: TypeAlias = np.ndarray[tuple[int, int], np.dtype[np.float32]]
Codes: TypeAlias = np.ndarray[tuple[int], np.dtype[np.int64]]


def top_k_rows(scores: ScoreRows, k: int) -> list[Codes]:
    """For each row of `scores` [B, n] the indices of its `k` best, best first; ties by the smaller index.

    Entries of minus infinity are excluded, so fewer than k may come back. All rows together, because a call costs as
    much as its work on a row of some thousand scores.
    """
    indices, counts = best_of_rows(np.ascontiguousarray(scores), k)
    return [row[:count] for row, count in zip(indices, counts, strict=True)]


def top_k(scores: Scores, k: int) -> Codes:
    """`top_k_rows` of the one row `scores` [n]."""
    return top_k_rows(scores[np.newaxis], k)[0]


def in_order(scores: Scores) -> Iterator[int]:
    """Indices of every entry that is not excluded, best first, found in growing portions."""
    given, wanted = 0, 256
    while True:
        found = top_k(scores, wanted)
        yield from (int(index) for index in found[given:])
        if found.shape[0] < wanted:
            return
        given, wanted = found.shape[0], wanted * 4
