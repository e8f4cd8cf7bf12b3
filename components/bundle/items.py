"""The items of a bundle as a person knows them: id, title and metadata of every item code."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lazydp.components.features.catalogue import (
    BAG_PREFIX,
    DENSE_COLUMN,
    ID_COLUMN,
    METADATA_PREFIX,
    TITLE_COLUMN,
)
from lazydp.components.shared.bounded_parquet import read_bounded
from lazydp.components.shared.errors import FormatError, InputError

# Metadata that lists several values in one text: genres, tags.
_SEPARATORS = re.compile(r"\||,\s")
# Masks of the values most asked for: some at least, however large the catalogue; one takes a byte an item.
_MASK_BYTES = 2**26
_LEAST_MASKS, _MOST_MASKS = 8, 512

Mask: TypeAlias = np.ndarray[tuple[int], np.dtype[np.bool_]]


class ItemTable:
    """Items by code 1..num_items, from the catalogue table (see `features.catalogue`).

    Attributes:
        ids: text, `ids[code - 1]` is the item's id.
        titles: text or None by the same index; None where the table has no titles.
        attributes: names of the metadata columns, which filters may name.
    """

    def __init__(self, table: pa.Table) -> None:
        self.ids: list[str] = table.column(ID_COLUMN).to_pylist()
        has_titles = TITLE_COLUMN in table.column_names and table.column(TITLE_COLUMN).null_count < len(self.ids)
        self.titles: list[str | None] | None = table.column(TITLE_COLUMN).to_pylist() if has_titles else None
        self._metadata = {
            name.removeprefix(METADATA_PREFIX): table.column(name)
            for name in table.column_names
            if name.startswith(METADATA_PREFIX)
        }
        self.attributes = tuple(self._metadata)
        self._codes = {name: code for code, name in enumerate(self.ids, start=1)}
        kept = min(_MOST_MASKS, max(_LEAST_MASKS, _MASK_BYTES // (len(self.ids) + 1)))
        self._mask = functools.lru_cache(maxsize=kept)(self._uncached_mask)
        self._columns: dict[str, tuple[dict[str, np.ndarray[Any, Any]], list[tuple[str, ...]]]] = {}

    def __len__(self) -> int:
        return len(self.ids)

    def code(self, item_id: str) -> int:
        """Code of an item, 0 where there is no such item."""
        return self._codes.get(item_id, 0)

    def title(self, code: int) -> str | None:
        """Title of the item `code`, where it has one."""
        return self.titles[code - 1] if self.titles is not None else None

    def metadata(self, code: int) -> Mapping[str, str | None]:
        """Every metadata column of the item `code`, as text for display."""
        return {name: column[code - 1].as_py() for name, column in self._metadata.items()}

    def values(self, attribute: str, code: int) -> tuple[str, ...]:
        """The values that the item `code` has in a metadata column ("a, b" and "a|b" are two).

        Raises:
            InputError: no such attribute.
        """
        return self._column(attribute)[1][code - 1]

    def choices(self, attribute: str, *, most: int) -> tuple[str, ...]:
        """The values of a metadata column, that of most items first; none where there are more than `most`.

        Raises:
            InputError: no such attribute.
        """
        by_value = self._column(attribute)[0]
        if len(by_value) > most:
            return ()
        return tuple(sorted(by_value, key=lambda value: (-len(by_value[value]), value)))

    def mask(self, attribute: str, values: Sequence[str]) -> Mask:
        """Which codes 0..num_items have any of `values` in a metadata column; bool [num_items + 1], code 0 never.

        Raises:
            InputError: no such attribute.
        """
        if len(values) == 1:
            return self._mask(attribute, values[0])
        mask = np.zeros(len(self) + 1, dtype=np.bool_)
        for value in values:
            mask |= self._mask(attribute, value)
        return mask

    def _uncached_mask(self, attribute: str, value: str) -> Mask:
        mask = np.zeros(len(self) + 1, dtype=np.bool_)
        codes = self._column(attribute)[0].get(value)
        if codes is not None:
            mask[codes] = True
        mask.flags.writeable = False
        return mask

    def _column(self, attribute: str) -> tuple[dict[str, np.ndarray[Any, Any]], list[tuple[str, ...]]]:
        """Value -> codes, and values by code, of a metadata column; made when first asked for."""
        if attribute not in self.attributes:
            known = ", ".join(self.attributes) or "none"
            raise InputError(f"there is no item attribute {attribute!r}; this model has: {known}")
        if attribute not in self._columns:
            by_code = [_texts(value) for value in self._metadata[attribute].to_pylist()]
            by_value: dict[str, list[int]] = {}
            for code, texts in enumerate(by_code, start=1):
                for text in texts:
                    by_value.setdefault(text, []).append(code)
            self._columns[attribute] = ({text: np.asarray(codes) for text, codes in by_value.items()}, by_code)
        return self._columns[attribute]


def _texts(value: str | None) -> tuple[str, ...]:
    """What a filter may name: the parts of a text that lists several values, and the whole text."""
    if value is None:
        return ()
    parts = [part.strip() for part in _SEPARATORS.split(value)]
    return tuple(dict.fromkeys(part for part in parts if part)) if len(parts) > 1 else (value,)


def read(path: Path, *, num_items: int) -> pa.Table:
    """Read the catalogue table of a bundle.

    Raises:
        FormatError: not Parquet, another number of items than `num_items`, or a size beyond reason.
    """
    table = read_bounded(path, num_rows=num_items)
    _check(path, table)
    return table


def _check(path: Path, table: pa.Table) -> None:
    for column in table.column_names:
        if column in (ID_COLUMN, TITLE_COLUMN) or column.startswith(METADATA_PREFIX):
            if table.schema.field(column).type not in (pa.string(), pa.null()):
                raise FormatError(f"{path}: column {column!r} is {table.schema.field(column).type}, expected text")
        elif column != DENSE_COLUMN and not column.startswith(BAG_PREFIX):
            raise FormatError(f"{path}: column {column!r} is not one of a catalogue")
    if ID_COLUMN not in table.column_names:
        raise FormatError(f"{path} has no column {ID_COLUMN!r}")
    ids = table.column(ID_COLUMN)
    if ids.null_count or len(pc.unique(ids)) != len(ids):
        raise FormatError(f"{path}: item ids must be present and distinct")
