"""Exact top-k of scores: best first, ties by the smaller code, so that pages never overlap."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import numpy as np

Scores: TypeAlias = np.ndarray[tuple[int], np.dtype[np.float32]]
Codes: TypeAlias = np.ndarray[tuple[int], np.dtype[np.int64]]

_EXCLUDED = np.float32(-np.inf)
# Members of a group, and groups for each wanted entry below which the floor would let too many through.
_GROUP = 32
_LEAST_GROUPS = 4


def top_k(scores: Scores, k: int) -> Codes:
    """Indices of the `k` best of `scores` [n], best first; ties by the smaller index.

    Entries of minus infinity are excluded, so fewer than k may come back.
    """
    n = scores.shape[0]
    if k >= n:
        (found,) = (scores > _EXCLUDED).nonzero()
    else:
        # Selecting a value and comparing is faster than selecting positions, and keeps every tie at the edge.
        threshold = _floor(scores, k)
        (found,) = (scores >= threshold).nonzero() if threshold > _EXCLUDED else (scores > _EXCLUDED).nonzero()
    # `found` ascends, so a stable sort leaves ties in the order of their index.
    order = (-scores[found]).argsort(kind="stable")[:k]
    return found[order]


def _floor(scores: Scores, k: int) -> np.float32:
    """A value that at least `k` of `scores` [n > k] reach, and not many more.

    For many scores it is the k-th greatest of the maxima of n / 32 groups: k groups hold an entry that reaches it.
    Taking maxima streams through memory, where selecting among all scores is several times slower.
    """
    groups = scores.shape[0] // _GROUP
    if groups >= _LEAST_GROUPS * k:
        scores = scores[: groups * _GROUP].reshape(_GROUP, groups).max(axis=0)
    position = scores.shape[0] - k
    floor: np.float32 = np.partition(scores, position)[position]
    return floor


def in_order(scores: Scores) -> Iterator[int]:
    """Indices of every entry that is not excluded, best first, found in growing portions."""
    given, wanted = 0, 256
    while True:
        found = top_k(scores, wanted)
        yield from (int(index) for index in found[given:])
        if found.shape[0] < wanted:
            return
        given, wanted = found.shape[0], wanted * 4
