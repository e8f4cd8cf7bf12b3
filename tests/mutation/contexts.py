"""A pytest plugin: which lines of some modules each test reaches, and how long it takes.

`MUTATION_SOURCE` is the folder of the modules, `MUTATION_MAP` the file to write: JSON with `seconds` by test, and
`tests` by module and line. Line 0 stands for all tests that reach a module at all.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import coverage
import pytest

_SOURCE = Path(os.environ["MUTATION_SOURCE"]).resolve()
_coverage = coverage.Coverage(
    data_file=None, config_file=False, include=[f"{_SOURCE}/*"], messages=False, check_preimported=False
)
_seconds: dict[str, float] = defaultdict(float)


def pytest_sessionstart() -> None:
    """Begin before anything is imported."""
    _coverage.start()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """A context for each test, its fixtures included."""
    _coverage.switch_context(item.nodeid)
    try:
        return (yield)
    finally:
        _coverage.switch_context("")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add up the phases of a test; one that fails without a mutant says nothing with one."""
    _seconds[report.nodeid] += report.duration
    if report.failed:
        _seconds[report.nodeid] = float("inf")


def pytest_sessionfinish() -> None:
    """Write the map."""
    _coverage.stop()
    data = _coverage.get_data()
    tests: dict[str, dict[int, list[str]]] = {}
    for file in data.measured_files():
        lines = {line: [name for name in names if name] for line, names in data.contexts_by_lineno(file).items()}
        lines[0] = sorted({name for names in lines.values() for name in names})
        tests[str(Path(file).resolve().relative_to(_SOURCE))] = lines
    kept = {name: seconds for name, seconds in _seconds.items() if seconds != float("inf")}
    Path(os.environ["MUTATION_MAP"]).write_text(json.dumps({"seconds": kept, "tests": tests}))
