"""Each failure in the table of docs/reliability.md names a test that exists."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CELLS = 5
DEPENDENCIES = {"Disk", "Ledger", "Folder of bundles", "Clock", "Peer", "Process"}


def rows(page: str) -> Iterator[tuple[str, list[str]]]:
    """(dependency, cells) of each failure."""
    dependency = ""
    for line in page.partition("## Failures")[2].partition("| --- |")[2].splitlines()[1:]:
        if not line.startswith("|"):
            return
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not cells[1]:
            dependency = cells[0].split("**")[1]
        else:
            yield dependency, cells


def check(dependency: str, cells: list[str]) -> None:
    """Raise unless every cell says something, and the last one names a test, and its case if it has one."""
    assert dependency in DEPENDENCIES
    assert len(cells) == CELLS
    assert all(cells)
    named = re.fullmatch(r"`(tests/[\w/]+\.py)::(test_\w+)(?:\[(.+)\])?`", cells[-1])
    assert named is not None, cells[-1]
    text = (ROOT / named[1]).read_text()
    functions = {node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
    assert named[2] in functions, cells[-1]
    assert named[3] is None or f'"{named[3]}":' in text, cells[-1]


TABLE = list(rows((ROOT / "docs" / "reliability.md").read_text()))


@pytest.mark.parametrize(("dependency", "cells"), TABLE, ids=[f"{where}: {cells[0]}" for where, cells in TABLE])
def test_each_failure_has_a_test(dependency: str, cells: list[str]) -> None:
    check(dependency, cells)


def test_every_dependency_is_there() -> None:
    assert {dependency for dependency, _ in TABLE} == DEPENDENCIES
    assert len({cells[0] for _, cells in TABLE}) == len(TABLE)


@pytest.mark.parametrize(
    "test",
    [
        "",
        "none",
        "`tests/test_reliability.py::test_no_such`",
        "`tests/test_reliability.py::test_every_dependency_is_there[x]`",
    ],
)
def test_a_row_without_a_test_would_be_seen(test: str) -> None:
    with pytest.raises(AssertionError):
        check("Disk", ["full", "it ends", "nothing", "make room", test])
