"""The code's version tells two sources apart, and nothing that has no part in a run."""

import os
from pathlib import Path

import pytest

from lazydp.components.shared import version
from lazydp.components.shared.version import code_version, remembered_digest, source_digest

SOURCE = '''"""A module."""

RATE = 0.5
"""Of everything."""


class Step:
    """One step."""

    def take(self, at: float = 1.0) -> float:
        """Take it."""
        return at * RATE  # slowly
'''


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("components/train/engine/step.py", "kernels/ops.py", "service/app.py", "components/train/README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(SOURCE)
    return tmp_path


@pytest.mark.parametrize("name", ["components/train/engine/step.py", "kernels/ops.py", "kernels/another.py"])
def test_another_source_is_another_version(root: Path, name: str) -> None:
    before = source_digest(root)
    assert source_digest(root) == before
    (root / name).write_text("other")
    assert source_digest(root) != before


REWORDED = {
    "module": ('"""A module."""', '"""Something else altogether."""'),
    "attribute": ('"""Of everything."""\n', ""),
    "class": ('    """One step."""\n', '    """A step,\n    and one only."""\n'),
    "function": ('        """Take it."""\n', ""),
    "comment": ("  # slowly", "  # fast"),
    "layout": ("at * RATE", "(\n            at * RATE\n        )"),
}


@pytest.mark.parametrize("change", REWORDED.values(), ids=list(REWORDED))
def test_words_have_no_part_in_the_version(root: Path, change: tuple[str, str]) -> None:
    before = source_digest(root)
    written = SOURCE.replace(*change)
    assert written != SOURCE
    (root / "kernels" / "ops.py").write_text(written)
    assert source_digest(root) == before


CHANGED = {
    "constant": ("0.5", "0.25"),
    "default": ("at: float = 1.0", "at: float = 2.0"),
    "operator": ("at * RATE", "at / RATE"),
    "annotation": ("-> float", "-> int"),
    "a string that is used": ("return at * RATE", "return 'Take it.'"),
}


@pytest.mark.parametrize("change", CHANGED.values(), ids=list(CHANGED))
def test_what_the_code_does_is_in_the_version(root: Path, change: tuple[str, str]) -> None:
    before = source_digest(root)
    written = SOURCE.replace(*change)
    assert written != SOURCE
    (root / "kernels" / "ops.py").write_text(written)
    assert source_digest(root) != before


def test_a_source_that_moves_is_another_version(root: Path) -> None:
    before = source_digest(root)
    (root / "kernels" / "ops.py").rename(root / "components" / "ops.py")
    assert source_digest(root) != before


@pytest.mark.parametrize("name", ["service/app.py", "components/train/README.md", "components/train/engine.pyc"])
def test_what_has_no_part_in_a_run_has_none_in_its_version(root: Path, name: str) -> None:
    before = source_digest(root)
    (root / name).write_text("other")
    assert source_digest(root) == before


def test_sources_that_nobody_wrote_are_not_read_again(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    assert remembered_digest(root, cache) == source_digest(root)
    syntax = version._syntax
    read: list[str] = []
    monkeypatch.setattr(version, "_syntax", lambda source: read.append(source) or syntax(source))  # type: ignore[func-returns-value]
    remembered = remembered_digest(root, cache)
    assert read == []
    assert remembered == source_digest(root)
    # A change that restores name, size and times of the file is seen all the same.
    file = root / "kernels" / "ops.py"
    before = file.stat()
    file.write_text(SOURCE.replace("0.5", "0.6"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    assert remembered_digest(root, cache) == source_digest(root) != remembered


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"written": 1, "digest": "x"}'])
def test_what_is_kept_wrongly_is_computed_anew(root: Path, tmp_path: Path, text: str) -> None:
    cache = tmp_path / "cache"
    remembered_digest(root, cache)
    (kept,) = cache.iterdir()
    whole = kept.read_text()
    kept.write_text(text)
    assert remembered_digest(root, cache) == source_digest(root)
    assert kept.read_text() == whole


def test_a_folder_that_cannot_be_written_costs_time_alone(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (None, tmp_path / "file" / "cache"):
        assert remembered_digest(root, folder) == source_digest(root)


def test_this_codes_version_is_of_these_sources() -> None:
    release, _, digest = code_version().partition("+")
    assert release[0].isdigit()
    assert digest == source_digest(Path(__file__).parents[3])
    assert digest != source_digest(Path(__file__).parent)  # of no source at all
