"""The data flows of ARCHITECTURE.md: trees of calls that visit each module once and only run down."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOW = re.compile(r"^### (?P<title>[^\n]+)\n\n```flow\n(?P<tree>.*?)```", flags=re.M | re.S)
LINE = re.compile(r"(?P<indent> *)(?P<file>[\w/]+\.py):(?P<name>[\w.]+)")


@dataclass(frozen=True)
class Call:
    """One line of a flow: what is called, and by whom."""

    file: str
    name: str
    caller: str | None


def flows() -> dict[str, list[Call]]:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    return {found["title"]: list(calls(found["tree"])) for found in FLOW.finditer(text)}


def calls(tree: str) -> Iterator[Call]:
    above: list[str] = []
    for line in tree.splitlines():
        found = LINE.match(line)
        assert found is not None, line
        depth = len(found["indent"]) // 2
        assert depth <= len(above), f"indented by more than one step: {line}"
        del above[depth:]
        yield Call(found["file"], found["name"], above[-1] if above else None)
        above.append(found["file"])


def defined(file: str) -> set[str]:
    names = set()
    for node in ast.parse((ROOT / file).read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{inner.name}" for inner in ast.walk(node) if isinstance(inner, ast.FunctionDef)}
    return names


def imported(file: str) -> set[str]:
    """Files of ours that a file imports, at the top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lazydp."):
            module = str(node.module).removeprefix("lazydp.").replace(".", "/")
            found |= {f"{module}.py", *(f"{module}/{alias.name}.py" for alias in node.names)}
    return found


def faults(flow: list[Call]) -> list[str]:
    visited = Counter(call.file for call in flow)
    found = [f"{file} is visited {count} times" for file, count in visited.items() if count > 1]
    found += [f"{call.file} does not define {call.name}" for call in flow if call.name not in defined(call.file)]
    for call in flow:
        if call.caller is not None and call.file not in imported(call.caller):
            found.append(f"{call.caller} does not import {call.file}")
    return found


@pytest.mark.parametrize("title", flows())
def test_a_flow_visits_each_module_once_and_follows_the_imports(title: str) -> None:
    """With `test_layers`, by which imports only run down, so does the flow."""
    assert faults(flows()[title]) == []


def test_there_are_five() -> None:
    assert len(flows()) == 5


def test_faults_are_seen() -> None:
    caller = "components/export/export.py"
    assert faults([Call(caller, "export", None), Call("components/bundle/writer.py", "write_bundle", caller)]) == []
    planted = [
        Call(caller, "export", None),
        Call("components/bundle/writer.py", "no_such_name", caller),
        Call("components/bundle/writer.py", "write_bundle", caller),
        Call("components/ingest/source.py", "RowSource", caller),
    ]
    assert [fault.partition(" ")[2] for fault in faults(planted)] == [
        "is visited 2 times",
        "does not define no_such_name",
        "does not import components/ingest/source.py",
    ]
