"""The contestants of `lazydp bench ingest` do what their names say."""

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lazydp.components.bench.ingest import LogShape, contestants, run, run_wide, write_log
from lazydp.components.ingest.dataset import EncodedDataset

SHAPE = LogShape(rows=3000, users=20, items=50)


def kept_users(folder: Path) -> list[str]:
    users: list[str] = pq.read_table(folder / "log.parquet").column("user").to_pylist()
    return users


def test_every_contestant_runs_twice_over_the_same_log(tmp_path: Path) -> None:
    write_log(tmp_path / "log.parquet", SHAPE)
    assert pq.read_metadata(tmp_path / "log.parquet").num_rows == 3000
    for work in contestants(tmp_path / "log.parquet", SHAPE, tmp_path).values():
        work()
        work()
    counts = EncodedDataset.open(tmp_path / "lazydp").manifest.counts
    assert (counts.users, counts.max_examples_of_a_user) == (20, 64)
    peers = [name for name in ("polars", "duckdb") if (tmp_path / f"{name}.arrow").exists()]
    for name in peers:
        with pa.memory_map(str(tmp_path / f"{name}.arrow")) as source:
            kept = pa.ipc.open_file(source).read_all()
        # The last 64 of each user, as lazydp keeps them (which holds one more out).
        assert kept.num_rows == sum(min(64, count) for count in Counter(kept_users(tmp_path)).values())
        assert kept.column("user").to_pylist() == sorted(kept.column("user").to_pylist())
    for name in ("pyarrow", "pyarrow_sorted"):
        with pa.memory_map(str(tmp_path / f"{name}.arrow")) as source:
            table = pa.ipc.open_file(source).read_all()
        assert table.num_rows == 3000
    users = table.column("user").to_numpy()
    times = table.column("at").to_numpy()
    assert (users[1:] >= users[:-1]).all()
    assert (times[1:] >= times[:-1])[users[1:] == users[:-1]].all()


def test_a_run_measures_them_all() -> None:
    results = run(rows=2000, repeats=2)
    assert {"lazydp", "pyarrow", "pyarrow_sorted"} <= {result.contestant for result in results}
    assert all(result.median_s > 0 and result.shape["rows"] == 2000 for result in results)
    for bench in (run, run_wide):
        with pytest.raises(ValueError, match="at least 1"):
            bench(rows=0)


def test_the_wide_log_is_read_whole() -> None:
    results = run_wide(rows=300, repeats=1)
    assert {result.contestant for result in results} == {"lazydp", "decode"}
    assert all(result.shape["columns"] == 42 for result in results)
