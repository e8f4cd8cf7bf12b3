"""The dependency rules of ARCHITECTURE.md, held against the imports, also those in functions and for type checkers."""

import ast
import sys
import tomllib
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("kernels", "components", "pipelines", "service", "api")
NAMESPACES = FOLDERS[:4]
# What a folder at the top may import of ours, as prefixes; everything outside lazydp is judged separately.
ALLOWED = {
    "kernels": ("lazydp.kernels",),
    "components": ("lazydp.kernels", "lazydp.components"),
    "pipelines": ("lazydp.pipelines", "lazydp.components.shared"),
    "service": (
        "lazydp.service",
        "lazydp.components.bundle",
        "lazydp.components.budget",
        "lazydp.components.features",
        "lazydp.components.models",
        "lazydp.components.shared",
    ),
    "api": ("lazydp.api", "lazydp.components", "lazydp.kernels", "lazydp.service.client"),
}
KERNELS_THIRD_PARTY = {"torch", "numpy"}

Graph = Mapping[str, frozenset[str]]
"""The modules that each module imports."""


def sources() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("lazydp", *(parts[:-1] if parts[-1] == "__init__" else parts)))


@cache
def files() -> Mapping[str, str]:
    """Path of each module below the root."""
    return {module_of(path): path.relative_to(ROOT).as_posix() for path in sources()}


def imports(path: Path) -> list[str]:
    """Every module that the file imports, at the top or inside functions."""
    return imported(path.read_text(), known=files())


def imported(source: str, *, known: Mapping[str, str]) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            assert node.module is not None
            # `from lazydp.components.x import component` names a module as well.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = [name for name in names if name in known or node.module == "lazydp"]
            found += modules if len(modules) == len(names) else [node.module, *modules]
    return found


@cache
def graph() -> Graph:
    return {
        module: frozenset(name for name in imports(ROOT / file) if name in files() and name != module)
        for module, file in files().items()
    }


# --- what a top folder may import ---------------------------------------------------------------------------------


def violations(path: Path, folder: str, names: list[str]) -> list[str]:
    bad = []
    for name in names:
        top = name.split(".")[0]
        if top == "lazydp":
            component = folder == "pipelines" and name.startswith("lazydp.components.") and name.endswith(".component")
            if not component and not name.startswith(ALLOWED[folder]):
                bad.append(f"{folder} must not import {name}")
        elif top == "kfp" and folder != "pipelines" and path.name != "component.py":
            bad.append("kfp is imported in component.py and pipelines/ only")
        elif folder == "kernels" and top not in KERNELS_THIRD_PARTY and top not in sys.stdlib_module_names:
            bad.append(f"kernels must not import {name}")
    return bad


def test_imports_keep_the_dependency_rules() -> None:
    found = {
        str(path): bad
        for path in sources()
        if (bad := violations(path, path.relative_to(ROOT).parts[0], imports(path)))
    }
    assert found == {}


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("kernels", "lazydp.components.shared.errors"),
        ("kernels", "pyarrow"),
        ("components", "kfp.dsl"),
        ("components", "lazydp.service.app"),
        ("service", "lazydp.components.train.engine.step"),
        ("pipelines", "lazydp.components.train.engine.step"),
        ("api", "lazydp.pipelines.cli"),
        ("api", "lazydp.service.app"),
    ],
)
def test_a_breach_is_seen(folder: str, name: str) -> None:
    assert violations(ROOT / folder / "module.py", folder, [name]) != []


# --- no cycle ------------------------------------------------------------------------------------------------------


def cycles(imports_of: Graph) -> list[list[str]]:
    """Sets of modules that import each other, directly or through others (Tarjan's strongly connected components)."""
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(module: str) -> None:
        number[module] = lowest[module] = len(number)
        stack.append(module)
        for other in sorted(imports_of[module]):
            if other not in number:
                visit(other)
                lowest[module] = min(lowest[module], lowest[other])
            elif other in stack:
                lowest[module] = min(lowest[module], number[other])
        if lowest[module] == number[module]:
            place = stack.index(module)
            if len(stack) - place > 1:
                found.append(sorted(stack[place:]))
            del stack[place:]

    for module in imports_of:
        if module not in number:
            visit(module)
    return found


def test_no_module_imports_itself_through_others() -> None:
    assert cycles(graph()) == []


def test_a_cycle_is_seen_wherever_the_import_stands() -> None:
    known = {"lazydp.a": "a.py", "lazydp.b": "b.py", "lazydp.c": "c.py"}
    written = {
        "lazydp.a": "from lazydp import b",
        "lazydp.b": "def later() -> None:\n    import lazydp.c",
        "lazydp.c": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from lazydp.a import thing",
    }
    found = {module: frozenset(imported(source, known=known)) & known.keys() for module, source in written.items()}
    assert cycles(found) == [["lazydp.a", "lazydp.b", "lazydp.c"]]
    assert cycles({**found, "lazydp.c": frozenset()}) == []


# --- no import that runs up ----------------------------------------------------------------------------------------


@cache
def layers() -> list[tuple[str, ...]]:
    """The rows of the table of layers in ARCHITECTURE.md, from the top: folders, and patterns of files."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    rows = text.partition("| layer | folders and files |")[2].partition("\n\n")[0].splitlines()[2:]
    return [tuple(part.strip().strip("`") for part in row.split("|")[2].split(",")) for row in rows]


def place_of(file: str) -> tuple[int, str] | None:
    """Row (from the top) and entry that a file belongs to: that of a pattern of files, else that of its folder."""
    entries = [(row, entry) for row, names in enumerate(layers()) for entry in names]
    patterns = [(row, entry) for row, entry in entries if entry.endswith(".py") and fnmatchcase(file, entry)]
    folders = [(row, entry) for row, entry in entries if entry == file.rpartition("/")[0]]
    found = patterns or folders
    assert len(found) <= 1, f"{file} belongs to {found}"
    return found[0] if found else None


def upward(imports_of: Graph, places: Mapping[str, tuple[int, str]]) -> Iterator[str]:
    for module, others in imports_of.items():
        for other in sorted(others):
            here, there = places[module], places[other]
            if there[1] != here[1] and there[0] <= here[0]:
                yield f"{module} (in {here[1]}) imports {other} (in {there[1]}, which is not below)"


def places() -> dict[str, tuple[int, str]]:
    found = {module: place_of(file) for module, file in files().items()}
    missing = sorted(files()[module] for module, place in found.items() if place is None)
    assert missing == [], "each folder has a row in the table of layers of ARCHITECTURE.md"
    return {module: place for module, place in found.items() if place is not None}


def test_imports_run_down_the_table_of_layers() -> None:
    assert list(upward(graph(), places())) == []


def test_the_table_of_layers_names_nothing_that_is_gone() -> None:
    named = {entry for names in layers() for entry in names}
    assert named - {place[1] for place in places().values()} == set()


def test_an_import_that_runs_up_is_seen() -> None:
    # The trainer must not know who releases what it trained.
    module, other = "lazydp.components.train.run.train", "lazydp.components.export.export"
    planted = {**graph(), module: graph()[module] | {other}}
    assert [found for found in upward(planted, places()) if other in found and found.startswith(module)] != []
    # Nor may two folders of one row know each other.
    module, other = "lazydp.components.ingest.ingest", "lazydp.components.models.build"
    planted = {**graph(), module: graph()[module] | {other}}
    assert [found for found in upward(planted, places()) if other in found and found.startswith(module)] != []


# --- packaging -----------------------------------------------------------------------------------------------------


def test_every_folder_with_python_is_packaged() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {"lazydp." + ".".join(path.parent.relative_to(ROOT).parts) for path in sources()}
    assert sorted(listed) == sorted(found)


def test_layer_tops_are_namespaces() -> None:
    # With an __init__.py there, anything run from the root would see `import kernels` as ours.
    assert [folder for folder in NAMESPACES if (ROOT / folder / "__init__.py").exists()] == []


def test_package_init_files_import_nothing() -> None:
    # Inside a running component kfp.dsl.component does not exist, so an __init__ must not pull component.py in.
    inits = [path for path in sources() if path.name == "__init__.py"]
    assert [path for path in inits if {name.split(".")[0] for name in imports(path)} - sys.stdlib_module_names] == []
