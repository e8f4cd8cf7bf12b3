"""The items of a bundle as a person knows them: id, title and metadata of every item code."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lazydp.components.shared.errors import FormatError, InputError

CODE, ID, TITLE = "code", "id", "title"
# What a Parquet file of items may claim to unfold to; a hostile one could claim anything.
_MAX_UNFOLDED_BYTES = 16 * 2**30
_MAX_COLUMNS = 256
# Masks of the values most asked for; one takes a byte an item.
_CACHED_MASKS = 512

Mask: TypeAlias = np.ndarray[tuple[int], np.dtype[np.bool_]]


class ItemTable:
    """Items by code 1..num_items.

    Attributes:
        ids: text, `ids[code - 1]` is the item's id.
        titles: text or None by the same index; None where the table has no titles.
        attributes: names of the metadata columns, which filters may name.
    """

    def __init__(self, table: pa.Table) -> None:
        self._table = table
        self.ids: list[str] = table.column(ID).to_pylist()
        self.titles: list[str | None] | None = table.column(TITLE).to_pylist() if TITLE in table.column_names else None
        self.attributes = tuple(name for name in table.column_names if name not in (CODE, ID, TITLE))
        self._codes = {name: code for code, name in enumerate(self.ids, start=1)}
        self._mask = functools.lru_cache(maxsize=_CACHED_MASKS)(self._uncached_mask)
        self._columns: dict[str, tuple[dict[str, np.ndarray[Any, Any]], list[tuple[str, ...]]]] = {}

    def __len__(self) -> int:
        return len(self.ids)

    def code(self, item_id: str) -> int:
        """Code of an item, 0 where there is no such item."""
        return self._codes.get(item_id, 0)

    def title(self, code: int) -> str | None:
        """Title of the item `code`, where it has one."""
        return self.titles[code - 1] if self.titles is not None else None

    def metadata(self, code: int) -> Mapping[str, Any]:
        """Every metadata column of the item `code`."""
        return {name: self._table.column(name)[code - 1].as_py() for name in self.attributes}

    def values(self, attribute: str, code: int) -> tuple[str, ...]:
        """The values, as text, that the item `code` has in a metadata column (several in a list column).

        Raises:
            InputError: no such attribute.
        """
        return self._column(attribute)[1][code - 1]

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
            by_code = [_texts(value) for value in self._table.column(attribute).to_pylist()]
            by_value: dict[str, list[int]] = {}
            for code, texts in enumerate(by_code, start=1):
                for text in texts:
                    by_value.setdefault(text, []).append(code)
            self._columns[attribute] = ({text: np.asarray(codes) for text, codes in by_value.items()}, by_code)
        return self._columns[attribute]


def _texts(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, list | tuple):
        return tuple(text for part in value for text in _texts(part))
    if isinstance(value, bool):
        return ("true" if value else "false",)
    if isinstance(value, float) and value.is_integer():
        return (str(int(value)),)
    return (str(value),)


def prepare(items: pa.Table, *, num_items: int) -> pa.Table:
    """The table as a bundle stores it: `code` first, ids as text, then title and metadata.

    Args:
        items: `id`, optionally `title`, and metadata columns; row i describes code i + 1.
        num_items: rows expected.

    Raises:
        InputError: no `id`, missing or repeated ids, or another number of rows.
    """
    if ID not in items.column_names:
        raise InputError(f"items need a column {ID!r}, found {', '.join(items.column_names) or 'no column'}")
    if items.num_rows != num_items:
        raise InputError(f"items have {items.num_rows} rows, the catalogue has {num_items} items")
    ids = items.column(ID).cast(pa.string())
    if ids.null_count or len(pc.unique(ids)) != num_items:
        raise InputError("item ids must be present and distinct")
    table = items.drop_columns([ID] + [CODE] * (CODE in items.column_names))
    table = table.add_column(0, ID, ids)
    return table.add_column(0, CODE, pa.array(np.arange(1, num_items + 1, dtype=np.int32)))


def write(path: Path, table: pa.Table) -> None:
    """Write a prepared table."""
    pq.write_table(table, path)


def read(path: Path, *, num_items: int) -> ItemTable:
    """Read the items of a bundle.

    Raises:
        FormatError: not Parquet, rows or columns that don't agree with the catalogue, or a size beyond reason.
    """
    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            meta = file.metadata
            unfolded = sum(meta.row_group(i).total_byte_size for i in range(meta.num_row_groups))
            if meta.num_rows != num_items:
                raise FormatError(f"{path} has {meta.num_rows} items, the model has {num_items}")
            if unfolded > _MAX_UNFOLDED_BYTES or meta.num_columns > _MAX_COLUMNS:
                raise FormatError(f"{path} unfolds to {unfolded} bytes in {meta.num_columns} columns: beyond reason")
            table = file.read()
    except (pa.ArrowException, OSError) as error:
        raise FormatError(f"{path} cannot be read as Parquet: {' '.join(str(error).split())}") from error
    try:
        return ItemTable(prepare(table, num_items=num_items))
    except (InputError, pa.ArrowException) as error:
        raise FormatError(f"{path}: {error}") from None
