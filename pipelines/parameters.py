"""The parameters of a run: names and types from the package, values from the command line."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from lazydp.components.shared.errors import InputError

_TRUE, _FALSE = {"true", "yes", "1"}, {"false", "no", "0"}


def parse_parameters(given: Sequence[str], spec: Mapping[str, Any], *, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a run.

    Args:
        given: `name=value`, each.
        spec: the compiled pipeline (PipelineSpec as a mapping).
        defaults: values for parameters that are not given and whose name the pipeline has.

    Raises:
        InputError: not `name=value`, an unknown name, a value of another type or with `{{` in it, or a parameter
            without a value.
    """
    declared: Mapping[str, Any] = spec["root"].get("inputDefinitions", {}).get("parameters", {})
    found = {name: value for name, value in defaults.items() if name in declared}
    for entry in given:
        name, separator, text = entry.partition("=")
        if not separator:
            raise InputError(f"--parameter {entry!r}: expected name=value")
        if name not in declared:
            close = difflib.get_close_matches(name, declared, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; it has {', '.join(declared)}"
            raise InputError(f"--parameter {name}: the pipeline has no such parameter{hint}")
        found[name] = _value(name, text, declared[name]["parameterType"])
    missing = [
        name
        for name, definition in declared.items()
        if name not in found and not definition.get("isOptional") and "defaultValue" not in definition
    ]
    if missing:
        raise InputError(f"the pipeline needs {', '.join(missing)}: give each with --parameter name=value")
    return found


def _value(name: str, text: str, kind: str) -> Any:
    if "{{" in text:
        # The launcher and Argo replace what looks like a placeholder, wherever it stands.
        raise InputError(f"--parameter {name}: '{{{{' in a value would be taken for a placeholder by Kubeflow")
    try:
        if kind == "NUMBER_DOUBLE":
            return float(text)
        if kind == "NUMBER_INTEGER":
            return int(text)
    except ValueError:
        raise InputError(f"--parameter {name}: expected a number, found {text!r}") from None
    if kind == "BOOLEAN":
        if text.lower() not in _TRUE | _FALSE:
            raise InputError(f"--parameter {name}: expected true or false, found {text!r}")
        return text.lower() in _TRUE
    return text
