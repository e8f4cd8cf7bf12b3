"""Contestants of `lazydp bench ingest`: from one Parquet log to memory-mapped columns.

decode          read every column with pyarrow and drop it: the floor
lazydp          the whole of ingest: encode, bound, hold out, histories, digests, synced to disk
pyarrow         read, dictionary-encode users and items, write Arrow: what any encoding needs at least
pyarrow_sorted  the same, sorted by user and time in memory: the order that histories and splits need
pandas          read, factorize, sort, keep the last k of each user, write Arrow; only where pandas is installed
polars, duckdb  read, keep the last k of each user in order of user and time, write Arrow; only where installed.
                Neither codes ids by a keyed hash, holds rows out, makes histories or digests, nor syncs

Two logs: of interactions (user, item, time); and, for decode and lazydp alone, one of 42 columns like those of Criteo's
clicks: a label, 13 counts and 26 categories, with a user and a time beside them.
"""

from __future__ import annotations

import functools
import importlib.util
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lazydp.components.ingest.ingest import IngestOptions, ingest
from lazydp.components.shared.bench_harness import Contestant, Result, measure

UNIT = "rows"
_BOUND = 64
_PIECE = 250_000
_SPEC = """
name: bench
user: {{column: user, vocabulary: {{kind: hashed, buckets: 100000, salt: bench}}}}
item: {{column: item, vocabulary: {{kind: integer, size: {items}}}}}
timestamp: at
label: {{kind: implicit}}
max_examples_per_user: {bound}
history: {{max_length: 50}}
"""


# Distinct values of the 26 categories, as unequal as those of Criteo's logs.
_CATEGORIES = (
    *(1000, 500, 200_000, 80_000, 300, 20, 12_000, 600, 3, 50_000, 5000, 150_000, 3000),
    *(26, 10_000, 120_000, 10, 4000, 2000, 4, 130_000, 15, 15, 60_000, 80, 40_000),
)
_COUNTS = 13
_ROWS_A_USER = 20


@dataclass(frozen=True, kw_only=True)
class LogShape:
    """A made-up log: rows drawn for users at random, items by a power-law distribution."""

    rows: int = 2_000_000
    users: int = 50_000
    items: int = 20_000


def run(*, rows: int = LogShape.rows, repeats: int = 7) -> list[Result]:
    """Measures the contestants on a log of `rows` rows, made first in a temporary folder.

    `bytes` counts the input file alone: what each writes differs, as does what it keeps.
    Raises ValueError for less than one row.
    """
    if rows < 1:
        raise ValueError(f"rows: expected at least 1, found {rows}")
    shape = LogShape(rows=rows)
    with tempfile.TemporaryDirectory(prefix="lazydp-bench-") as name:
        folder = Path(name)
        log = folder / "log.parquet"
        write_log(log, shape)
        size = log.stat().st_size
        entered = [Contestant(name, work, bytes=size) for name, work in contestants(log, shape, folder).items()]
        return measure(
            "ingest",
            shape={UNIT: shape.rows, "users": shape.users, "items": shape.items, "file_bytes": size},
            contestants=entered,
            repeats=repeats,
        )


def run_wide(*, rows: int, repeats: int = 7) -> list[Result]:
    """`run` for the log of 42 columns: decode and lazydp.

    Raises ValueError for less than one row.
    """
    if rows < 1:
        raise ValueError(f"rows: expected at least 1, found {rows}")
    with tempfile.TemporaryDirectory(prefix="lazydp-bench-") as name:
        log = Path(name) / "log.parquet"
        write_wide_log(log, rows)
        size = log.stat().st_size
        work = {"lazydp": functools.partial(_ingest, log, _wide_spec(), Path(name) / "lazydp")}
        work["decode"] = functools.partial(_decode, log)
        return measure(
            "ingest",
            shape={UNIT: rows, "columns": 3 + _COUNTS + len(_CATEGORIES), "file_bytes": size},
            contestants=[Contestant(name, work, bytes=size) for name, work in work.items()],
            repeats=repeats,
        )


def write_wide_log(path: Path, rows: int, *, seed: int = 0) -> None:
    """Write a log with the columns user, at, label, I1 to I13 (a fifth of them missing) and C1 to C26 (text)."""
    generator = np.random.default_rng(seed)
    writer = None
    for begin in range(0, rows, _PIECE):
        size = min(_PIECE, rows - begin)
        users = generator.integers(0, max(1, rows // _ROWS_A_USER), size)
        columns = {
            "user": pa.array([f"user-{number}" for number in users.tolist()]),
            "at": pa.array(generator.integers(0, 10**9, size)),
            "label": pa.array(generator.integers(0, 2, size)),
        }
        for number in range(_COUNTS):
            counts = generator.exponential(50, size).astype(np.int32)
            columns[f"I{number + 1}"] = pa.array(counts, mask=generator.random(size) < 0.2)
        for number, distinct in enumerate(_CATEGORIES):
            names = pa.array([f"{value * 2_654_435_761 % 2**32:08x}" for value in range(distinct)])
            columns[f"C{number + 1}"] = names.take(pa.array((distinct * generator.random(size) ** 3).astype(np.int64)))
        table = pa.table(columns)
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()


def _wide_spec() -> str:
    lines = [
        "name: bench",
        "user: {column: user, vocabulary: {kind: hashed, buckets: 100000, salt: bench}}",
        "timestamp: at",
        "label: {kind: column, column: label}",
        f"max_examples_per_user: {_BOUND}",
        "features:",
    ]
    lines += [f"  - {{name: I{n}, kind: dense, bounds: [0, 1000], transform: log1p}}" for n in range(1, _COUNTS + 1)]
    vocabulary = "{kind: hashed, buckets: 100000, salt: bench}"
    lines += [f"  - {{name: C{n}, kind: single, vocabulary: {vocabulary}}}" for n in range(1, len(_CATEGORIES) + 1)]
    return "\n".join(lines) + "\n"


def _ingest(log: Path, spec: str, out: Path) -> None:
    ingest([str(log)], spec, out, IngestOptions(replace=True))


def _decode(log: Path) -> None:
    for _ in pq.ParquetFile(log).iter_batches():
        pass


def write_log(path: Path, shape: LogShape, *, seed: int = 0) -> None:
    """Write a log with the columns user (text), item, at, a piece at a time."""
    generator = np.random.default_rng(seed)
    names = pa.array([f"user-{number}" for number in range(shape.users)])
    schema = pa.schema({"user": pa.string(), "item": pa.int64(), "at": pa.int64()})
    with pq.ParquetWriter(path, schema) as writer:
        for begin in range(0, shape.rows, _PIECE):
            size = min(_PIECE, shape.rows - begin)
            columns = [
                names.take(pa.array(generator.integers(0, shape.users, size))),
                pa.array((shape.items * generator.random(size) ** 3).astype(np.int64)),
                pa.array(generator.integers(0, 10**9, size)),
            ]
            writer.write_table(pa.table(columns, schema=schema))


def contestants(log: Path, shape: LogShape, folder: Path) -> Mapping[str, Callable[[], None]]:
    """What is to be timed, by name; each call reads `log` and writes below `folder` anew."""
    spec = _SPEC.format(items=shape.items, bound=_BOUND)

    def pyarrow() -> None:
        _write(_encoded(log), folder / "pyarrow.arrow")

    def pyarrow_sorted() -> None:
        table = _encoded(log)
        keys = table.set_column(0, "user", table.column("user").combine_chunks().indices)
        _write(keys.sort_by([("user", "ascending"), ("at", "ascending")]), folder / "pyarrow_sorted.arrow")

    named: dict[str, Callable[[], None]] = {
        "lazydp": functools.partial(_ingest, log, spec, folder / "lazydp"),
        "decode": functools.partial(_decode, log),
        "pyarrow": pyarrow,
        "pyarrow_sorted": pyarrow_sorted,
    }
    for peer, work in (("pandas", _with_pandas), ("polars", _with_polars), ("duckdb", _with_duckdb)):
        if importlib.util.find_spec(peer) is not None:
            named[peer] = functools.partial(work, log, folder / f"{peer}.arrow")
    return named


def _encoded(log: Path) -> pa.Table:
    table = pq.read_table(log)
    for position, name in enumerate(("user", "item")):
        table = table.set_column(position, name, table.column(name).combine_chunks().dictionary_encode())
    return table


def _write(table: pa.Table, path: Path) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def _with_polars(log: Path, path: Path) -> None:
    import polars as pl  # noqa: PLC0415 - a peer

    rows = pl.scan_parquet(log).sort("user", "at")
    rows.group_by("user", maintain_order=True).tail(_BOUND).sink_ipc(path)


def _with_duckdb(log: Path, path: Path) -> None:
    import duckdb  # noqa: PLC0415 - a peer

    query = f"""
        select "user", item, "at" from read_parquet('{log}')
        qualify row_number() over (partition by "user" order by "at" desc) <= {_BOUND} order by "user", "at"
    """  # noqa: S608 - a path of our own
    with duckdb.connect() as connection:
        reader = connection.sql(query).to_arrow_reader()
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, reader.schema) as writer:
            for batch in reader:
                writer.write_batch(batch)


def _with_pandas(log: Path, path: Path) -> None:
    import pandas as pd  # type: ignore[import-not-found, import-untyped, unused-ignore]  # noqa: PLC0415 - a peer

    frame = pd.read_parquet(log)
    frame["user"] = pd.factorize(frame["user"])[0]
    frame["item"] = pd.factorize(frame["item"])[0]
    frame = frame.sort_values(["user", "at"], kind="stable").groupby("user").tail(_BOUND)
    _write(pa.Table.from_pandas(frame, preserve_index=False), path)
