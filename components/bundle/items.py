"""The items of a bundle as a person knows them: id, title and metadata of every item code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from lazydp.components.bundle.attributes import Attributes
from lazydp.components.features.catalogue import (
    BAG_PREFIX,
    DENSE_COLUMN,
    ID_COLUMN,
    METADATA_PREFIX,
    TITLE_COLUMN,
)
from lazydp.components.shared.bounded_parquet import read_bounded
from lazydp.components.shared.errors import FormatError


class ItemTable:
    """Items by code 1..num_items, from the catalogue table (see `features.catalogue`).

    Attributes:
        ids: text, `ids[code - 1]` is the item's id.
        titles: text or None by the same index; None where the table has no titles.
        columns: the metadata columns.
        attributes: their names, which filters may name.
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
        self.columns = Attributes(self._metadata, num_items=len(self.ids))
        self.attributes = self.columns.names
        self._codes = {name: code for code, name in enumerate(self.ids, start=1)}

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
