"""Which code it is: the release, and a digest of the sources on which a run's bits and its privacy hang."""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import importlib.metadata
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from lazydp.components.shared.cache_folder import cache_folder
from lazydp.components.shared.files import PRIVATE_DIRECTORY, write_bytes

_COVERED = ("components", "kernels")
_DIGITS = 12


@functools.cache
def release() -> str:
    """The package's version, as installed; its metadata is read once."""
    return importlib.metadata.version("lazydp")


@functools.cache
def code_version() -> str:
    """`0.1.0+3f2a9c51d0e7`: the package's version, and a digest of its sources, in which two commits differ.

    Covered are the Python files of `components` and `kernels`, as syntax trees: comments, docstrings and layout do not
    count. The compiled extension is not covered, for compilers make other bytes of the same sources; nor are torch and
    other libraries.
    """
    return f"{release()}+{remembered_digest(Path(__file__).parents[2], cache_folder())}"


def remembered_digest(root: Path, folder: Path | None) -> str:
    """`source_digest`, which takes most of a second, from `folder` where no source was written since it was kept there.

    A file that was written has another time of change (`st_ctime_ns`), whatever else is restored of it. What is kept is
    that of the Python version that computed it, since syntax trees differ between versions.
    """
    kept = None if folder is None else folder / f"sources-{_sha256(str(root))[:_DIGITS]}.json"
    state = _written(root)
    if kept is not None:
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            found = json.loads(kept.read_text())
            if found["written"] == state and len(digest := str(found["digest"])) == _DIGITS:
                return digest
    digest = source_digest(root)
    if kept is not None and state == _written(root):
        # A full disk or a read-only home costs time, not correctness.
        with contextlib.suppress(OSError):
            kept.parent.mkdir(mode=PRIVATE_DIRECTORY, parents=True, exist_ok=True)
            write_bytes(kept, json.dumps({"written": state, "digest": digest}).encode())
    return digest


def source_digest(root: Path) -> str:
    """The first 12 hexadecimal digits of a SHA-256 over path and syntax tree of what is covered below `root`."""
    digest = hashlib.sha256()
    for path in _sources(root):
        digest.update(f"{path.relative_to(root).as_posix()}\0{_sha256(_syntax(path.read_text()))}\n".encode())
    return digest.hexdigest()[:_DIGITS]


def _sources(root: Path) -> Iterator[Path]:
    for folder in _COVERED:
        yield from sorted((root / folder).rglob("*.py"))


def _written(root: Path) -> str:
    """Changes whenever a covered file is written, made, moved or removed; and with the version of Python."""
    lines = [sys.version]
    for path in _sources(root):
        status = path.stat()
        lines.append(f"{path}\0{status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}")
    return _sha256("\n".join(lines))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _syntax(source: str) -> str:
    """What the code does, without comments and docstrings, which a running job may see reworded."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            # Strings that stand alone are docstrings, of attributes too. Nothing in their place would not parse.
            node.body = [part for part in node.body if not _is_docstring(part)] or [ast.Pass()]
    return ast.dump(tree)


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
