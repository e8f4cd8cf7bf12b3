"""metadata.yaml and OWNERS of each component, by the rules of kubeflow/pipelines-components."""

import datetime
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

COMPONENTS = sorted(path.parent for path in (Path(__file__).parents[2] / "components").glob("*/component.py"))
_FIELDS = ["name", "stability", "dependencies", "lastVerified"]
_OPTIONAL = {"tags", "ci", "links"}
# https://semver.org, with a comparison before it.
_VERSION = re.compile(r"(==|>=|<=|~=)?(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(-[0-9A-Za-z.-]+)?(\+[0-9A-Za-z.-]+)?")


def problems(document: dict[str, Any]) -> list[str]:
    """What those rules say against a metadata.yaml."""
    found = []
    if [field for field in document if field not in _OPTIONAL] != _FIELDS:
        found.append(f"fields are {list(document)}, expected {_FIELDS} in this order")
    if document.get("stability") not in {"experimental", "alpha", "beta", "stable"}:
        found.append("stability")
    if not isinstance(document.get("lastVerified"), datetime.datetime):
        found.append("lastVerified is no time")
    dependencies = document.get("dependencies", {})
    if not set(dependencies) <= {"kubeflow", "external_services"}:
        found.append(f"dependencies are {list(dependencies)}")
    if "Pipelines" not in [entry["name"] for entry in dependencies.get("kubeflow", [])]:
        found.append("no dependency on Pipelines")
    for entry in [entry for entries in dependencies.values() for entry in entries]:
        if not _VERSION.fullmatch(str(entry.get("version"))):
            found.append(f"version {entry.get('version')!r} of {entry.get('name')!r}")
    return found


@pytest.mark.parametrize("folder", COMPONENTS, ids=lambda folder: folder.name)
def test_metadata_and_owners(folder: Path) -> None:
    document = yaml.safe_load((folder / "metadata.yaml").read_text())
    assert problems(document) == []
    assert document["name"] == folder.name
    owners = yaml.safe_load((folder / "OWNERS").read_text())
    assert owners["approvers"]
    assert (folder / "README.md").exists()


def test_a_short_version_or_a_missing_field_is_seen() -> None:
    good = yaml.safe_load((COMPONENTS[0] / "metadata.yaml").read_text())
    short = {**good, "dependencies": {"kubeflow": [{"name": "Pipelines", "version": ">=2.15"}]}}
    assert problems(short) == ["version '>=2.15' of 'Pipelines'"]
    assert problems({name: value for name, value in good.items() if name != "stability"}) != []
