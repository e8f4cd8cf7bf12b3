"""Small Parquet files of others, read without letting them unfold to more than they may."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lazydp.components.shared.errors import FormatError

# What any table may take in memory, and what it may take besides for each byte of its file.
_FREE_BYTES = 2**26
_BYTES_A_BYTE = 64
_MAX_COLUMNS = 256
# Values of all lists of a column for each row.
_VALUES_A_ROW = 4096


def read_bounded(path: Path, *, num_rows: int, columns: list[str] | None = None) -> pa.Table:
    """Read a Parquet file that somebody else may have written.

    Text is read as the file holds it, each distinct value once, and only unfolded where that fits: a megabyte can name
    one long text a million times.

    Args:
        path: the file.
        num_rows: rows that it must have.
        columns: names of those to read; None for all.

    Raises:
        FormatError: not Parquet, another number of rows, a name twice, or a size beyond reason.
    """
    most = _FREE_BYTES + _BYTES_A_BYTE * path.stat().st_size
    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            _check_footer(path, file.metadata, num_rows=num_rows, most=most)
            names = file.schema_arrow.names
            if len(set(names)) < len(names):
                raise FormatError(f"{path} has a column twice")
            text = [field.name for field in file.schema_arrow if pa.types.is_string(field.type)]
        with pq.ParquetFile(path, memory_map=True, read_dictionary=text) as file:
            table = file.read(columns)
            if sum(_unfolded(column) for column in table.columns) > most:
                raise _beyond_reason(path)
            return pa.table({name: _plain(table.column(name)) for name in table.column_names})
    except (pa.ArrowException, OSError, KeyError) as error:
        raise FormatError(f"{path} cannot be read as Parquet: {' '.join(str(error).split())}") from error


def _check_footer(path: Path, meta: pq.FileMetaData, *, num_rows: int, most: int) -> None:
    if meta.num_rows != num_rows:
        raise FormatError(f"{path} has {meta.num_rows} rows, expected {num_rows}")
    if meta.num_columns > _MAX_COLUMNS:
        raise FormatError(f"{path} has {meta.num_columns} columns: beyond reason")
    chunks = [
        meta.row_group(group).column(column)
        for group in range(meta.num_row_groups)
        for column in range(meta.num_columns)
    ]
    values = max((chunk.num_values for chunk in chunks), default=0)
    if sum(chunk.total_uncompressed_size for chunk in chunks) > most or values > _VALUES_A_ROW * (num_rows + 1):
        raise _beyond_reason(path)


def _unfolded(column: pa.ChunkedArray) -> int:
    """Bytes of a column once each row holds its own text."""
    if not pa.types.is_dictionary(column.type):
        return int(column.nbytes)
    lengths: Callable[[pa.Array], pa.Array] = pc.binary_length
    return sum(
        int(pc.sum(lengths(chunk.dictionary).take(chunk.indices)).as_py() or 0) + 8 * len(chunk)
        for chunk in column.chunks
    )


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _beyond_reason(path: Path) -> FormatError:
    return FormatError(f"{path} unfolds to more than a file of its size has a reason to")
