"""Data larger than the memory given: parts on disk, each bounded; the peak does not grow with the log."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lazydp.components.ingest.spill import Spill, part_by_hash, partitions_needed

_MEASURE = """
import sys, threading
from pathlib import Path
from lazydp.components.ingest.ingest import IngestOptions, ingest

spec = (
    "name: a\\nlabel: {kind: implicit}\\nuser: {column: u, embed: false}\\ntimestamp: t\\nhistory: {max_length: 20}\\n"
    "item: {column: i, vocabulary: {kind: integer, size: 1000}}\\n"
)
peak, done = 0, threading.Event()

def watch():
    # Anonymous memory only: pages of mapped files can be dropped at any time.
    global peak
    while not done.wait(0.01):
        status = Path("/proc/self/status").read_text()
        peak = max(peak, int(status.split("RssAnon:")[1].split()[0]) << 10)

thread = threading.Thread(target=watch)
thread.start()
ingest([sys.argv[1]], spec, Path(sys.argv[2]), IngestOptions(memory_bytes=int(sys.argv[3])))
done.set()
thread.join()
print(peak)
"""


def test_parts_are_as_many_as_memory_asks_for() -> None:
    assert partitions_needed(num_rows=1000, row_bytes=50, memory_bytes=1 << 30) == 1
    assert partitions_needed(num_rows=10**7, row_bytes=5000, memory_bytes=10**9) == 256
    # Workers hold a part each.
    assert partitions_needed(num_rows=10**7, row_bytes=5000, memory_bytes=10**9, workers=2) == 512
    assert partitions_needed(num_rows=10**12, row_bytes=50, memory_bytes=1) == 512
    # With memory enough parts are of half a million rows.
    assert partitions_needed(num_rows=10**7, row_bytes=50, memory_bytes=1 << 40) == 32


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


def _log(path: Path, rows: int) -> None:
    generator = np.random.default_rng(0)
    schema = pa.schema({"u": pa.int64(), "i": pa.int64(), "t": pa.int64()})
    with pq.ParquetWriter(path, schema) as writer:
        for _ in range(rows // 100_000):
            columns = [generator.integers(0, 200_000, 100_000), generator.integers(0, 1000, 100_000)]
            writer.write_table(pa.table([*columns, generator.integers(0, 10**9, 100_000)], schema=schema))


@pytest.mark.slow
def test_the_peak_stays_bounded(tmp_path: Path) -> None:
    def peak(rows: int, memory: int) -> int:
        _log(tmp_path / "log.parquet", rows)
        arguments = [str(tmp_path / "log.parquet"), str(tmp_path / f"out-{rows}-{memory}"), str(memory)]
        run = subprocess.run([sys.executable, "-c", _MEASURE, *arguments], check=True, capture_output=True, text=True)
        print(rows, memory, int(run.stdout) >> 20)
        return int(run.stdout)

    small, large = peak(500_000, 32 << 20), peak(5_000_000, 32 << 20)
    unbounded = peak(5_000_000, 1 << 40)
    # Ten times the rows need hardly more; what grows a little is buffers of the reader and of the parts.
    assert large - small < 100 << 20
    # The negative control: given all memory in the world, it is used.
    assert unbounded - large > 400 << 20
