"""Which code it is: the release, and a digest of the sources on which a run's bits and its privacy hang."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
from pathlib import Path

_COVERED = ("components", "kernels")
_DIGITS = 12


@functools.cache
def code_version() -> str:
    """`0.1.0+3f2a9c51d0e7`: the package's version, and a digest of its sources, in which two commits differ.

    Covered are the Python files of `components` and `kernels`, as syntax trees: comments, docstrings and layout do not
    count. The compiled extension is not covered, for compilers make other bytes of the same sources; nor are torch and
    other libraries.
    """
    return f"{importlib.metadata.version('lazydp')}+{source_digest(Path(__file__).parents[2])}"


def source_digest(root: Path) -> str:
    """The first 12 hexadecimal digits of a SHA-256 over path and syntax tree of what is covered below `root`."""
    digest = hashlib.sha256()
    for folder in _COVERED:
        for path in sorted((root / folder).rglob("*.py")):
            content = hashlib.sha256(_syntax(path.read_text()).encode()).hexdigest()
            digest.update(f"{path.relative_to(root).as_posix()}\0{content}\n".encode())
    return digest.hexdigest()[:_DIGITS]


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
