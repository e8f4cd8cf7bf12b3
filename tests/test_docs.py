"""What the documents name exists, and what exists is documented."""

import ast
import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from lazydp.pipelines.cli import cli

ROOT = Path(__file__).resolve().parent.parent
_FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef
PAGES = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [page for pattern in ("*/README.md", "*/*/README.md") for page in sorted(ROOT.glob(pattern))]


def command_lines(text: str) -> Iterator[str]:
    """`lazydp ...` lines of fenced shell blocks, continuation lines joined."""
    for block in re.findall(r"```(?:sh|bash|shell|console)\n(.*?)```", text, flags=re.S):
        for line in block.replace("\\\n", " ").splitlines():
            stripped = line.strip().removeprefix("$ ").removeprefix(".venv/bin/")
            if stripped.startswith("lazydp "):
                yield stripped


def check(line: str) -> None:
    """Walk the words of a command line down the click tree; fail on a command or an option that isn't there."""
    words = shlex.split(line.split(" | ", maxsplit=1)[0].split(" > ", maxsplit=1)[0], comments=True)[1:]
    command: click.Command = cli
    context = click.Context(cli, info_name="lazydp")
    while words and isinstance(command, click.Group) and not words[0].startswith("-"):
        found = command.get_command(context, words.pop(0))
        assert found is not None, f"no such command: {line}"
        command = found
        context = click.Context(command, info_name=command.name, parent=context)
    options = {
        name for parameter in command.get_params(context) for name in (*parameter.opts, *parameter.secondary_opts)
    }
    for word in words:
        if word.startswith("--"):
            assert word.split("=")[0] in options, f"{word} is not an option: {line}"


LINES = [(page.relative_to(ROOT), line) for page in PAGES if page.exists() for line in command_lines(page.read_text())]


@pytest.mark.parametrize(("page", "line"), LINES, ids=[f"{page}: {line[:60]}" for page, line in LINES])
def test_commands_named_in_the_docs_exist(page: Path, line: str) -> None:
    check(line)


@pytest.mark.parametrize("line", ["lazydp trian --out x", "lazydp train --no-such-option x"])
def test_a_wrong_command_line_is_seen(line: str) -> None:
    with pytest.raises(AssertionError):
        check(line)


def test_readme_has_commands() -> None:
    assert any(page == Path("README.md") for page, _ in LINES)


def test_make_targets_named_in_the_docs_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    named = {name for page in PAGES if page.exists() for name in re.findall(r"`make ([a-z-]+)`", page.read_text())}
    assert named - targets == set()


def test_cli_reference_is_what_the_commands_say() -> None:
    location = ROOT / "docs" / "generate_cli.py"
    specification = importlib.util.spec_from_file_location("generate_cli", location)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    assert (ROOT / "docs" / "cli.md").read_text() == module.reference(), "run `make docs`"


def test_every_command_has_an_example() -> None:
    context = click.Context(cli, info_name="lazydp")

    def walk(group: click.Group) -> Iterator[click.Command]:
        for name in group.list_commands(context):
            command = group.get_command(context, name)
            assert command is not None
            yield command
            if isinstance(command, click.Group):
                yield from walk(command)

    assert [c.name for c in walk(cli) if not isinstance(c, click.Group) and "Example" not in (c.epilog or "")] == []


def rest_paths() -> set[str]:
    from lazydp.service.app import document

    return set(document()["paths"])


def test_rest_paths_in_the_docs_exist_and_the_reverse() -> None:
    pattern = re.compile(r"(?<![\w./])(/(?:v1|v2|healthz|readyz|metrics)[\w/{}-]*)")
    named = {
        path.rstrip("/")
        for page in [ROOT / "README.md", ROOT / "docs" / "serving.md"]
        for path in pattern.findall(page.read_text())
    }
    known = rest_paths()
    as_patterns = [re.compile("^" + re.sub(r"\{[^}]+\}", "[^/]+", path) + "$") for path in known]
    assert {path for path in named if not any(p.match(path) for p in as_patterns)} == set(), "named, but not served"
    documented = (ROOT / "docs" / "serving.md").read_text()
    assert {path for path in known if path not in documented and path != "/"} == set(), "served, but not documented"


def defined_names(source: str) -> set[str]:
    """Functions, classes and methods (`Class.method`) that a Python file defines."""
    names = set()
    for node in ast.parse(source).body:
        if isinstance(node, _FUNCTIONS | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, _FUNCTIONS)}
    return names


def missing_names(text: str) -> list[str]:
    """What a page names as `path/file:name` and the file doesn't define."""
    references = re.findall(r"`([\w/]+\.(?:py|cpp|h|cuh|cu)):([\w.]+)`", text)
    assert references
    missing = []
    for file, name in references:
        source = (ROOT / file).read_text()
        found = name in defined_names(source) if file.endswith(".py") else re.search(rf"\b{name}\(", source)
        missing += [] if found else [f"{file}:{name}"]
    return missing


def test_architecture_names_what_exists() -> None:
    assert missing_names((ROOT / "ARCHITECTURE.md").read_text()) == []


@pytest.mark.parametrize("name", ["kernels/ops.py:tensor", "service/http/auth.py:Nobody.check", "setup.py:no"])
def test_a_name_that_is_not_defined_is_seen(name: str) -> None:
    assert missing_names(f"see `{name}`") == [name]


def test_the_tables_of_the_scaling_page_are_what_its_script_makes() -> None:
    location = ROOT / "docs" / "generate_scaling.py"
    specification = importlib.util.spec_from_file_location("generate_scaling", location)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    page = module.PAGE.read_text()
    # Of memory and checkpoints; the others take seconds to draw.
    assert all(line in page for line in module.memory_table())
    row = module.row_of_step(8, 2048)
    assert row in page
