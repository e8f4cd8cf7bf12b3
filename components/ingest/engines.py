"""The engines by name."""

from __future__ import annotations

from typing import Literal

from lazydp.components.ingest.job import Engine
from lazydp.components.ingest.ray_engine import RayEngine
from lazydp.components.ingest.spark_engine import SparkEngine
from lazydp.components.ingest.workers import cores
from lazydp.components.shared.errors import InputError

EngineName = Literal["local", "ray", "spark"]


def engine_named(name: EngineName, *, cluster: str | None = None, workers: int | None = None) -> Engine | None:
    """The engine of a name; None for `local`, which is `ingest` itself.

    Args:
        name: see `EngineName`.
        cluster: address of a cluster that runs already; None: workers of this machine.
        workers: workers of this machine; all cores where None.

    Raises:
        InputError: an option that the engine lacks.
    """
    if cluster is not None and name == "local":
        raise InputError("--cluster is for --engine ray or spark: the engine local works on this machine")
    if cluster is not None and workers is not None:
        raise InputError("--workers is for workers of this machine: a cluster has those that it has")
    match name:
        case "local":
            return None
        case "ray":
            return RayEngine(cluster, workers or cores())
        case "spark":
            return SparkEngine(cluster, workers or cores())
