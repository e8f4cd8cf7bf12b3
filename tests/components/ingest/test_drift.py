"""Files of one log that differ: in types, in columns, in where they lie. Their order never matters."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.ingest.ingest import ingest
from lazydp.components.shared.errors import InputError

SPEC = """
name: a
user: {column: user, vocabulary: {kind: hashed, buckets: 1000, salt: s}}
item: {column: item, vocabulary: {kind: integer, first: 1, size: 100}}
timestamp: at
label: {kind: implicit}
history: {max_length: 5}
split: {kind: none}
features:
  - {name: device, kind: single, vocabulary: {kind: hashed, buckets: 1000, salt: s}}
"""
NAIVE = [datetime.datetime(2024, 1, 1, hour) for hour in (3, 1, 2)]
ZONED = [time.replace(tzinfo=datetime.UTC) for time in NAIVE]
PLAIN = {
    "user": pa.array(["1", "1", "2"]),
    "item": pa.array([1, 2, 3]),
    "at": pa.array(NAIVE, pa.timestamp("us")),
    "device": pa.array(["7", "8", None]),
}


def table(**changes: pa.Array | None) -> pa.Table:
    return pa.table({name: column for name, column in (PLAIN | changes).items() if column is not None})


def result(folder: Path, files: list[pa.Table], *, name: str) -> tuple[str, list[str]]:
    """Fingerprint, and every example as (user, items of the history, item, device), of a log of these files."""
    (folder / name).mkdir()
    for number, content in enumerate(files):
        pq.write_table(content, folder / name / f"{number}.parquet", store_schema=True)
    manifest = ingest([str(folder / name)], SPEC, folder / f"{name}-out")
    dataset = EncodedDataset.open(folder / f"{name}-out")
    batch = dataset.split("train").take(np.arange(manifest.counts.train))
    assert batch.item is not None
    return manifest.fingerprint, batch.item.tolist()


NUMBERS = pa.array([30, 10, 20])
DRIFT: dict[str, tuple[pa.Table, pa.Table]] = {
    "all null": (table(), table(device=pa.nulls(3))),
    "all null text": (table(), table(device=pa.nulls(3, pa.string()))),
    "empty day": (table(), table().slice(0, 0)),
    "empty day of null types": (table(), pa.table({name: pa.nulls(0) for name in PLAIN})),
    "missing feature": (table(), table(device=None)),
    "ns and us": (table(), table(at=pa.array(NAIVE, pa.timestamp("ns")))),
    "ms and us": (table(), table(at=pa.array(NAIVE, pa.timestamp("ms")))),
    "zone and none": (table(), table(at=pa.array(ZONED, pa.timestamp("us", "America/New_York")))),
    "dates and timestamps": (table(), table(at=pa.array([time.date() for time in NAIVE]))),
    "text and text views": (table(), table(user=PLAIN["user"].cast(pa.string_view()))),
    "text and large text": (table(), table(user=PLAIN["user"].cast(pa.large_string()))),
    "text and dictionary": (table(), table(user=PLAIN["user"].dictionary_encode())),
    "text and integers": (table(), table(user=pa.array([1, 1, 2]))),
    "integers and unsigned": (table(user=pa.array([1, 1, 2])), table(user=pa.array([1, 1, 2], pa.uint64()))),
    "int32 and large int64": (table(item=pa.array([1, 2, 3], pa.int32())), table(item=pa.array([1, 2, 2**40]))),
    "integers and fractions": (table(at=NUMBERS), table(at=pa.array([30.0, 10.5, 20.0]))),
    "integers and decimals": (table(user=pa.array([1, 1, 2])), table(user=pa.array([Decimal("1.00")] * 3))),
    "int32 and int64": (table(at=NUMBERS.cast(pa.int32())), table(at=NUMBERS)),
    "float32 and float64": (
        table(device=pa.array([0.1, 0.5, 2], pa.float32())),
        table(device=pa.array([0.1, 0.5, 2], pa.float64())),
    ),
    "columns in another order": (table(), table().select(["at", "device", "item", "user"])),
    "further columns": (table(), table(more=pa.array([1, 2, 3]))),
    "bytes and text": (table(), table(user=PLAIN["user"].cast(pa.binary()))),
}


@pytest.mark.parametrize("files", DRIFT.values(), ids=DRIFT.keys())
def test_files_that_differ_are_read_whatever_their_order(tmp_path: Path, files: tuple[pa.Table, pa.Table]) -> None:
    forward = result(tmp_path, list(files), name="forward")
    assert forward == result(tmp_path, list(reversed(files)), name="backward")
    assert len(forward[1]) >= 3


SAME: dict[str, pa.Table] = {
    "at ns": table(at=pa.array(NAIVE, pa.timestamp("ns"))),
    "at ms": table(at=pa.array(NAIVE, pa.timestamp("ms"))),
    "at zoned": table(at=pa.array(ZONED, pa.timestamp("us", "Asia/Tokyo"))),
    "user view": table(user=PLAIN["user"].cast(pa.string_view())),
    "user integer": table(user=pa.array([1, 1, 2])),
    "user float": table(user=pa.array([1.0, 1.0, 2.0])),
    "item text": table(item=pa.array(["1", "2", "3"])),
    "device decimal": table(device=pa.array([Decimal("7.0"), Decimal("8.0"), None])),
}


def test_equal_content_in_other_types_has_one_fingerprint(tmp_path: Path) -> None:
    plain = result(tmp_path, [table()], name="plain")
    for number, content in enumerate(SAME.values()):
        assert result(tmp_path, [content], name=f"same{number}") == plain, list(SAME)[number]
    # The negative control: another value is another fingerprint.
    assert result(tmp_path, [table(user=pa.array(["1", "1", "02"]))], name="other") != plain


REFUSED: dict[str, tuple[pa.Table, pa.Table, str]] = {
    "numbers and dates": (table(), table(at=NUMBERS), "holds numbers in .* and dates in"),
    "no user column": (table(), table(user=None), "has no column 'user'"),
    "lists": (table(), table(item=pa.array([[1], [2], [3]])), "holds list<"),
    "durations": (table(), table(user=pa.array([1, 2, 3], pa.duration("s"))), "holds duration"),
    "a column twice": (
        table(),
        pa.Table.from_arrays([*table().columns, NUMBERS], names=[*PLAIN, "user"]),
        "more than once",
    ),
}


@pytest.mark.parametrize(("first", "second", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_one_log_is_refused_before_anything_is_written(
    tmp_path: Path, first: pa.Table, second: pa.Table, message: str
) -> None:
    for name, files in (("forward", [first, second]), ("backward", [second, first])):
        with pytest.raises(InputError, match=message) as caught:
            result(tmp_path, files, name=name)
        assert "\n" not in str(caught.value)
        assert {path.name for path in tmp_path.iterdir()} <= {"forward", "backward"}


def test_order_is_that_of_time_whatever_holds_it(tmp_path: Path) -> None:
    """A date beyond what nanoseconds hold, as 96-bit timestamps have them, is the user's last, not the first."""
    far = [datetime.datetime(9999, 12, 31), datetime.datetime(2024, 1, 1), datetime.datetime(1600, 1, 1)]
    items = pa.array([1, 2, 3])
    users = pa.array(["1"] * 3)
    text = pa.array([time.isoformat() for time in far])
    floats = pa.array([3e9, 2.5, -1.0])
    columns = [pa.array(far, pa.timestamp("us")), text, floats, floats.cast(pa.string())]
    for number, at in enumerate(columns):
        assert result(tmp_path, [table(user=users, item=items, at=at, device=items)], name=f"{number}")[1] == [3, 2, 1]  # type: ignore[comparison-overlap]
    (tmp_path / "old").mkdir()
    old = table(user=users, item=items, at=pa.array(far, pa.timestamp("us")), device=items)
    # 96-bit timestamps of Spark and Hive; pyarrow writes them from nanoseconds, which the years here exceed.
    near = [datetime.datetime(2200, 1, 1), *far[1:2], datetime.datetime(1700, 1, 1)]
    old = old.set_column(2, "at", pa.array(near, pa.timestamp("ns")))
    pq.write_table(old, tmp_path / "old" / "0.parquet", use_deprecated_int96_timestamps=True)
    ingest([str(tmp_path / "old")], SPEC, tmp_path / "old-out")
    assert EncodedDataset.open(tmp_path / "old-out").split("train").item.tolist() == [3, 2, 1]  # type: ignore[union-attr]


def test_nanoseconds_order_rows_beside_coarser_files(tmp_path: Path) -> None:
    fine = table(user=pa.array(["1"] * 3), at=pa.array([1_000_002, 1_000_001, 1_000_003], pa.timestamp("ns")))
    coarse = table(user=pa.array(["1"] * 3), at=pa.array([0, 1_001, 2_000], pa.timestamp("us")))
    assert result(tmp_path, [fine, coarse], name="both")[1] == [1, 2, 1, 3, 2, 3]  # type: ignore[comparison-overlap]


def test_unsigned_extremes_are_no_times(tmp_path: Path) -> None:
    extreme = table(user=pa.array(["1"] * 3), at=pa.array([2**64 - 1, 5, 4], pa.uint64()))
    assert result(tmp_path, [extreme], name="x")[1] == [3, 2]  # type: ignore[comparison-overlap]
    rejected = EncodedDataset.open(tmp_path / "x-out").manifest.rejected
    assert rejected["bad_timestamp"] == 1


def folders(base: Path) -> None:
    for day, rows in (("2024-01-01", table().slice(0, 2)), ("2024-01-02", table().slice(2))):
        for part in ("a, b", "c"):
            folder = base / f"day={day}" / f"part={part}"
            folder.mkdir(parents=True)
            pq.write_table(rows, folder / "data")


def test_partition_columns_are_columns(tmp_path: Path) -> None:
    folders(tmp_path / "log")
    (tmp_path / "log" / "_SUCCESS").write_text("")
    (tmp_path / "log" / ".part.crc").write_text("x")
    spec = SPEC.replace("timestamp: at", "timestamp: day") + (
        "  - {name: part, kind: single, vocabulary: {kind: declared, values: ['a, b', c]}}\n"
    )
    ingest([str(tmp_path / "log")], spec, tmp_path / "out")
    dataset = EncodedDataset.open(tmp_path / "out")
    batch = dataset.split("train").take(np.arange(6))
    assert sorted(batch.bags["part"].values.tolist()) == [1, 1, 1, 2, 2, 2]


PATTERNS: dict[str, tuple[str, int]] = {
    "day=*/part=c/*": ("day=*/part=c/*", 3),
    "**/data": ("**/data", 6),
    "one day": ("day=2024-01-0[1]/*/data", 4),
    "folders": ("day=2024-01-0?", 6),
    "comma": ("day=2024-01-02/part=a, b", 1),
}


@pytest.mark.parametrize(("pattern", "rows"), PATTERNS.values(), ids=PATTERNS.keys())
def test_patterns_and_commas_name_files(tmp_path: Path, pattern: str, rows: int) -> None:
    folders(tmp_path / "log")
    assert ingest([str(tmp_path / "log" / pattern)], SPEC, tmp_path / "out").source.rows == rows


def delta(folder: Path) -> str:
    deltalake = pytest.importorskip("deltalake")
    deltalake.write_deltalake(str(folder / "log"), table())
    deltalake.DeltaTable(str(folder / "log")).delete("user = '2'")
    return str(folder / "log")


def test_a_delta_table_is_read_without_its_deleted_rows(tmp_path: Path) -> None:
    manifest = ingest([delta(tmp_path)], SPEC, tmp_path / "out")
    assert (manifest.source.rows, manifest.counts.users) == (2, 1)
    for inside in ("*.parquet", next((tmp_path / "log").glob("*.parquet")).name):
        with pytest.raises(InputError, match="part of the Delta table"):
            ingest([str(tmp_path / "log" / inside)], SPEC, tmp_path / "no")
    with pytest.raises(InputError, match="holds a Delta table at log"):
        ingest([str(tmp_path)], SPEC, tmp_path / "no")


def iceberg(base: Path) -> str:
    (base / "metadata").mkdir(parents=True)
    (base / "metadata" / "v1.metadata.json").write_text("{}")
    (base / "data").mkdir()
    pq.write_table(table(), base / "data" / "0.parquet")
    return str(base)


def hudi(base: Path) -> str:
    (base / ".hoodie").mkdir(parents=True)
    (base / ".hoodie" / "hoodie.properties").write_text("")
    pq.write_table(table(), base / "0.parquet")
    return str(base)


def twice(base: Path) -> str:
    base.mkdir()
    pq.write_table(table(), base / "0.parquet")
    os.link(base / "0.parquet", base / "1.parquet")
    return str(base)


def foreign(base: Path) -> str:
    base.mkdir()
    pq.write_table(table(), base / "0.parquet")
    (base / "photo.png").write_bytes(b"\x89PNG")
    return str(base)


def torn(base: Path) -> str:
    base.mkdir()
    pq.write_table(table(), base / "0.parquet")
    (base / "1.parquet").write_bytes(b"")
    return str(base)


FOLDERS: dict[str, tuple[Callable[[Path], str], str]] = {
    "iceberg": (iceberg, "table of Iceberg, which is not read"),
    "data of iceberg": (lambda base: iceberg(base) + "/data", "part of the Iceberg table"),
    "hudi": (hudi, "table of Hudi, which is not read"),
    "file of hudi": (lambda base: hudi(base) + "/0.parquet", "part of the Hudi table"),
    "a file twice": (twice, "given twice"),
    "a file of no known kind": (foreign, r"photo\.png is no data file that is known"),
    "an empty file": (torn, "is not Parquet"),
    "a pattern that matches nothing": (lambda base: f"{base}/*.parquet", "no file matches"),
    "nothing": (str, "does not exist"),
}


@pytest.mark.parametrize(("make", "message"), FOLDERS.values(), ids=FOLDERS.keys())
def test_folders_that_are_no_log_are_refused(tmp_path: Path, make: Callable[[Path], str], message: str) -> None:
    location = make(tmp_path / "log")
    with pytest.raises(InputError, match=message) as caught:
        ingest([location], SPEC, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_same_file_by_two_names_is_refused(tmp_path: Path) -> None:
    pq.write_table(table(), tmp_path / "0.parquet")
    (tmp_path / "link.parquet").symlink_to(tmp_path / "0.parquet")
    for other in (str(tmp_path / "0.parquet"), str(tmp_path / "link.parquet"), (tmp_path / "0.parquet").as_uri()):
        with pytest.raises(InputError, match="given twice"):
            ingest([str(tmp_path / "0.parquet"), other], SPEC, tmp_path / "out")


def test_a_damaged_page_is_refused(tmp_path: Path) -> None:
    content = table(
        user=pa.array([f"user-{n % 7}" for n in range(30_000)]),
        **{  # type: ignore[arg-type]
            name: pa.array(np.arange(30_000) % 50) for name in ("item", "at", "device")
        },
    )
    path = tmp_path / "log.parquet"
    pq.write_table(content, path, compression="none", use_dictionary=False, write_page_checksum=True)
    ingest([str(path)], SPEC, tmp_path / "fine")
    damaged = bytearray(path.read_bytes())
    place = damaged.index(b"user-3", len(damaged) // 8)
    damaged[place + 5] ^= 1
    path.write_bytes(bytes(damaged))
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        ingest([str(path)], SPEC, tmp_path / "out")
    assert not (tmp_path / "out").exists()
