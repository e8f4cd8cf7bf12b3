"""The house rules of ARCHITECTURE.md, read from the imports."""

import ast
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("kernels", "components", "pipelines", "service", "api")
NAMESPACES = LAYERS[:4]
# What a layer may import of ours, as prefixes; everything outside lazydp is judged separately.
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


def sources() -> list[Path]:
    return [path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))]


def imports(path: Path) -> list[str]:
    """Every module that the file imports, at the top or inside functions."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            # `from lazydp.components.x import component` names a module as well.
            found += [node.module] + [f"{node.module}.{alias.name}" for alias in node.names if node.module == "lazydp"]
    return found


def violations(path: Path, layer: str, names: list[str]) -> list[str]:
    bad = []
    for name in names:
        top = name.split(".")[0]
        if top == "lazydp":
            component = layer == "pipelines" and name.startswith("lazydp.components.") and name.endswith(".component")
            if not component and not name.startswith(ALLOWED[layer]):
                bad.append(f"{layer} must not import {name}")
        elif top == "kfp" and layer != "pipelines" and path.name != "component.py":
            bad.append("kfp is imported in component.py and pipelines/ only")
        elif layer == "kernels" and top not in KERNELS_THIRD_PARTY and top not in sys.stdlib_module_names:
            bad.append(f"kernels must not import {name}")
    return bad


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_keep_the_layers(path: Path) -> None:
    assert violations(path, path.relative_to(ROOT).parts[0], imports(path)) == []


@pytest.mark.parametrize(
    ("layer", "name"),
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
def test_a_breach_is_seen(layer: str, name: str) -> None:
    assert violations(ROOT / layer / "module.py", layer, [name]) != []


def test_every_folder_with_python_is_packaged() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {"lazydp." + ".".join(path.parent.relative_to(ROOT).parts) for path in sources()}
    assert listed == found


def test_layer_tops_are_namespaces() -> None:
    # With an __init__.py there, anything run from the root would see `import kernels` as ours.
    assert [layer for layer in NAMESPACES if (ROOT / layer / "__init__.py").exists()] == []


def test_package_init_files_import_nothing() -> None:
    # Inside a running component kfp.dsl.component does not exist, so an __init__ must not pull component.py in.
    inits = [path for path in sources() if path.name == "__init__.py"]
    assert [path for path in inits if {name.split(".")[0] for name in imports(path)} - sys.stdlib_module_names] == []
