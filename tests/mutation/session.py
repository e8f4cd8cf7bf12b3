"""A pytest plugin that runs, instead of the tests, mutants: each in a fork of the session, on the tests of its line."""

from __future__ import annotations

import contextlib
import math
import os
import resource
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mutation.planting import functions_below, plant_before_import, plant_in

KILLED, SURVIVED, UNREACHED, ENDLESS = "killed", "survived", "unreached", "endless"
NOT_LOADED = "not loaded"
"""The fault is not in a function that can be replaced while the process runs."""
# Fixtures of the whole session that are set up once, before the forks, where their lines are not those of the folder.
SHARED = ("nothing_of_the_developer", "tiny_dataset", "postgres_server")


@dataclass(frozen=True, slots=True)
class Case:
    """A fault and what to run.

    Attributes:
        name: for people; unique.
        file: of the module.
        source: of the module.
        mutated: the same with the fault.
        tests: those that reach its line, in the order in which they run.
        processor_s: that all of them may take, before the fault counts as one that does not end.
        at_import: whether its line runs when modules are imported, or tests collected.
    """

    name: str
    file: Path
    source: str
    mutated: str
    tests: tuple[str, ...]
    processor_s: float
    at_import: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a mutant, and the test that failed (if one did)."""

    found: str
    test: str = ""


def forked(processor_s: float, run: Callable[[Callable[[str], None]], None]) -> Outcome:
    """What `run` tells, in a fork that may take so much processor time.

    It tells the name of a test that failed, or `KILLED`, and ends; or it ends without a word where all passed.
    """
    scratch = os.environ.get("MUTATION_OUTPUT", os.devnull)
    inner, outer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads: those of libraries wait
        child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setsid()
            os.close(inner)
            output = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            for descriptor in (1, 2):
                os.dup2(output, descriptor)
            resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(processor_s), math.ceil(processor_s) + 1))
            run(lambda text: _tell_and_end(outer, text))
            status = 0
        finally:
            os._exit(status)
    os.close(outer)
    try:
        ended = _waited(child, seconds=120 + 30 * processor_s)
        told = os.read(inner, 4096).decode()
    finally:
        os.close(inner)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # what its tests started and left
    if told:
        return Outcome(ENDLESS, told[1:]) if told[0] == "!" else Outcome(KILLED, told)
    if ended is None or os.WIFSIGNALED(ended):
        return Outcome(ENDLESS)
    if os.WEXITSTATUS(ended) == 0:
        return Outcome(SURVIVED)
    raise SystemExit("the tests of a mutant could not be run: MUTATION_OUTPUT=FILE shows what they print")


def _tell_and_end(pipe: int, text: str) -> None:
    os.write(pipe, text.encode())
    os._exit(0)


def _waited(child: int, *, seconds: float) -> int | None:
    """The status of a child; None where it had to be killed."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.005)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


class FirstFailure:
    """A pytest plugin that tells of the first test that fails, and ends the process."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Tell it."""
        if report.failed:
            ended = "Timeout" not in report.longreprtext.splitlines()[-1]
            self._tell(report.nodeid if ended else f"!{report.nodeid}")


class Mutants:
    """The plugin.

    Args:
        folder: of the modules.
        cases: in any order.
        dependent: fixtures whose lines are those of the folder.
        told: called with each case and what became of it.
    """

    def __init__(
        self, folder: Path, cases: Sequence[Case], dependent: set[str], told: Callable[[Case, Outcome], None]
    ) -> None:
        self._folder = folder
        self._cases = cases
        self._shared = [name for name in SHARED if f"fixture {name}" not in dependent]
        self._told = told

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Run the cases."""
        if session.testsfailed:
            raise SystemExit("the tests cannot be collected")
        items = {item.nodeid: item for item in session.items}
        needed = [items[name] for name in dict.fromkeys(name for case in self._cases for name in case.tests)]
        self._set_up(needed)
        functions = functions_below(self._folder)
        for case in self._cases:
            chosen = [items[name] for name in case.tests]

            def run(tell: Callable[[str], None], case: Case = case, chosen: Sequence[pytest.Item] = chosen) -> None:
                if not plant_in(functions, case.file, case.source, case.mutated):
                    tell(NOT_LOADED)
                session.config.pluginmanager.register(FirstFailure(tell))
                with _folder_of_its_own(session.config):
                    _run(chosen, session)

            outcome = forked(case.processor_s, run)
            self._told(case, Outcome(NOT_LOADED) if outcome.test == NOT_LOADED else outcome)
        return True

    def _set_up(self, items: Sequence[pytest.Item]) -> None:
        """Set up the fixtures of the session that every fork can share."""
        for name in self._shared:
            item: Any = next((one for one in items if name in one.fixturenames), None)  # type: ignore[attr-defined]
            if item is not None:
                names = list(item.fixturenames)
                item.fixturenames[:] = [one for one in names if one in self._shared]
                item.session._setupstate.teardown_exact(item)
                item.session._setupstate.setup(item)
                item.session._setupstate.teardown_exact(_elsewhere(item))
                item.fixturenames[:] = names
                item._initrequest()


def _run(chosen: Sequence[pytest.Item], session: pytest.Session) -> None:
    session._setupstate.teardown_exact(chosen[0])
    for item, following in zip(chosen, [*chosen[1:], None], strict=True):
        then = following or _elsewhere(item)
        session.config.hook.pytest_runtest_protocol(item=item, nextitem=then)


def _elsewhere(item: pytest.Item) -> pytest.Item:
    """A test of another file: what comes before it does not take the fixtures of the session down."""
    return next((one for one in item.session.items if one.path != item.path), item)


@contextlib.contextmanager
def _folder_of_its_own(config: Any) -> Iterator[None]:
    """The folder of a mutant's tests, in memory where there is room."""
    factory = config._tmp_path_factory
    base = factory.getbasetemp() / f"mutant-{os.getpid()}"
    base.mkdir()
    factory._basetemp = base
    yield


def in_a_session(folder: Path, files: Sequence[str], plugin: object, *, base: Path) -> None:
    """Collect the tests in `files` and run the plugin on them."""
    options = ["-q", "-s", "-n0", "-p", "no:cacheprovider", "--basetemp", str(base), "--tb=line", "--timeout=200"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of what was imported before
    status = pytest.main([*options, *files], plugins=[plugin])
    if status != pytest.ExitCode.OK:
        raise SystemExit(f"{folder.name}: pytest ended with status {status}")


def from_the_start(case: Case, *, base: Path) -> Outcome:
    """Run a case whose fault has to be there when modules are loaded: nothing of lazydp is loaded in this process."""

    def run(tell: Callable[[str], None]) -> None:
        loaded: list[bool] = []
        plant_before_import(case.file, case.mutated, lambda: loaded.append(True))
        shutil.rmtree(base, ignore_errors=True)
        options = ["-q", "-s", "-n0", "-p", "no:cacheprovider", "--basetemp", str(base), "--tb=line", "--timeout=200"]
        options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
        status = pytest.main([*options, *case.tests], plugins=[FirstFailure(tell)])
        if not loaded:
            tell(NOT_LOADED)
        if status != pytest.ExitCode.OK:
            tell("the import of the module")

    assert not any(name.startswith("lazydp.components") for name in sys.modules)
    outcome = forked(case.processor_s + 30, run)
    return Outcome(UNREACHED) if outcome.test == NOT_LOADED else outcome
