"""Rows of coming steps are asked for in time, each once, and change nothing of the batches."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lazydp.components.ingest import mapped_file
from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.ingest.ingest import IngestOptions, ingest
from lazydp.components.shared import memory
from lazydp.components.train.config import TrainConfig
from lazydp.components.train.data.read_ahead import STEPS_BETWEEN, ReadAhead
from lazydp.components.train.run import batches
from lazydp.components.train.run.batches import batch_maker
from lazydp.kernels.noise_key import NoiseKey

SPEC = """
name: a
label: {kind: implicit}
user: {column: u, vocabulary: {kind: hashed, buckets: 50, salt: s}}
item: {column: i, vocabulary: {kind: integer, size: 40}}
timestamp: t
history: {max_length: 5}
features:
  - {name: tags, kind: list, vocabulary: {kind: hashed, buckets: 9, salt: s}}
  - {name: x, kind: dense, bounds: [0, 1]}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> EncodedDataset:
    folder = tmp_path_factory.mktemp("data")
    generator, rows = np.random.default_rng(0), 20_000
    columns = {name: generator.integers(0, 40, rows) for name in "uit"}
    tags = [list(range(number % 4)) for number in range(rows)]
    pq.write_table(pa.table({**columns, "tags": tags, "x": generator.random(rows)}), folder / "log.parquet")
    ingest([str(folder / "log.parquet")], SPEC, folder / "out", IngestOptions(parts=4))
    return EncodedDataset.open(folder / "out")


@dataclass
class Asked:
    """A split that notes what it is asked for."""

    first: list[int] = field(default_factory=list)
    lists: list[int] = field(default_factory=list)

    def read_at_random(self) -> None:
        """Nothing to do."""

    def will_need(self, rows: Any) -> None:
        """Note it."""
        self.first.append(int(rows[0]))

    def will_need_lists(self, rows: Any) -> None:
        """Note it."""
        self.lists.append(int(rows[0]))


@dataclass(frozen=True)
class Step:
    """A step that draws its own number."""

    rows: np.ndarray[tuple[int], np.dtype[np.int64]]


def test_rows_are_asked_for_in_time_and_once() -> None:
    asked = Asked()
    ahead = ReadAhead(asked, lambda step: Step(np.array([step])), last=20)  # type: ignore[arg-type]
    for step in range(5, 21):
        assert ahead(step).rows.tolist() == [step]
        assert max(asked.first) == min(step + 2 * STEPS_BETWEEN, 20)
        assert max(asked.lists) == min(step + STEPS_BETWEEN, 20)
    assert asked.first == asked.lists == list(range(5, 21))
    # A step out of order is drawn all the same.
    assert ahead(3).rows.tolist() == [3]


def settings(sampling: str = "example") -> TrainConfig:
    """A configuration that draws small batches."""
    drawn = {"sampling": sampling, "sampling_prob": 0.01, "expected_batch_size": 200, "steps": 7}
    rest = {"model": {"kind": "two_tower"}, "noise_multiplier": 1.0, "target_delta": 1e-5}
    return TrainConfig.parse(drawn | rest | ({"user_gradient": "mean"} if sampling == "user" else {}), where="test")


@pytest.mark.parametrize("sampling", ["example", "user"])
def test_batches_are_the_same(data: EncodedDataset, sampling: str) -> None:
    config = settings(sampling)
    makers = [batch_maker(data, config, NoiseKey.for_tests(1), read_ahead=ahead) for ahead in (False, True)]
    for step in range(1, 8):
        plain, ahead = (maker(step) for maker in makers)
        assert_equal(plain, ahead)


def assert_equal(one: Any, other: Any) -> None:
    """All tensors of two batches are equal."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, Mapping):
        assert one.keys() == other.keys()
        assert_equal(list(one.values()), list(other.values()))
    elif isinstance(one, Sequence):
        assert len(one) == len(other)
        for part, same in zip(one, other, strict=True):
            assert_equal(part, same)
    elif is_dataclass(one):
        assert_equal([getattr(one, f.name) for f in fields(one)], [getattr(other, f.name) for f in fields(one)])
    else:
        assert one == other


@pytest.mark.parametrize(("share", "ahead"), [(0.4, False), (0.6, True)])
def test_what_does_not_fit_into_memory_is_read_ahead(
    data: EncodedDataset, monkeypatch: pytest.MonkeyPatch, share: float, ahead: bool
) -> None:
    made: list[object] = []

    def note(*_: object, **__: object) -> Callable[[int], None]:
        made.append(None)
        return lambda _step: None

    monkeypatch.setattr(batches, "ReadAhead", note)
    monkeypatch.setattr(batches, "available_memory", lambda: data.split("train").num_bytes / share)
    batch_maker(data, settings(), NoiseKey.for_tests(1))
    assert bool(made) is ahead


def test_the_pages_asked_for_are_those_that_are_read(data: EncodedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    class Recorder:
        @staticmethod
        def madvise(start: int, size: int, advice: int) -> int:
            assert advice == mmap.MADV_WILLNEED
            asked.append((start // mmap.PAGESIZE, (start + size - 1) // mmap.PAGESIZE))
            return 0

    monkeypatch.setattr(mapped_file, "_LIBC", Recorder)
    split = data.split("train")
    rows = np.sort(np.random.default_rng(1).choice(len(split), 300, replace=False))
    split.will_need(rows)
    split.will_need_lists(rows)
    found = {page for first, last in asked for page in range(first, last + 1)}
    expected: set[int] = set()
    for part, of_part in split._by_part(rows):
        assert part._history is not None
        history_end, history_length = part._history
        columns = [part.label, part._dense, part._codes, part.item, part.user_index, history_end, history_length]
        values, offsets = part._lists["tags"]
        for row in of_part.tolist():
            for column in columns:
                assert column is not None
                expected |= pages_of(column, row, row + 1)
            expected |= pages_of(offsets, row, row + 2)
            expected |= pages_of(values, int(offsets[row]), int(offsets[row + 1]))
            end = int(history_end[row])
            expected |= pages_of(part._sequence, end - int(history_length[row]), end)
    assert found == expected


def pages_of(column: np.ndarray[Any, Any], begin: int, end: int) -> set[int]:
    """Pages of some entries of a column."""
    if end == begin:
        return set()
    first = column.ctypes.data + begin * column.strides[0]
    return set(range(first // mmap.PAGESIZE, (first + (end - begin) * column.strides[0] - 1) // mmap.PAGESIZE + 1))


def test_adjacent_pages_are_asked_for_together(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    class Recorder:
        @staticmethod
        def madvise(start: int, size: int, _advice: int) -> int:
            asked.append((start // mmap.PAGESIZE, size // mmap.PAGESIZE))
            return 0

    monkeypatch.setattr(mapped_file, "_LIBC", Recorder)
    pages = np.array([9, 1, 2, 2, 5, 1]) * mmap.PAGESIZE
    mapped_file.will_need(pages + 8, np.array([8, 8, 8, 8, 2 * mmap.PAGESIZE, 8]))
    assert asked == [(1, 2), (5, 3), (9, 1)]
    mapped_file.will_need(pages[:0], pages[:0])
    assert len(asked) == 3


@pytest.mark.parametrize(
    ("groups", "file", "limit"),
    [
        ("0::/a/b\n", "a/memory.max", "12345"),
        ("0::/a/b\n", "a/b/memory.max", "12345"),
        ("0::/not/mounted\n", "memory.max", "12345"),
        ("4:memory:/a\n0::/\n", "memory/a/memory.limit_in_bytes", "12345"),
        ("0::/a\n", "a/memory.max", "max"),
    ],
)
def test_limits_of_control_groups_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: str, file: str, limit: str
) -> None:
    (tmp_path / "groups").write_text(groups)
    (tmp_path / "fs" / file).parent.mkdir(parents=True)
    (tmp_path / "fs" / file).write_text(limit + "\n")
    (tmp_path / "meminfo").write_text("MemTotal: 1000 kB\nMemAvailable: 500 kB\n")
    monkeypatch.setattr(memory, "_OWN_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(memory, "_GROUPS", tmp_path / "fs")
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    assert memory.available_memory() == (12345 if limit != "max" else 500 << 10)
