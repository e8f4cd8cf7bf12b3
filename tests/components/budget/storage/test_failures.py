"""A database that is down, full, locked, foreign or of another schema: one clear error, and nothing recorded."""

import fcntl
import sqlite3
import time
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa

from lazydp.components.budget.accounting.events import dpsgd_event
from lazydp.components.budget.ledger.ledger import Ledger
from lazydp.components.budget.storage import sql as sql_storage
from lazydp.components.budget.storage.base import SCHEMAS, sqlite_path, without_password
from lazydp.components.budget.storage.sql import SqlStorage, migrate
from lazydp.components.shared.errors import FormatError, InputError, UnavailableError

EVENT = dpsgd_event(noise_multiplier=10.0, sampling_prob=1.0, steps=1)


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_a_server_that_is_down() -> None:
    with pytest.raises(UnavailableError, match="ledger postgresql://u:") as error:
        Ledger.open("postgresql://u:secret@127.0.0.1:9/ledger")
    assert "secret" not in one_line(error)
    assert "refused" in one_line(error).lower()


def test_a_server_that_goes_down(postgres_url: str) -> None:
    with Ledger.open(postgres_url) as ledger:
        ledger.register_dataset("a" * 64, name="shop")
        name = postgres_url.rpartition("/")[2]
        with psycopg.connect(postgres_url.replace(name, "postgres"), autocommit=True) as connection:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
        with pytest.raises(UnavailableError, match="database") as error:
            ledger.budgets()
        one_line(error)


def test_a_missing_file_or_folder(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="no ledger at"):
        Ledger.open(f"sqlite:///{tmp_path / 'none.db'}", read_only=True).entries()
    with pytest.raises(UnavailableError, match="cannot be opened") as error:
        Ledger.open(f"sqlite:///{tmp_path / 'none' / 'ledger.db'}")
    one_line(error)


@pytest.mark.parametrize("url", ["ledger.db", "sqlite://", "sqlite:///:memory:", "mysql://u@h/n"])
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(InputError, match="ledger") as error:
        Ledger.open(url)
    one_line(error)


def reserve_until_full(ledger: Ledger) -> None:
    for number in range(50):
        ledger.reserve(dataset="shop", event=EVENT, run_id=f"run-{number}", config_digest="c" * 4000)


def test_a_full_sqlite_database(sqlite_url: str) -> None:
    ledger = Ledger.open(sqlite_url)
    ledger.register_dataset("a" * 64, name="shop")
    ledger.set_budget("shop", epsilon=30.0, delta=1e-5)
    entries = ledger.entries()

    def no_room(connection: sqlite3.Connection, _record: object) -> None:
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count={pages}")

    storage = ledger._storage
    assert isinstance(storage, SqlStorage)
    sa.event.listen(storage._engine, "connect", no_room)
    with pytest.raises(UnavailableError, match="full: make room") as error:
        reserve_until_full(ledger)
    one_line(error)
    sa.event.remove(storage._engine, "connect", no_room)
    # What was told to be reserved is; what was refused left nothing; and there is room again.
    after = ledger.entries()
    assert after[: len(entries)] == entries
    ledger.reserve(dataset="shop", event=EVENT, run_id="later")


def test_a_full_postgres_server(postgres_url: str) -> None:
    """A server answers an INSERT on a full disk with SQLSTATE 53100; here a trigger does."""
    with Ledger.open(postgres_url) as ledger:
        with psycopg.connect(postgres_url, autocommit=True) as connection:
            connection.execute(
                "CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS "
                "$$ BEGIN RAISE EXCEPTION 'could not extend file' USING ERRCODE = '53100'; END $$"
            )
            connection.execute("CREATE TRIGGER full_disk BEFORE INSERT ON lazydp_entries EXECUTE FUNCTION full_disk()")
        with pytest.raises(UnavailableError, match="disk is full") as error:
            ledger.register_dataset("a" * 64, name="shop")
        one_line(error)
        assert ledger.entries() == ()


def test_a_locked_database(ledger: Ledger, ledger_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sql_storage, "LOCK_SECONDS", 1)
    with Ledger.open(ledger_url) as impatient, Ledger.open(ledger_url) as holder:
        impatient.reserve(dataset="shop", event=EVENT, run_id="before")
        with holder._storage.locked():
            started = time.monotonic()
            with pytest.raises(UnavailableError, match="held its lock") as error:
                impatient.reserve(dataset="shop", event=EVENT, run_id="meanwhile")
            assert time.monotonic() - started < 20
            one_line(error)
            # Reading goes on meanwhile.
            assert impatient.show("shop").reserved_runs == 1
        impatient.reserve(dataset="shop", event=EVENT, run_id="after")
        assert [run.run_id for run in impatient.runs()] == ["before", "after"]


def test_an_older_schema_is_named_and_migrated(ledger_url: str) -> None:
    storage = SqlStorage(ledger_url)
    storage.migrate(SCHEMAS[0])
    storage.close()
    for read_only in (True, False):
        with pytest.raises(
            FormatError, match="schema 0001, this lazydp needs 0002: run `lazydp budget migrate`"
        ) as error:
            Ledger.open(ledger_url, read_only=read_only).entries()
        one_line(error)
    migrate(ledger_url)
    migrate(ledger_url)
    with Ledger.open(ledger_url) as ledger:
        ledger.register_dataset("a" * 64, name="shop")


def test_a_newer_schema_is_named(ledger: Ledger, ledger_url: str) -> None:
    engine = sa.create_engine(ledger_url.replace("postgresql://", "postgresql+psycopg://"))
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE lazydp_schema SET version_num = '0099'")
    engine.dispose()
    for read_only in (True, False):
        with pytest.raises(FormatError, match="schema 0099, this lazydp reads up to 0002: use a newer lazydp") as error:
            Ledger.open(ledger_url, read_only=read_only).entries()
        one_line(error)
    with pytest.raises(FormatError, match="newer"):
        migrate(ledger_url)


def test_a_foreign_database(ledger_url: str, tmp_path: Path) -> None:
    engine = sa.create_engine(ledger_url.replace("postgresql://", "postgresql+psycopg://"))
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE lazydp_other (x INTEGER)")
    engine.dispose()
    with pytest.raises(FormatError, match="holds no ledger"):
        Ledger.open(ledger_url, read_only=True).entries()
    garbage = tmp_path / "garbage.db"
    garbage.write_bytes(b"not a database, " * 100)
    for read_only in (True, False):
        with pytest.raises(FormatError, match="damaged or is not a SQLite database") as error:
            Ledger.open(f"sqlite:///{garbage}", read_only=read_only).entries()
        one_line(error)


def test_a_read_only_sqlite_ledger_refuses_to_write(sqlite_url: str) -> None:
    with Ledger.open(sqlite_url) as ledger:
        ledger.register_dataset("a" * 64, name="shop")
    with Ledger.open(sqlite_url, read_only=True) as ledger, pytest.raises(UnavailableError, match="reading only"):
        ledger.register_dataset("b" * 64, name="else")


def test_a_reader_needs_only_to_read(postgres_url: str) -> None:
    # A standby refuses what changes anything, as this role's transactions do.
    with Ledger.open(postgres_url) as ledger:
        ledger.register_dataset("f" * 64, name="films")
        ledger.set_budget("films", epsilon=3.0, delta=1e-5)
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        if connection.execute("SELECT 1 FROM pg_roles WHERE rolname = 'reader'").fetchone() is None:
            connection.execute("CREATE ROLE reader LOGIN")
        connection.execute("ALTER ROLE reader SET default_transaction_read_only = on")
        connection.execute("GRANT USAGE ON SCHEMA public TO reader")
        connection.execute("GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader")
    readers_url = postgres_url.replace("lazydp@", "reader@")
    with Ledger.open(readers_url, read_only=True) as ledger:
        assert [budget.epsilon for budget in ledger.budgets()] == [3.0]
        assert [entry.kind for entry in ledger.entries()] == ["dataset", "budget"]
    with Ledger.open(readers_url) as ledger, pytest.raises(UnavailableError):
        ledger.set_budget("films", epsilon=2.0, delta=1e-5)


def test_passwords_are_not_shown() -> None:
    assert without_password("postgresql://u:p@ss@h/n") == "postgresql://u:***@h/n"
    assert without_password("postgresql://u@h:5432/n") == "postgresql://u@h:5432/n"
    assert without_password("sqlite:////a/b.db") == "sqlite:////a/b.db"


@pytest.mark.parametrize("name", ["a?b.db", "50%.db", "50%25.db", "c#d.db", "e f;g=h&i.db", "?mode=ro"])
def test_one_text_names_one_file(tmp_path: Path, name: str) -> None:
    """For the writer, the reader, the secret and the memory of the ledger's end."""
    url = f"sqlite:///{tmp_path / name}"
    with Ledger.open(url) as ledger:
        ledger.register_dataset("a" * 64, name="shop")
    with Ledger.open(url, read_only=True) as ledger:
        assert len(ledger.entries()) == 1
    found = {path.name for path in tmp_path.iterdir() if not path.name.endswith(("-wal", "-shm"))}
    assert found == {name, f"{name}.secret", f"{name}.head", f"{name}.lock"}


def test_a_turn_at_a_file_that_never_comes(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Ledger.open(sqlite_url).close()
    waited: list[float] = []
    monkeypatch.setattr(sql_storage, "_TURNS", 1e-3)
    monkeypatch.setattr(time, "sleep", waited.append)
    with Ledger.open(sqlite_url) as ledger:
        ledger.register_dataset("a" * 64, name="shop")
        assert waited == []
        with Path(f"{sqlite_path(sqlite_url)}.lock").open("rb") as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            with pytest.raises(UnavailableError, match=r"for more than 0\.03 seconds") as error:
                ledger.set_budget("shop", epsilon=1.0, delta=1e-5)
            one_line(error)
        assert 0 < min(waited) < max(waited) < 0.1
        ledger.set_budget("shop", epsilon=1.0, delta=1e-5)


def test_what_a_killed_decision_left_is_gone_with_the_next(tmp_path: Path) -> None:
    """Parts of the memory of the ledger's end, and of its secret."""
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    with Ledger.open(url) as ledger:
        ledger.register_dataset("a" * 64, name="shop")
    left = [tmp_path / f".lazydp-partial.ledger.db.{name}.abcd1234" for name in ("head", "secret")]
    for file in left:
        file.write_text("{")
    with Ledger.open(url) as ledger:
        ledger.set_budget("shop", epsilon=1.0, delta=1e-5)
    assert not any(file.exists() for file in left)


def test_a_silent_server_is_not_waited_for(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The statement waits, the connection lives: without a deadline of its own the reading would not end."""
    Ledger.open(postgres_url).close()
    monkeypatch.setattr(sql_storage, "READ_SECONDS", 0.5)
    with psycopg.connect(postgres_url) as holder:
        with Ledger.open(postgres_url, read_only=True) as ledger:
            holder.execute("LOCK TABLE lazydp_entries IN ACCESS EXCLUSIVE MODE")
            with pytest.raises(UnavailableError) as error:
                ledger.entries()
            assert "has held its lock" not in one_line(error)
        holder.rollback()
    with Ledger.open(postgres_url, read_only=True) as ledger:
        assert ledger.entries() == ()
