"""However a log is stored, cut and read, and however many work on it, the dataset is the same to the byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lazydp.components.ingest import ingest as engine
from lazydp.components.ingest.ingest import IngestOptions, ingest
from lazydp.components.ingest.readers import ParquetReader

SPEC = """
name: same
user: {column: user, vocabulary: {kind: hashed, buckets: 50, salt: s}}
item: {column: item, vocabulary: {kind: integer, size: 40}}
timestamp: at
label: {kind: implicit}
max_examples_per_user: 5
history: {max_length: 4}
features:
  - {name: place, kind: single, vocabulary: {kind: hashed, buckets: 9, salt: p}}
  - {name: price, kind: dense, bounds: [0, 9]}
"""
SIZE = 3000


@pytest.fixture(scope="module")
def log() -> pa.Table:
    """Rows of which many share user and time, some name no user, and the places have repeats, gaps and empty texts."""
    generator = np.random.default_rng(0)
    users = [None if n == 0 else "" if n == 1 else f"user {n}" for n in generator.integers(0, 120, SIZE)]
    places = [None if n == 0 else "" if n == 1 else f"place {n}" for n in generator.integers(0, 30, SIZE)]
    return pa.table(
        {
            "user": pa.array(users, pa.string()),
            "item": generator.integers(0, 41, SIZE),
            "at": generator.integers(0, 20, SIZE),
            "place": pa.array(places, pa.string()),
            "price": generator.random(SIZE).round(1),
        }
    )


def content(inputs: list[Path], out: Path, **options: Any) -> dict[str, bytes]:
    """The files of the dataset and its fingerprint."""
    manifest = ingest([str(path) for path in inputs], SPEC, out, IngestOptions(**options))
    files = {path.name: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != "dataset.json"}
    counted = f"{manifest.fingerprint} {manifest.source.digest} {manifest.counts} {manifest.rejected}"
    return files | {"counted": counted.encode()}


@pytest.fixture(scope="module")
def whole(log: pa.Table, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    pq.write_table(log, folder / "log.parquet", use_dictionary=False)
    return content([folder / "log.parquet"], folder / "out", workers=1)


@pytest.mark.parametrize("workers", [1, 2, 8])
@pytest.mark.parametrize("memory", [1, 1 << 40])
def test_neither_workers_nor_memory_change_a_byte(
    log: pa.Table, whole: dict[str, bytes], tmp_path: Path, workers: int, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_FEWEST_ROWS", 100)
    pq.write_table(log, tmp_path / "log.parquet", row_group_size=700)
    assert content([tmp_path / "log.parquet"], tmp_path / "out", workers=workers, memory_bytes=memory) == whole


@pytest.mark.parametrize("kind", ["dictionary", "plain", "large", "typed", "mixed"])
def test_nor_does_the_way_in_which_text_is_stored(
    log: pa.Table, whole: dict[str, bytes], tmp_path: Path, kind: str
) -> None:
    """As places in a dictionary, as text, as large text, as a column of dictionary type; or a file of each."""
    casts = {"large": pa.large_string(), "typed": pa.dictionary(pa.int8(), pa.string())}
    kinds = ["dictionary", "plain", "large", "typed"] if kind == "mixed" else [kind]
    paths = []
    for number, rows in enumerate(np.array_split(np.arange(SIZE), len(kinds))):
        table = log.take(pa.array(rows))
        if kinds[number] in casts:
            for name in ("user", "place"):
                column = table.column(name).cast(casts[kinds[number]])
                table = table.set_column(table.schema.get_field_index(name), name, column)
        paths.append(tmp_path / f"{number}.parquet")
        pq.write_table(table, paths[-1], use_dictionary=kinds[number] != "plain", row_group_size=400)
    assert content(paths[::-1], tmp_path / "out", workers=2) == whole


def test_columns_are_read_as_dictionaries_where_they_are_stored_as_such(
    log: pa.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the tests above would compare one way of reading with itself."""
    kinds = set()
    original = ParquetReader.coded_batches

    def told(reader: ParquetReader, *arguments: Any, **named: Any) -> Any:
        for batch in original(reader, *arguments, **named):
            kinds.add(pa.types.is_dictionary(batch.column("user").type))
            yield batch

    monkeypatch.setattr(ParquetReader, "coded_batches", told)
    for name, stored in (("plain", False), ("coded", True)):
        kinds.clear()
        pq.write_table(log, tmp_path / f"{name}.parquet", use_dictionary=stored)
        content([tmp_path / f"{name}.parquet"], tmp_path / name)
        assert kinds == {stored}
