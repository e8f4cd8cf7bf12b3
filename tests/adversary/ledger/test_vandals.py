"""What somebody with the database, and without the ledger's secret, can do to it: nothing is decided on it after.

A case is one row of VANDALS: a name, what is done to the files, and what the refusal says.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lazydp.components.budget.accounting.events import dpsgd_event
from lazydp.components.budget.ledger.ledger import Ledger
from lazydp.components.budget.ledger.verify import verify
from lazydp.components.budget.storage.entries import COLUMNS, Entry, canonical_json, next_entry, true_digest
from lazydp.components.shared.errors import IntegrityError, LazyDPError

IDENTIFIER = "a" * 64
EVENT = dpsgd_event(noise_multiplier=10.0, sampling_prob=1.0, steps=1)
DEEP = '{"a":' * 50_000 + "1" + "}" * 50_000


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAZYDP_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A ledger of four entries: dataset, budget, two reservations."""
    path = tmp_path / "ledger" / "ledger.db"
    path.parent.mkdir()
    with Ledger.open(f"sqlite:///{path}") as ledger:
        ledger.register_dataset(IDENTIFIER, name="shop")
        ledger.set_budget("shop", epsilon=0.6, delta=1e-5, by="officer")
        ledger.reserve(dataset="shop", event=EVENT, run_id="one")
        shutil.copy(path, tmp_path / "older.db")
        ledger.reserve(dataset="shop", event=EVENT, run_id="two")
    return path


@contextlib.contextmanager
def database(file: Path) -> Iterator[sqlite3.Connection]:
    """The table without its triggers."""
    with contextlib.closing(sqlite3.connect(file)) as connection:
        for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            connection.execute(f"DROP TRIGGER {name}")
        yield connection
        connection.commit()


def sql(*statements: str) -> Callable[[Path], None]:
    def vandal(file: Path) -> None:
        with database(file) as connection:
            for statement in statements:
                connection.execute(statement)

    return vandal


def entries_of(file: Path) -> list[Entry]:
    with Ledger.open(f"sqlite:///{file}", read_only=True) as ledger:
        return list(ledger.entries())


def put(file: Path, entry: Entry, verb: str = "INSERT OR REPLACE") -> None:
    with database(file) as connection:
        marks = ", ".join("?" * len(COLUMNS))
        connection.execute(
            f"{verb} INTO lazydp_entries ({', '.join(COLUMNS)}) VALUES ({marks})", dataclasses.astuple(entry)
        )


def changed(entry: Entry, **content: object) -> Entry:
    """The entry with another content, and the digest that fits."""
    body = canonical_json({**entry.content(), **content})
    fresh = dataclasses.replace(entry, body=body, digest="")
    return dataclasses.replace(fresh, digest=true_digest(fresh))


def rewrite_all(file: Path) -> None:
    """Raise the budget, and chain every later entry to it anew."""
    previous = None
    for entry in entries_of(file):
        fresh = changed(entry, epsilon=100.0) if entry.kind == "budget" else entry
        if previous is not None:
            fresh = dataclasses.replace(fresh, previous=previous.digest)
            fresh = dataclasses.replace(fresh, digest=true_digest(fresh))
        put(file, fresh)
        previous = fresh


def append_a_raise(file: Path) -> None:
    """A well-formed entry that nobody decided on."""
    *_, budget, _, last = entries_of(file)
    content = {**entries_of(file)[1].content(), "epsilon": 100.0, "accounts": last.content()["accounts"]}
    content.pop("format_version")
    put(
        file,
        next_entry(
            last,
            kind="budget",
            dataset=IDENTIFIER,
            run_id="",
            recorded_at=last.recorded_at,
            recorded_by="nobody",
            content=content,
        ),
        verb="INSERT",
    )
    assert budget


def void_the_last(file: Path) -> None:
    """The last entry replaced by one that gives back what it reserved, chained as it should be."""
    last = entries_of(file)[-1]
    voided = changed(dataclasses.replace(last, kind="voided", run_id="one"), reason="crashed")
    put(file, voided)


def body(text: object, *, digest: bool) -> Callable[[Path], None]:
    """Another body in the third entry, with its digest made to fit or not."""

    def vandal(file: Path) -> None:
        entry = dataclasses.replace(entries_of(file)[2], body=text)  # type: ignore[arg-type]
        if digest:
            entry = dataclasses.replace(entry, digest=true_digest(entry))
        put(file, entry)

    return vandal


def files(action: Callable[[Path, Path], object]) -> Callable[[Path], None]:
    """Something done to the files; the second path is that of an older copy."""

    def vandal(file: Path) -> None:
        for log in file.parent.glob("ledger.db-*"):
            log.unlink()
        action(file, file.parent.parent / "older.db")

    return vandal


def without(*names: str) -> Callable[[Path, Path], None]:
    return lambda file, _: [file.with_name(name).unlink() for name in names]  # type: ignore[func-returns-value, return-value]


def without_log(file: Path) -> None:
    """Entries that were in the write-ahead log alone are lost with it."""
    reader = sqlite3.connect(file)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM lazydp_entries").fetchone()
    with Ledger.open(f"sqlite:///{file}") as ledger:
        ledger.void("two", by="officer", reason="test")
        assert Path(f"{file}-wal").stat().st_size > 0
        alone = file.read_bytes()
    reader.close()
    for log in file.parent.glob("ledger.db-*"):
        log.unlink()
    file.write_bytes(alone)


VANDALS: dict[str, tuple[Callable[[Path], None], str]] = {
    "edited": (
        sql("UPDATE lazydp_entries SET body = replace(body, '0.6', '100.0') WHERE number = 2"),
        "does not match",
    ),
    "edited, its digest too": (lambda file: put(file, changed(entries_of(file)[1], epsilon=100.0)), "does not follow"),
    "rewritten, all digests too": (rewrite_all, "rewritten"),
    "deleted": (sql("DELETE FROM lazydp_entries WHERE number = 3"), "missing"),
    "cut": (sql("DELETE FROM lazydp_entries WHERE number = 4"), "cut off"),
    "emptied": (sql("DELETE FROM lazydp_entries"), "is empty"),
    "dropped": (sql("DROP TABLE lazydp_entries"), "no such table"),
    "last replaced": (void_the_last, "cut off or rewritten"),
    "replaced": (lambda file: put(file, dataclasses.replace(entries_of(file)[0], number=3)), "is missing"),
    "exchanged": (
        sql(
            "UPDATE lazydp_entries SET number = 9 WHERE number = 3",
            "UPDATE lazydp_entries SET number = 3 WHERE number = 4",
            "UPDATE lazydp_entries SET number = 4 WHERE number = 9",
        ),
        "does not match",
    ),
    "appended": (append_a_raise, "goes on after"),
    "older copy": (files(lambda file, older: shutil.copy(older, file)), "cut off"),
    "without its write-ahead log": (without_log, "cut off"),
    "file deleted": (files(without("ledger.db")), "is empty"),
    "file and memory deleted": (files(without("ledger.db", "ledger.db.head")), "secret .* is there"),
    "file empty": (files(lambda file, _: file.write_bytes(b"")), "is empty"),
    "file of something else": (files(lambda file, _: file.write_bytes(b"no database" * 1000)), "not a SQLite database"),
    "memory deleted": (files(without("ledger.db.head")), "is missing"),
    "memory edited": (
        files(lambda file, _: _edit_head(file, lambda head: {**head, "head": "3:" + "0" * 64})),
        "not written under the secret",
    ),
    "memory torn": (files(lambda file, _: file.with_name("ledger.db.head").write_text('{"he')), "damaged"),
    "secret deleted": (files(without("ledger.db.secret")), "secret of ledger .* is missing"),
    "secret exchanged": (
        files(lambda file, _: file.with_name("ledger.db.secret").write_text("0" * 64)),
        "not written under the secret|another secret",
    ),
    "body deep": (body(DEEP, digest=False), "does not match"),
    "body deep, with a digest": (body(DEEP, digest=True), "does not follow"),
    "body a blob": (body(b"\xff\xfe{}", digest=False), "not what a column"),
    "body not UTF-8": (
        sql("UPDATE lazydp_entries SET body = CAST(x'ff7b7d' AS TEXT) WHERE number = 3"),
        "does not match",
    ),
    "body a text": (body("kilroy", digest=True), "does not follow"),
    "body a list": (body("[1]", digest=True), "does not follow"),
    "date of another kind": (
        sql("UPDATE lazydp_entries SET recorded_at = x'00' WHERE number = 3"),
        "not what a column",
    ),
}


def _edit_head(file: Path, edit: Callable[[dict[str, object]], dict[str, object]]) -> None:
    path = file.with_name("ledger.db.head")
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))


@pytest.mark.parametrize("name", VANDALS)
def test_nothing_is_decided_on_a_damaged_ledger(name: str, file: Path) -> None:
    vandal, says = VANDALS[name]
    vandal(file)
    with pytest.raises(LazyDPError, match=says) as refused, Ledger.open(f"sqlite:///{file}") as ledger:
        ledger.reserve(dataset=IDENTIFIER, event=EVENT, run_id="three")
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize("name", VANDALS)
def test_verify_and_the_reading_of_a_damaged_ledger_never_break(name: str, file: Path) -> None:
    """Whatever is in it, a problem is named or one of our errors raised."""
    vandal, _ = VANDALS[name]
    vandal(file)
    try:
        found = entries_of(file)
    except LazyDPError:
        return
    verify(found)
    with contextlib.suppress(LazyDPError), Ledger.open(f"sqlite:///{file}", read_only=True) as ledger:
        ledger.budgets()


def test_the_control(file: Path) -> None:
    """Untouched, restored whole, or killed between the database and the memory, it goes on."""
    url = f"sqlite:///{file}"
    with Ledger.open(url) as ledger:
        ledger.void("two", by="officer", reason="test")
    head = file.with_name("ledger.db.head")
    for killed in ("before", "after"):
        document = json.loads(head.read_text())
        with Ledger.open(url) as ledger:
            ledger.reserve(dataset="shop", event=EVENT, run_id=killed)
            last = ledger.head()
        after = json.loads(head.read_text())
        assert (after["head"], after["next"]) == (last, None)
        assert document["head"] != last
        with Ledger.open(url) as ledger:
            ledger.void(killed, by="officer", reason="test")


def test_killed_between_the_commit_and_the_memory(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lazydp.components.budget.ledger.memory import HeadMemory

    class Killed(BaseException):
        pass

    def killed(*_: object) -> None:
        raise Killed

    url = f"sqlite:///{file}"
    with monkeypatch.context() as patch, Ledger.open(url) as ledger:
        patch.setattr(HeadMemory, "confirm", killed)
        with pytest.raises(Killed):
            ledger.void("two", by="officer", reason="test")
    with Ledger.open(url) as ledger:
        assert ledger.state().runs["two"].status == "voided"  # the database had it
        ledger.reserve(dataset="shop", event=EVENT, run_id="three")


def test_what_was_verified_can_be_accepted(file: Path) -> None:
    url = f"sqlite:///{file}"
    file.with_name("ledger.db.head").unlink()
    with Ledger.open(url) as ledger:
        with pytest.raises(IntegrityError, match="verify --remember"):
            ledger.void("two", by="officer", reason="test")
        ledger.remember()
        ledger.void("two", by="officer", reason="test")
