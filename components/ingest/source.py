"""Where data comes from: Parquet files by path or URI, and small tables as Parquet, CSV or TSV."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from lazydp.components.shared.errors import InputError, UnavailableError

_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+://")
# Header fields of RecBole's atomic files, such as `user_id:token`.
_ATOMIC = re.compile(r"^(.+):(token|token_seq|float|float_seq)$")
_PARQUET_MAGIC = b"PAR1"
_BATCH_ROWS = 1 << 17
_FOOTERS_AT_ONCE = 8


def is_uri(location: str) -> bool:
    """Whether the location names a scheme, such as s3://bucket/folder."""
    return _SCHEME.match(location) is not None


def open_location(location: str | Path) -> tuple[Any, str]:
    """The pyarrow file system of a path or URI, and the path in it.

    pyarrow's own file systems (file, s3, gs, hdfs) come first, then any that fsspec knows.

    Raises:
        InputError: no such scheme, or its package is not installed.
    """
    text = str(location)
    if not is_uri(text):
        return pafs.LocalFileSystem(), str(Path(text).expanduser().absolute())
    scheme = text.split("://", 1)[0]
    if scheme in {"file", "s3", "gs", "gcs", "hdfs", "viewfs", "abfs"}:
        try:
            filesystem, path = pafs.FileSystem.from_uri(text)
        except (pa.ArrowException, ValueError, OSError) as error:
            raise InputError(f"{text} is no location that can be opened: {error}") from None
        return filesystem, path
    import fsspec  # type: ignore[import-untyped]  # noqa: PLC0415 - only for schemes that pyarrow lacks

    try:
        filesystem, path = fsspec.url_to_fs(text)
    except (ValueError, ImportError) as error:
        raise InputError(f"{text}: the scheme {scheme}:// cannot be opened: {error}") from None
    return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), path


def resolve_location(location: str, base: str | Path) -> str:
    """A path of a spec relative to the folder `base` (itself a path or URI); absolute paths and URIs stay."""
    if is_uri(location) or Path(location).expanduser().is_absolute():
        return location
    return f"{str(base).rstrip('/')}/{location}" if is_uri(str(base)) else str(Path(base) / location)


def read_text(location: str | Path) -> str:
    """A small text file by path or URI.

    Raises:
        InputError: it does not exist, or is not UTF-8.
    """
    filesystem, path = open_location(location)
    try:
        with filesystem.open_input_stream(path) as stream:
            return bytes(stream.read()).decode("utf-8")
    except FileNotFoundError:
        raise InputError(f"{location} does not exist") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{location} is not UTF-8 text: {error}") from None
    except OSError as error:
        raise _unreadable(location, error) from None


def _unreadable(location: str | Path, error: Exception) -> InputError | UnavailableError:
    if is_uri(str(location)) and not str(location).startswith("file://"):
        return UnavailableError(f"{location} does not answer: {error}")
    return InputError(f"{location} cannot be read: {error}")


def require_columns(columns: Sequence[tuple[str, str]], schema: pa.Schema, *, where: str) -> None:
    """Check that the columns (name, field of the spec) are there.

    Raises:
        InputError: one is not; the message names it, the field that asks for it, and the columns found.
    """
    for name, field in columns:
        if name not in schema.names:
            found = ", ".join(schema.names) or "none"
            raise InputError(
                f"{where} has no column {name!r}, which {field} of the feature spec names; it has: {found}"
            )


def read_side_table(location: str | Path) -> pa.Table:
    """A small table: Parquet, or text with a header row and commas or tabs between its fields.

    Text fields are not interpreted, empty ones are null. Type suffixes of the header (`age:token`) are left out.

    Raises:
        InputError: it does not exist or is neither.
        UnavailableError: its store does not answer.
    """
    filesystem, path = open_location(location)
    try:
        with filesystem.open_input_file(path) as file:
            if file.read(4) == _PARQUET_MAGIC:
                return pq.read_table(file)
            file.seek(0)
            return _read_delimited(file)
    except FileNotFoundError:
        raise InputError(f"{location} does not exist") from None
    except pa.ArrowException as error:
        raise InputError(f"{location} is neither Parquet nor CSV or TSV with a header: {error}") from None
    except OSError as error:
        raise _unreadable(location, error) from None


def _read_delimited(file: Any) -> pa.Table:
    header = file.read(1 << 16).decode("utf-8", errors="replace").split("\n", 1)[0].rstrip("\r")
    file.seek(0)
    tabs = "\t" in header
    names = header.split("\t") if tabs else [name.strip('"') for name in header.split(",")]
    table = pacsv.read_csv(
        file,
        parse_options=pacsv.ParseOptions(delimiter="\t" if tabs else ",", quote_char=False if tabs else '"'),
        convert_options=pacsv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=True, null_values=[""]
        ),
    )
    atomic = [_ATOMIC.match(name) for name in table.column_names]
    if all(atomic):
        table = table.rename_columns([match[1] for match in atomic if match is not None])
    return table


@dataclass(frozen=True)
class _File:
    """One Parquet file: its file system, its path there, and what its footer says."""

    filesystem: Any
    path: str
    schema: pa.Schema
    num_rows: int

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        # A row group at a time: the reader of whole files and the dataset scanner read far ahead.
        local = isinstance(self.filesystem, pafs.LocalFileSystem)
        with self.filesystem.open_input_file(self.path) as raw:
            file = pq.ParquetFile(raw, pre_buffer=not local)
            for group in range(file.num_row_groups):
                yield from file.iter_batches(batch_size=_BATCH_ROWS, row_groups=[group], columns=list(columns))


@dataclass(frozen=True)
class RowSource:
    """Rows of one schema, read a batch at a time: of Parquet files, or of a small table."""

    schema: pa.Schema
    num_rows: int
    where: str
    files: tuple[_File, ...] = ()
    table: pa.Table | None = None

    @classmethod
    def open(cls, locations: Sequence[str]) -> RowSource:
        """Open files and folders (searched for *.parquet at any depth) by path or URI.

        Raises:
            InputError: nothing there, or not Parquet.
            UnavailableError: a store does not answer.
        """
        if not locations:
            raise InputError("no input given: name a Parquet file or a folder of them")
        found = [pair for location in locations for pair in _parquet_files(location)]
        with ThreadPoolExecutor(max_workers=_FOOTERS_AT_ONCE) as pool:
            files = tuple(pool.map(_open_file, found))
        return cls(
            schema=files[0].schema,
            num_rows=sum(file.num_rows for file in files),
            where=", ".join(locations),
            files=files,
        )

    @classmethod
    def open_side_table(cls, location: str) -> RowSource:
        """Open a side table: Parquet (a file or a folder) is read in batches, CSV and TSV as by `read_side_table`.

        Raises:
            InputError: it does not exist or is neither.
            UnavailableError: its store does not answer.
        """
        if _is_parquet(location):
            return cls.open([location])
        table = read_side_table(location)
        return cls(schema=table.schema, num_rows=table.num_rows, where=location, table=table)

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """The rows of these columns, in batches of bounded size.

        Raises:
            InputError: a file is torn, lacks a column, or has it in another type than the first file.
        """
        if self.table is not None:
            yield from self.table.select(list(columns)).combine_chunks().to_batches(max_chunksize=_BATCH_ROWS)
            return
        wanted = pa.schema([self.schema.field(name) for name in columns]).remove_metadata()
        for file in self.files:
            _require_same_types(file, wanted)
        yield from _coalesced(self._file_batches(wanted), wanted)

    def _file_batches(self, wanted: pa.Schema) -> Iterator[pa.RecordBatch]:
        for file in self.files:
            try:
                for batch in file.batches(wanted.names):
                    yield batch.select(wanted.names).cast(wanted)
            except (pa.ArrowException, OSError) as error:
                raise InputError(f"{file.path} cannot be read as Parquet: {error}") from None


def _coalesced(batches: Iterator[pa.RecordBatch], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """The same rows in fewer batches, where row groups are small."""
    waiting: list[pa.RecordBatch] = []
    size = 0
    for batch in batches:
        waiting.append(batch)
        size += batch.num_rows
        if size >= _BATCH_ROWS:
            yield from pa.Table.from_batches(waiting, schema).combine_chunks().to_batches()
            waiting, size = [], 0
    if size:
        yield from pa.Table.from_batches(waiting, schema).combine_chunks().to_batches()


def _require_same_types(file: _File, wanted: pa.Schema) -> None:
    for field in wanted:
        if field.name not in file.schema.names:
            raise InputError(f"{file.path} has no column {field.name!r}, which the first file has")
        found = file.schema.field(field.name).type
        if found != field.type and _family(found) != _family(field.type):
            raise InputError(f"{file.path}: column {field.name!r} holds {found}, in the first file {field.type}")


def _family(kind: pa.DataType) -> str:
    """Types of one family are cast to the type of the first file."""
    if pa.types.is_dictionary(kind):
        return _family(kind.value_type)
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return "number"
    return "text" if pa.types.is_string(kind) or pa.types.is_large_string(kind) else str(kind)


def _is_parquet(location: str) -> bool:
    filesystem, path = open_location(location)
    try:
        if filesystem.get_file_info(path).type == pafs.FileType.Directory:
            return True
        with filesystem.open_input_file(path) as file:
            return bytes(file.read(4)) == _PARQUET_MAGIC
    except FileNotFoundError:
        raise InputError(f"{location} does not exist") from None
    except OSError as error:
        raise _unreadable(location, error) from None


def _parquet_files(location: str) -> list[tuple[Any, str]]:
    """(file system, path) of every Parquet file at a location."""
    filesystem, path = open_location(location)
    try:
        info = filesystem.get_file_info(path)
        if info.type == pafs.FileType.NotFound:
            raise InputError(f"{location} does not exist")
        if info.type == pafs.FileType.File:
            return [(filesystem, path)]
        inside = filesystem.get_file_info(pafs.FileSelector(path, recursive=True))
    except OSError as error:
        raise _unreadable(location, error) from None
    found = sorted(info.path for info in inside if _is_data(info, path))
    if not found:
        raise InputError(f"the folder {location} holds no *.parquet file")
    return [(filesystem, path) for path in found]


def _is_data(info: Any, folder: str) -> bool:
    inside = info.path[len(folder) :].strip("/").split("/")
    hidden = any(part.startswith((".", "_")) for part in inside)
    return info.type == pafs.FileType.File and info.extension in {"parquet", "pq"} and not hidden


def _open_file(place: tuple[Any, str]) -> _File:
    filesystem, path = place
    try:
        with filesystem.open_input_file(path) as raw:
            file = pq.ParquetFile(raw)
            return _File(filesystem, path, file.schema_arrow, file.metadata.num_rows)
    except pa.ArrowException as error:
        raise InputError(f"{path} is not Parquet: {error}") from None
    except OSError as error:
        raise _unreadable(path, error) from None
