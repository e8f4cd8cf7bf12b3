"""The mutants of a module: which faults are planted, and what is left alone."""

import ast

from mutation.mutants import mutants_of
from mutation.named import NAMED
from mutation.run import ROOT, Reached

SOURCE = '''
"""A text that says 1 < 2."""
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import a
LIMIT: int = 3

@decorated(1)
def f(x: int = 4, *, é: bool = True) -> "1 + 1":
    """1 + 1"""
    _log.info("%d", 1 + 1)
    assert x < 5
    if x <= LIMIT and not é:
        raise ValueError(f"{x + 1}")
    for part in sorted(x[1:-2]):
        if part in x:
            continue
        save(part)
        x += 1
    return max(y for y in x if y)
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


def test_tests_are_chosen_by_line_the_fastest_first() -> None:
    reached = Reached(
        {"slow": 9.0, "fast": 1.0, "middle": 3.0}, {"a.py": {"0": ["slow", "fast"], "1": [], "7": ["slow", "middle"]}}
    )
    assert reached.by("a.py", 7, within_s=60) == ["middle", "slow"]
    assert reached.by("a.py", 7, within_s=5) == ["middle"]
    assert reached.by("a.py", 1, within_s=60) == ["fast", "slow"]
    assert reached.by("a.py", 2, within_s=60) == []
    assert reached.by("b.py", 1, within_s=60) == []
