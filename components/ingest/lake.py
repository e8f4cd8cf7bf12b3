"""Tables of a lake, read through their own library: only it knows which rows of which files still count."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from lazydp.components.ingest.discover import Found
from lazydp.components.ingest.locations import one_line
from lazydp.components.ingest.readers import BATCH_ROWS, Reader
from lazydp.components.shared.errors import InputError


class DeltaReader(Reader):
    """The current version of a Delta table, through the package `deltalake`."""

    def __init__(self, found: Found, version: int | None = None) -> None:
        """Open the current version of a table, or a `version` that was current before."""
        self.where = found.location
        try:
            from deltalake import DeltaTable  # noqa: PLC0415 - an extra
            from deltalake.exceptions import DeltaError  # noqa: PLC0415
        except ImportError:
            raise InputError(
                f"{self.where} is a Delta table, which needs the package deltalake: pip install 'lazydp[delta]'"
            ) from None
        try:
            table = DeltaTable(found.given, version=version)
            self._dataset = table.to_pyarrow_dataset()
        except (DeltaError, OSError, ValueError) as error:
            raise InputError(f"{self.where} is a Delta table that cannot be read: {one_line(error)}") from None
        self.schema = self._dataset.schema
        self.num_rows = int(self._dataset.count_rows())
        self._opened = found, int(table.version())

    def __reduce__(self) -> tuple[Any, ...]:
        """Sent elsewhere, it opens the same version there: what its library holds does not travel."""
        return DeltaReader, self._opened

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        scanner = self._dataset.scanner(
            columns=list(columns), batch_size=BATCH_ROWS, batch_readahead=1, fragment_readahead=1, use_threads=False
        )
        try:
            yield from scanner.to_batches()
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{self.where} cannot be read: {one_line(error)}") from None


def open_table(found: Found) -> Reader:
    """The reader of a table of a lake.

    Raises:
        InputError: of a format that isn't read, or whose package is missing.
    """
    if found.table == "Delta":
        return DeltaReader(found)
    raise InputError(
        f"{found.location} is a table of {found.table}, which is not read: its files by themselves hold deleted rows; "
        "export the current rows as Parquet, and give that"
    )
