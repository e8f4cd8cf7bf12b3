"""A build that is killed leaves the library that was there, whole."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import setuptools
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parents[2]
WHOLE, HALF = b"a whole library", b"half a libr"


@pytest.fixture(name="command")
def _command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The command `build_ext` of setup.py, for a library below `tmp_path`."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    distribution = setuptools.Distribution({"ext_modules": given["ext_modules"]})
    command = given["cmdclass"]["build_ext"](distribution)
    command.build_lib = str(tmp_path)
    command.ensure_finalized()
    return command


@pytest.mark.parametrize("killed", [False, True])
def test_linking(command: Any, monkeypatch: pytest.MonkeyPatch, *, killed: bool) -> None:
    library = Path(command.get_ext_fullpath("lazydp.kernels._C"))
    library.parent.mkdir(parents=True)
    library.write_bytes(b"the one before")

    def link(self: Any, extension: setuptools.Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name))
        target.write_bytes(HALF)
        assert not library.samefile(target)
        if killed:
            raise KeyboardInterrupt
        target.write_bytes(WHOLE)

    monkeypatch.setattr(build_ext, "build_extension", link)
    if killed:
        with pytest.raises(KeyboardInterrupt):
            command.build_extension(command.extensions[0])
        assert library.read_bytes() == b"the one before"
    else:
        command.build_extension(command.extensions[0])
        assert library.read_bytes() == WHOLE
    assert command.get_ext_fullpath("lazydp.kernels._C") == str(library)


def test_copying_into_the_source_tree(command: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    built, library = tmp_path / "built.so", tmp_path / "_C.abi3.so"
    built.write_bytes(WHOLE)
    library.write_bytes(b"the one before")

    def killed(self: Any, source: str, target: str, **options: Any) -> None:
        Path(target).write_bytes(HALF)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build_ext, "copy_file", killed)
        with pytest.raises(KeyboardInterrupt):
            command.copy_file(str(built), str(library), level=0)
    assert library.read_bytes() == b"the one before"
    command.copy_file(str(built), str(library))
    assert library.read_bytes() == WHOLE
