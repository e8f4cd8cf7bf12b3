"""Readers of one file of a log: Parquet, text with delimiters (CSV, TSV, RecBole, Criteo), JSON lines.

Each knows the names and types of its columns before rows are read, and reads rows of some columns in bounded batches,
in the types that the file has. Text stays text: a column of CSV has no type.
"""

from __future__ import annotations

import copy
import csv
import io
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import orjson
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from lazydp.components.features.values import scalar_text
from lazydp.components.ingest.discover import Found
from lazydp.components.ingest.locations import one_line, unreadable
from lazydp.components.shared.errors import InputError, UnavailableError

Format = Literal["auto", "parquet", "csv", "tsv", "jsonl", "criteo"]
BATCH_ROWS = 1 << 18
# Criteo's click logs have no header: a label, 13 counts, 26 categories.
CRITEO_COLUMNS = ("label", *(f"I{n}" for n in range(1, 14)), *(f"C{n}" for n in range(1, 27)))
_PARQUET_MAGIC = b"PAR1"
_COMPRESSED = re.compile(r"\.(gz|bz2|zst|lz4|br)$", re.IGNORECASE)
_BY_EXTENSION: dict[str, Format] = {
    "csv": "csv",
    "tsv": "tsv",
    "tab": "tsv",
    "txt": "csv",
    "inter": "tsv",
    "user": "tsv",
    "item": "tsv",
    "json": "jsonl",
    "jsonl": "jsonl",
    "ndjson": "jsonl",
}
# Header fields of RecBole's atomic files, such as `user_id:token`.
_ATOMIC = re.compile(r"^(.+):(token|token_seq|float|float_seq)$")
# Only these end a line; str.splitlines would end one at U+2028 as well.
_LINES = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")
# Of fewer digits an integer has 64 bits.
_LONG_NUMBER = re.compile(rb"[0-9]{19}")
_BLOCK_BYTES = 1 << 22
_BUFFER_BYTES = 1 << 18
_LARGE_GROUP_BYTES = 1 << 25
# Writers give up dictionaries of more than a mebibyte; a place in one takes up to so many bytes, run lengths included.
_DICTIONARY_BYTES = 5 << 18
_INDEX_BYTES = 3
_HEAD_BYTES = 1 << 20
_JSON_LINES = 1 << 14


class Reader(ABC):
    """One file.

    Attributes:
        where: its path, for messages.
        schema: names and types of its columns, those that its folders name included.
        num_rows: its rows where they are known beforehand, else None.
        num_bytes: the size of the file.
    """

    where: str
    schema: pa.Schema
    num_rows: int | None = None
    num_bytes: int = 0

    @abstractmethod
    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """The rows of these columns, which it has, in their order in the file.

        Raises:
            InputError: the file is torn or not what its format says.
        """

    def coded_batches(self, columns: Sequence[str], *, most_rows: int) -> Iterator[pa.RecordBatch]:
        """`batches` of so many rows at most where the format can; text may come as a dictionary, as it is stored."""
        del most_rows
        return self.batches(columns)

    def pieces(self, most_rows: int) -> list[Reader]:
        """Readers of about so many rows each, with the same rows between them; itself where the format has no cuts."""
        del most_rows
        return [self]

    def check_unchanged(self) -> None:
        """Check that the file is the one that was opened: tasks of a cluster read it later, and perhaps twice.

        Raises:
            InputError: it has changed since, or is gone.
            UnavailableError: its store does not answer.
        """
        return


class _FileReader(Reader):
    """A reader of a file whose folders may name further columns."""

    def __init__(self, found: Found) -> None:
        self._found = found
        self.where = found.location
        self._size_and_time = self._info()
        self.num_bytes = self._size_and_time[0]

    def _info(self) -> tuple[int, int | None]:
        """Size and time of change, as far as the file system knows them."""
        try:
            info = self._found.filesystem.get_file_info(self._found.path)
        except OSError as error:
            raise self._unreadable(error) from None
        if info.type == pafs.FileType.NotFound:
            raise InputError(f"{self.where} is gone: it was there when ingest began")
        return int(info.size or 0), info.mtime_ns

    def check_unchanged(self) -> None:
        if self._info() != self._size_and_time:
            raise InputError(
                f"{self.where} has changed while it was read: ingest files that nobody writes to, such as a copy"
            )

    def _unreadable(self, error: Exception, what: str = "") -> InputError | UnavailableError:
        return unreadable(self.where, error, filesystem=self._found.filesystem, what=what)

    def _with_partitions(self, schema: pa.Schema) -> pa.Schema:
        _refuse_repeated_columns(schema.names, self.where)
        for name in self._found.partitions:
            if name not in schema.names:
                schema = schema.append(pa.field(name, pa.string()))
        return schema

    def _completed(self, batch: pa.RecordBatch, columns: Sequence[str]) -> pa.RecordBatch:
        """The batch with the columns that the folders name, in the order asked for."""
        arrays = []
        for name in columns:
            if name in batch.schema.names:
                arrays.append(batch.column(name))
            else:
                value = self._found.partitions[name]
                arrays.append(pa.repeat(pa.scalar(value, pa.string()), batch.num_rows))
        return pa.RecordBatch.from_arrays(arrays, names=list(columns))

    def _of_file(self, columns: Sequence[str], own: Sequence[str]) -> list[str]:
        return [name for name in columns if name in own]


class ParquetReader(_FileReader):
    """A Parquet file; checksums of its pages are verified where it has any."""

    def __init__(self, found: Found) -> None:
        super().__init__(found)
        try:
            with found.filesystem.open_input_file(found.path) as raw:
                file = self._open(raw)
                self._own = file.schema_arrow
                self.num_rows = file.metadata.num_rows
                self._groups = range(file.num_row_groups)
                self._group_rows = [file.metadata.row_group(group).num_rows for group in self._groups]
                self._buffer_size = _buffer_size(file.metadata)
                self._dictionaries = _dictionaries(file)
        except pa.ArrowException as error:
            raise InputError(f"{self.where} is not Parquet: {one_line(error)}") from None
        except OSError as error:
            raise self._unreadable(error) from None
        self.schema = self._with_partitions(self._own)

    def _open(self, raw: Any, *, texts: Sequence[str] = (), buffer_size: int = 0) -> Any:
        local = isinstance(self._found.filesystem, pafs.LocalFileSystem)
        # Old timestamps of 96 bits (Spark's, Hive's) reach beyond what 64 bits of nanoseconds hold.
        return pq.ParquetFile(
            raw,
            pre_buffer=not local,
            buffer_size=buffer_size,
            read_dictionary=list(texts),
            coerce_int96_timestamp_unit="us",
            page_checksum_verification=True,
        )

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        return self._batches(columns, most_rows=BATCH_ROWS)

    def coded_batches(self, columns: Sequence[str], *, most_rows: int) -> Iterator[pa.RecordBatch]:
        return self._batches(columns, most_rows=most_rows, texts=self._dictionaries)

    def pieces(self, most_rows: int) -> list[Reader]:
        found: list[Reader] = []
        begin, rows = self._groups.start, 0
        for group in self._groups:
            rows += self._group_rows[group]
            if rows >= most_rows or group == self._groups[-1]:
                piece = copy.copy(self)
                piece._groups, piece.num_rows = range(begin, group + 1), rows
                found.append(piece)
                begin, rows = group + 1, 0
        return found

    def _batches(
        self, columns: Sequence[str], *, most_rows: int, texts: Sequence[str] = ()
    ) -> Iterator[pa.RecordBatch]:
        own = self._of_file(columns, self._own.names)
        try:
            with self._found.filesystem.open_input_file(self._found.path) as raw:
                file = self._open(raw, texts=texts, buffer_size=self._buffer_size)
                # A row group at a time: the reader of whole files reads far ahead.
                for group in self._groups:
                    num_rows = file.metadata.row_group(group).num_rows
                    if not own:
                        yield from self._of_partitions(columns, num_rows)
                        continue
                    # Batches of one size, of which none is so small that it would have to be joined with others.
                    batch_rows = -(-num_rows // -(-num_rows // most_rows)) if num_rows else most_rows
                    for batch in file.iter_batches(batch_size=batch_rows, row_groups=[group], columns=own):
                        yield self._completed(batch, columns)
        except (pa.ArrowException, OSError) as error:
            raise self._unreadable(error, "Parquet") from None

    def _of_partitions(self, columns: Sequence[str], num_rows: int) -> Iterator[pa.RecordBatch]:
        for begin in range(0, num_rows, BATCH_ROWS):
            empty = pa.record_batch({"": pa.nulls(min(BATCH_ROWS, num_rows - begin))})
            yield self._completed(empty, columns)


def _dictionaries(file: Any) -> list[str]:
    """The columns of text that are stored as dictionaries throughout, as far as their size tells.

    Where a dictionary grows too large, a writer goes on with plain text: to read that as a dictionary costs more.
    """
    schema, metadata = file.schema_arrow, file.metadata
    found = {field.name for field in schema if pa.types.is_string(field.type)}
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            most = _DICTIONARY_BYTES + _INDEX_BYTES * column.num_values
            if not column.has_dictionary_page or column.total_uncompressed_size > most:
                found.discard(column.path_in_schema)
    return sorted(found)


def _buffer_size(metadata: Any) -> int:
    """The bytes of a column that are read at once; 0: all of a row group, which is quicker where they are few."""
    sizes = (metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
    return _BUFFER_BYTES if max(sizes, default=0) > _LARGE_GROUP_BYTES else 0


class DelimitedReader(_FileReader):
    """Text with a header row, or with `names` without one; every field is text, an empty one is missing.

    The delimiter is the first of tab, comma, semicolon and bar that the first line has. Quotes are those of CSV, also
    around line breaks; files with tabs have none. `name:type` headers of RecBole lose the type.
    """

    def __init__(self, found: Found, *, delimiter: str | None = None, names: Sequence[str] | None = None) -> None:
        super().__init__(found)
        self._names = names
        try:
            header = _first_line(found)
            self._delimiter = delimiter or next((mark for mark in "\t,;|" if mark in header), ",")
            if names is None:
                fields = _fields(header, self._delimiter)
            else:
                fields = list(names)
                self._refuse_other_width(header)
        except (pa.ArrowException, UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{self.where} is not text with delimiters: {one_line(error)}") from None
        except OSError as error:
            raise self._unreadable(error) from None
        _refuse_repeated_columns(fields, self.where)
        self._fields = fields
        atomic = [_ATOMIC.match(name) for name in fields]
        plain = [match[1] for match in atomic if match is not None]
        self._own = plain if len(plain) == len(fields) else fields
        self.schema = self._with_partitions(pa.schema([(name, pa.string()) for name in self._own]))

    def _refuse_other_width(self, line: str) -> None:
        found = line.count(self._delimiter) + 1
        if self._names is not None and found != len(self._names):
            raise InputError(f"{self.where}: expected {len(self._names)} fields a line, found {found} in the first")

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        in_file = dict(zip(self._own, self._fields, strict=True))
        own = self._of_file(columns, self._own) or self._own[:1]
        try:
            with _stream(self._found) as stream:
                reader = pacsv.open_csv(
                    stream,
                    read_options=pacsv.ReadOptions(
                        block_size=_BLOCK_BYTES, column_names=self._names, use_threads=False
                    ),
                    parse_options=pacsv.ParseOptions(
                        delimiter=self._delimiter,
                        quote_char=False if self._delimiter == "\t" else '"',
                        newlines_in_values=self._delimiter != "\t",
                    ),
                    convert_options=pacsv.ConvertOptions(
                        column_types=dict.fromkeys(self._fields, pa.string()),
                        include_columns=[in_file[name] for name in own],
                        strings_can_be_null=True,
                        null_values=[""],
                    ),
                )
                for batch in reader:
                    if batch.num_rows:
                        yield self._completed(batch.rename_columns(own), columns)
        except (pa.ArrowException, OSError) as error:
            raise self._unreadable(error, "text with delimiters") from None


class JsonLinesReader(_FileReader):
    """A JSON object a line. Its columns are those of the first lines; a value keeps the text form of its own kind."""

    def __init__(self, found: Found) -> None:
        super().__init__(found)
        names: dict[str, pa.DataType] = {}
        for record in next(self._records(), []):
            for name, value in record.items():
                if value is not None and name not in names:
                    names[name] = pa.list_(pa.string()) if isinstance(value, list) else pa.string()
                names.setdefault(name, pa.null())
        self._own = [name for name, kind in names.items()]
        fields = [(name, pa.string() if kind == pa.null() else kind) for name, kind in names.items()]
        self.schema = self._with_partitions(pa.schema(fields))

    def _records(self) -> Iterator[list[dict[str, Any]]]:
        """The objects of the file, some thousand at a time."""
        number = 0
        try:
            with _stream(self._found) as stream, io.BufferedReader(stream) as lines:
                records: list[dict[str, Any]] = []
                for line in lines:
                    number += 1
                    text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                    if not text.strip():
                        continue
                    record = _json(text)
                    if not isinstance(record, dict):
                        kind = type(record).__name__
                        raise InputError(f"{self.where}:{number}: expected a JSON object a line, found {kind}")
                    records.append(record)
                    if len(records) == _JSON_LINES:
                        yield records
                        records = []
                if records:
                    yield records
        except orjson.JSONDecodeError as error:
            raise InputError(f"{self.where}:{number}: not a line of JSON: {one_line(error)}") from None
        except (pa.ArrowException, OSError) as error:
            raise self._unreadable(error) from None

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        own = self._of_file(columns, self._own)
        for records in self._records():
            arrays = {name: self._array(name, [record.get(name) for record in records]) for name in own}
            batch = pa.record_batch(arrays) if arrays else pa.record_batch({"": pa.nulls(len(records))})
            yield self._completed(batch, columns)

    def _array(self, name: str, values: list[Any]) -> pa.Array:
        kind = self.schema.field(name).type
        try:
            if pa.types.is_list(kind):
                lists = [None if value is None else [scalar_text(part) for part in value] for value in values]
                return pa.array(lists, kind)
            return pa.array([scalar_text(value) for value in values], kind)
        except (ValueError, TypeError) as error:
            raise InputError(f"{self.where}: field {name!r}: {one_line(error)}") from None


def _json(text: bytes) -> Any:
    """A line of JSON; integers of any size are exact, where orjson makes floats of those beyond 64 bits."""
    record = orjson.loads(text)
    return json.loads(text) if _LONG_NUMBER.search(text) else record


def open_reader(found: Found, kind: Format = "auto") -> Reader:
    """The reader of a file, by `kind` or by what the file is: its first bytes, then its extension.

    Raises:
        InputError: it is of no known kind, or not of the kind said.
        UnavailableError: its store does not answer.
    """
    match _kind(found) if kind == "auto" else kind:
        case "parquet":
            return ParquetReader(found)
        case "jsonl":
            return JsonLinesReader(found)
        case "tsv":
            return DelimitedReader(found, delimiter="\t")
        case "criteo":
            return DelimitedReader(found, delimiter="\t", names=CRITEO_COLUMNS)
        case _:
            return DelimitedReader(found)


def _kind(found: Found) -> Format:
    try:
        with found.filesystem.open_input_file(found.path) as file:
            if bytes(file.read(4)) == _PARQUET_MAGIC:
                return "parquet"
    except OSError as error:
        raise unreadable(found.location, error, filesystem=found.filesystem) from None
    name = found.path.rsplit("/", 1)[-1]
    extension = _COMPRESSED.sub("", name).rsplit(".", 1)[-1].lower()
    if extension in {"parquet", "pq"}:
        raise InputError(f"{found.location} is not Parquet: it does not begin with PAR1; the file may be torn")
    if extension not in _BY_EXTENSION:
        raise InputError(
            f"{found.location} is no data file that is known: expected Parquet, or one of "
            f"{', '.join('.' + known for known in _BY_EXTENSION)}; leave it out by a pattern, or say --format"
        )
    return _BY_EXTENSION[extension]


def _stream(found: Found) -> Any:
    """The file's bytes, unpacked where its name says that they are packed."""
    return found.filesystem.open_input_stream(found.path, compression="detect")


def _first_line(found: Found) -> str:
    """The first line that is not blank, quoted line breaks included, without a byte-order mark."""
    with _stream(found) as stream:
        head = bytes(stream.read(_HEAD_BYTES))
    text = head.decode("utf-8-sig", errors="ignore" if len(head) == _HEAD_BYTES else "strict")
    kept = ""
    for match in _LINES.finditer(text):
        line = match[0]
        kept += line
        if kept.strip() and kept.count('"') % 2 == 0:
            return kept.strip("\r\n")
        if not kept.strip():
            kept = ""
    if not kept:
        raise InputError(f"{found.location} is empty: expected a header row")
    return kept.strip("\r\n")


def _fields(header: str, delimiter: str) -> list[str]:
    if delimiter == "\t":
        return header.split("\t")
    return next(csv.reader(io.StringIO(header, newline=""), delimiter=delimiter))


def _refuse_repeated_columns(names: Sequence[str], where: str) -> None:
    repeated = sorted({name for name in names if list(names).count(name) > 1})
    if repeated:
        raise InputError(f"{where} has the column {repeated[0]!r} more than once: rename one")
