"""The catalogue as an Arrow table: what a dataset and a bundle keep of the items.

Row i describes item code i + 1. Columns: `item` (id, text), `title` (text, null where unknown), `metadata:<column>`
(text), `dense` (fixed-size list of float32), `bag:<feature>` (list of int32 codes).
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lazydp.components.features.encode import CodeLists, encode_list, refuse_text, scale_dense
from lazydp.components.features.spec import ITEM, FeatureSpec, ListFeature
from lazydp.components.features.values import MAX_ID, canonical_text
from lazydp.components.features.vocabulary import Vocabularies
from lazydp.components.shared.errors import InputError

ID_COLUMN = "item"
TITLE_COLUMN = "title"
METADATA_PREFIX = "metadata:"
DENSE_COLUMN = "dense"
BAG_PREFIX = "bag:"


def catalogue_table(spec: FeatureSpec, vocabularies: Vocabularies, items: pa.Table | None) -> pa.Table:
    """Encode the public items table for every code of the item vocabulary.

    Args:
        spec: a spec with an item.
        vocabularies: its vocabularies.
        items: the items table, None where the spec declares none; items that the vocabulary lacks are left out.

    Raises:
        InputError: an id is too long, an item stands there twice, or a column is of the wrong kind.
    """
    assert spec.item is not None
    ids = vocabularies[ITEM].values()
    assert ids is not None
    longest = pc.max(pc.utf8_length(ids)).as_py() or 0
    if longest > MAX_ID:
        raise InputError(f"item vocabulary: an id has {longest} characters; ids may have up to {MAX_ID}")
    columns: dict[str, pa.Array] = {ID_COLUMN: ids, TITLE_COLUMN: pa.nulls(len(ids), pa.string())}
    if items is not None and spec.items is not None:
        rows = _rows_in_code_order(vocabularies, items.column(spec.items.key), size=len(ids))
        described = items.take(rows)
        columns |= _display_columns(spec, described)
        columns |= _feature_columns(spec, vocabularies, described)
    return pa.table(columns)


def _rows_in_code_order(vocabularies: Vocabularies, key: pa.ChunkedArray, *, size: int) -> pa.Array:
    """The row of the items table for each code 1..size, null where it has none."""
    try:
        codes = vocabularies[ITEM].encode(key)
    except ValueError as error:
        raise InputError(f"items table: its key: {error}") from None
    known = np.flatnonzero(codes)
    repeated = np.flatnonzero(np.bincount(codes[known]) > 1)
    if len(repeated):
        first = canonical_text(key)[int(known[codes[known] == repeated[0]][0])].as_py()
        raise InputError(f"items table: item {first!r} stands there more than once; each item needs one row")
    rows = np.full(size, -1, dtype=np.int64)
    rows[codes[known] - 1] = known
    return pa.array(rows, mask=rows < 0)


def _display_columns(spec: FeatureSpec, described: pa.Table) -> dict[str, pa.Array]:
    assert spec.item is not None
    wanted = {f"{METADATA_PREFIX}{column}": column for column in spec.item.metadata}
    if spec.item.title is not None:
        wanted[TITLE_COLUMN] = spec.item.title
    return {name: _display_text(described.column(column)) for name, column in wanted.items()}


def _display_text(column: pa.ChunkedArray) -> pa.Array:
    array = column.combine_chunks()
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        return pc.binary_join(array.cast(pa.list_(pa.string())), ", ")
    try:
        return canonical_text(array)
    except ValueError as error:
        raise InputError(f"items table: a column for display: {error}") from None


def _feature_columns(spec: FeatureSpec, vocabularies: Vocabularies, described: pa.Table) -> dict[str, pa.Array]:
    columns: dict[str, pa.Array] = {}
    dense = spec.dense("item")
    try:
        if dense:
            for number in dense:
                refuse_text(described.column(number.column_name))
            scaled = [scale_dense(feature, described.column(feature.column_name)) for feature in dense]
            flat = np.ascontiguousarray(np.stack(scaled, axis=1)).reshape(-1)
            columns[DENSE_COLUMN] = pa.FixedSizeListArray.from_arrays(pa.array(flat), len(dense))
        for feature in spec.embedded("item"):
            array = described.column(feature.column_name).combine_chunks()
            vocabulary = vocabularies[feature.table_name]
            if isinstance(feature, ListFeature):
                lists = encode_list(feature, vocabulary, array)
            else:
                lists = CodeLists(vocabulary.encode(array), np.ones(len(array), dtype=np.int64))
            columns[BAG_PREFIX + feature.name] = pa.ListArray.from_arrays(
                pa.array(lists.offsets().astype(np.int32)), pa.array(lists.values.astype(np.int32))
            )
    except ValueError as error:
        raise InputError(f"items table: {error}") from None
    return columns
