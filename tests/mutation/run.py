"""Plant faults in a component and see whether the tests of its own folder notice: `make mutation`.

    python tests/mutation/run.py budget --sample 60 --seed 1

docs/testing.md says how it works, and why not a tool that is kept elsewhere.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mutation.mutants import mutants_of
from mutation.named import NAMED
from mutation.session import (
    ENDLESS,
    KILLED,
    NOT_LOADED,
    SURVIVED,
    UNREACHED,
    Case,
    Mutants,
    Outcome,
    from_the_start,
    in_a_session,
)

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / ".stamps" / "mutation"
# Imported before anything is forked; nothing of lazydp.
LIBRARIES = (
    "torch",
    "torch.func",
    "scipy.stats",
    "scipy.optimize",
    "dp_accounting",
    "pyarrow.parquet",
    "pyarrow.dataset",
    "pydantic_settings",
    "sqlalchemy.dialects.sqlite",
    "alembic.command",
    "safetensors.torch",
    "hypothesis",
    "click.testing",
)
# Files of tests whose work is done by processes that they start: those would not have the fault.
OTHER_PROCESSES = ("test_kills", "test_killed", "test_killed_commands", "test_resume_kills", "test_contention")


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault that can be planted in a module of a folder (`Mutant` has the other attributes).

    Attributes:
        name: for people; unique.
        file: of the module, below the folder.
        mutated: the module with the fault.
    """

    name: str
    file: str
    line: int
    statement: int
    at_import: bool
    mutated: str


@dataclass(frozen=True)
class Reached:
    """Which tests reach which lines of a component.

    Attributes:
        seconds: of processor time that a test takes, while its lines are noted.
        tests: by module and line; line 0 stands for all tests that reach the module at all.
        imported: lines that run when modules are imported, or tests collected; maybe also later.
        dependent: fixtures of several tests that run the component.
    """

    seconds: dict[str, float]
    tests: dict[str, dict[int, list[str]]]
    imported: dict[str, set[int]]
    dependent: set[str]

    def by(self, fault: Fault, *, within_s: float, first: str = "") -> list[str]:
        """Tests to run for a fault, as far as time goes.

        Those of the module's own subfolder come before others, one case of each test before its further cases, and the
        faster ones before the slower ones. `first` comes before all of them. What runs when the module is imported (a
        constant, a default) is tested by whatever reaches the module, or else by every test.
        """
        file, lines = fault.file, self.tests.get(fault.file, {})
        names = lines.get(fault.line) or lines.get(fault.statement) or []
        if fault.at_import:
            names = lines.get(0) or list(self.seconds)
        own = f"/{Path(file).parent.as_posix()}/"
        nth: Counter[str] = Counter()
        keys = {}
        for name in sorted(names, key=lambda n: self.seconds[n]):
            function = name.partition("[")[0]
            keys[name] = (name != first, nth[function], own not in name, self.seconds[name])
            nth[function] += 1
        chosen: list[str] = []
        total = 0.0
        for name in sorted(keys, key=lambda n: keys[n]):
            total += self.seconds[name]
            if chosen and total > within_s:
                continue
            chosen.append(name)
        return chosen


def reached_by(folder: str) -> Reached:
    """Which tests of a folder reach which lines: kept for a file of tests while neither it nor a module changes."""
    tests = ROOT / "tests" / "components" / folder
    digests = {str(path.relative_to(ROOT)): _digest(folder, path) for path in sorted(tests.rglob("test_*.py"))}
    files = {file: KEPT / folder / f"{digest}.json" for file, digest in digests.items()}
    stale = [file for file in files if not files[file].exists() and Path(file).stem not in OTHER_PROCESSES]
    if stale:
        print(f"{folder}: which lines the tests of {len(stale)} files reach", flush=True)
        for file, made in _mapped(folder, stale).items():
            files[file].parent.mkdir(parents=True, exist_ok=True)
            files[file].write_text(json.dumps(made))
    return joined(json.loads(kept.read_text()) for kept in files.values() if kept.exists())


def _digest(folder: str, file: Path) -> str:
    digest = hashlib.sha256(str(file.relative_to(ROOT)).encode())
    for path in [*sorted((ROOT / "components" / folder).rglob("*.py")), Path(__file__).with_name("contexts.py"), file]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _mapped(folder: str, files: Sequence[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="lazydp-mutation-") as scratch:
        target = Path(scratch) / "map.json"
        given = {"MUTATION_SOURCE": str(ROOT / "components" / folder), "MUTATION_MAP": str(target)}
        command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "mutation.contexts", "-p", "no:cacheprovider"]
        path = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, **given, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, "--timeout=900", *files], cwd=ROOT, env=environment, check=False)
        found: dict[str, Any] = json.loads(target.read_text())
    return found


def joined(maps: Any) -> Reached:
    """One map of several."""
    reached = Reached({}, {}, {}, set())
    for made in maps:
        reached.dependent.update(made["dependent"])
        for file, lines in made["imported"].items():
            reached.imported.setdefault(file, set()).update(lines)
        for test, noted in made["tests"].items():
            reached.seconds[test] = noted["seconds"]
            for file, lines in noted["lines"].items():
                for line in (0, *lines):
                    reached.tests.setdefault(file, {}).setdefault(line, []).append(test)
    return reached


class Killers:
    """Which test killed a mutant last time: it comes first the next time, so that most mutants cost one test."""

    def __init__(self, folder: str) -> None:
        self._file = KEPT / folder / "killers.json"
        self._tests: dict[str, str] = json.loads(self._file.read_text()) if self._file.exists() else {}

    def of(self, case: str) -> str:
        """The test; empty where none is known."""
        return self._tests.get(case, "")

    def keep(self, case: str, test: str) -> None:
        """Remember it."""
        self._tests[case] = test
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.write_text(json.dumps(self._tests, indent=1))


def drawn(folder: str, *, sample: int, seed: int) -> list[Fault]:
    """A random sample of a folder's mutants (all of them where `sample` is 0)."""
    every: list[Fault] = []
    root = ROOT / "components" / folder
    for path in sorted(root.rglob("*.py")):
        if path.name == "component.py":
            continue  # a shell around a function; tests/components/test_components.py has the tests of all of them
        source, file = path.read_text(), str(path.relative_to(root))
        every += [
            Fault(f"{folder}/{file}:{one}", file, one.line, one.statement, one.at_import, one.applied(source))
            for one in mutants_of(source)
        ]
    chosen = random.Random(seed).sample(every, min(sample, len(every))) if sample else every
    print(f"{folder}: {len(every)} mutants, {len(chosen)} drawn with seed {seed}", flush=True)
    return chosen


def named(folder: str) -> list[Fault]:
    """The faults that were found by hand."""
    faults = []
    for name, fault in NAMED.items():
        if fault.folder == folder:
            source, file = (ROOT / "components" / fault.file).read_text(), fault.file.removeprefix(f"{folder}/")
            assert source.count(fault.old) == 1, f"{name}: the text of the fault stands {source.count(fault.old)} times"
            line = source[: source.index(fault.old)].count("\n") + 1
            faults.append(Fault(name, file, line, line, at_import=False, mutated=source.replace(fault.old, fault.new)))
    return faults


def cases_of(folder: str, faults: Sequence[Fault], reached: Reached, *, within_s: float) -> list[Case]:
    """What to run for each fault."""
    killers, cases = Killers(folder), []
    for fault in faults:
        path = ROOT / "components" / folder / fault.file
        tests = reached.by(fault, within_s=within_s, first=killers.of(fault.name))
        seconds = sum(reached.seconds[test] for test in tests)
        at_import = fault.at_import or fault.line in reached.imported.get(fault.file, ())
        cases.append(Case(fault.name, path, path.read_text(), fault.mutated, tuple(tests), 10 + 4 * seconds, at_import))
    return cases


def outcomes(folder: str, cases: Sequence[Case], dependent: set[str], scratch: Path) -> dict[str, Outcome]:
    """What becomes of each case; printed as it is known."""
    found: dict[str, Outcome] = {}
    killers, begun = Killers(folder), time.monotonic()

    def told(case: Case, outcome: Outcome) -> None:
        nonlocal begun
        found[case.name] = outcome
        if outcome.test:
            killers.keep(case.name, outcome.test)
        print(f"{outcome.found:9} {time.monotonic() - begun:5.1f} s  {case.name}", flush=True)
        begun = time.monotonic()

    reachable = [case for case in cases if case.tests]
    for case in cases:
        if not case.tests:
            told(case, Outcome(UNREACHED))
    again = _in_the_loaded(folder, reachable, dependent, scratch, told) if reachable else []
    for case in again:
        told(case, from_the_start(case, base=scratch / "start"))
    return found


def _in_the_loaded(
    folder: str,
    cases: Sequence[Case],
    dependent: set[str],
    scratch: Path,
    told: Callable[[Case, Outcome], None],
) -> list[Case]:
    """Run the cases whose fault can be planted in loaded functions; returns those that have to be run otherwise."""
    inner, outer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(inner)
        with os.fdopen(outer, "w") as pipe:
            numbers = {case.name: number for number, case in enumerate(cases)}

            def tell(case: Case, outcome: Outcome) -> None:
                print(json.dumps([numbers[case.name], outcome.found, outcome.test]), file=pipe, flush=True)

            plugin = Mutants(ROOT / "components" / folder, cases, dependent, tell)
            files = sorted({test.partition("::")[0] for case in cases for test in case.tests})
            status = 1
            try:
                in_a_session(ROOT / "components" / folder, files, plugin, base=scratch / "loaded")
                status = 0
            finally:
                pipe.flush()
                os._exit(status)
    os.close(outer)
    again = []
    with os.fdopen(inner) as lines:
        for line in lines:
            number, found, test = json.loads(line)
            case = cases[number]
            if found == NOT_LOADED or (found == SURVIVED and case.at_import):
                again.append(case)
            else:
                told(case, Outcome(found, test))
    if os.waitpid(child, 0)[1]:
        raise SystemExit(f"{folder}: the session of its tests failed")
    return again


def summary(folder: str, found: Sequence[Outcome]) -> str:
    """The share that was killed, with its interval, as one line."""
    from scipy.stats import binomtest  # not before the libraries are imported

    counts = Counter(one.found for one in found)
    killed, total = counts[KILLED] + counts[ENDLESS], len(found)
    between = binomtest(killed, total).proportion_ci(method="exact")
    return (
        f"{folder}: {killed} of {total} killed ({100 * killed / total:.1f} %, 95 % interval {100 * between.low:.1f} to "
        f"{100 * between.high:.1f} %): {', '.join(f'{number} {name}' for name, number in sorted(counts.items()))}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", help="components, such as budget")
    parser.add_argument("--sample", type=int, default=60, help="mutants of each; 0 for all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=30, help="of tests for each mutant")
    parser.add_argument("--only", default="", help="of these, run those whose name matches this regular expression")
    given = parser.parse_args(arguments)
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive")
    os.chdir(ROOT)
    reached = {folder: reached_by(folder) for folder in given.folders}
    for library in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(library)
    return 1 if sum(_one_folder(folder, reached[folder], given) for folder in given.folders) else 0


def _one_folder(folder: str, reached: Reached, given: argparse.Namespace) -> int:
    """Run a folder's mutants, and print what was killed; how many of those found by hand were not."""
    by_hand = [fault for fault in named(folder) if re.search(given.only, fault.name)]
    sample = [one for one in drawn(folder, sample=given.sample, seed=given.seed) if re.search(given.only, one.name)]
    cases = cases_of(folder, by_hand, reached, within_s=10 * given.seconds)
    cases += cases_of(folder, sample, reached, within_s=given.seconds)
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="lazydp-mutation-", dir=memory) as scratch:
        found = outcomes(folder, cases, reached.dependent, Path(scratch))
    if sample:
        print(summary(folder, [found[fault.name] for fault in sample]), flush=True)
    return sum(found[fault.name].found not in (KILLED, ENDLESS) for fault in by_hand)


if __name__ == "__main__":
    sys.exit(main())
