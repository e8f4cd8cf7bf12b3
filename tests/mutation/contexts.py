"""A pytest plugin: which lines of some modules each test reaches, and the processor time that it takes.

`MUTATION_SOURCE` is the folder of the modules, `MUTATION_MAP` the file to write: JSON, `Reached` by file of tests.
"""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import coverage
import pytest

os.environ["COVERAGE_CORE"] = "ctrace"  # the core of newer Pythons looks at each line once, whatever the context
_SOURCE = Path(os.environ["MUTATION_SOURCE"]).resolve()
_coverage = coverage.Coverage(
    data_file=None, config_file=False, include=[f"{_SOURCE}/*"], messages=False, check_preimported=False
)
_seconds: dict[str, float] = {}
_failed: set[str] = set()
_fixtures: dict[str, set[str]] = {}
_contexts = [""]


def pytest_sessionstart() -> None:
    """Begin before anything is imported."""
    _coverage.start()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Note which fixtures that outlive a test each test uses."""
    for item in session.items:
        found: dict[str, Any] = item._fixtureinfo.name2fixturedefs  # type: ignore[attr-defined]
        _fixtures[item.nodeid] = {_name(one) for several in found.values() for one in several}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """A context for each test, its own fixtures included."""
    begun = time.process_time()
    _switch(item.nodeid)
    try:
        return (yield)
    finally:
        _switch("")
        _seconds[item.nodeid] = time.process_time() - begun


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: Any) -> Iterator[Any]:
    """A context for each fixture that outlives a test: its lines are those of all tests that use it."""
    before = _contexts[-1]
    if fixturedef.scope != "function":
        _switch(_name(fixturedef))
    try:
        return (yield)
    finally:
        _switch(before)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A test that fails without a mutant says nothing with one."""
    if report.failed:
        _failed.add(report.nodeid)


def pytest_sessionfinish() -> None:
    """Write the map."""
    _coverage.stop()
    data = _coverage.get_data()
    lines: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    imported: dict[str, list[int]] = {}
    for measured in data.measured_files():
        file = str(Path(measured).resolve().relative_to(_SOURCE))
        for line, contexts in data.contexts_by_lineno(measured).items():
            for context in contexts:
                lines[context][file].add(line)
        imported[file] = sorted(lines[""][file])
    maps: dict[str, Any] = {}
    for test, seconds in _seconds.items():
        made = maps.setdefault(test.partition("::")[0], {"tests": {}, "imported": imported, "dependent": []})
        used = [fixture for fixture in sorted(_fixtures[test]) if fixture in lines]
        made["dependent"] = sorted({*made["dependent"], *used})
        if test not in _failed:
            reached: dict[str, set[int]] = defaultdict(set)
            for context in (test, *used):
                for file, some in lines[context].items():
                    reached[file] |= some
            made["tests"][test] = {
                "seconds": round(seconds, 3),
                "lines": {file: sorted(some) for file, some in reached.items() if some},
            }
    Path(os.environ["MUTATION_MAP"]).write_text(json.dumps(maps))


def _name(fixturedef: Any) -> str:
    return f"fixture {fixturedef.argname}"


def _switch(context: str) -> None:
    _contexts[:] = [context]
    _coverage.switch_context(context)
