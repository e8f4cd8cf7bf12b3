"""Exact top-k of scores: best first, ties by the smaller code, so that pages never overlap."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import numpy as np

Scores: TypeAlias = np.ndarray[tuple[int], np.dtype[np.float32]]
Codes: TypeAlias = np.ndarray[tuple[int], np.dtype[np.int64]]

_EXCLUDED = np.float32(-np.inf)


def top_k(scores: Scores, k: int) -> Codes:
    """Indices of the `k` best of `scores` [n], best first; ties by the smaller index.

    Entries of minus infinity are excluded, so fewer than k may come back.
    """
    n = scores.shape[0]
    if k >= n:
        found = np.flatnonzero(scores > _EXCLUDED)
    else:
        # Selecting the k-th value and comparing is faster than selecting positions, and keeps every tie at the edge.
        threshold = np.partition(scores, n - k)[n - k]
        found = np.flatnonzero(scores >= threshold) if threshold > _EXCLUDED else np.flatnonzero(scores > _EXCLUDED)
    # `found` ascends, so a stable sort leaves ties in the order of their index.
    order = np.argsort(-scores[found], kind="stable")[:k]
    return found[order]


def in_order(scores: Scores) -> Iterator[int]:
    """Indices of every entry that is not excluded, best first, found in growing portions."""
    given, wanted = 0, 256
    while True:
        found = top_k(scores, wanted)
        yield from (int(index) for index in found[given:])
        if found.shape[0] < wanted:
            return
        given, wanted = found.shape[0], wanted * 4
