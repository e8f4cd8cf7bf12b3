"""When the backend takes a task's outputs from an earlier run instead of starting a pod."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def fingerprint(executor_input: Mapping[str, Any], container: Mapping[str, Any], claims: list[str]) -> str:
    """SHA-256 of what the backend compares: names, parameters, command, image and claims; no URI and no content."""
    inputs, outputs = executor_input["inputs"], executor_input["outputs"]
    key = {
        "inputs": {name: [part["name"] for part in found["artifacts"]] for name, found in inputs["artifacts"].items()},
        "parameters": inputs["parameterValues"],
        "outputs": {name: found["artifacts"][0]["type"] for name, found in outputs["artifacts"].items()},
        "output_parameters": sorted(outputs["parameters"]),
        "command": [*container["command"], *container["args"]],
        "image": container["image"],
        "claims": sorted(set(claims)),
        "environment": container.get("env", []),
    }
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
