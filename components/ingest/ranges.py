"""What a dataset holds, hash range by hash range: counts and digests that depend on its rows alone.

The hashes of users (of rows, without users) fall into fixed ranges. A range's digest is of the encoded columns of its
users, counted from its first user. So it depends neither on files, parts, workers and memory, nor on what other ranges
hold: parts made on several machines have the ranges of the whole between them, and rows that are added to one range
leave the others as they were.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lazydp.components.features.encode import CodeLists
from lazydp.components.features.values import texts_of
from lazydp.components.ingest.assemble import Assembled, SplitRows
from lazydp.components.ingest.hashing import Words

# Ranges of the upper bits of a hash. Part of the format: the fingerprint is over them.
RANGE_BITS = 9
NUM_RANGES = 1 << RANGE_BITS
_SHIFT = np.uint64(64 - RANGE_BITS)

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Range:
    """One range that has rows.

    number: 0..NUM_RANGES - 1.
    rows: accepted rows.
    train, test, users, items: examples of each split, users, and training items of all histories.
    most: training examples of the user who has most; 0 without users.
    digest: SHA-256 of the encoded columns.
    """

    number: int
    rows: int
    most: int
    train: int
    test: int
    users: int
    items: int
    digest: str


def part_of_range(number: int, parts: int) -> int:
    """Which of so many parts (a power of two up to NUM_RANGES) holds a range."""
    return number * parts // NUM_RANGES


def ranges_of(part: Assembled) -> list[Range]:
    """The ranges of a partition, which holds each of them whole, in their order."""
    hashed = _cuts(part.hashes)
    ends = {"train": part.train_counts.cumsum(), "test": part.test_counts.cumsum(), "rows": part.row_ends}
    if part.sequences is not None:
        ends["items"] = part.sequences.lengths.cumsum()
    cuts = {name: np.append(0, end)[hashed] for name, end in ends.items()}
    nothing = np.zeros(NUM_RANGES + 1, dtype=np.int64)
    cuts["users"] = hashed if part.users is not None else nothing
    cuts.setdefault("items", nothing)
    counts = {name: np.diff(cut) for name, cut in cuts.items()}
    found = []
    for number in np.flatnonzero(counts["rows"]).tolist():
        at = {name: slice(int(cut[number]), int(cut[number + 1])) for name, cut in cuts.items()}
        sizes = {name: int(count[number]) for name, count in counts.items()}
        most = int(part.train_counts[at["users"]].max(initial=0))
        found.append(Range(number=number, most=most, digest=_digest(_columns(part, at)), **sizes))
    return found


def _cuts(hashes: Words) -> Array:
    """Where each range begins among ascending hashes, and where the last one ends: int64 [NUM_RANGES + 1]."""
    return np.searchsorted(hashes >> _SHIFT, np.arange(NUM_RANGES + 1, dtype=np.uint64)).astype(np.int64)


def _columns(part: Assembled, at: Mapping[str, slice]) -> Iterable[tuple[str, Sequence[Any]]]:
    """The columns of a range as buffers, counted from the range's first user and first item."""
    for name, split in (("train", part.train), ("test", part.test)):
        for column, buffers in _split_columns(split, at[name], at["users"].start, at["items"].start):
            yield f"{name}.{column}", buffers
    if part.users is not None:
        texts = texts_of(part.users.slice(at["users"].start, at["users"].stop - at["users"].start))
        ends = texts.offsets.astype(np.int64)
        yield "users.user", [ends - ends[0], memoryview(texts.data or b"")[int(ends[0]) : int(ends[-1])]]
    if part.sequences is not None:
        lengths, values = part.sequences.lengths[at["users"]], part.sequences.values[at["items"]]
        yield "users.items", [lengths.astype(np.int64, copy=False), values.astype(np.int32, copy=False)]


def _split_columns(
    split: SplitRows, rows: slice, first_user: int, first_item: int
) -> Iterable[tuple[str, Sequence[Any]]]:
    yield "label", [split.label[rows]]
    yield "dense", [split.dense[rows]]
    yield "codes", [split.codes[rows]]
    if split.item is not None:
        yield "item", [split.item[rows]]
    if split.user_index is not None:
        yield "user_index", [split.user_index[rows] - first_user]
    if split.history_end is not None and split.history_length is not None:
        yield "history_end", [split.history_end[rows] - first_item]
        yield "history_length", [split.history_length[rows]]
    for name, lists in sorted(split.lists.items()):
        yield f"list.{name}", _of_lists(lists, rows)


def _of_lists(lists: CodeLists, rows: slice) -> Sequence[Any]:
    begin = int(lists.lengths[: rows.start].sum())
    lengths = lists.lengths[rows].astype(np.int64)
    return [lengths, lists.values[begin : begin + int(lengths.sum())].astype(np.int32)]


def _digest(columns: Iterable[tuple[str, Sequence[Any]]]) -> str:
    """SHA-256 over the name and the SHA-256 of every column."""
    whole = hashlib.sha256()
    for name, buffers in columns:
        column = hashlib.sha256()
        for buffer in buffers:
            column.update(np.ascontiguousarray(buffer).data)
        whole.update(name.encode() + b"\0" + column.digest())
    return whole.hexdigest()


def write_ranges(path: Path, ranges: Sequence[Range]) -> None:
    """Write ranges as an Arrow file."""
    table = pa.Table.from_pylist([asdict(found) for found in ranges], schema=_SCHEMA)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
        writer.write_table(table)


def read_ranges(path: Path) -> list[Range]:
    """What `write_ranges` wrote."""
    with pa.memory_map(str(path)) as source:
        return [Range(**found) for found in pa.ipc.open_file(source).read_all().to_pylist()]


_SCHEMA = pa.schema(
    [
        ("number", pa.int32()),
        *((name, pa.int64()) for name in ("rows", "most", "train", "test", "users", "items")),
        ("digest", pa.string()),
    ]
)
