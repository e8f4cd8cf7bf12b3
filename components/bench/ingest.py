"""Contestants of `lazydp bench ingest`: from one Parquet log to memory-mapped columns.

decode          read every column with pyarrow and drop it: the floor
lazydp          the whole of ingest: encode, bound, hold out, histories, digests, synced to disk
pyarrow         read, dictionary-encode users and items, write Arrow: what any encoding needs at least
pyarrow_sorted  the same, sorted by user and time in memory: the order that histories and splits need
pandas          read, factorize, sort, keep the last k of each user, write Arrow; only where pandas is installed
polars, duckdb  read, keep the last k of each user in order of user and time, write Arrow; only where installed.
                Neither codes ids by a keyed hash, holds rows out, makes histories or digests, nor syncs
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

    def lazydp() -> None:
        ingest([str(log)], spec, folder / "lazydp", IngestOptions(replace=True))

    def decode() -> None:
        for _ in pq.ParquetFile(log).iter_batches():
            pass

    def pyarrow() -> None:
        _write(_encoded(log), folder / "pyarrow.arrow")

    def pyarrow_sorted() -> None:
        table = _encoded(log)
        keys = table.set_column(0, "user", table.column("user").combine_chunks().indices)
        _write(keys.sort_by([("user", "ascending"), ("at", "ascending")]), folder / "pyarrow_sorted.arrow")

    named: dict[str, Callable[[], None]] = {
        "lazydp": lazydp,
        "decode": decode,
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
