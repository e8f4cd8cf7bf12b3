"""Where entries are kept: SQLite or PostgreSQL, and what can be wrong with either, said in one line.

`storage.open` opens one. Reading a SQLite ledger needs the standard library alone (`storage.sqlite`), so that
`lazydp budget show` and the service answer at once; everything else goes through SQLAlchemy (`storage.sql`).
"""

from __future__ import annotations

import contextlib
import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from lazydp.components.budget.storage.entries import COLUMNS, Entry
from lazydp.components.shared.errors import FormatError, InputError, LazyDPError, UnavailableError
from lazydp.components.shared.ledger_url import URL_VARIABLE

# Revisions of the schema, oldest first; the last is the one that this code reads and writes.
SCHEMAS = ("0001", "0002")
# How long to wait for another process' lock.
LOCK_SECONDS = 30

READ_VERSION = "SELECT version_num FROM lazydp_schema"
READ_ENTRIES = f"SELECT {', '.join(COLUMNS)} FROM lazydp_entries ORDER BY number"  # noqa: S608 - constants only


class Transaction(Protocol):
    """A ledger held for writing: nobody else can write until it ends."""

    def read(self) -> list[Entry]:
        """Every entry, in order."""
        ...

    def head(self) -> str:
        """Digest of the last entry; zeros where there is none."""
        ...

    def append(self, entry: Entry) -> None:
        """Add an entry; durable when the transaction ends without an exception."""
        ...

    def after_commit(self, action: Callable[[], None]) -> None:
        """Have something done once the entry is durable, before anybody else who waits for the ledger goes on."""
        ...


class Storage(Protocol):
    """A database that holds a ledger."""

    @property
    def shown(self) -> str:
        """The URL without its password."""
        ...

    def read(self) -> list[Entry]:
        """Every entry, in order."""
        ...

    def locked(self) -> AbstractContextManager[Transaction]:
        """Hold the ledger for writing."""
        ...

    def close(self) -> None:
        """Let go of connections."""
        ...


def readable_text(raw: bytes) -> str:
    """A text of SQLite, whatever bytes somebody put there: what is not UTF-8 fails its digest, not the reading."""
    return raw.decode("utf-8", "surrogateescape")


def without_password(url: str) -> str:
    """The URL, fit for a log."""
    return re.sub(r"(//[^:/@]*):.*@", r"\1:***@", url)


def sqlite_path(url: str) -> Path | None:
    """The file of a `sqlite:///FILE` URL; None for another database.

    Raises:
        InputError: not a URL, or a database in memory, which would forget what was spent.
    """
    if "://" not in url:
        raise InputError(
            f"ledger {without_password(url)!r} is not a URL: expected sqlite:///FILE or postgresql://USER@HOST/NAME"
        )
    if not url.startswith("sqlite"):
        return None
    # Everything after the slashes is the path, `?`, `%` and `#` included: one text names one file for writer, reader
    # and secret alike.
    file = url.partition(":///")[2]
    if not file or file == ":memory:":
        raise InputError(f"ledger {url!r} names no file: a ledger in memory would forget what was spent")
    return Path(file)


def check_schema(version: str | None, *, shown: str) -> None:
    """Refuse a schema that this code does not read.

    Raises:
        FormatError: older, newer or none; the message says what to do.
    """
    if version == SCHEMAS[-1]:
        return
    if version is None:
        raise FormatError(f"{shown} holds no ledger of lazydp: check the URL (--ledger, {URL_VARIABLE})")
    if version in SCHEMAS:
        raise FormatError(
            f"ledger {shown} has schema {version}, this lazydp needs {SCHEMAS[-1]}: run `lazydp budget migrate`"
        )
    raise FormatError(f"ledger {shown} has schema {version}, this lazydp reads up to {SCHEMAS[-1]}: use a newer lazydp")


# --- errors ----------------------------------------------------------------------------------------------------

_SQLITE = {
    "SQLITE_BUSY": f"another process has held its lock for more than {LOCK_SECONDS} seconds: try again",
    "SQLITE_LOCKED": f"another process has held its lock for more than {LOCK_SECONDS} seconds: try again",
    "SQLITE_FULL": "the disk or the database is full: make room and try again; nothing was recorded",
    "SQLITE_READONLY": "it cannot be written: check the permissions of the file and its folder",
    "SQLITE_CANTOPEN": "it cannot be opened: check that the folder exists and may be written",
    "SQLITE_IOERR": "the disk fails to read or write it",
    "SQLITE_PERM": "its permissions forbid it",
}
_POSTGRES = {
    "53100": "the server's disk is full: make room and try again; nothing was recorded",
    "55P03": f"another process has held its lock for more than {LOCK_SECONDS} seconds: try again",
    "25006": "the server accepts no writes (read-only or standby)",
    "28P01": "the server refuses the password",
    "28000": "the server refuses this user",
    "3D000": "the server has no database of that name: create it first",
    "42501": "this user may not write the ledger's tables",
    "53300": "the server has no connection to spare: try again",
    "57P01": "the server is shutting down",
    "57P03": "the server is starting up: try again",
}


@contextlib.contextmanager
def translated(shown: str) -> Iterator[None]:
    """Turn a database's exception into one of ours that says in one line what is wrong with the ledger `shown`."""
    try:
        yield
    except (LazyDPError, AssertionError):
        raise
    except Exception as error:
        found = _translation(error, shown)
        if found is None:
            raise
        raise found from error


def _translation(error: Exception, shown: str) -> LazyDPError | None:
    cause = getattr(error, "orig", None) or error
    if isinstance(cause, sqlite3.Error):
        return _sqlite_translation(cause, shown)
    if isinstance(cause, OSError):
        return UnavailableError(f"ledger {shown}: {cause.strerror or cause}")
    if type(cause).__module__.startswith("psycopg"):
        code = getattr(cause, "sqlstate", None)
        first_line = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
        why = _POSTGRES.get(code or "", f"the database does not answer as it should: {first_line}")
        return UnavailableError(f"ledger {shown}: {why}")
    return None


def _sqlite_translation(cause: sqlite3.Error, shown: str) -> LazyDPError:
    name = getattr(cause, "sqlite_errorname", "")
    for known, why in _SQLITE.items():
        if name.startswith(known):
            return UnavailableError(f"ledger {shown}: {why}")
    if name.startswith(("SQLITE_NOTADB", "SQLITE_CORRUPT")):
        return FormatError(f"ledger {shown}: the file is damaged or is not a SQLite database: restore it from a copy")
    return UnavailableError(f"ledger {shown}: {cause}")
