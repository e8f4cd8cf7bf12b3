"""The rows of a log or of a side table: one or many files, read as one.

Files need not agree in types: a value has one text form whatever type holds it (see `features.values`), and so neither
the order of files nor what the first one happens to hold decides anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa

from lazydp.components.features.encode import is_list_type
from lazydp.components.features.values import canonical_text, is_scalar_type
from lazydp.components.ingest.discover import Found, find
from lazydp.components.ingest.lake import open_table
from lazydp.components.ingest.locations import shown
from lazydp.components.ingest.readers import BATCH_ROWS, Format, Reader, open_reader
from lazydp.components.shared.errors import InputError

_FOOTERS_AT_ONCE = 8
# Batches of fewer rows are joined with the next: to join larger ones costs more than it saves.
_FEW_ROWS = BATCH_ROWS // 4


@dataclass(frozen=True)
class RowSource:
    """Rows of one or several files.

    Attributes:
        files: their readers, in the order in which they are read.
        where: what was named, for messages.
    """

    files: tuple[Reader, ...]
    where: str

    @classmethod
    def open(cls, locations: Sequence[str], *, kind: Format = "auto") -> RowSource:
        """Open what lies at the locations: files, folders, patterns, tables of a lake (see `discover.find`).

        Args:
            locations: paths or URIs.
            kind: the format of every file; `auto` goes by what each file is.

        Raises:
            InputError: nothing there, or not what it should be.
            UnavailableError: a store does not answer.
        """
        if not locations:
            raise InputError("no input given: name a file, a folder or a pattern")

        def reader(found: Found) -> Reader:
            return open_table(found) if found.table is not None else open_reader(found, kind)

        with ThreadPoolExecutor(max_workers=_FOOTERS_AT_ONCE) as pool:
            return cls(tuple(pool.map(reader, find(locations))), ", ".join(map(shown, locations)))

    @property
    def num_rows(self) -> int | None:
        """Rows of all files, None where a file of text has to be read to know."""
        known = [file.num_rows for file in self.files]
        return None if None in known else sum(number for number in known if number is not None)

    @property
    def num_bytes(self) -> int:
        """Bytes of all files as they are stored."""
        return sum(file.num_bytes for file in self.files)

    @property
    def column_names(self) -> list[str]:
        """Every column that some file has, in the order in which they appear."""
        return list(dict.fromkeys(name for file in self.files for name in file.schema.names))

    def types(self, column: str) -> dict[pa.DataType, str]:
        """The types in which files hold the column, each with one file that does."""
        found: dict[pa.DataType, str] = {}
        for file in self.files:
            if column in file.schema.names:
                found.setdefault(file.schema.field(column).type, file.where)
        return found

    def batches(
        self, columns: Sequence[str], *, most_rows: int = BATCH_ROWS, coded: bool = False
    ) -> Iterator[pa.RecordBatch]:
        """The rows of these columns in batches of bounded size; null where a file lacks a column.

        The types of a column may differ from batch to batch, as they do between files.

        Args:
            columns: their names.
            most_rows: rows of a batch at most.
            coded: text may come as a dictionary, as it is stored.

        Raises:
            InputError: a file is torn.
        """
        names = list(columns)
        waiting: list[pa.RecordBatch] = []
        size = 0
        for batch in (batch for file in self.files for batch in self._of_file(file, names, most_rows, coded=coded)):
            if waiting and (batch.schema != waiting[0].schema or size >= min(_FEW_ROWS, most_rows)):
                yield from _slices(_joined(waiting), most_rows)
                waiting, size = [], 0
            waiting.append(batch)
            size += batch.num_rows
        if waiting:
            yield from _slices(_joined(waiting), most_rows)

    def _of_file(self, file: Reader, names: Sequence[str], most_rows: int, *, coded: bool) -> Iterator[pa.RecordBatch]:
        own = [name for name in names if name in file.schema.names]
        for batch in file.coded_batches(own, most_rows=most_rows) if coded else file.batches(own):
            arrays = [batch.column(name) if name in own else pa.nulls(batch.num_rows) for name in names]
            yield pa.RecordBatch.from_arrays(arrays, names=list(names))

    def table(self, columns: Sequence[str]) -> pa.Table:
        """All rows of these columns; a column of which files hold different types comes as text.

        Raises:
            InputError: a file is torn, or lists and single values stand in one column.
        """
        names = list(columns)
        parts: dict[str, list[pa.Array]] = {name: [] for name in names}
        for batch in self.batches(names):
            for name in names:
                parts[name].append(batch.column(name))
        return pa.table({name: self._one_type(name, parts[name]) for name in names})

    def _one_type(self, name: str, parts: list[pa.Array]) -> pa.ChunkedArray:
        kinds = {part.type for part in parts if not pa.types.is_null(part.type)}
        if len(kinds) == 1:
            (kind,) = kinds
            # Views and runs cannot be picked from: their plain text stands for them.
            if is_list_type(kind) or pa.types.is_primitive(kind) or pa.types.is_string(kind):
                return pa.chunked_array([part.cast(kind) for part in parts], kind)
        if all(is_scalar_type(kind) for kind in kinds):
            try:
                return pa.chunked_array([canonical_text(part) for part in parts], pa.string())
            except ValueError as error:
                raise InputError(f"{self.where}: column {name!r}: {error}") from None
        if len(kinds) == 1:
            return pa.chunked_array([part.cast(kind) for part in parts], kind)
        raise InputError(f"{self.where}: column {name!r} holds {' and '.join(sorted(map(str, kinds)))}")


def require_columns(columns: Sequence[tuple[str, str]], source: RowSource, *, where: str) -> None:
    """Check that the columns (name, field of the spec) are there: those of features in some file, others in each.

    Raises:
        InputError: one is not; the message names it, the field that asks for it, and the columns found.
    """
    for name, field in columns:
        if name not in source.column_names:
            found = ", ".join(source.column_names) or "none"
            raise InputError(
                f"{where} has no column {name!r}, which {field} of the feature spec names; it has: {found}"
            )
        if field.startswith("feature "):
            continue
        for file in source.files:
            if name not in file.schema.names:
                raise InputError(f"{file.where} has no column {name!r} ({field}), which other files of {where} have")


def _slices(batch: pa.RecordBatch, most_rows: int) -> Iterator[pa.RecordBatch]:
    for begin in range(0, max(batch.num_rows, 1), most_rows):
        yield batch.slice(begin, most_rows)


def _joined(batches: list[pa.RecordBatch]) -> pa.RecordBatch:
    if len(batches) == 1:
        return batches[0]
    return pa.Table.from_batches(batches).combine_chunks().to_batches()[0]
