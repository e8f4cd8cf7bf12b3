"""Validates custom resources against the schemas that their projects publish, unknown fields refused."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

SCHEMAS = Path(__file__).resolve().parents[3] / "shared" / "schemas"


def validate(manifest: dict[str, Any], file: str) -> None:
    """Hold a custom resource against the published schema in `file`; skips, with the reason, where it is absent.

    Raises:
        jsonschema.ValidationError: a field is wrong, missing or unknown.
    """
    if not (SCHEMAS / file).exists():
        pytest.skip(f"the published schema {file} is not at {SCHEMAS}")
    version = manifest["apiVersion"].split("/")[1]
    # Without `jsonschema.validate`'s own check of the schema, which takes a dozen seconds for KServe's.
    jsonschema.Draft202012Validator(_schema(file, version)).validate(manifest)


@cache
def _schema(file: str, version: str) -> dict[str, Any]:
    with (SCHEMAS / file).open() as opened:
        document = yaml.load(opened, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    [found] = [entry for entry in document["spec"]["versions"] if entry["name"] == version]
    schema: dict[str, Any] = _strict(found["schema"]["openAPIV3Schema"])
    # The API server knows the fields of metadata, which the schema leaves open.
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


def _strict(node: Any) -> Any:
    """The schema with unknown fields refused, where it does not say that they are kept."""
    if isinstance(node, list):
        return [_strict(part) for part in node]
    if not isinstance(node, dict):
        return node
    found = {key: _strict(value) for key, value in node.items()}
    if found.pop("x-kubernetes-int-or-string", False):
        return {"type": ["integer", "string"]}
    keeps = found.get("x-kubernetes-preserve-unknown-fields", False)
    if "properties" in found and isinstance(node.get("type"), str) and not keeps:
        found.setdefault("additionalProperties", False)
    return found
