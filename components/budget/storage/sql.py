"""The ledger's storage through SQLAlchemy: SQLite in write-ahead mode, or PostgreSQL; schema by Alembic."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.pool import NullPool

from lazydp.components.budget.storage.base import (
    LOCK_SECONDS,
    READ_VERSION,
    SCHEMAS,
    check_schema,
    readable_text,
    sqlite_path,
    translated,
    without_password,
)
from lazydp.components.budget.storage.entries import COLUMNS, GENESIS, Entry
from lazydp.components.shared.errors import InputError, UnavailableError
from lazydp.components.shared.files import PRIVATE_FILE

_MIGRATIONS = Path(__file__).parent / "migrations"
# Of LOCK_SECONDS, that one waits in the queue of a SQLite ledger: a crowd of hundreds takes its time.
_TURNS = 4
# The longest that a reading of a PostgreSQL ledger may take.
READ_SECONDS = 30.0
# The longest that a statement may take on a PostgreSQL server, and that a silent one is waited for.
_STATEMENT_SECONDS = 60
_ADVISORY_LOCK = 0x1A27D9  # any number, the same in every process that migrates

_ENTRIES = sa.table("lazydp_entries", sa.column("number", sa.BigInteger), *(sa.column(name) for name in COLUMNS[1:]))


class SqlTransaction:
    """A `Transaction` on a SQLAlchemy connection that holds the lock."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection
        self._actions: list[Callable[[], None]] = []

    def read(self) -> list[Entry]:
        """Every entry, in order."""
        return _read(self._connection)

    def head(self) -> str:
        """Digest of the last entry; zeros where there is none."""
        last = sa.select(_ENTRIES.c.digest).order_by(_ENTRIES.c.number.desc()).limit(1)
        return self._connection.execute(last).scalar() or GENESIS

    def append(self, entry: Entry) -> None:
        """Add an entry."""
        self._connection.execute(_ENTRIES.insert().values(**asdict(entry)))

    def after_commit(self, action: Callable[[], None]) -> None:
        """Have something done once the entry is durable."""
        self._actions.append(action)

    def committed(self) -> None:
        """Do it."""
        for action in self._actions:
            action()


def _read(connection: sa.Connection) -> list[Entry]:
    rows = connection.execute(sa.select(*(_ENTRIES.c[name] for name in COLUMNS)).order_by(_ENTRIES.c.number))
    return [Entry(*row) for row in rows]


class SqlStorage:
    """A `Storage` of either kind; `open_sql` opens one."""

    def __init__(self, url: str) -> None:
        self.shown = without_password(url)
        self._engine = _engine(url)

    @property
    def _is_sqlite(self) -> bool:
        return self._engine.dialect.name == "sqlite"

    def read(self) -> list[Entry]:
        """Every entry, in order.

        Raises:
            UnavailableError: the database does not answer in time, even where something in between keeps the
                connection alive.
        """
        with translated(self.shown), self._engine.connect() as connection, self._deadline(connection):
            return _read(connection)

    @contextlib.contextmanager
    def _deadline(self, connection: sa.Connection) -> Iterator[None]:
        """Shut the connection down where what is done with it does not end: the driver itself waits for ever."""
        if self._is_sqlite:
            yield
            return
        driver: Any = connection.connection.driver_connection
        with socket.socket(fileno=os.dup(driver.pgconn.socket)) as line:
            silent = threading.Timer(READ_SECONDS, _shut_down, [line])
            silent.daemon = True
            silent.start()
            try:
                yield
            finally:
                silent.cancel()
                silent.join()

    @contextlib.contextmanager
    def locked(self) -> Iterator[SqlTransaction]:
        """Hold the ledger for writing; commit at the end, roll back on an exception."""
        with translated(self.shown), self._turn(), self._engine.connect() as connection:
            if self._is_sqlite:
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            else:
                # Conflicts with itself, not with readers.
                connection.exec_driver_sql("LOCK TABLE lazydp_entries IN SHARE ROW EXCLUSIVE MODE")
            transaction = SqlTransaction(connection)
            try:
                yield transaction
                self._end(connection, "COMMIT")
            except BaseException:
                # The failure that brought us here is the one worth telling.
                with contextlib.suppress(Exception):
                    self._end(connection, "ROLLBACK")
                raise
            transaction.committed()

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Wait for a turn at a SQLite ledger: its own lock leaves the unlucky of a crowd waiting until they give up.

        Raises:
            UnavailableError: none came in time.
        """
        path = sqlite_path(self.shown) if self._is_sqlite else None
        if path is None:
            yield
            return
        descriptor = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT, PRIVATE_FILE)
        try:
            _wait_for(descriptor, self.shown, patience=_TURNS * LOCK_SECONDS)
            yield
        finally:
            os.close(descriptor)

    def _end(self, connection: sa.Connection, verb: str) -> None:
        if self._is_sqlite:
            connection.exec_driver_sql(verb)
        elif verb == "COMMIT":
            connection.commit()
        else:
            connection.rollback()

    def close(self) -> None:
        """Let go of connections."""
        self._engine.dispose()

    def version(self) -> str | None:
        """Revision of the schema; None where there is no ledger."""
        with translated(self.shown), self._engine.connect() as connection:
            if not sa.inspect(connection).has_table("lazydp_schema"):
                return None
            return connection.exec_driver_sql(READ_VERSION).scalar()

    def migrate(self, revision: str = SCHEMAS[-1]) -> None:
        """Bring the schema to `revision`, whole or not at all."""
        from alembic import command  # noqa: PLC0415 - needed once in a ledger's life
        from alembic.config import Config  # noqa: PLC0415

        config = Config()
        config.set_main_option("script_location", str(_MIGRATIONS))
        with translated(self.shown), self._engine.connect() as connection:
            if self._is_sqlite:
                connection.exec_driver_sql("PRAGMA journal_mode=WAL")
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            else:
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_ADVISORY_LOCK)))
            # Whoever held the lock before may have done it all: then Alembic finds nothing to do.
            config.attributes["connection"] = connection
            command.upgrade(config, revision)
            self._end(connection, "COMMIT")


def open_sql(url: str, *, read_only: bool = False) -> SqlStorage:
    """Open the ledger at `url`; make one where there is none, unless `read_only`.

    Raises:
        UnavailableError: the database does not answer, or is locked or full.
        FormatError: its schema is of another version.
        InputError: not the URL of a database that lazydp knows.
    """
    storage = SqlStorage(url)
    if storage.version() is None and not read_only:
        storage.migrate()
    check_schema(storage.version(), shown=storage.shown)
    return storage


def migrate(url: str) -> None:
    """Bring the ledger at `url` to the schema of this lazydp; nothing happens where it is there already.

    Raises:
        UnavailableError: the database does not answer, or is locked or full.
        FormatError: its schema is newer than this lazydp.
    """
    storage = SqlStorage(url)
    if storage.version() in (None, *SCHEMAS):
        storage.migrate()
    check_schema(storage.version(), shown=storage.shown)
    storage.close()


def _shut_down(line: socket.socket) -> None:
    with contextlib.suppress(OSError):
        line.shutdown(socket.SHUT_RDWR)


def _wait_for(descriptor: int, shown: str, *, patience: float) -> None:
    """Take the file's lock, asking again at random moments, so that of those who wait all have the same chance."""
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise UnavailableError(
                    f"ledger {shown}: other processes have held its lock for more than {patience:g} seconds: try again"
                ) from None
            time.sleep(random.uniform(0.002, 0.03))  # noqa: S311 - a moment to sleep, not a secret
        else:
            return


def _engine(url: str) -> sa.Engine:
    path = sqlite_path(url)
    if path is not None:
        # The driver's own transactions are off: it would not take the write lock before reading.
        engine = sa.create_engine(
            sa.URL.create("sqlite", database=str(path)),  # as a text, `?` and `%` in the path would mean something
            poolclass=NullPool,
            isolation_level="AUTOCOMMIT",
            connect_args={"timeout": LOCK_SECONDS, "isolation_level": None},
        )
        sa.event.listen(engine, "connect", _durable)
        return engine
    if not url.startswith("postgresql"):
        raise InputError(f"ledger {without_password(url)!r}: expected sqlite:///FILE or postgresql://USER@HOST/NAME")
    limits = {
        "lock_timeout": f"{LOCK_SECONDS}s",
        "statement_timeout": f"{_STATEMENT_SECONDS}s",
        "idle_in_transaction_session_timeout": f"{_STATEMENT_SECONDS}s",
        "client_encoding": "UTF8",
    }
    settings = {
        "connect_timeout": 10,
        "options": " ".join(f"-c {name}={value}" for name, value in limits.items()),
        # A server or a network that falls silent is noticed, and not waited for until the process ends.
        "keepalives": 1,
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "tcp_user_timeout": 1000 * _STATEMENT_SECONDS,
    }
    _, _, rest = url.partition("://")
    return sa.create_engine(f"postgresql+psycopg://{rest}", poolclass=NullPool, connect_args=settings)


def _durable(connection: object, _record: object) -> None:
    connection.text_factory = readable_text  # type: ignore[attr-defined]
    # Reservations must survive power loss.
    connection.execute("PRAGMA synchronous=FULL")  # type: ignore[attr-defined]
