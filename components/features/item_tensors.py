"""The tensors of a catalogue table."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from lazydp.components.features.batch import Bags, ItemCatalogue
from lazydp.components.features.catalogue import BAG_PREFIX, DENSE_COLUMN
from lazydp.components.features.spec import ITEM, FeatureSpec
from lazydp.components.shared.errors import FormatError


def item_catalogue(spec: FeatureSpec, table: pa.Table) -> ItemCatalogue:
    """The tensors of a catalogue table; row 0 (the unknown item) has zeros, empty bags, and code 0 as its id.

    Raises:
        FormatError: the table lacks a feature of the spec, or has another number of items.
    """
    if spec.item is None:
        return ItemCatalogue(num_items=0, dense=torch.zeros(1, 0), bags={})
    num_items = table.num_rows
    if num_items + 1 != spec.tables()[ITEM]:
        raise FormatError(f"the catalogue has {num_items} items, its feature spec {spec.tables()[ITEM] - 1}")
    wanted = [BAG_PREFIX + feature.name for feature in spec.embedded("item")]
    wanted += [DENSE_COLUMN] if spec.num_item_dense else []
    for column in wanted:
        if column not in table.column_names:
            raise FormatError(f"the catalogue has no column {column!r}; it has {', '.join(table.column_names)}")
    bags = {ITEM: Bags.single(torch.arange(num_items + 1))}
    for feature in spec.embedded("item"):
        bags[feature.name] = _bags_after_unknown(table.column(BAG_PREFIX + feature.name))
    dense = torch.zeros(num_items + 1, spec.num_item_dense)
    if spec.num_item_dense:
        flat = pc.list_flatten(table.column(DENSE_COLUMN)).to_numpy().reshape(num_items, spec.num_item_dense)
        dense[1:] = torch.from_numpy(np.array(flat, dtype=np.float32))
    return ItemCatalogue(num_items=num_items, dense=dense, bags=bags)


def _bags_after_unknown(column: pa.ChunkedArray) -> Bags:
    lengths = pc.list_value_length(column).fill_null(0).to_numpy()
    offsets = np.concatenate([[0, 0], np.cumsum(lengths)]).astype(np.int64)
    values = pc.list_flatten(column).to_numpy().astype(np.int64)
    return Bags(torch.from_numpy(values), torch.from_numpy(offsets))
