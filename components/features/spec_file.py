"""Reads a feature spec from YAML."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml

from lazydp.components.features.spec import FORMAT_VERSION, FeatureSpec
from lazydp.components.shared.errors import InputError
from lazydp.components.shared.validation import Document, parse_yaml, read_text

_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


def read_spec(path: Path) -> FeatureSpec:
    """Read a feature spec from a YAML file.

    Raises:
        InputError: the file is missing, is not YAML or not a feature spec; the message names file, line and field.
    """
    return parse_spec(read_text(path, what="feature spec"), where=str(path))


def parse_spec(text: str, *, where: str) -> FeatureSpec:
    """Read a feature spec from YAML text; `where` names it in errors.

    Raises:
        InputError: not YAML or not a feature spec; the message names `where`, line and field.
    """
    document = parse_yaml(text, where=where)
    _refuse_newer_format(document)
    if document.root is not None:
        _refuse_respelled_values(document.root, where)
    return document.validated(FeatureSpec)


def _refuse_newer_format(document: Document) -> None:
    version = document.content.get("format_version") if isinstance(document.content, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        found = f"format_version {version} is newer than this lazydp reads ({FORMAT_VERSION})"
        raise document.error(found, "format_version")


def _refuse_respelled_values(root: yaml.Node, where: str) -> None:
    """Refuse values of a vocabulary or split that YAML reads as another text, such as 01, 1_000, 16:09 or 1.10.

    Values are compared as text, so the author must say which text is meant.
    """
    for node in _value_nodes(root):
        if node.style is None and node.tag in _NUMBERS:
            value = yaml.safe_load(node.value)
            if str(value) != node.value:
                raise InputError(
                    f"{where}:{node.start_mark.line + 1}: the value {node.value} is the number {value} in YAML: "
                    f"write '{node.value}' in quotes for this text, or {value}"
                )


def _value_nodes(node: yaml.Node) -> Iterator[yaml.ScalarNode]:
    """The scalars that stand for values of a column: lists under `values`, and `train` and `test` of a split."""
    children = node.value if isinstance(node, (yaml.MappingNode, yaml.SequenceNode)) else []
    for child in children:
        key, value = (child[0].value, child[1]) if isinstance(child, tuple) else (None, child)
        if key == "values" and isinstance(value, yaml.SequenceNode):
            yield from (item for item in value.value if isinstance(item, yaml.ScalarNode))
        elif key in ("train", "test") and isinstance(value, yaml.ScalarNode):
            yield value
        else:
            yield from _value_nodes(value)
