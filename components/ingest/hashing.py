"""64-bit hashes of rows, vectorised: they fix an order and a choice that depend on content alone.

Public, unkeyed and not cryptographic: nothing rests on them but that equal rows get equal hashes and that order and
choice do not depend on where a row stands in its file. Where two hashes collide, the values themselves decide.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from lazydp.components.features.values import texts_of
from lazydp.kernels import rows

Words: TypeAlias = np.ndarray[tuple[int], np.dtype[np.uint64]]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(words: Words) -> Words:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection whose output bits all depend on all input."""
    mixed = words + _GOLDEN
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def as_words(values: np.ndarray[Any, Any]) -> Words:
    """The bit patterns of integers, floats or booleans as uint64 [n]; -0.0 counts as 0.0."""
    if np.issubdtype(values.dtype, np.floating):
        return (values.astype(np.float64) + 0.0).view(np.uint64)
    return values.astype(np.int64).view(np.uint64)


def chain(hashes: Words, words: Words) -> Words:
    """Hashes of rows with one more column of words taken in."""
    return mix(hashes ^ mix(words))


def hash_lists(words: Words, lengths: np.ndarray[Any, Any]) -> Words:
    """A hash for each list of words, lists lying one after the other; order and length count."""
    ends = np.cumsum(lengths)
    position = np.arange(len(words)) - np.repeat(ends - lengths, lengths)
    running = np.zeros(len(words) + 1, dtype=np.uint64)
    np.cumsum(mix(words ^ mix(position.astype(np.uint64))), out=running[1:])
    return chain(running[ends] - running[ends - lengths], lengths.astype(np.uint64))


def hash_texts(texts: pa.Array) -> Words:
    """A hash for each text of a string array, of null as of ""; that of the list of its bytes."""
    return rows.hash_texts(texts_of(texts))


def fraction_of(hashes: Words) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Hashes as numbers in [0, 1)."""
    return (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53
