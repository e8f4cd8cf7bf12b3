"""What items have in their metadata columns: which items meet a condition, and the number of each item."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from lazydp.components.bundle.query import Condition
from lazydp.components.shared.errors import InputError

# Metadata that lists several values in one text: genres, tags.
_SEPARATORS = re.compile(r"\||,\s")
# A number as JSON and CSV have it; Python's `float` reads more than that (underscores, "nan", digits of other scripts).
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
# Masks of the values most asked for: some at least, however large the catalogue; one takes a byte an item.
_MASK_BYTES = 2**26
_LEAST_MASKS, _MOST_MASKS = 8, 512

Mask: TypeAlias = np.ndarray[tuple[int], np.dtype[np.bool_]]
Numbers: TypeAlias = np.ndarray[tuple[int], np.dtype[np.float64]]
_Codes: TypeAlias = np.ndarray[tuple[int], np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class _Column:
    """One metadata column.

    Attributes:
        texts: values by code - 1.
        codes: value -> codes of the items that have it.
        numbers: every number of every item, ascending.
        numbered: code of the item that each of `numbers` is of.
        first: the first number of each code 0..num_items, NaN where there is none.
    """

    texts: list[tuple[str, ...]]
    codes: dict[str, _Codes]
    numbers: Numbers
    numbered: _Codes
    first: Numbers

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> _Column:
        texts = [_texts(value) for value in column.to_pylist()]
        codes: dict[str, list[int]] = {}
        found: list[tuple[float, int]] = []
        first = np.full(len(texts) + 1, np.nan)
        for code, values in enumerate(texts, start=1):
            for text in values:
                codes.setdefault(text, []).append(code)
            own = [number for text in values if (number := number_of(text)) is not None]
            found += [(number, code) for number in own]
            if own:
                first[code] = own[0]
        found.sort()
        return cls(
            texts,
            {text: np.asarray(having) for text, having in codes.items()},
            np.asarray([number for number, _ in found], dtype=np.float64),
            np.asarray([code for _, code in found], dtype=np.int64),
            first,
        )

    def within(self, condition: Condition) -> _Codes:
        """Codes of the items that have a number within the bounds of `condition`."""
        start, end = 0, len(self.numbers)
        for bound, side in ((condition.gte, "left"), (condition.gt, "right")):
            if bound is not None:
                start = max(start, int(np.searchsorted(self.numbers, bound, side=side)))  # type: ignore[call-overload]
        for bound, side in ((condition.lte, "right"), (condition.lt, "left")):
            if bound is not None:
                end = min(end, int(np.searchsorted(self.numbers, bound, side=side)))  # type: ignore[call-overload]
        return self.numbered[start:end]


class Attributes:
    """The metadata columns of items 1..num_items. A column is read when it is first asked for.

    Attributes:
        names: of the columns.
    """

    def __init__(self, columns: Mapping[str, pa.ChunkedArray], *, num_items: int) -> None:
        self.names = tuple(columns)
        self._source = columns
        self._num_items = num_items
        self._columns: dict[str, _Column] = {}
        kept = min(_MOST_MASKS, max(_LEAST_MASKS, _MASK_BYTES // (num_items + 1)))
        self._of_value = functools.lru_cache(maxsize=kept)(self._uncached)

    def values(self, attribute: str, code: int) -> tuple[str, ...]:
        """The values of the item `code` ("a, b" and "a|b" are two).

        Raises:
            InputError: no such attribute.
        """
        return self._column(attribute).texts[code - 1]

    def choices(self, attribute: str, *, most: int) -> tuple[str, ...]:
        """The values of a column, that of most items first; none where there are more than `most`.

        Raises:
            InputError: no such attribute.
        """
        codes = self._column(attribute).codes
        if len(codes) > most:
            return ()
        return tuple(sorted(codes, key=lambda value: (-len(codes[value]), value)))

    def numbers(self, attribute: str) -> Numbers:
        """The first number of every code 0..num_items, NaN where there is none; float64 [num_items + 1].

        Raises:
            InputError: no such attribute.
        """
        return self._column(attribute).first

    def mask(self, attribute: str, condition: Condition) -> Mask:
        """Which codes 0..num_items meet `condition`; bool [num_items + 1], not to be changed; code 0 may be either.

        Raises:
            InputError: no such attribute.
        """
        if condition.is_range or condition.without is not None or condition.any_of is None:
            return self._all_of(attribute, condition)
        return self._any_of(attribute, condition)

    def _all_of(self, attribute: str, condition: Condition) -> Mask:
        mask = np.ones(self._num_items + 1, dtype=np.bool_)
        if condition.any_of is not None:
            mask &= self._any_of(attribute, condition)
        if condition.is_range:
            inside = np.zeros_like(mask)
            inside[self._column(attribute).within(condition)] = True
            mask &= inside
        if condition.without is not None:
            mask &= ~self.mask(attribute, condition.without)
        return mask

    def _any_of(self, attribute: str, condition: Condition) -> Mask:
        values = condition.any_of or ()
        if len(values) == 1:
            return self._of_value(attribute, values[0])
        mask = np.zeros(self._num_items + 1, dtype=np.bool_)
        for value in values:
            mask |= self._of_value(attribute, value)
        return mask

    def _uncached(self, attribute: str, value: str) -> Mask:
        mask = np.zeros(self._num_items + 1, dtype=np.bool_)
        codes = self._column(attribute).codes.get(value)
        if codes is not None:
            mask[codes] = True
        mask.flags.writeable = False
        return mask

    def _column(self, attribute: str) -> _Column:
        found = self._columns.get(attribute)
        if found is None:
            if attribute not in self._source:
                known = ", ".join(self.names) or "none"
                raise InputError(f"there is no item attribute {attribute!r}; this model has: {known}")
            found = self._columns[attribute] = _Column.of(self._source[attribute])
        return found


def number_of(text: str) -> float | None:
    """The finite number that `text` is, None where it is none."""
    text = text.strip()
    if _NUMBER.fullmatch(text) is None:
        return None
    number = float(text)
    return number if np.isfinite(number) else None


def _texts(value: Any) -> tuple[str, ...]:
    """What a filter may name: the parts of a text that lists several values, and the whole text."""
    if value is None:
        return ()
    parts = [part.strip() for part in _SEPARATORS.split(value)]
    return tuple(dict.fromkeys(part for part in parts if part)) if len(parts) > 1 else (value,)
