"""A chain of made-up entries, without a database: each kind of damage is named, and each remembered head compared."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lazydp.components.budget.ledger.chain import chain_problems, check_chain, head_problems
from lazydp.components.budget.ledger.memory import HeadMemory, was_remembered
from lazydp.components.budget.ledger.secret import LedgerSecret
from lazydp.components.budget.storage.entries import (
    FORMAT_VERSION,
    GENESIS,
    Entry,
    digest_of,
    head_of,
    next_entry,
    true_digest,
)
from lazydp.components.shared.errors import IntegrityError


def chain(length: int) -> list[Entry]:
    entries: list[Entry] = []
    for number in range(length):
        entries.append(
            next_entry(
                entries[-1] if entries else None,
                kind="dataset",
                dataset=f"{number}",
                run_id="",
                recorded_at="2026-01-01T00:00:00.000000+00:00",
                recorded_by="tester",
                content={"name": f"n{number}"},
            )
        )
    return entries


def changed(entry: Entry, **columns: Any) -> Entry:
    return dataclasses.replace(entry, **columns)


def signed(entry: Entry, **columns: Any) -> Entry:
    """Changed, with the digest that belongs to the change."""
    other = changed(entry, **columns)
    return changed(other, digest=true_digest(other))


def named(entries: list[Entry]) -> list[int | None]:
    return [problem.entry for problem in chain_problems(entries)]


DAMAGE: dict[str, tuple[Callable[[list[Entry]], list[Entry]], list[int | None]]] = {
    "none": (lambda e: e, []),
    "first removed": (lambda e: e[1:], [1]),
    "three removed": (lambda e: [*e[:2], *e[5:]], [3, 4, 5]),
    "a column of another type": (lambda e: [*e[:2], changed(e[2], body=b"x"), *e[3:]], [3]),
    "a number of another type": (lambda e: [*e[:2], changed(e[2], number="3"), *e[3:]], [None]),
    "two of another type": (lambda e: [changed(e[0], body=None), changed(e[1], kind=7), *e[2:]], [1, 2]),
    "a number twice": (lambda e: [*e[:3], e[2], *e[3:]], [None]),
    "content changed": (lambda e: [*e[:3], changed(e[3], recorded_by="x"), *e[4:]], [4]),
    "content and digest changed": (lambda e: [*e[:3], signed(e[3], recorded_by="x"), *e[4:]], [5]),
    "rewritten from one on": (lambda e: [*e[:3], signed(e[3], previous=GENESIS), *e[4:]], [4, 5]),
    "an unknown kind": (lambda e: [*e[:6], signed(e[6], kind="gift")], [7]),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(name: str) -> None:
    damage, expected = DAMAGE[name]
    entries = damage(chain(7))
    assert named(entries) == expected
    if expected:
        with pytest.raises(IntegrityError):
            check_chain(entries, ledger="here")
    else:
        check_chain(entries, ledger="here")


@pytest.mark.parametrize(("gap", "told"), [(20, 20), (21, 21)])
def test_of_many_missing_entries_twenty_are_named(gap: int, told: int) -> None:
    entries = chain(gap + 2)
    found = list(chain_problems([entries[0], entries[-1]]))
    assert [problem.entry for problem in found[:20]] == list(range(2, 22))
    assert len(found) == told
    assert [problem.what for problem in found[20:]] == ["entries 2 to 22 are missing"][: told - 20]


def test_a_head_that_was_kept_is_compared() -> None:
    entries = chain(4)
    assert list(head_problems(entries, None)) == list(head_problems(entries, head_of(None))) == []
    for entry in entries:
        assert list(head_problems(entries, head_of(entry))) == []
    assert [problem.entry for problem in head_problems(entries, f"2:{'f' * 64}")] == [2]
    assert [problem.entry for problem in head_problems(entries[:3], head_of(entries[3]))] == [4]


def test_what_a_digest_covers_is_fixed() -> None:
    """Or every digest that was ever written would be a wrong one."""
    columns = {"kind": "k", "dataset": "d", "run_id": "r", "recorded_at": "t", "recorded_by": "b", "body": "{}"}
    found = digest_of(number=1, previous="p", **columns)
    assert found == "37b4e5140af1c375a2bf4b94b69593608438ca7d07f812b3be70ac6c027d5415"
    assert chain(1)[0].previous == "0" * 64
    assert chain(1)[0].content()["format_version"] == 3


@pytest.mark.parametrize(("depth", "ok"), [(64, True), (65, False)])
def test_a_body_is_nested_so_deeply_and_no_more(depth: int, ok: bool) -> None:
    inner = depth - 1
    entry = changed(chain(1)[0], body='{"a":' + "[" * inner + "]" * inner + ', "b": [], "c": {}}')
    if ok:
        assert set(entry.content()) == {"a", "b", "c"}
    else:
        with pytest.raises(IntegrityError, match="more deeply"):
            entry.content()


# --- what is remembered of the end -------------------------------------------------------------------------------

SECRET = LedgerSecret(b"0" * 32)


@pytest.fixture(params=[True, False], ids=["of a file", "of a server"])
def memory(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HeadMemory:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    url = f"sqlite:///{tmp_path / 'l.db'}" if request.param else "postgresql://u@h/n"
    memory = HeadMemory.of(url, SECRET)
    assert memory.exact == request.param
    return memory


def refused(memory: HeadMemory, entries: list[Entry]) -> bool:
    try:
        memory.check(entries)
    except IntegrityError:
        return True
    return False


def test_the_end_that_was_remembered_is_demanded(memory: HeadMemory) -> None:
    entries = chain(5)
    assert not memory.exists()
    memory.confirm(entries[2])
    assert memory.exists()
    assert not refused(memory, entries[:3])
    assert refused(memory, entries[:2])
    assert refused(memory, [])
    # Others write to a server, too; to a file they do not.
    assert refused(memory, entries) == memory.exact
    rewritten = [*entries[:2], signed(entries[2], recorded_by="x")]
    assert refused(memory, rewritten)


def test_the_entry_that_is_about_to_follow_may_be_there_or_not(memory: HeadMemory) -> None:
    entries = chain(3)
    memory.intend(entries[0], entries[1])
    assert not refused(memory, entries[:1])
    assert not refused(memory, entries[:2])
    assert refused(memory, [])
    memory.intend(None, entries[0])
    assert not refused(memory, [])
    assert not refused(memory, entries[:1])


def test_a_memory_under_another_secret_is_refused(memory: HeadMemory) -> None:
    entries = chain(2)
    memory.confirm(entries[1])
    other = dataclasses.replace(memory, secret=LedgerSecret(b"1" * 32))
    with pytest.raises(IntegrityError, match="not written under the secret"):
        other.check(entries)


def test_a_memory_that_is_gone_is_missed_beside_a_file_only(memory: HeadMemory) -> None:
    assert refused(memory, chain(1)) == memory.exact
    assert not refused(memory, [])


def test_an_older_lazydp_remembered_nothing() -> None:
    entry = chain(1)[0]
    assert FORMAT_VERSION >= 3
    assert was_remembered([entry])
    assert not was_remembered([])
    for version in ("2", '"3"'):
        assert not was_remembered([changed(entry, body=f'{{"format_version":{version}}}')])


def test_each_ledger_of_a_server_has_a_memory_of_its_own_in_the_state_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def file(url: str, secret: LedgerSecret = SECRET) -> Path:
        return HeadMemory.of(url, secret).file

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    found = {
        file("postgresql://u@h/a"),
        file("postgresql://u@h/b"),
        file("postgresql://u@h/a", LedgerSecret(b"1" * 32)),
    }
    assert len(found) == 3
    assert {path.parent for path in found} == {tmp_path / "lazydp"}
    assert all(len(path.stem) == 32 for path in found)
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert file("postgresql://u@h/a").parent == tmp_path / "home" / ".local" / "state" / "lazydp"
    HeadMemory.of("postgresql://u@h/a", SECRET).confirm(None)
    assert file("postgresql://u@h/a").parent.stat().st_mode & 0o777 == 0o700
    assert file("postgresql://u@h/a").stat().st_mode & 0o777 == 0o600


def test_secrets_are_32_bytes_and_named_by_16_digits(tmp_path: Path) -> None:
    ledger, seen = tmp_path / "l.db", list[LedgerSecret]()
    made = LedgerSecret.make(ledger, before=seen.append)
    text = (tmp_path / "l.db.secret").read_text().strip()
    assert len(bytes.fromhex(text)) == 32
    assert len(made.name) == 16
    assert [secret.name for secret in seen] == [made.name] == [LedgerSecret(bytes.fromhex(text)).name]
    # Of several processes one is the first: the second takes its secret.
    assert LedgerSecret.make(ledger, before=seen.append).name == made.name
    assert seen[1].name != made.name
