"""The mutants of a module: which faults are planted, what is left alone, and how they are planted and run."""

import ast
import importlib
import importlib.util
import os
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest
from mutation.mutants import mutants_of
from mutation.named import NAMED
from mutation.planting import functions_below, plant_before_import, plant_in
from mutation.run import ROOT, Fault, joined, summary
from mutation.session import ENDLESS, KILLED, SURVIVED, Outcome, forked

SOURCE = '''
"""A text that says 1 < 2."""
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import a
LIMIT: int = 3
_HASHED_AT_ONCE = 1 << 16
class Shape(Protocol):
    size: int = 7

@decorated(1)
def f(x: int = 4, *, é: bool = True) -> "1 + 1":
    """1 + 1"""
    _log.info("%d", 1 + 1)
    file.close()
    call(x, strict=True, timeout=9)
    assert x < 5
    if x <= LIMIT and not é:
        raise ValueError(f"{x + 1}")
    for part in sorted(x[1:-2]):
        if part in x:
            continue
        save(part)
        x += 1
    return max(y for y in x if y)

def __repr__(x):
    return x + 1
'''
EXPECTED = {
    "3 -> 4",
    "4 -> 5",
    "True -> False",
    "x <= LIMIT and not é -> ((x <= LIMIT) or (not é))",
    "x <= LIMIT and not é -> (not (x <= LIMIT and (not é)))",
    "x <= LIMIT -> x < LIMIT",
    "not é -> (é)",
    "sorted -> list",
    "1 -> ",
    "1 -> 2",
    "-2 -> ",
    "-2 -> (2)",
    "2 -> 3",
    "part in x -> part not in x",
    "continue -> break",
    "save(part) -> pass",
    "call(x, strict=True, timeout=9) -> pass",
    "x += 1 -> x -= 1",
    "return max(y for y in x if y) -> return None",
    "max -> min",
    "y -> True",
}


def test_what_is_planted() -> None:
    found = mutants_of(SOURCE)
    assert {f"{one.old} -> {one.new}" for one in found} == EXPECTED
    for one in found:
        ast.parse(one.applied(SOURCE))
        assert one.applied(SOURCE) != SOURCE
        assert SOURCE.splitlines()[one.line - 1].find(one.old.splitlines()[0]) >= 0


def test_faults_found_by_hand_can_still_be_planted() -> None:
    for name, fault in NAMED.items():
        source = (ROOT / "components" / fault.file).read_text()
        assert source.count(fault.old) == 1, name
        ast.parse(source.replace(fault.old, fault.new))


def made(**tests: tuple[float, list[int]]) -> dict[str, object]:
    """A map of one file of tests: for each test its seconds and its lines of `a/b.py`."""
    noted = {name: {"seconds": seconds, "lines": {"a/b.py": lines}} for name, (seconds, lines) in tests.items()}
    return {"tests": noted, "imported": {"a/b.py": [1]}, "dependent": ["fixture x"]}


def at(file: str, line: int, *, at_import: bool = False) -> Fault:
    return Fault("name", file, line, max(1, line - line % 5), at_import, "")


def test_tests_are_chosen_by_line() -> None:
    reached = joined([made(slow=(9.0, [7]), fast=(1.0, [2])), made(middle=(3.0, [7]))])
    assert reached.dependent == {"fixture x"}
    assert reached.by(at("a/b.py", 7), within_s=60) == ["middle", "slow"]
    assert reached.by(at("a/b.py", 7), within_s=60, first="slow") == ["slow", "middle"]
    assert reached.by(at("a/b.py", 7), within_s=5) == ["middle"]
    assert reached.by(at("a/b.py", 1, at_import=True), within_s=60) == ["fast", "middle", "slow"]
    assert reached.by(at("a/b.py", 3), within_s=60) == []
    assert reached.by(at("c.py", 1), within_s=60) == []
    assert reached.by(at("c.py", 1, at_import=True), within_s=60) == ["fast", "middle", "slow"]


def test_a_line_that_is_not_noted_is_tested_with_the_first_line_of_its_statement() -> None:
    reached = joined([made(one=(1.0, [5]))])
    assert reached.by(at("a/b.py", 6), within_s=60) == ["one"]
    assert reached.by(at("a/b.py", 11), within_s=60) == []


def test_one_case_of_each_test_comes_before_further_cases_and_the_own_folder_before_others() -> None:
    names = {"t/a/x.py::f[1]": 1.0, "t/a/x.py::f[2]": 2.0, "t/a/x.py::g": 5.0, "t/z.py::h": 0.5}
    reached = joined([made(**{name: (seconds, [7]) for name, seconds in names.items()})])
    chosen = ["t/a/x.py::f[1]", "t/a/x.py::g", "t/z.py::h", "t/a/x.py::f[2]"]
    assert reached.by(at("a/b.py", 7), within_s=60) == chosen


def test_what_runs_at_import() -> None:
    source = (
        "LIMIT = 1\n\nclass A:\n    x = 2\n\n    def f(self, y=3):\n        return (\n            y + 4\n        )\n"
    )
    found = {one.old: (one.line, one.statement, one.at_import) for one in mutants_of(source)}
    assert {old: found[old] for old in "1234"} == {
        "1": (1, 1, True),
        "2": (4, 4, True),
        "3": (6, 6, True),
        "4": (8, 7, False),
    }


PLANTED = """
import functools

LIMIT = 3

def wrapped(f):
    @functools.wraps(f)
    def inner(*args):
        return f(*args) + 10
    return inner

@wrapped
def double(x):
    return [y * 2 for y in [x]][0]

class Shape:
    sides = 4

    @property
    def half(self):
        return self.sides - 2

def outer(x):
    def below(y):
        return y > x
    return below

apply = lambda x: x % 7
"""


def loaded(file: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def seen(module: ModuleType) -> list[object]:
    return [module.LIMIT, module.double(5), module.Shape().half, module.outer(2)(2), module.apply(9)]


@pytest.mark.parametrize(
    ("old", "new", "place"),
    [
        ("y * 2", "(y) / (2)", 1),
        ("f(*args) + 10", "(f(*args)) - (10)", 1),
        ("self.sides - 2", "(self.sides) + (2)", 2),
        ("y > x", "y >= x", 3),
        ("x % 7", "(x) * (7)", 4),
    ],
)
def test_a_fault_is_planted_in_what_is_loaded(tmp_path: Path, old: str, new: str, place: int) -> None:
    file = tmp_path / "planted.py"
    file.write_text(PLANTED)
    module = loaded(file, "planted")
    before = seen(module)
    [mutant] = [one for one in mutants_of(PLANTED) if (one.old, one.new) == (old, new)]
    assert plant_in(functions_below(tmp_path), file, PLANTED, mutant.applied(PLANTED))
    after = seen(module)
    assert [number for number in range(5) if after[number] != before[number]] == [place]


@pytest.mark.parametrize("old", ["LIMIT = 3", "sides = 4"])
def test_a_fault_outside_functions_is_not(tmp_path: Path, old: str) -> None:
    file = tmp_path / "planted.py"
    file.write_text(PLANTED)
    module = loaded(file, "planted")
    before = seen(module)
    assert not plant_in(functions_below(tmp_path), file, PLANTED, PLANTED.replace(old, f"{old}0"))
    assert seen(module) == before


def test_a_fault_is_there_when_a_module_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "loaded_with_a_fault.py"
    file.write_text("LIMIT = 3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(SourceFileLoader, "get_code", SourceFileLoader.get_code)  # put back afterwards
    calls: list[bool] = []
    plant_before_import(file.resolve(), "LIMIT = 4\n", lambda: calls.append(True))
    try:
        assert importlib.import_module(file.stem).LIMIT == 4
    finally:
        sys.modules.pop(file.stem, None)
    assert calls == [True]
    assert loaded(file, "by_another_name").LIMIT == 4


def test_what_becomes_of_a_fork() -> None:
    def spin(_: object) -> None:
        while True:
            pass

    assert forked(5, lambda tell: tell("a test")) == Outcome(KILLED, "a test")
    assert forked(5, lambda tell: tell("!a test")) == Outcome(ENDLESS, "a test")
    assert forked(5, lambda tell: None) == Outcome(SURVIVED)
    assert forked(0.1, spin) == Outcome(ENDLESS)
    with pytest.raises(SystemExit, match="could not be run"):
        forked(5, lambda tell: os._exit(3))


def test_the_share_has_its_interval() -> None:
    line = summary("budget", [Outcome(KILLED)] * 54 + [Outcome(SURVIVED)] * 6)
    assert "54 of 60 killed (90.0 %, 95 % interval 79.5 to 96.2 %)" in line
