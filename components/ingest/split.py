"""The examples of one split of a dataset: read at random, of one set of memory-mapped files or of several."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import torch

from lazydp.components.features.batch import Bags, Batch
from lazydp.components.features.encode import CodeLists, ranges
from lazydp.components.features.spec import HISTORY, USER, FeatureSpec, ListFeature
from lazydp.components.ingest.manifest import BAG_PREFIX
from lazydp.components.ingest.mapped_file import MappedFile, will_need
from lazydp.components.shared.errors import InputError

Array: TypeAlias = np.ndarray[Any, Any]
Rows: TypeAlias = np.ndarray[tuple[int], np.dtype[np.int64]]


@dataclass(frozen=True)
class _Picked:
    """Some examples, in some order: fields as in `Batch`, n rows."""

    label: Array
    dense: Array
    codes: Array
    item: Array | None
    user_index: Array | None
    lists: dict[str, CodeLists]

    def take(self, rows: Rows) -> _Picked:
        return _Picked(
            label=self.label[rows],
            dense=self.dense[rows],
            codes=self.codes[rows],
            item=None if self.item is None else self.item[rows],
            user_index=None if self.user_index is None else self.user_index[rows],
            lists={name: lists.take(rows) for name, lists in self.lists.items()},
        )

    @staticmethod
    def joined(parts: Sequence[_Picked]) -> _Picked:
        """The examples of one after those of the other."""
        items = [part.item for part in parts if part.item is not None]
        users = [part.user_index for part in parts if part.user_index is not None]
        return _Picked(
            label=np.concatenate([part.label for part in parts]),
            dense=np.concatenate([part.dense for part in parts]),
            codes=np.concatenate([part.codes for part in parts]),
            item=np.concatenate(items) if items else None,
            user_index=np.concatenate(users) if users else None,
            lists={
                name: CodeLists(
                    np.concatenate([part.lists[name].values for part in parts]),
                    np.concatenate([part.lists[name].lengths for part in parts]),
                )
                for name in parts[0].lists
            },
        )


class SplitPart:
    """The examples of one part of a split: views of its files."""

    def __init__(
        self, spec: FeatureSpec, columns: Mapping[str, pa.Array], *, sequence: Array, users_before: int
    ) -> None:
        """Take the columns of a file.

        Args:
            spec: the dataset's spec.
            columns: of the file.
            sequence: the training items of the part's users, which histories are windows of.
            users_before: users of the parts before this one.
        """
        self.size = len(columns["label"])
        self.users_before = users_before
        self.label = numbers(columns["label"])
        self.item = numbers(columns["item"]) if "item" in columns else None
        self.user_index = numbers(columns["user_index"]) if "user_index" in columns else None
        self._dense = _matrix(columns.get("dense"), self.size, spec.num_dense, np.float32)
        self._codes = _matrix(columns.get("codes"), self.size, len(singles(spec)), np.int32)
        lists = [f.name for f in spec.embedded("user", "context") if isinstance(f, ListFeature)]
        self._lists = {name: list_parts(columns[BAG_PREFIX + name]) for name in lists}
        self._sequence = sequence
        self._history = (
            (numbers(columns["history_end"]), numbers(columns["history_length"])) if spec.history is not None else None
        )

    def will_need(self, rows: Rows) -> None:
        """Have the kernel load the columns of these rows, but not the values of their lists."""
        columns = [self.label, self._dense, self._codes, self.item, self.user_index, *(self._history or ())]
        _will_need([(column, rows) for column in columns if column is not None and column.size])
        _will_need([(offsets, places) for _, offsets in self._lists.values() for places in (rows, rows + 1)])

    def will_need_lists(self, rows: Rows) -> None:
        """Have the kernel load the values of their lists and histories; reads where these lie."""
        for values, offsets in self._lists.values():
            _will_need_runs(values, offsets[rows], offsets[rows + 1] - offsets[rows])
        if self._history is not None:
            ends, lengths = self._history[0][rows], self._history[1][rows].astype(np.int64)
            _will_need_runs(self._sequence, ends - lengths, lengths)

    def take(self, rows: Rows) -> _Picked:
        lists = {}
        for name, (values, offsets) in self._lists.items():
            starts = offsets[rows]
            lists[name] = _gathered(values, starts, offsets[rows + 1] - starts)
        if self._history is not None:
            ends, lengths = self._history[0][rows], self._history[1][rows].astype(np.int64)
            lists[HISTORY] = _gathered(self._sequence, ends - lengths, lengths)
        return _Picked(
            label=self.label[rows],
            dense=self._dense[rows],
            codes=self._codes[rows],
            item=None if self.item is None else self.item[rows],
            user_index=None if self.user_index is None else self.user_index[rows] + self.users_before,
            lists=lists,
        )


class Split:
    """The examples of one split, in order of user and time; `take` reads any of them."""

    def __init__(self, spec: FeatureSpec, parts: Sequence[SplitPart], files: Sequence[MappedFile]) -> None:
        self._parts = parts
        self._files = files
        self._ends = np.cumsum([part.size for part in parts])
        self._size = int(self._ends[-1])
        self._singles = singles(spec)
        self._order = [feature.name for feature in spec.example_features()]

    def __len__(self) -> int:
        return self._size

    @property
    def num_bytes(self) -> int:
        """Bytes of the files that `take` reads."""
        return sum(file.num_bytes for file in self._files)

    def read_at_random(self) -> None:
        """Prepare for `take` where the files do not stay in memory; see `MappedFile.read_at_random`."""
        for file in self._files:
            file.read_at_random()

    def evict(self) -> None:
        """Have the kernel forget the pages of the files: for benchmarks."""
        for file in self._files:
            file.evict()

    def will_need(self, rows: Rows) -> None:
        """Have the kernel load these rows, without waiting for them; `will_need_lists` asks for the rest."""
        for part, of_part in self._by_part(rows):
            part.will_need(of_part)

    def will_need_lists(self, rows: Rows) -> None:
        """Have the kernel load the lists and histories of rows that were asked for by `will_need` some time ago."""
        for part, of_part in self._by_part(rows):
            part.will_need_lists(of_part)

    @cached_property
    def label(self) -> Array:
        """float32 [n]; a view of the file where there is one part, else in memory."""
        return _whole([part.label for part in self._parts])

    @cached_property
    def item(self) -> Array | None:
        """int32 [n], as `label`; None without an item."""
        found = [part.item for part in self._parts if part.item is not None]
        return _whole(found) if found else None

    @cached_property
    def user_index(self) -> Array | None:
        """int64 [n], ascending, as `label`; None without a user."""
        found: list[Array] = []
        for part in self._parts:
            if part.user_index is not None:
                found.append(part.user_index + part.users_before if part.users_before else part.user_index)
        return _whole(found) if found else None

    def take(self, rows: Rows) -> Batch:
        """The examples `rows` (int64 [B], any order, repeats allowed, none allowed), in that order.

        Raises:
            IndexError: a row outside 0..len - 1.
        """
        rows = np.asarray(rows, dtype=np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= self._size):
            raise IndexError(f"rows must lie in 0..{self._size - 1}, found {rows.min()}..{rows.max()}")
        picked = self._picked(rows)
        bags = {name: _bags(lists) for name, lists in picked.lists.items()}
        codes = torch.from_numpy(np.ascontiguousarray(picked.codes.T, dtype=np.int64))
        offsets = torch.arange(len(rows) + 1)
        bags |= {name: Bags(codes[column], offsets) for column, name in enumerate(self._singles)}
        return Batch(
            size=len(rows),
            labels=torch.from_numpy(picked.label),
            dense=torch.from_numpy(picked.dense),
            bags={name: bags[name] for name in self._order},
            item=None if picked.item is None else torch.from_numpy(picked.item.astype(np.int64)),
            user_index=None if picked.user_index is None else torch.from_numpy(picked.user_index),
        )

    def _picked(self, rows: Rows) -> _Picked:
        if len(self._parts) == 1:
            return self._parts[0].take(rows)
        found = [part.take(of_part) for part, of_part in self._by_part(rows)]
        back = np.empty(len(rows), dtype=np.int64)
        back[self._order_by_part(rows)] = np.arange(len(rows))
        return _Picked.joined(found or [self._parts[0].take(rows)]).take(back)

    def _order_by_part(self, rows: Rows) -> Rows:
        return np.argsort(np.searchsorted(self._ends, rows, side="right"), kind="stable").astype(np.int64)

    def _by_part(self, rows: Rows) -> Iterator[tuple[SplitPart, Rows]]:
        """The parts that hold any of the rows, with those rows as they are counted there."""
        ordered = rows[self._order_by_part(rows)]
        ends = np.cumsum(np.bincount(np.searchsorted(self._ends, ordered, side="right"), minlength=len(self._parts)))
        for place, part in enumerate(self._parts):
            of_part = ordered[ends[place - 1] if place else 0 : ends[place]]
            if len(of_part):
                yield part, of_part - (self._ends[place] - part.size)

    def rows_of(self, users: Rows) -> tuple[Rows, Rows]:
        """Where the examples of `users` (int64 [U], user_index) begin, and how many each has: int64 [U] both.

        A user's examples lie side by side, so two binary searches find them: what isn't asked for isn't read.

        Raises:
            InputError: the dataset has no user column.
        """
        if self.user_index is None:
            raise InputError("this dataset has no user column: its privacy unit can only be the example")
        starts = np.searchsorted(self.user_index, users).astype(np.int64)
        return starts, np.searchsorted(self.user_index, users, side="right") - starts


def _will_need(wanted: Sequence[tuple[Array, Rows]]) -> None:
    """Ask for single rows of columns."""
    if wanted:
        starts = [column.ctypes.data + rows * column.strides[0] for column, rows in wanted]
        sizes = [np.full(len(rows), column.strides[0], dtype=np.int64) for column, rows in wanted]
        will_need(np.concatenate(starts), np.concatenate(sizes))


def _will_need_runs(values: Array, starts: Rows, lengths: Rows) -> None:
    """Ask for runs of values."""
    held = np.flatnonzero(lengths)
    width = values.strides[0]
    will_need(values.ctypes.data + starts[held] * width, np.asarray(lengths[held] * width, dtype=np.int64))


def singles(spec: FeatureSpec) -> list[str]:
    """The features of an example that have one code, in the order of their columns."""
    names = [f.name for f in spec.embedded("user", "context") if not isinstance(f, ListFeature)]
    return [USER, *names] if spec.user is not None and spec.user.embed else names


def numbers(array: pa.Array) -> Array:
    """A column of numbers as a view."""
    return np.asarray(array.to_numpy(zero_copy_only=True))


def list_parts(array: pa.Array) -> tuple[Array, Array]:
    """Values and offsets of a column of lists, as views."""
    return numbers(array.values), numbers(array.offsets)


def _matrix(array: pa.Array | None, size: int, width: int, dtype: Any) -> Array:
    if array is None:
        return np.empty((size, width), dtype=dtype)
    return numbers(array.flatten()).reshape(size, width)


def _whole(parts: Sequence[Array]) -> Array:
    if len(parts) == 1:
        return parts[0]
    joined = np.concatenate(parts)
    joined.flags.writeable = False
    return joined


def _gathered(values: Array, starts: Rows, lengths: Rows) -> CodeLists:
    return CodeLists(values[ranges(starts, lengths)], lengths)


def _bags(lists: CodeLists) -> Bags:
    return Bags(torch.from_numpy(lists.values.astype(np.int64)), torch.from_numpy(lists.offsets()))
