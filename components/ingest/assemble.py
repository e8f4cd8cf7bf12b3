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
from lazydp.components.features.vocabulary import Codes, Vocabularies
from lazydp.components.ingest.hashing import Words, chain, fraction_of, hash_text, mix
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
)

Array = np.ndarray[Any, Any]
_USER_CODE = "user_code"
# Any fixed word: keeps the choice of a sample independent of the order by hash.
_SAMPLE = np.uint64(0x73616D706C65)


@dataclass(frozen=True, kw_only=True)
class SplitRows:
    """Encoded examples of one split, in their final order; fields as in `Batch`, n rows."""

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
    # The train items of each user in order of time: what histories are windows of.
    sequences: CodeLists | None
    over_bound: int
    max_examples: int


@dataclass
class _Sorted:
    """Rows in their final order, grouped by user."""

    rows: pa.Table
    user: Codes | None  # which of the partition's users, ascending
    num_users: int
    hashes: Words
    is_test: Mask = field(init=False)


class Assembler:
    """Makes examples of partitions that come in ascending order of hash; numbers users across partitions."""

    def __init__(self, spec: FeatureSpec, vocabularies: Vocabularies) -> None:
        self._spec = spec
        self._vocabularies = vocabularies
        self._users_done = 0
        self._sequence_done = 0

    def assemble(self, rows: pa.Table, users: pa.Table | None) -> Assembled:
        """Make the examples of one partition.

        Args:
            rows: encoded rows, all rows of every user in it (see `InteractionEncoder`).
            users: encoded user features (`user`, `hash`, `feature:<name>`), None without any.
        """
        names, ordered = self._order(rows)
        ordered.is_test = self._held_out(ordered)
        kept = ~ordered.is_test & self._within_bound(ordered)
        sequences, history_end, history_length = self._histories(ordered)
        profiles = self._profiles(names, users)
        parts = {
            test: self._examples(ordered, np.flatnonzero(mask), profiles, history_end, history_length)
            for test, mask in ((False, kept), (True, ordered.is_test))
        }
        assembled = Assembled(
            train=parts[False],
            test=parts[True],
            users=names,
            sequences=sequences,
            over_bound=int((~kept & ~ordered.is_test).sum()),
            max_examples=_largest_count(ordered.user, kept),
        )
        self._users_done += ordered.num_users
        self._sequence_done += len(sequences.values) if sequences is not None else 0
        return assembled

    def _order(self, rows: pa.Table) -> tuple[pa.Array | None, _Sorted]:
        """Sort rows by user (by hash of the id), then time, then content; without users by content."""
        hashes = rows.column(HASH_COLUMN).to_numpy()
        if self._spec.user is None:
            order = np.argsort(hashes, kind="stable")
            return None, _Sorted(rows=rows.take(pa.array(order)), user=None, num_users=0, hashes=hashes[order])
        names, rank = _ranked(rows.column(USER_COLUMN))
        keys = [hashes]
        if TIME_COLUMN in rows.column_names:
            if TIME_PART_COLUMN in rows.column_names:
                keys.append(rows.column(TIME_PART_COLUMN).to_numpy())
            keys.append(rows.column(TIME_COLUMN).to_numpy())
        elif TEST_COLUMN in rows.column_names:
            # Without time, what is for evaluation comes after what is for training.
            keys.append(rows.column(TEST_COLUMN).to_numpy())
        order = _order_of(rank, keys)
        ordered = rows.drop_columns([USER_COLUMN]).take(pa.array(order))
        return names, _Sorted(rows=ordered, user=rank[order], num_users=len(names), hashes=hashes[order])

    def _held_out(self, ordered: _Sorted) -> Mask:
        """Which rows are for evaluation."""
        split = self._spec.effective_split
        if TEST_COLUMN in ordered.rows.column_names:
            return np.asarray(ordered.rows.column(TEST_COLUMN).to_numpy(), dtype=bool)
        if isinstance(split, LeaveLastOut):
            assert ordered.user is not None
            counts = np.bincount(ordered.user, minlength=ordered.num_users)
            last = np.zeros(len(ordered.user), dtype=bool)
            last[np.cumsum(counts)[counts > 1] - 1] = True
            return last
        if isinstance(split, HashedSplit):
            salt = hash_text(pa.array([split.salt]))
            held_out: Mask = fraction_of(chain(ordered.hashes, salt)) < split.test_fraction
            return held_out
        return np.zeros(len(ordered.hashes), dtype=bool)

    def _within_bound(self, ordered: _Sorted) -> Mask:
        """Which rows are among the k training rows that the user may contribute."""
        bound = self._spec.max_examples_per_user
        within = np.ones(len(ordered.hashes), dtype=bool)
        if bound is None or ordered.user is None:
            return within
        train = np.flatnonzero(~ordered.is_test)
        user = ordered.user[train]
        if self._spec.effective_selection == "sample":
            by_choice = np.lexsort((mix(ordered.hashes[train] ^ _SAMPLE), user))
        else:
            # Latest first: the rows stand in order of time.
            by_choice = np.lexsort((-np.arange(len(train)), user))
        counts = np.bincount(user, minlength=ordered.num_users)
        place = np.arange(len(train)) - np.repeat(np.cumsum(counts) - counts, counts)
        within[train[by_choice]] = place < bound
        return within

    def _histories(self, ordered: _Sorted) -> tuple[CodeLists | None, Array | None, Array | None]:
        """Each user's positive training items in order, and for each row the window of them that came before it."""
        if ordered.user is None or self._spec.item is None:
            return None, None, None
        positive = ~ordered.is_test & (ordered.rows.column(LABEL_COLUMN).to_numpy() >= 0.5)
        items = ordered.rows.column(ITEM_COLUMN).to_numpy()[positive].astype(np.int64)
        lengths = np.bincount(ordered.user[positive], minlength=ordered.num_users)
        begins = np.cumsum(lengths) - lengths
        before = np.cumsum(positive) - positive
        available = before - begins[ordered.user]
        max_length = self._spec.history.max_length if self._spec.history is not None else 0
        return (
            CodeLists(items, lengths.astype(np.int64)),
            before + self._sequence_done,
            np.minimum(available, max_length).astype(np.int32),
        )

    def _profiles(self, names: pa.Array | None, users: pa.Table | None) -> pa.Table | None:
        """The user features of each of the partition's users, a null row where the users table lacks the user."""
        if names is None:
            return None
        found = pa.table({USER_COLUMN: names})
        if self._spec.user is not None and self._spec.user.embed:
            codes = self._vocabularies[USER].encode(names)
            found = found.append_column(_USER_CODE, pa.array(codes.astype(np.int32)))
        if users is None or not self._user_features():
            return found
        # Of several rows for one user the one with the smallest hash counts, wherever it stands.
        users = users.sort_by([(USER_COLUMN, "ascending"), (HASH_COLUMN, "ascending")])
        rows = pc.index_in(names, value_set=users.column(USER_COLUMN).combine_chunks())
        for name in self._user_features():
            found = found.append_column(FEATURE_PREFIX + name, users.column(FEATURE_PREFIX + name).take(rows))
        return found

    def _user_features(self) -> list[str]:
        return [feature.name for feature in self._spec.features if feature.source == "user"]

    def _examples(
        self,
        ordered: _Sorted,
        rows: Codes,
        profiles: pa.Table | None,
        history_end: Array | None,
        history_length: Array | None,
    ) -> SplitRows:
        user = None if ordered.user is None else ordered.user[rows]
        gather = _Gather(ordered.rows, rows, profiles, user)
        spec = self._spec
        dense = [gather.numbers(f.source, f.name, np.float32) for f in spec.dense("user", "context")]
        embedded = spec.embedded("user", "context")
        codes = [gather.numbers(f.source, f.name, np.int32) for f in embedded if isinstance(f, SingleFeature)]
        if spec.user is not None and spec.user.embed and profiles is not None:
            codes.insert(0, profiles.column(_USER_CODE).to_numpy()[user])
        return SplitRows(
            label=gather.own(LABEL_COLUMN),
            dense=_stacked(dense, len(rows), np.float32),
            codes=_stacked(codes, len(rows), np.int32),
            lists={f.name: gather.lists(f.source, f.name) for f in embedded if isinstance(f, ListFeature)},
            item=gather.own(ITEM_COLUMN) if spec.item is not None else None,
            user_index=None if user is None else user + self._users_done,
            history_end=None if history_end is None else history_end[rows],
            history_length=None if history_length is None else history_length[rows],
        )


@dataclass(frozen=True)
class _Gather:
    """Picks feature values for examples: from the row for context features, from the user for user features."""

    rows: pa.Table
    picked: Codes
    profiles: pa.Table | None
    user: Codes | None

    def own(self, column: str) -> Array:
        return np.asarray(self.rows.column(column).to_numpy()[self.picked])

    def _column(self, source: str, name: str) -> tuple[pa.ChunkedArray | None, Codes | None]:
        table, picked = (self.rows, self.picked) if source == "context" else (self.profiles, self.user)
        column = FEATURE_PREFIX + name
        if table is None or column not in table.column_names:
            return None, picked
        return table.column(column), picked

    def numbers(self, source: str, name: str, dtype: Any) -> Array:
        column, picked = self._column(source, name)
        if column is None:
            return np.zeros(len(self.picked), dtype=dtype)
        values = column.fill_null(0).to_numpy()
        return np.asarray(values[picked], dtype=dtype)

    def lists(self, source: str, name: str) -> CodeLists:
        column, picked = self._column(source, name)
        if column is None or picked is None:
            return CodeLists(np.empty(0, dtype=np.int64), np.zeros(len(self.picked), dtype=np.int64))
        lengths = pc.list_value_length(column).fill_null(0).to_numpy().astype(np.int64)
        values = pc.list_flatten(column).to_numpy().astype(np.int64)
        return CodeLists(values, lengths).take(picked)


def _ranked(users: pa.ChunkedArray) -> tuple[pa.Array, Codes]:
    """The distinct users in order of (hash, id), and for each row the place of its user in that order."""
    encoded = users.combine_chunks().dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.combine_chunks()
    names = encoded.dictionary
    order = pc.sort_indices(
        pa.table({"hash": pa.array(hash_text(names)), "name": names}),
        sort_keys=[("hash", "ascending"), ("name", "ascending")],
    ).to_numpy()
    place = np.empty(len(names), dtype=np.int64)
    place[order] = np.arange(len(names))
    return names.take(pa.array(order)), place[encoded.indices.to_numpy(zero_copy_only=False)]


def _order_of(rank: Codes, keys: list[Array]) -> Codes:
    """The order by rank, then by the last of the keys, and so on: `np.lexsort((*keys, rank))`, twice as fast.

    Sorting by one key and then stably by a small rank is quick; the few rows that agree in both are put in order after.
    """
    order = np.argsort(keys[-1])
    order = order[np.argsort(rank[order].astype(np.int32), kind="stable")]
    key, user = keys[-1][order], rank[order]
    equal = (key[1:] == key[:-1]) & (user[1:] == user[:-1])
    if equal.any():
        tied = np.flatnonzero(np.append(equal, False) | np.append(False, equal))
        among = order[tied]
        # Runs of equal rows keep their places, since rank and key come first here, too.
        order[tied] = among[np.lexsort((*(part[among] for part in keys), rank[among]))]
    return np.asarray(order)


def _stacked(columns: list[Array], size: int, dtype: Any) -> Array:
    return np.stack(columns, axis=1) if columns else np.empty((size, 0), dtype=dtype)


def _largest_count(user: Codes | None, kept: Mask) -> int:
    if user is None or not kept.any():
        return 0
    return int(np.bincount(user[kept]).max())
