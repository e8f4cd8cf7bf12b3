"""Columns of values to encoded columns: one way of doing it, for ingest and for a request to the service."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lazydp.components.features.spec import DenseFeature, ListFeature
from lazydp.components.features.values import Numbers, Values, as_array, canonical_text, integers_of, to_numbers
from lazydp.components.features.vocabulary import Codes, Vocabulary

Floats: TypeAlias = np.ndarray[tuple[int], np.dtype[np.float32]]


# Fewer values than these may all be slips of the pen.
_ODD_VALUES = 20
# A table of integers pays where a column has so many values, and each stands there so often.
_MANY_VALUES = 1 << 10
_REPEATS = 4


@dataclass(frozen=True, slots=True)
class CodeLists:
    """n lists of codes, one after the other: values int64 [N], lengths int64 [n]."""

    values: Codes
    lengths: Codes

    def offsets(self) -> Codes:
        """Where each list begins, and at last where the last one ends: int64 [n + 1]."""
        offsets = np.zeros(len(self.lengths) + 1, dtype=np.int64)
        np.cumsum(self.lengths, out=offsets[1:])
        return offsets

    def take(self, rows: Codes) -> CodeLists:
        """The lists `rows`, in that order."""
        starts = self.offsets()[:-1][rows]
        lengths = self.lengths[rows]
        return CodeLists(self.values[ranges(starts, lengths)], lengths)


def ranges(starts: Codes, lengths: Codes) -> Codes:
    """starts[0] .. starts[0] + lengths[0] - 1, then the same of 1, and so on: int64 [sum of lengths]."""
    before = np.cumsum(lengths) - lengths
    return np.asarray(np.repeat(starts - before, lengths) + np.arange(int(lengths.sum())))


def split_text(values: Values, separator: str) -> pa.Array:
    """Text cut at `separator` into lists of tokens; missing text is an empty list, empty tokens are null."""
    text = canonical_text(values).fill_null("")
    return pc.split_pattern(text, separator)


def is_list_type(kind: pa.DataType) -> bool:
    """Whether a column of this type holds a list a row."""
    tests = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list, pa.types.is_list_view)
    return any(test(kind) for test in (*tests, pa.types.is_large_list_view))


def encode_list(feature: ListFeature, vocabulary: Vocabulary, values: Values) -> CodeLists:
    """Encode a list column, or text with a separator.

    Missing lists are empty, missing tokens are left out, unknown tokens have code 0.

    Raises:
        ValueError: neither lists nor, with a separator, text.
    """
    array = values if isinstance(values, pa.Array) else pa.array(values)
    if feature.separator is not None and not pa.types.is_nested(array.type):
        array = split_text(array, feature.separator)
    if pa.types.is_null(array.type):
        array = array.cast(pa.list_(pa.string()))
    if not is_list_type(array.type):
        raise ValueError(f"expected lists (or text, and a separator in the spec), found {array.type}")
    if not (pa.types.is_list(array.type) or pa.types.is_large_list(array.type)):
        array = array.cast(pa.list_(array.type.value_type))
    lengths = pc.list_value_length(array).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    tokens = canonical_text(pc.list_flatten(array))
    kept = tokens.is_valid().to_numpy(zero_copy_only=False)
    return _filtered(vocabulary.encode(tokens), lengths, kept, feature.max_length)


def _filtered(codes: Codes, lengths: Codes, kept: np.ndarray[Any, Any], max_length: int | None) -> CodeLists:
    """Leave out the values not `kept`, then all after the first `max_length` of a list."""
    owner = np.repeat(np.arange(len(lengths)), lengths)
    if not kept.all():
        codes, owner = codes[kept], owner[kept]
        lengths = np.bincount(owner, minlength=len(lengths)).astype(np.int64)
    if max_length is not None and len(lengths) and int(lengths.max()) > max_length:
        position = np.arange(len(codes)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        codes = codes[position < max_length]
        lengths = np.minimum(lengths, max_length)
    return CodeLists(codes, lengths)


def scale_dense(feature: DenseFeature, values: Values) -> Floats:
    """Numbers to float32 [n] in [-1, 1] by the declared bounds; missing or not a number is 0.

    Raises:
        ValueError: nested values.
    """
    array = as_array(values)
    if len(array) >= _MANY_VALUES and array.type in (pa.int32(), pa.int64()):
        integers = integers_of(array)
        first, last = integers.range()
        if 0 <= last - first <= len(array) // _REPEATS:
            # Each integer is scaled once, not in every row. The last entry stands for what is missing.
            known = _scaled(feature, np.arange(first, last + 1).astype(np.float64))
            return integers.look_up(first, np.append(known, np.float32(0)))
    return _scaled(feature, to_numbers(array))


def _scaled(feature: DenseFeature, numbers: Numbers) -> Floats:
    low, high = feature.bounds
    if feature.transform == "log1p":
        numbers = np.sign(numbers) * np.log1p(np.abs(numbers))
        low, high = (float(np.sign(bound) * np.log1p(abs(bound))) for bound in (low, high))
    scaled = 2.0 * (np.clip(numbers, low, high) - low) / (high - low) - 1.0
    return np.where(np.isnan(scaled), 0.0, scaled).astype(np.float32)


def refuse_text(values: Values) -> None:
    """Refuse a column of values none of which is a number: it is text, declared dense by mistake.

    Raises:
        ValueError: over a score of values, and not one number.
    """
    array = values if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values)
    if pa.types.is_integer(array.type):
        return
    known = array.drop_null()
    if len(known) > _ODD_VALUES and bool(np.isnan(to_numbers(known)).all()):
        raise ValueError(
            f"expected numbers, found none among {len(known)} values: text needs a vocabulary (kind: single), "
            "numbers a column of their own"
        )


def pick(rows: Sequence[Mapping[str, Any]], column: str) -> list[Any]:
    """One column of a list of records, null where a record lacks it."""
    return [row.get(column) for row in rows]
