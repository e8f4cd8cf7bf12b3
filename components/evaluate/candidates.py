"""What held-out items are ranked among, where a file gives it: a published protocol's negatives, or items in stock."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import torch

from lazydp.components.features.batch import Bags
from lazydp.components.features.spec import ITEM
from lazydp.components.features.values import canonical_text
from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.ingest.source import RowSource, require_columns
from lazydp.components.shared.errors import InputError

_log = logging.getLogger("lazydp.evaluate")


def read_candidates(path: Path, data: EncodedDataset) -> Bags:
    """The candidates of every user_index, as item codes; an empty bag for a user of whom the file says nothing.

    Args:
        path: any kind of file that ingest reads, one row for each pair of user and item, in the columns of the spec.
        data: the dataset; users of the file that it does not know are left out, and the log says how many rows.

    Raises:
        InputError: the dataset has no users or items, the file lacks a column, names an item outside the catalogue, or
            knows none of the users.
    """
    spec = data.spec
    if spec.user is None or spec.item is None or data.users is None:
        raise InputError("candidates are items of a user, and this dataset lacks users or items: leave them out")
    source = RowSource.open([str(path)])
    columns = (spec.user.column, spec.item.column)
    require_columns([(columns[0], "user.column"), (columns[1], "item.column")], source, where=f"candidates {path}")
    rows = source.table(columns)
    users = pc.index_in(canonical_text(rows.column(columns[0])), value_set=data.users)
    known = users.is_valid().to_numpy(zero_copy_only=False)
    if not known.any():
        raise InputError(f"candidates {path} name no user of dataset {data.path}: are these the same people?")
    if not known.all():
        _log.warning("candidates: %d of %d rows are of users that the dataset lacks", (~known).sum(), len(known))
    items = data.vocabularies[ITEM].encode(rows.column(columns[1]))
    if not items.all():
        missing = rows.column(columns[1])[int(np.flatnonzero(items == 0)[0])].as_py()
        raise InputError(f"candidates {path}: item {missing!r} is not in the catalogue of dataset {data.path}")
    owner = users.fill_null(0).to_numpy()[known].astype(np.int64)
    order = np.argsort(owner, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=data.num_users))])
    return Bags(torch.from_numpy(items[known][order].astype(np.int64)), torch.from_numpy(offsets.astype(np.int64)))
