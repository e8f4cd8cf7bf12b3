"""Files and folders that are whole or absent, whatever happens to the process that writes them."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazydp.components.shared import files
from lazydp.components.shared.errors import InputError
from lazydp.components.shared.files import PRIVATE_FILE, atomic_directory, partial_file, scratch_directory, write_bytes

_WORKS = """
import sys, time
from pathlib import Path
from lazydp.components.shared.files import atomic_directory

with atomic_directory(Path(sys.argv[1]), replaces="mark") as folder:
    (folder / "private").write_text("rows")
    (folder / "mark").write_text("new")
    print("working", flush=True)
    time.sleep(60)
"""


@contextlib.contextmanager
def working(path: Path) -> Iterator[None]:
    """A process that works on `path`; killed at the end of the block."""
    with subprocess.Popen([sys.executable, "-c", _WORKS, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "working\n"
        yield
        process.kill()


def write(path: Path) -> None:
    with atomic_directory(path) as folder:
        (folder / "x").write_text("x")


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path) -> None:
    with working(tmp_path / "a"):
        pass
    left = list(tmp_path.rglob("private"))
    assert len(left) == 1  # the negative control: there is something to remove
    write(tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b"]


def test_what_a_living_process_works_on_stays(tmp_path: Path) -> None:
    with working(tmp_path / "a"):
        write(tmp_path / "b")
        assert len(list(tmp_path.rglob("private"))) == 1


def test_a_file_that_a_killed_process_left_is_removed_by_the_next(tmp_path: Path) -> None:
    with partial_file(tmp_path / "a", b"private", mode=PRIVATE_FILE) as temporary:
        name = temporary.name
    (tmp_path / name).write_bytes(b"private")  # as a kill leaves it: nobody holds its lock
    with partial_file(tmp_path / "b", b"at work", mode=PRIVATE_FILE) as other:
        write_bytes(tmp_path / "c", b"whole")
        assert sorted(tmp_path.iterdir()) == sorted([other, tmp_path / "c"])
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_files_go_on_in_a_folder_that_is_itself_being_written(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "a") as folder:
        write_bytes(folder / "x", b"x")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["x"]


def test_a_file_taken_for_abandoned_before_it_was_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, taken = files._lock, list[str]()

    def slow(descriptor: int, *, wait: bool) -> bool:
        if wait and not taken:
            taken.extend(path.name for path in tmp_path.iterdir())
            files._remove_abandoned_files(tmp_path)
        return lock(descriptor, wait=wait)

    monkeypatch.setattr(files, "_lock", slow)
    write_bytes(tmp_path / "a", b"whole")
    assert len(taken) == 1
    assert (tmp_path / "a").read_bytes() == b"whole"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_had_stepped_aside_comes_back(tmp_path: Path) -> None:
    aside = tmp_path / ".lazydp-partial.data.set.abcd1234"
    (aside / "replaced").mkdir(parents=True)
    (aside / "replaced" / "mark").write_text("old")
    write(tmp_path / "b")
    assert (tmp_path / "data.set" / "mark").read_text() == "old"
    assert not aside.exists()


def test_a_failed_replacement_keeps_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mark").write_text("old")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if Path(target) == tmp_path / "a" and self.name != "replaced":
            raise OSError("disk")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="disk"), atomic_directory(tmp_path / "a", replaces="mark") as folder:
        (folder / "mark").write_text("new")
    assert (tmp_path / "a" / "mark").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("text", ["s3://bk/out", "gs://bk", "file:///tmp/x", "abfs://c@a/x"])
def test_a_uri_is_no_folder(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="is a URI"):
        write(Path(text))
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_in_the_scratch_folder_goes_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with scratch_directory("a") as first:
        left = first.parent / ".lazydp-partial.b.abcd1234"
        left.mkdir()
        (left / "rows").write_text("private")
        with scratch_directory("b") as second:
            assert not left.exists()
            # The other is locked: somebody works in it.
            assert first.exists()
            assert second.stat().st_mode & 0o077 == 0
    assert list(first.parent.iterdir()) == []


def test_a_scratch_folder_that_others_can_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with scratch_directory("a") as folder:
        folder.parent.chmod(0o755)
    with pytest.raises(InputError, match="no private folder of yours"), scratch_directory("a"):
        pass


_COMMAND = """
import signal, sys, types
import click
from lazydp.pipelines import cli

# A process that was started in the background of a shell ignores the signal, and so do its children.
signal.signal(signal.SIGINT, signal.default_int_handler)
module = types.ModuleType("writes")
module.command = click.command()(lambda: exec(compile(sys.stdin.read(), "writes", "exec"), {}))
sys.modules["writes"] = module
cli._COMMANDS["write"] = ("writes:command", "")
cli.main(["write"])
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_command_that_is_told_to_stop_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", _COMMAND], text=True, **pipes) as process:  # type: ignore[call-overload]
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(_WORKS.replace("sys.argv[1]", repr(str(tmp_path / "a"))))
        process.stdin.close()
        assert process.stdout.readline() == "working\n"
        process.send_signal(number)
        assert process.stderr.read().strip() == "lazydp: interrupted; nothing was left half-written"
        assert process.wait(timeout=30) == 128 + number
    assert list(tmp_path.iterdir()) == []
