"""From the encoded rows of some users to their examples: order, split, bound on contributions, history.

Everything here looks at the rows of one user at a time (vectorised over many users). What is kept of a user, which row
is held out and what stands in a history is a function of that user's own rows, whatever order they came in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lazydp.components.features.encode import CodeLists
from lazydp.components.features.spec import USER, FeatureSpec, HashedSplit, LeaveLastOut, ListFeature, SingleFeature
from lazydp.components.features.values import texts_of
from lazydp.components.features.vocabulary import Codes, Vocabularies
from lazydp.components.ingest.hashing import Words, chain, fraction_of, hash_texts, mix
from lazydp.components.ingest.memory import Workspace
from lazydp.components.ingest.rows import (
    FEATURE_PREFIX,
    HASH_COLUMN,
    ITEM_COLUMN,
    LABEL_COLUMN,
    TEST_COLUMN,
    TIME_COLUMN,
    TIME_PART_COLUMN,
    USER_COLUMN,
    Mask,
    hash_rows,
)
from lazydp.kernels.rows import (
    Array,
    Examples,
    OrderedRows,
    SplitUsers,
    gather,
    number_users,
    order_by_time,
    order_rows,
    split_users,
)

_USER_CODE = "user_code"
# Any fixed word: keeps the choice of a sample independent of the order by hash.
_SAMPLE = np.uint64(0x73616D706C65)
_HASHED_AT_ONCE = 1 << 16
_STACKED_AT_ONCE = 1 << 12
# A string array has offsets of 32 bits.
_MOST_TEXT = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class SplitRows:
    """Encoded examples of one split, in their final order; fields as in `Batch`, n rows.

    user_index and history_end count from the partition's first user and its first training item.
    """

    label: Array
    dense: Array
    codes: Array
    lists: dict[str, CodeLists]
    item: Array | None
    user_index: Array | None
    history_end: Array | None
    history_length: Array | None

    def __len__(self) -> int:
        return len(self.label)


@dataclass(frozen=True, kw_only=True)
class Assembled:
    """What one partition contributes to the dataset.

    users: texts [U]; None without users.
    hashes: of the users, without users of the rows in their order; ascending.
    sequences: the train items of each user in order of time, int32: what histories are windows of.
    order: which of the given rows stands at each place of the final order.
    row_ends: where in it the rows of each hash end.
    train_counts, test_counts: examples of each hash.
    """

    train: SplitRows
    test: SplitRows
    users: pa.Array | None
    hashes: Words
    sequences: CodeLists | None
    order: Array
    row_ends: Codes
    train_counts: Codes
    test_counts: Codes


@dataclass(frozen=True)
class _Sorted:
    """Rows as they came, and their final order: by user, without users by content.

    names: of the users [U], None without users.
    hashes: of the users, without users of the rows; in their order.
    order: which row stands at a place.
    ends: where in the order the rows of each hash end.
    """

    rows: pa.Table
    names: pa.Array | None
    hashes: Words
    order: Array
    ends: Codes

    def column(self, name: str) -> Array:
        """A column of numbers in the final order."""
        return _picked(_numpy(self.rows.column(name)), self.order)


class Assembler:
    """Makes the examples of partitions; does not change, so that threads may share it."""

    def __init__(self, spec: FeatureSpec, vocabularies: Vocabularies) -> None:
        """Take the resolved spec and its vocabularies."""
        self._spec = spec
        self._vocabularies = vocabularies

    def assemble(self, rows: pa.Table, users: pa.Table | None, workspace: Workspace) -> Assembled:
        """Make the examples of one partition.

        Args:
            rows: encoded rows, all rows of every user in it (see `spill.Parted.of`).
            users: encoded user features (`user`, `hash`, `feature:<name>`), None without any.
            workspace: makes the arrays.
        """
        spec = self._spec
        ordered = _order(spec, rows, workspace)
        masks = OrderedRows(
            order=ordered.order,
            ends=ordered.ends,
            test=_held_out(spec, ordered),
            positive=_positive(spec, ordered),
            bound=spec.max_examples_per_user if spec.user is not None else None,
        )
        masks = _with_sample(spec, ordered, masks)
        most_history = spec.history.max_length if spec.history is not None else 0
        found = split_users(masks, most_history=most_history, empty=workspace.empty)
        profiles = _profiles(spec, self._vocabularies, ordered.names, users)
        gather = _Gather(spec, rows, profiles, workspace)
        return Assembled(
            train=gather.examples(found.train),
            test=gather.examples(found.test),
            users=ordered.names,
            hashes=ordered.hashes,
            sequences=gather.sequences(found),
            order=ordered.order,
            row_ends=ordered.ends,
            train_counts=found.train_counts,
            test_counts=found.test_counts,
        )


def _order(spec: FeatureSpec, rows: pa.Table, workspace: Workspace) -> _Sorted:
    """Sort rows by user (by hash of the id), then time, then content; without users by content."""
    if spec.user is None:
        hashes = _numpy(rows.column(HASH_COLUMN))
        order = order_rows(hashes)
        ends = np.arange(1, len(order) + 1)
        return _Sorted(rows, None, hashes[order], order.astype(np.uint32), ends)
    names, hashes, numbers = _numbered_users(rows.column(USER_COLUMN), workspace)
    time: Array | None = None
    if TIME_COLUMN in rows.column_names:
        time = _numpy(rows.column(TIME_COLUMN), workspace)
    elif TEST_COLUMN in rows.column_names:
        # Without time, what is for evaluation comes after what is for training.
        time = _numpy(rows.column(TEST_COLUMN)).astype(np.int64)
    order, ends, ties = order_by_time(numbers, len(names), time, empty=workspace.empty)
    _settle(spec, rows, order, np.flatnonzero(ties), ties)
    return _Sorted(rows, names, hashes, order, ends)


def _numbered_users(column: pa.ChunkedArray, workspace: Workspace) -> tuple[pa.Array, Words, Array]:
    """The users of a partition in their order, their hashes, and the number of each row's user (uint32)."""
    names = _one_array([chunk.dictionary for chunk in column.chunks])
    hashes = hash_texts(names)
    number_of, distinct = number_users(hashes, texts_of(names))
    numbers = workspace.empty(len(column), np.uint32)
    begin, first = 0, 0
    for chunk in column.chunks:
        end, last = begin + len(chunk), first + len(chunk.dictionary)
        gather(number_of[first:last], chunk.indices.to_numpy(), numbers[begin:end])
        begin, first = end, last
    return names.take(pa.array(distinct)), hashes[distinct], numbers


def _settle(spec: FeatureSpec, rows: pa.Table, order: Array, places: Codes, ties: Array) -> None:
    """Put rows of one user and time in the order of their times' parts and their content; changes `order`."""
    if not len(places):
        return
    tied = order[places]
    part = None
    if TIME_PART_COLUMN in rows.column_names:
        part = _picked(_numpy(rows.column(TIME_PART_COLUMN)), tied)
    group = np.cumsum(ties[places] == 1).astype(np.uint64)
    order[places] = tied[order_rows(group, part=part, content=content_hashes(spec, rows, tied))]


def content_hashes(spec: FeatureSpec, rows: pa.Table, picked: Array) -> Words:
    """The hashes of the content of some rows (see `hash_rows`), some thousand at a time: uint64 [number picked]."""
    if HASH_COLUMN in rows.column_names:
        return _picked(_numpy(rows.column(HASH_COLUMN)), picked)
    content = rows.drop_columns([USER_COLUMN])
    hashes = np.empty(len(picked), dtype=np.uint64)
    for begin in range(0, len(picked), _HASHED_AT_ONCE):
        some = picked[begin : begin + _HASHED_AT_ONCE]
        (batch,) = content.take(pa.array(some)).combine_chunks().to_batches()
        hashes[begin : begin + len(some)] = hash_rows(batch, spec)
    return hashes


def _held_out(spec: FeatureSpec, ordered: _Sorted) -> Mask | None:
    """Which rows are for evaluation, by place; None where none is."""
    split = spec.effective_split
    if TEST_COLUMN in ordered.rows.column_names:
        return ordered.column(TEST_COLUMN).astype(bool)
    if isinstance(split, LeaveLastOut):
        held_out = np.zeros(len(ordered.order), dtype=bool)
        held_out[ordered.ends[np.diff(ordered.ends, prepend=0) > 1] - 1] = True
        return held_out
    if isinstance(split, HashedSplit):
        hashes = content_hashes(spec, ordered.rows, ordered.order)
        return np.asarray(fraction_of(chain(hashes, hash_texts(pa.array([split.salt])))) < split.test_fraction)
    return None


def _positive(spec: FeatureSpec, ordered: _Sorted) -> Mask | None:
    """Which rows are positive, by place; None where all are."""
    if LABEL_COLUMN not in ordered.rows.column_names or ordered.names is None or spec.item is None:
        return None
    return np.asarray(ordered.column(LABEL_COLUMN) >= 0.5)


def _with_sample(spec: FeatureSpec, ordered: _Sorted, masks: OrderedRows) -> OrderedRows:
    """With the mask of the k training rows of each user that a sample keeps; the latest k need none."""
    if masks.bound is None or spec.effective_selection != "sample":
        return masks
    size = len(ordered.order)
    rows = np.arange(size) if masks.test is None else np.flatnonzero(~masks.test)
    user = np.repeat(np.arange(len(ordered.ends)), np.diff(ordered.ends, prepend=0))[rows]
    counts = np.bincount(user, minlength=len(ordered.ends))
    hashes = content_hashes(spec, ordered.rows, ordered.order[rows])
    by_choice = order_rows(user.astype(np.uint64), content=mix(hashes ^ _SAMPLE))
    within = np.zeros(size, dtype=bool)
    within[rows[by_choice]] = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts) < masks.bound
    return replace(masks, within=within)


def _profiles(
    spec: FeatureSpec, vocabularies: Vocabularies, names: pa.Array | None, users: pa.Table | None
) -> pa.Table | None:
    """The user features of each of the partition's users, a null row where the users table lacks the user."""
    if names is None:
        return None
    found = pa.table({USER_COLUMN: names})
    if spec.user is not None and spec.user.embed:
        found = found.append_column(_USER_CODE, pa.array(vocabularies[USER].encode_column(names)))
    features = [feature.name for feature in spec.features if feature.source == "user"]
    if users is None or not features:
        return found
    # Of several rows for one user the one with the smallest hash counts, wherever it stands.
    users = users.sort_by([(USER_COLUMN, "ascending"), (HASH_COLUMN, "ascending")])
    rows = pc.index_in(names, value_set=users.column(USER_COLUMN).combine_chunks().cast(names.type))
    for name in features:
        found = found.append_column(FEATURE_PREFIX + name, users.column(FEATURE_PREFIX + name).take(rows))
    return found


@dataclass(frozen=True)
class _Gather:
    """Picks feature values for examples: from the row for context features, from the user for user features."""

    spec: FeatureSpec
    rows: pa.Table
    profiles: pa.Table | None
    workspace: Workspace
    _joined: dict[str, Array] = field(default_factory=dict)

    def examples(self, found: Examples) -> SplitRows:
        """The values of some examples."""
        spec = self.spec
        embedded = spec.embedded("user", "context")
        singles = [(f.source, FEATURE_PREFIX + f.name) for f in embedded if isinstance(f, SingleFeature)]
        if spec.user is not None and spec.user.embed:
            singles.insert(0, ("user", _USER_CODE))
        dense = [(f.source, FEATURE_PREFIX + f.name) for f in spec.dense("user", "context")]
        with_history = spec.user is not None and spec.item is not None
        return SplitRows(
            label=self._label(found),
            dense=self._stacked(dense, found, np.float32),
            codes=self._stacked(singles, found, np.int32),
            lists={f.name: self._lists(f.source, f.name, found) for f in embedded if isinstance(f, ListFeature)},
            item=self._own(ITEM_COLUMN, found.rows) if spec.item is not None else None,
            user_index=found.users if spec.user is not None else None,
            history_end=found.history_ends if with_history else None,
            history_length=found.history_lengths if with_history else None,
        )

    def sequences(self, found: SplitUsers) -> CodeLists | None:
        """The items that histories are windows of."""
        if self.spec.user is None or self.spec.item is None:
            return None
        return CodeLists(self._own(ITEM_COLUMN, found.items), found.item_counts)

    def _label(self, found: Examples) -> Array:
        if LABEL_COLUMN in self.rows.column_names:
            return self._own(LABEL_COLUMN, found.rows)
        label = self.workspace.empty(len(found), np.float32)
        label.fill(1.0)
        return label

    def _values(self, name: str) -> Array:
        """A column of the rows in one array, made once for both splits."""
        if name not in self._joined:
            column = self.rows.column(name)
            self._joined[name] = _numpy(column.fill_null(0) if column.null_count else column, self.workspace)
        return self._joined[name]

    def _own(self, column: str, picked: Array) -> Array:
        values = self._values(column)
        out = self.workspace.empty(len(picked), values.dtype)
        gather(values, picked, out)
        return out

    def _stacked(self, columns: Sequence[tuple[str, str]], found: Examples, dtype: Any) -> Array:
        """The values of columns side by side, [size, number of columns]; 0 where there is nothing to pick."""
        stacked = self.workspace.empty(len(found) * len(columns), dtype).reshape(len(found), len(columns))
        for number, (source, name) in enumerate(columns):
            if source == "context":
                continue
            if self.profiles is not None and name in self.profiles.column_names:
                stacked[:, number] = _numpy(self.profiles.column(name).fill_null(0))[found.users]
            else:
                stacked[:, number] = 0
        own = [(number, self._values(name)) for number, (source, name) in enumerate(columns) if source == "context"]
        # Some rows at a time, so that what is written column by column is still near the processor.
        for begin in range(0, len(found), _STACKED_AT_ONCE):
            picked = slice(begin, begin + _STACKED_AT_ONCE)
            for number, values in own:
                gather(values, found.rows[picked], stacked[picked], column=number)
        return stacked

    def _lists(self, source: str, name: str, found: Examples) -> CodeLists:
        table, picked = (self.rows, found.rows) if source == "context" else (self.profiles, found.users)
        if table is None or FEATURE_PREFIX + name not in table.column_names:
            return CodeLists(np.empty(0, dtype=np.int64), np.zeros(len(found), dtype=np.int64))
        column = table.column(FEATURE_PREFIX + name)
        lengths = pc.list_value_length(column).fill_null(0).to_numpy().astype(np.int64)
        values = pc.list_flatten(column).to_numpy().astype(np.int64)
        return CodeLists(values, lengths).take(picked.astype(np.int64))


def _one_array(arrays: Sequence[pa.Array]) -> pa.Array:
    """The texts of all arrays in one."""
    if sum(array.nbytes for array in arrays) > _MOST_TEXT:
        arrays = [array.cast(pa.large_string()) for array in arrays]
    return pa.concat_arrays(arrays)


def _numpy(column: pa.ChunkedArray, workspace: Workspace | None = None) -> Array:
    """A column of numbers in one array: a view where it is in one piece."""
    if column.num_chunks == 1 or workspace is None or pa.types.is_boolean(column.type):
        return np.asarray(column.to_numpy())
    joined = workspace.empty(len(column), column.type.to_pandas_dtype())
    begin = 0
    for chunk in column.chunks:
        joined[begin : begin + len(chunk)] = chunk.to_numpy()
        begin += len(chunk)
    return joined


def _picked(values: Array, rows: Array) -> Array:
    out = np.empty(len(rows), dtype=values.dtype)
    gather(values, rows, out)
    return out
