"""Opens the storage that a ledger's URL names."""

from __future__ import annotations

from lazydp.components.budget.storage.base import Storage, sqlite_path
from lazydp.components.budget.storage.sqlite import SqliteReader


def open_storage(url: str, *, read_only: bool) -> Storage:
    """The storage behind `url`, made where it does not exist unless `read_only`.

    Raises:
        UnavailableError: it does not answer, or is locked or full.
        FormatError: it is no ledger, or of another schema.
        InputError: not a URL of a database that lazydp knows.
    """
    path = sqlite_path(url)
    if read_only and path is not None:
        return SqliteReader(path)
    from lazydp.components.budget.storage.sql import open_sql  # noqa: PLC0415 - SQLAlchemy takes a third of a second

    return open_sql(url, read_only=read_only)
