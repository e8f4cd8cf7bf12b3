"""From the encoded rows of some users to their examples: order, split, bound on contributions, history.

Everything here looks at the rows of one user at a time (vectorised over many users). What is kept of a user, which row
is held out and what stands in a history is a function of that user's own rows, whatever order they came in.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lazydp.components.features.encode import CodeLists
from lazydp.components.features.spec import USER, FeatureSpec, HashedSplit, LeaveLastOut, ListFeature, SingleFeature
from lazydp.components.features.values import texts_of
from lazydp.components.features.vocabulary import Codes, Vocabularies
from lazydp.components.ingest.hashing import Words, chain, fraction_of, hash_texts, mix
from lazydp.components.ingest.rows import (
    FEATURE_PREFIX,
    HASH_COLUMN,
    ITEM_COLUMN,
    LABEL_COLUMN,
    TEST_COLUMN,
    TIME_COLUMN,
    TIME_PART_COLUMN,
    USER_COLUMN,
    USER_HASH_COLUMN,
    Mask,
)
from lazydp.kernels.rows import order_by_user, order_rows

Array = np.ndarray[Any, Any]
_USER_CODE = "user_code"
# Any fixed word: keeps the choice of a sample independent of the order by hash.
_SAMPLE = np.uint64(0x73616D706C65)
# A string array has offsets of 32 bits.
_MOST_TEXT = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class SplitRows:
    """Encoded examples of one split, in their final order; fields as in `Batch`, n rows.

    hashes: of the user, without users of the row: what parts them; ascending.
    user_index and history_end count from the partition's first user and its first training item.
    """

    hashes: Words

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
    """What one partition contributes to the dataset."""

    train: SplitRows
    test: SplitRows
    users: pa.Array | None
    # Of the users; empty without them.
    user_hashes: Words
    # The train items of each user in order of time: what histories are windows of.
    sequences: CodeLists | None
    # Which of the given rows stands at each place of the final order; and where in it each user's rows end.
    order: Codes
    row_ends: Codes
    # Training examples of each user.
    examples: Codes


@dataclass
class _Sorted:
    """Rows as they came, and their final order, grouped by user.

    order: which row stands at a place.
    user: which of the partition's users it is of, ascending.
    ends: where in the order each user's rows end.
    user_hashes: of the users, in their order.
    hashes: of the rows in their order.
    """

    rows: pa.Table
    order: Codes
    user: Codes | None
    ends: Codes
    user_hashes: Words
    hashes: Words
    is_test: Mask = field(init=False)

    @property
    def num_users(self) -> int:
        return len(self.ends)

    def column(self, name: str) -> Array:
        """A column of numbers in the final order."""
        return np.asarray(_numpy(self.rows.column(name))[self.order])

    def counts(self, mask: Mask) -> Codes:
        """How many rows of each user the mask has."""
        running = np.zeros(len(mask) + 1, dtype=np.int64)
        np.cumsum(mask, out=running[1:])
        return np.asarray(np.diff(running[self.ends], prepend=0))


def assemble(spec: FeatureSpec, vocabularies: Vocabularies, rows: pa.Table, users: pa.Table | None) -> Assembled:
    """Make the examples of one partition.

    Args:
        spec: the resolved feature spec.
        vocabularies: those of the spec.
        rows: encoded rows, all rows of every user in it (see `InteractionEncoder`).
        users: encoded user features (`user`, `hash`, `feature:<name>`), None without any.
    """
    names, ordered = _order(spec, rows)
    ordered.is_test = _held_out(spec, ordered)
    kept = ~ordered.is_test & _within_bound(spec, ordered)
    sequences, history_end, history_length = _histories(spec, ordered)
    profiles = _profiles(spec, vocabularies, names, users)
    train, test = (
        _examples(spec, ordered, np.flatnonzero(mask), profiles, history_end, history_length)
        for mask in (kept, ordered.is_test)
    )
    return Assembled(
        train=train,
        test=test,
        users=names,
        user_hashes=ordered.user_hashes,
        sequences=sequences,
        order=ordered.order,
        row_ends=ordered.ends,
        examples=ordered.counts(kept),
    )


def _order(spec: FeatureSpec, rows: pa.Table) -> tuple[pa.Array | None, _Sorted]:
    """Sort rows by user (by hash of the id), then time, then content; without users by content."""
    hashes = _numpy(rows.column(HASH_COLUMN))
    if spec.user is None:
        order = order_rows(hashes)
        none, no_words = np.empty(0, np.int64), np.empty(0, np.uint64)
        return None, _Sorted(rows=rows, order=order, user=None, ends=none, user_hashes=no_words, hashes=hashes[order])
    names = _one_array(rows.column(USER_COLUMN))
    time, part = None, None
    if TIME_COLUMN in rows.column_names:
        time = _numpy(rows.column(TIME_COLUMN))
        part = _numpy(rows.column(TIME_PART_COLUMN)) if TIME_PART_COLUMN in rows.column_names else None
    elif TEST_COLUMN in rows.column_names:
        # Without time, what is for evaluation comes after what is for training.
        time = _numpy(rows.column(TEST_COLUMN)).astype(np.int64)
    user_hashes = _numpy(rows.column(USER_HASH_COLUMN))
    order, starts = order_by_user(user_hashes, texts_of(names), time=time, part=part, content=hashes)
    first = np.flatnonzero(starts)
    ends = np.append(first[1:], len(order))
    user = np.repeat(np.arange(len(first)), ends - first)
    return names.take(pa.array(order[first])), _Sorted(
        rows=rows, order=order, user=user, ends=ends, user_hashes=user_hashes[order[first]], hashes=hashes[order]
    )


def _held_out(spec: FeatureSpec, ordered: _Sorted) -> Mask:
    """Which rows are for evaluation."""
    split = spec.effective_split
    if TEST_COLUMN in ordered.rows.column_names:
        return np.asarray(ordered.column(TEST_COLUMN), dtype=bool)
    held_out = np.zeros(len(ordered.hashes), dtype=bool)
    if isinstance(split, LeaveLastOut):
        held_out[ordered.ends[np.diff(ordered.ends, prepend=0) > 1] - 1] = True
    elif isinstance(split, HashedSplit):
        held_out = fraction_of(chain(ordered.hashes, hash_texts(pa.array([split.salt])))) < split.test_fraction
    return held_out


def _within_bound(spec: FeatureSpec, ordered: _Sorted) -> Mask:
    """Which rows are among the k training rows that the user may contribute; says nothing of rows held out."""
    bound = spec.max_examples_per_user
    within = np.ones(len(ordered.hashes), dtype=bool)
    if bound is None or ordered.user is None:
        return within
    train = ~ordered.is_test
    counts = ordered.counts(train)
    if spec.effective_selection == "sample":
        rows = np.flatnonzero(train)
        user = ordered.user[rows]
        by_choice = order_rows(user.astype(np.uint64), content=mix(ordered.hashes[rows] ^ _SAMPLE))
        place = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        within[rows[by_choice]] = place < bound
        return within
    # Latest first: the rows stand in order of time, so those count that have fewer than k after them.
    after = np.repeat(np.cumsum(counts), np.diff(ordered.ends, prepend=0)) - np.cumsum(train)
    return np.asarray(after < bound)


def _histories(spec: FeatureSpec, ordered: _Sorted) -> tuple[CodeLists | None, Array | None, Array | None]:
    """Each user's positive training items in order, and for each row the window of them that came before it."""
    if ordered.user is None or spec.item is None:
        return None, None, None
    positive = ~ordered.is_test & (ordered.column(LABEL_COLUMN) >= 0.5)
    items = _numpy(ordered.rows.column(ITEM_COLUMN))[ordered.order[positive]]
    lengths = ordered.counts(positive)
    before: Codes = np.cumsum(positive) - positive
    available = before - np.repeat(np.cumsum(lengths) - lengths, np.diff(ordered.ends, prepend=0))
    max_length = spec.history.max_length if spec.history is not None else 0
    return CodeLists(items, lengths), before, np.minimum(available, max_length).astype(np.int32)


def _profiles(
    spec: FeatureSpec, vocabularies: Vocabularies, names: pa.Array | None, users: pa.Table | None
) -> pa.Table | None:
    """The user features of each of the partition's users, a null row where the users table lacks the user."""
    if names is None:
        return None
    found = pa.table({USER_COLUMN: names})
    if spec.user is not None and spec.user.embed:
        codes = vocabularies[USER].encode(names)
        found = found.append_column(_USER_CODE, pa.array(codes.astype(np.int32)))
    features = [feature.name for feature in spec.features if feature.source == "user"]
    if users is None or not features:
        return found
    # Of several rows for one user the one with the smallest hash counts, wherever it stands.
    users = users.sort_by([(USER_COLUMN, "ascending"), (HASH_COLUMN, "ascending")])
    rows = pc.index_in(names, value_set=users.column(USER_COLUMN).combine_chunks().cast(names.type))
    for name in features:
        found = found.append_column(FEATURE_PREFIX + name, users.column(FEATURE_PREFIX + name).take(rows))
    return found


def _examples(
    spec: FeatureSpec,
    ordered: _Sorted,
    places: Codes,
    profiles: pa.Table | None,
    history_end: Array | None,
    history_length: Array | None,
) -> SplitRows:
    user = None if ordered.user is None else ordered.user[places]
    gather = _Gather(ordered.rows, ordered.order[places], profiles, user)
    dense = [gather.numbers(f.source, f.name) for f in spec.dense("user", "context")]
    embedded = spec.embedded("user", "context")
    codes = [gather.numbers(f.source, f.name) for f in embedded if isinstance(f, SingleFeature)]
    if spec.user is not None and spec.user.embed and profiles is not None:
        codes.insert(0, (_numpy(profiles.column(_USER_CODE)), user))
    return SplitRows(
        hashes=ordered.hashes[places] if user is None else ordered.user_hashes[user],
        label=gather.own(LABEL_COLUMN),
        dense=_stacked(dense, len(places), np.float32),
        codes=_stacked(codes, len(places), np.int32),
        lists={f.name: gather.lists(f.source, f.name) for f in embedded if isinstance(f, ListFeature)},
        item=gather.own(ITEM_COLUMN) if spec.item is not None else None,
        user_index=user,
        history_end=None if history_end is None else history_end[places],
        history_length=None if history_length is None else history_length[places],
    )


@dataclass(frozen=True)
class _Gather:
    """Picks feature values for examples: from the row for context features, from the user for user features."""

    rows: pa.Table
    picked: Codes
    profiles: pa.Table | None
    user: Codes | None

    def own(self, column: str) -> Array:
        return np.asarray(_numpy(self.rows.column(column))[self.picked])

    def _column(self, source: str, name: str) -> tuple[pa.ChunkedArray | None, Codes | None]:
        table, picked = (self.rows, self.picked) if source == "context" else (self.profiles, self.user)
        column = FEATURE_PREFIX + name
        if table is None or column not in table.column_names:
            return None, picked
        return table.column(column), picked

    def numbers(self, source: str, name: str) -> tuple[Array, Codes | None]:
        """The values of a column, and which of them the examples have; (none, none) where there are none."""
        column, picked = self._column(source, name)
        if column is None:
            return np.empty(0), None
        return _numpy(column.fill_null(0) if column.null_count else column), picked

    def lists(self, source: str, name: str) -> CodeLists:
        column, picked = self._column(source, name)
        if column is None or picked is None:
            return CodeLists(np.empty(0, dtype=np.int64), np.zeros(len(self.picked), dtype=np.int64))
        lengths = pc.list_value_length(column).fill_null(0).to_numpy().astype(np.int64)
        values = pc.list_flatten(column).to_numpy().astype(np.int64)
        return CodeLists(values, lengths).take(picked)


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    """The texts of all chunks in one array."""
    if column.nbytes > _MOST_TEXT:
        column = column.cast(pa.large_string())
    return column.combine_chunks()


def _numpy(column: pa.ChunkedArray) -> Array:
    return np.asarray(column.to_numpy())


def _stacked(columns: list[tuple[Array, Codes | None]], size: int, dtype: Any) -> Array:
    """The picked values of columns side by side, [size, number of columns]; 0 where there is nothing to pick."""
    stacked = np.zeros((size, len(columns)), dtype=dtype)
    for number, (values, picked) in enumerate(columns):
        if picked is not None:
            stacked[:, number] = values[picked]
    return stacked
