"""Where data comes from: Parquet files by path or URI, and small tables as Parquet, CSV or TSV."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.dataset as pads
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from lazydp.components.shared.errors import InputError, UnavailableError

_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+://")
# Header fields of RecBole's atomic files, such as `user_id:token`.
_ATOMIC = re.compile(r"^(.+):(token|token_seq|float|float_seq)$")
_PARQUET_MAGIC = b"PAR1"
_BATCH_ROWS = 1 << 17


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
class RowSource:
    """Rows of one schema, read a batch at a time."""

    dataset: Any
    schema: pa.Schema
    num_rows: int
    where: str

    @classmethod
    def open(cls, locations: Sequence[str]) -> RowSource:
        """Open files and folders (searched for *.parquet at any depth) by path or URI.

        Raises:
            InputError: nothing there, not Parquet, or schemas that differ.
            UnavailableError: a store does not answer.
        """
        where = ", ".join(locations)
        if not locations:
            raise InputError("no input given: name a Parquet file or a folder of them")
        parts = [_open_parquet(location) for location in locations]
        try:
            dataset = parts[0] if len(parts) == 1 else pads.dataset(parts)
            num_rows = sum(part.count_rows() for part in parts)
        except pa.ArrowException as error:
            raise InputError(f"{where}: the files cannot be read together: {error}") from None
        return cls(dataset=dataset, schema=dataset.schema, num_rows=num_rows, where=where)

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
        return cls(dataset=pads.dataset(table), schema=table.schema, num_rows=table.num_rows, where=location)

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """The rows of these columns, in batches of bounded size.

        Raises:
            InputError: a file is torn, or a column changes its type between files.
        """
        scanner = self.dataset.scanner(
            columns=list(columns), batch_size=_BATCH_ROWS, batch_readahead=2, fragment_readahead=1
        )
        try:
            for batch in scanner.to_batches():
                if batch.num_rows:
                    yield batch
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{self.where} cannot be read as Parquet: {error}") from None


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


def _open_parquet(location: str) -> Any:
    filesystem, path = open_location(location)
    try:
        info = filesystem.get_file_info(path)
        if info.type == pafs.FileType.NotFound:
            raise InputError(f"{location} does not exist")
        files = [path] if info.type == pafs.FileType.File else _parquet_files(filesystem, path)
        if not files:
            raise InputError(f"the folder {location} holds no *.parquet file")
        return pads.dataset(files, filesystem=filesystem, format="parquet")
    except pa.ArrowException as error:
        raise InputError(f"{location} is not Parquet: {error}") from None
    except OSError as error:
        raise _unreadable(location, error) from None


def _parquet_files(filesystem: Any, folder: str) -> list[str]:
    found = filesystem.get_file_info(pafs.FileSelector(folder, recursive=True))
    return sorted(
        info.path
        for info in found
        if info.type == pafs.FileType.File and info.extension in {"parquet", "pq"} and not _hidden(info.path, folder)
    )


def _hidden(path: str, folder: str) -> bool:
    inside = path[len(folder) :].strip("/").split("/")
    return any(part.startswith((".", "_")) for part in inside)
