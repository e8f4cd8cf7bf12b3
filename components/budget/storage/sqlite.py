"""Reading of a SQLite ledger with the standard library alone."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from contextlib import AbstractContextManager
from pathlib import Path

from lazydp.components.budget.storage.base import (
    LOCK_SECONDS,
    READ_ENTRIES,
    READ_VERSION,
    Transaction,
    check_schema,
    readable_text,
    translated,
)
from lazydp.components.budget.storage.entries import Entry
from lazydp.components.shared.errors import UnavailableError
from lazydp.components.shared.ledger_url import URL_VARIABLE


class SqliteReader:
    """Reads a SQLite ledger; a `Storage` that refuses to write."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def shown(self) -> str:
        return f"sqlite:///{self._path}"

    def read(self) -> list[Entry]:
        """Every entry, in order.

        Raises:
            UnavailableError: the file is missing, locked or cannot be read.
            FormatError: it is no ledger, or of another schema.
        """
        if not self._path.exists():
            raise UnavailableError(
                f"no ledger at {self._path}: `lazydp budget set` makes one; --ledger or {URL_VARIABLE} names another"
            )
        with translated(self.shown), contextlib.closing(self._connect()) as connection:
            connection.text_factory = readable_text
            check_schema(_sqlite_version(connection), shown=self.shown)
            return [Entry(*row) for row in connection.execute(READ_ENTRIES)]

    def _connect(self) -> sqlite3.Connection:
        quoted = str(self._path.absolute()).replace("%", "%25").replace("?", "%3f").replace("#", "%23")
        # In a folder that cannot be written there is no shared-memory file to coordinate with a writer; without a
        # write-ahead log beside it the file is at rest, and may be read as it is.
        at_rest = not os.access(self._path.parent, os.W_OK) and not Path(f"{self._path}-wal").exists()
        mode = "immutable=1" if at_rest else "mode=ro"
        return sqlite3.connect(f"file:{quoted}?{mode}", uri=True, timeout=LOCK_SECONDS)

    def locked(self) -> AbstractContextManager[Transaction]:
        raise UnavailableError(f"ledger {self.shown} was opened for reading only")

    def close(self) -> None:
        return


def _sqlite_version(connection: sqlite3.Connection) -> str | None:
    known = connection.execute("SELECT name FROM sqlite_master WHERE name = 'lazydp_schema'").fetchone()
    if known is None:
        return None
    row = connection.execute(READ_VERSION).fetchone()
    return None if row is None else str(row[0])
