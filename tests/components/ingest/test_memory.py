"""Data larger than the memory given: parts on disk, each bounded; the peak does not grow with the log."""

import mmap
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lazydp.components.ingest import memory
from lazydp.components.ingest.ingest import IngestOptions, ingest
from lazydp.components.ingest.spill import Spill, part_by_hash, partitions_needed

_MEASURE = """
import sys, threading
from pathlib import Path
from lazydp.components.ingest.ingest import IngestOptions, ingest

spec = (
    "name: a\\nlabel: {kind: implicit}\\nuser: {column: u, vocabulary: {kind: hashed, buckets: 9999, salt: s}}\\n"
    "timestamp: t\\nhistory: {max_length: 20}\\nmax_examples_per_user: 64\\n"
    "item: {column: i, vocabulary: {kind: integer, size: 1000}}\\n"
)
peak, done = 0, threading.Event()

def watch():
    # Anonymous memory of the whole process; pages of mapped files can be dropped at any time.
    global peak
    while not done.wait(0.005):
        status = Path("/proc/self/status").read_text()
        peak = max(peak, int(status.split("RssAnon:")[1].split()[0]) << 10)

thread = threading.Thread(target=watch)
thread.start()
try:
    ingest([sys.argv[1]], spec, Path(sys.argv[2]), IngestOptions(memory_bytes=int(sys.argv[3]), workers=2))
finally:
    done.set()
    thread.join()
print(peak)
"""
_MIB = 1 << 20


def test_parts_are_as_many_as_memory_asks_for() -> None:
    assert partitions_needed(num_rows=1000, row_bytes=50, memory_bytes=1 << 30) == 1
    assert partitions_needed(num_rows=10**7, row_bytes=2500, memory_bytes=10**9) == 256
    # Workers hold a part each.
    assert partitions_needed(num_rows=10**7, row_bytes=2500, memory_bytes=10**9, workers=2) == 512
    assert partitions_needed(num_rows=10**12, row_bytes=50, memory_bytes=1) == 512
    # With memory enough parts are of half a million rows.
    assert partitions_needed(num_rows=10**7, row_bytes=50, memory_bytes=1 << 40) == 32


def test_arrays_in_files_have_their_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Else a disk that fills up later ends the process by SIGBUS, without a word.
    blocks: list[int] = []
    real = mmap.mmap

    def mapped(descriptor: int, length: int) -> mmap.mmap:
        blocks.append(os.fstat(descriptor).st_blocks)
        return real(descriptor, length)

    monkeypatch.setattr("lazydp.components.ingest.memory.mmap.mmap", mapped)
    assert len(memory.Workspace(tmp_path).empty(1 << 18, np.float64)) == 1 << 18
    assert [512 * found >= 1 << 21 for found in blocks] == [True]


def test_a_spill_gives_back_every_row_in_order_of_parts(tmp_path: Path) -> None:
    hashes = np.random.default_rng(0).integers(0, 2**64, 1000, dtype=np.uint64)
    spill = Spill(tmp_path, "x", 7)
    for part in np.array_split(np.arange(1000), 3):
        spill.add(part_by_hash(pa.record_batch({"row": part}), hashes[part], 7))
    spill.close()
    number_of = np.array([(int(word) * 7) >> 64 for word in hashes])
    for number, table in enumerate(spill.partitions()):
        assert table is not None
        assert sorted(table.column("row").to_pylist()) == np.flatnonzero(number_of == number).tolist()
    assert list(tmp_path.iterdir()) == []
    order = np.argsort(hashes)
    assert (np.diff(number_of[order]) >= 0).all()


def test_a_spill_keeps_in_memory_what_fits(tmp_path: Path) -> None:
    hashes = np.arange(1000, dtype=np.uint64) << np.uint64(54)
    rows = pa.record_batch({"row": np.arange(1000)})
    spill = Spill(tmp_path, "x", 4, memory_bytes=rows.nbytes)
    spill.add(part_by_hash(rows, hashes, 4))
    assert list(tmp_path.iterdir()) == []
    # Now memory is full.
    spill.add(part_by_hash(rows, hashes, 4))
    assert len(list(tmp_path.iterdir())) == 1
    spill.close()
    # Its file is mapped and has no name any more: nothing of it is left when the process is killed.
    assert list(tmp_path.iterdir()) == []
    assert [spill.has_rows(number) for number in range(4)] == [True] * 4
    found = [table.column("row").to_pylist() for table in spill.partitions() if table is not None]
    assert sorted(row for part in found for row in part) == sorted([*range(1000), *range(1000)])


def test_a_partition_too_large_for_memory_works_in_a_file_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One user has most rows, which stay together whatever the memory; large arrays are mapped, and leave no file."""
    monkeypatch.setattr(memory, "_SMALL_BYTES", 1)
    made = []
    original = memory.Workspace.empty

    def counted(workspace: memory.Workspace, size: int, dtype: Any) -> Any:
        array = original(workspace, size, dtype)
        made.append(not array.flags.owndata)
        return array

    monkeypatch.setattr(memory.Workspace, "empty", counted)
    generator = np.random.default_rng(0)
    users = np.where(generator.random(3000) < 0.8, 7, generator.integers(0, 50, 3000))
    log = pa.table({"u": users, "i": generator.integers(0, 9, 3000), "t": generator.integers(0, 99, 3000)})
    pq.write_table(log, tmp_path / "log.parquet")
    spec = (
        "name: a\nlabel: {kind: implicit}\nuser: {column: u, vocabulary: {kind: hashed, buckets: 9, salt: s}}\n"
        "timestamp: t\nhistory: {max_length: 3}\nitem: {column: i, vocabulary: {kind: integer, size: 9}}\n"
    )

    def content(name: str, memory_bytes: int) -> dict[str, bytes]:
        made.clear()
        ingest([str(tmp_path / "log.parquet")], spec, tmp_path / name, IngestOptions(memory_bytes=memory_bytes))
        paths = [path for path in (tmp_path / name).rglob("*") if path.is_file()]
        return {str(path.relative_to(tmp_path / name)): path.read_bytes() for path in paths}

    plenty = content("plenty", 1 << 40)
    assert made
    assert not any(made)
    assert content("little", 1) == plenty
    assert sum(made) > 10


def _log(path: Path, rows: int) -> None:
    """A log one user of which has a twentieth of the rows; row groups are large, and most users in one have a row."""
    generator = np.random.default_rng(0)
    group = min(rows, 1_000_000)
    names = pa.array(np.arange(rows // 20)).cast(pa.string())
    schema = pa.schema({"u": pa.string(), "i": pa.int64(), "t": pa.int64()})
    with pq.ParquetWriter(path, schema) as writer:
        for _ in range(rows // group):
            users = np.where(generator.random(group) < 0.05, 7, generator.integers(0, len(names), group))
            columns = [names.take(pa.array(users)), generator.integers(0, 1000, group)]
            writer.write_table(pa.table([*columns, generator.integers(0, 10**9, group)], schema=schema))


def _peak(folder: Path, memory_bytes: int) -> int:
    arguments = [str(folder / "log.parquet"), str(folder / f"out-{memory_bytes}"), str(memory_bytes)]
    run = subprocess.run([sys.executable, "-c", _MEASURE, *arguments], check=True, capture_output=True, text=True)
    print(memory_bytes // _MIB, "MiB given,", int(run.stdout) // _MIB, "MiB taken")
    return int(run.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [6_000_000, 60_000_000])
def test_the_whole_process_stays_within_the_memory_given(tmp_path: Path, rows: int) -> None:
    """Anonymous memory, the interpreter and its libraries included, and one user with a twentieth of the rows."""
    _log(tmp_path / "log.parquet", rows)
    assert _peak(tmp_path, 128 * _MIB) <= 128 * _MIB
    large = _peak(tmp_path, 1024 * _MIB)
    assert large <= 1024 * _MIB
    # The negative control: what is given is also used.
    assert large > 160 * _MIB
