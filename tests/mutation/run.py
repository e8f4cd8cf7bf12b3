"""Plant faults in a component and see whether the tests of its own folder notice: `make mutation`.

    python tests/mutation/run.py budget --sample 40 --seed 1

Why not a tool that is kept elsewhere: mutmut 3 knows a module by the path of its file, and our folders are imported
under other names (`components/budget` as `lazydp.components.budget`), so that it takes no test for any mutant's;
cosmic-ray starts the whole test command for each mutant, which here means that torch is imported and every test of the
folder run. Here a mutant is a fork of a process that has the libraries imported. It runs the tests that reach its line,
the fastest first, until one fails. The mutant lies in a copy of the working tree, so that processes which tests start
have it too.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import importlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mutation.mutants import Mutant, mutants_of
from mutation.named import NAMED

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("api", "components", "kernels", "pipelines", "service", "tests", ".typecheck", "docs", "examples")
# Imported once, before a mutant's process is forked; nothing of lazydp.
LIBRARIES = (
    "torch",
    "torch._dynamo",
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
    "httpx",
    "fastapi",
    "uvicorn",
    "click.testing",
    "matplotlib",
)
# What the tests of a mutant may take in processor time before it counts as one that does not end.
PROCESSOR_SECONDS = 240
KILLED, SURVIVED, UNREACHED, ENDLESS = "killed", "survived", "unreached", "endless"
# A module that cannot be imported any more, or a test that ends the process, is a fault that was seen, too.
_MEANING = {
    int(pytest.ExitCode.OK): SURVIVED,
    int(pytest.ExitCode.TESTS_FAILED): KILLED,
    int(pytest.ExitCode.INTERRUPTED): KILLED,
}


class Order:
    """A pytest plugin: the fastest tests first."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds = seconds

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Sort."""
        items.sort(key=lambda item: self._seconds.get(item.nodeid, 0.0))


@dataclasses.dataclass(frozen=True)
class Reached:
    """Which tests reach which lines of a component, and how long they take."""

    seconds: dict[str, float]
    tests: dict[str, dict[str, list[str]]]

    def by(self, file: str, line: int, *, within_s: float) -> list[str]:
        """Tests to run for a mutant in a line, as far as time goes: those of the module's own subfolder, then others.

        Of each the fastest first.
        A line that only an import reaches (a constant, a default) is tested by whatever reaches the module.
        """
        lines = self.tests.get(file, {})
        names = lines.get(str(line)) or (lines.get("0", []) if str(line) in lines else [])
        own = f"/{Path(file).parent.as_posix()}/"
        known = sorted((name for name in names if name in self.seconds), key=lambda n: (own not in n, self.seconds[n]))
        chosen: list[str] = []
        total = 0.0
        for name in known:
            total += self.seconds[name]
            if chosen and total > within_s:
                break
            chosen.append(name)
        return chosen


def copy_of_the_tree(target: Path) -> Path:
    """The working tree without its environment; compiled extensions included."""
    for part in PARTS:
        shutil.copytree(ROOT / part, target / part, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "csrc"))
    for file in ("pyproject.toml", "README.md", "ARCHITECTURE.md", "Makefile"):
        shutil.copy(ROOT / file, target)
    return target


def environment(tree: Path) -> dict[str, str]:
    """For processes that import lazydp from `tree`."""
    path = os.pathsep.join([str(tree / ".typecheck"), str(tree / "tests"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


def reached_by(folder: str, tree: Path) -> Reached:
    """Run the folder's tests once; kept for as long as neither its modules nor its tests change."""
    digest = hashlib.sha256()
    for part in (ROOT / "components" / folder, ROOT / "tests" / "components" / folder):
        for path in sorted(part.rglob("*.py")):
            digest.update(path.read_bytes())
    kept = ROOT / ".stamps" / "mutation" / f"{folder}-{digest.hexdigest()[:16]}.json"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        print(f"{folder}: which tests reach which lines", flush=True)
        given = environment(tree)
        given.update(MUTATION_SOURCE=str(tree / "components" / folder), MUTATION_MAP=str(kept))
        command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "mutation.contexts", "-p", "no:cacheprovider"]
        subprocess.run([*command, f"tests/components/{folder}"], cwd=tree, env=given, check=False)
    found = json.loads(kept.read_text())
    return Reached(found["seconds"], found["tests"])


@dataclasses.dataclass(frozen=True)
class Case:
    """A mutant (None: no fault at all) and what to run; one that was found by hand must be killed."""

    name: str
    file: str
    mutated: str | None
    tests: tuple[str, ...]
    by_hand: bool = False


def drawn(folder: str, reached: Reached, *, sample: int, seed: int, within_s: float) -> list[Case]:
    """A random sample of the folder's mutants (all of them where `sample` is 0)."""
    every: list[tuple[str, str, Mutant]] = []
    root = ROOT / "components" / folder
    for path in sorted(root.rglob("*.py")):
        if path.name == "component.py":
            continue  # a shell around a function; tests/components/test_components.py has the tests of all of them
        source = path.read_text()
        every += [(str(path.relative_to(root)), source, one) for one in mutants_of(source)]
    chosen = random.Random(seed).sample(every, min(sample, len(every))) if sample else every
    print(f"{folder}: {len(every)} mutants, {len(chosen)} drawn with seed {seed}", flush=True)
    return [
        Case(
            f"{folder}/{file}:{one}",
            f"{folder}/{file}",
            one.applied(source),
            tuple(reached.by(file, one.line, within_s=within_s)),
        )
        for file, source, one in chosen
    ]


def named(folder: str, reached: Reached, *, within_s: float) -> list[Case]:
    """The faults that were found by hand."""
    cases = []
    for name, fault in NAMED.items():
        if fault.folder == folder:
            source = (ROOT / "components" / fault.file).read_text()
            assert source.count(fault.old) == 1, f"{name}: the text of the fault stands {source.count(fault.old)} times"
            line = source[: source.index(fault.old)].count("\n") + 1
            tests = reached.by(fault.file.removeprefix(f"{folder}/"), line, within_s=within_s)
            cases.append(
                Case(f"{folder}: {name}", fault.file, source.replace(fault.old, fault.new), tuple(tests), by_hand=True)
            )
    return cases


def outcome(case: Case, reached: Reached, tree: Path) -> str:
    """Run the tests of a case in a fork."""
    if not case.tests:
        return UNREACHED
    target = tree / "components" / case.file
    source = target.read_text()
    target.write_text(source if case.mutated is None else case.mutated)
    scratch = Path(tempfile.mkdtemp(prefix="mutant-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    try:
        child = os.fork()
        if child == 0:
            os.setsid()
            _run_tests(case, reached, tree, scratch)
        _, status = os.waitpid(child, 0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # what its tests started and left
    finally:
        target.write_text(source)
        shutil.rmtree(scratch, ignore_errors=True)
    if os.WIFSIGNALED(status):
        return ENDLESS
    found = _MEANING.get(os.WEXITSTATUS(status))
    if found is None:
        raise SystemExit(f"{case.name}: pytest ended with status {os.WEXITSTATUS(status)} (see MUTATION_OUTPUT)")
    return found


def _run_tests(case: Case, reached: Reached, tree: Path, scratch: Path) -> None:
    output = os.open(os.environ.get("MUTATION_OUTPUT", os.devnull), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    resource.setrlimit(resource.RLIMIT_CPU, (PROCESSOR_SECONDS, PROCESSOR_SECONDS))
    os.environ.update(environment(tree))
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True
    os.chdir(tree)
    sys.path[:0] = [str(tree / ".typecheck")]
    options = ["-q", "-x", "-n0", "-p", "no:cacheprovider", "--basetemp", str(scratch / "tests"), "--tb=line"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of what was imported before the fork
    status = int(pytest.ExitCode.INTERNAL_ERROR)
    try:
        status = int(pytest.main([*options, *case.tests], plugins=[Order(reached.seconds)]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", help="components, such as budget")
    parser.add_argument("--sample", type=int, default=40, help="mutants of each; 0 for all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60, help="of tests for each mutant, the fastest first")
    parser.add_argument("--only", default="", help="run only mutants whose name holds this text")
    given = parser.parse_args(arguments)
    for library in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(library)
    with tempfile.TemporaryDirectory(prefix="lazydp-mutation-") as folder:
        tree = copy_of_the_tree(Path(folder))
        missed = sum(_one_folder(name, tree, given) for name in given.folders)
    return 1 if missed else 0


def _one_folder(folder: str, tree: Path, given: argparse.Namespace) -> int:
    """Run a folder's mutants, print what was not killed and the share that was; how many named ones survived."""
    reached = reached_by(folder, tree)
    cases = named(folder, reached, within_s=10 * given.seconds)
    cases += drawn(folder, reached, sample=given.sample, seed=given.seed, within_s=given.seconds)
    counts = dict.fromkeys((KILLED, SURVIVED, UNREACHED, ENDLESS), 0)
    missed = 0
    for case in cases:
        if case.by_hand and outcome(dataclasses.replace(case, mutated=None), reached, tree) != SURVIVED:
            raise SystemExit(f"{case.name}: its tests fail without the fault too")
        if given.only not in case.name:
            continue
        begun = time.monotonic()
        found = outcome(case, reached, tree)
        counts[found] += 1
        missed += case.by_hand and found not in (KILLED, ENDLESS)
        print(f"{found:9} {time.monotonic() - begun:5.1f} s  {case.name}", flush=True)
    ended = counts[KILLED] + counts[ENDLESS]
    total = sum(counts.values())
    print(f"{folder}: {ended} of {total} killed ({100 * ended / max(total, 1):.1f} %), {counts}", flush=True)
    return missed


if __name__ == "__main__":
    sys.exit(main())
