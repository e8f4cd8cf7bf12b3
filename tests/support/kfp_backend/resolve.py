"""What the driver does: the value of each input of a task, and the text that the launcher puts into a command."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_CHANNEL = re.compile(r"\{\{\$.inputs.parameters\['([^']+)'\]\}\}")


class DriverError(Exception):
    """The backend refuses the task before a pod starts."""


@dataclass(frozen=True)
class Job:
    """What placeholders of a run stand for."""

    run_id: str
    name: str
    display_name: str
    created: str


def constant(text: Any, task_name: str, job: Job, channels: Mapping[str, Any]) -> Any:
    """A constant as the driver gives it to the task: placeholders count only where they are the whole of it."""
    if not isinstance(text, str):
        return text
    known = {
        "{{$.pipeline_job_uuid}}": job.run_id,
        "{{$.pipeline_job_name}}": job.display_name,
        "{{$.pipeline_job_resource_name}}": job.name,
        "{{$.pipeline_job_create_time_utc}}": job.created,
        "{{$.pipeline_job_schedule_time_utc}}": job.created,
        "{{$.pipeline_task_name}}": task_name,
    }
    found = known.get(text, text)
    channel = _CHANNEL.search(found)
    if channel is not None and channel[1].startswith("pipelinechannel--"):
        if channel[1] not in channels:
            raise DriverError(f"pipeline channel {found} not found in task {task_name}")
        return channels[channel[1]]
    return found


def checked(name: str, declared: Mapping[str, Any], value: Any) -> Any:
    """The value as the component's declared type demands.

    Raises:
        DriverError: it is of another type.
    """
    kind = declared["parameterType"]
    if kind == "STRING":
        return value if isinstance(value, str) else json.dumps(value)
    expected: dict[str, type | tuple[type, ...]] = {
        "NUMBER_DOUBLE": (int, float),
        "NUMBER_INTEGER": (int, float),
        "BOOLEAN": bool,
        "LIST": list,
        "STRUCT": dict,
        "TASK_FINAL_STATUS": dict,
    }
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not isinstance(value, expected[kind]) or (kind.startswith("NUMBER") and not number):
        raise DriverError(f"input parameter {name!r} type mismatch: expect {kind}, got {type(value).__name__}")
    return value


def protojson(value: Any) -> Any:
    """What a value becomes on its way through a protobuf Value and Go's protojson: every number is a double."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return value
    if isinstance(value, int | float):
        double = float(value)
        return int(double) if double.is_integer() and abs(double) < 1e21 else double
    if isinstance(value, Mapping):
        return {str(key): protojson(inner) for key, inner in value.items()}
    return [protojson(inner) for inner in value]


def replaced(arguments: list[str], executor_input: Mapping[str, Any]) -> list[str]:
    """The command with placeholders replaced by text, `{{$}}` first.

    The launcher walks a Go map, in any order; this one is the order in which a placeholder inside a value does harm.
    """
    inputs = executor_input["inputs"]
    placeholders = {"{{$}}": json.dumps(executor_input)}
    for name, value in inputs["parameterValues"].items():
        text = value if isinstance(value, str) else json.dumps(value)
        placeholders[f"{{{{$.inputs.parameters['{name}']}}}}"] = text
    for name, artifacts in inputs["artifacts"].items():
        placeholders[f"{{{{$.inputs.artifacts['{name}'].uri}}}}"] = artifacts["artifacts"][0]["uri"]
    found = []
    for argument in arguments:
        for placeholder, text in placeholders.items():
            argument = argument.replace(placeholder, text)  # noqa: PLW2901 - each replacement works on the last
        found.append(argument)
    return found


def after_argo(text: str, job: Job) -> str:
    """What Argo Workflows makes of text in a template's parameters: its own tags are replaced, wherever they stand.

    Raises:
        DriverError: an expression tag, which Argo would evaluate.
    """
    if "{{=" in text:
        raise DriverError("failed to evaluate expression: a parameter holds Argo's expression tag {{=")
    return text.replace("{{workflow.name}}", job.name).replace("{{workflow.uid}}", job.run_id)
