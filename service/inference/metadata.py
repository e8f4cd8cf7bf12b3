"""What a model takes and answers with, its configuration and its statistics, as documents of the protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pydantic import BaseModel, ConfigDict

from lazydp.components.shared.version import release
from lazydp.service import schemas
from lazydp.service.inference.call import ONE_A_ROW, OUTPUTS, REASONS, feature_inputs
from lazydp.service.inference.tensors import Datatype
from lazydp.service.serving.served_version import ServedVersion

PLATFORM = "lazydp"
EXTENSIONS = ["model_repository", "model_configuration", "binary_tensor_data", "statistics"]
_ANY = -1


class _Document(BaseModel):
    model_config = ConfigDict(protected_namespaces=())


class ServerMetadata(_Document):
    """Open Inference Protocol: the server."""

    name: str
    version: str
    extensions: list[str]


class TensorMetadata(_Document):
    """Open Inference Protocol: one input or output; -1 stands for any extent."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(_Document):
    """Open Inference Protocol: a model."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class TensorConfig(_Document):
    """Model configuration extension: one output of a row; -1 stands for any extent."""

    name: str
    data_type: str
    dims: list[int]


class InputConfig(TensorConfig):
    """Model configuration extension: one input of a row; -1 stands for any extent."""

    optional: bool


class VersionPolicy(_Document):
    """Model configuration extension: the latest version alone is served."""

    latest: dict[str, int] = {"num_versions": 1}


class ModelConfig(_Document):
    """Model configuration extension: a model."""

    name: str
    platform: str
    backend: str
    version_policy: VersionPolicy
    max_batch_size: int
    input: list[InputConfig]
    output: list[TensorConfig]


class StatisticDuration(_Document):
    """Statistics extension: so many, and nanoseconds they took together."""

    count: int
    ns: int


class InferenceStatistics(_Document):
    """Statistics extension: durations. The wait for other calls is part of compute_infer."""

    success: StatisticDuration
    fail: StatisticDuration
    compute_input: StatisticDuration
    compute_infer: StatisticDuration
    compute_output: StatisticDuration


class ModelStatistics(_Document):
    """Statistics extension: inference calls of one version of a model since it was loaded."""

    name: str
    version: str
    last_inference: int
    inference_count: int
    execution_count: int
    inference_stats: InferenceStatistics


class ServerStatistics(_Document):
    """Statistics extension: of every model, or of the one asked for."""

    model_stats: list[ModelStatistics]


def server_metadata() -> ServerMetadata:
    """Name, version and extensions."""
    return ServerMetadata(name="lazydp", version=release(), extensions=EXTENSIONS)


def model_metadata(name: str, served: ServedVersion, *, versions: Sequence[str] = ()) -> ModelMetadata:
    """Inputs and outputs of a model under the name that was asked for, with all the `versions` that answer to it."""
    return ModelMetadata(
        name=name,
        versions=list(versions) or [served.version],
        platform=PLATFORM,
        inputs=[
            TensorMetadata(name=tensor, datatype=datatype, shape=[_ANY, *dims])
            for tensor, datatype, dims in _inputs(served)
        ],
        outputs=[
            TensorMetadata(name=tensor, datatype=datatype, shape=[_ANY, *dims]) for tensor, datatype, dims in _outputs()
        ],
    )


def model_config(name: str, served: ServedVersion) -> ModelConfig:
    """Configuration of a model under the name that was asked for."""
    return ModelConfig(
        name=name,
        platform=PLATFORM,
        backend=PLATFORM,
        version_policy=VersionPolicy(),
        max_batch_size=schemas.MAX_BATCH,
        input=[
            InputConfig(name=tensor, data_type=_config_type(datatype), dims=dims or [1], optional=True)
            for tensor, datatype, dims in _inputs(served)
        ],
        output=[
            TensorConfig(name=tensor, data_type=_config_type(datatype), dims=dims or [1])
            for tensor, datatype, dims in _outputs()
        ],
    )


def statistics(served: ServedVersion) -> ModelStatistics:
    """Statistics of one version."""
    counted = served.statistics
    return ModelStatistics(
        name=served.name,
        version=served.version,
        last_inference=counted.last_inference,
        inference_count=counted.inference_count,
        execution_count=counted.compute_infer.count,
        inference_stats=InferenceStatistics.model_validate(
            {name: asdict(getattr(counted, name)) for name in InferenceStatistics.model_fields}
        ),
    )


def _inputs(served: ServedVersion) -> list[tuple[str, Datatype, list[int]]]:
    """Name, datatype and extents of a row of every input."""
    own: list[tuple[str, Datatype, list[int]]] = [
        ("user_id", "BYTES", []),
        ("history", "BYTES", [_ANY]),
        ("exclude", "BYTES", [_ANY]),
        ("candidates", "BYTES", [_ANY]),
        ("similar_to", "BYTES", [_ANY]),
        ("history_weights", "FP32", [_ANY]),
        ("similar_weights", "FP32", [_ANY]),
        ("cursor", "BYTES", []),
    ]
    features = feature_inputs(served.scorer).items()
    return own + [(name, datatype, [_ANY] if several else []) for name, (datatype, several) in features]


def _outputs() -> list[tuple[str, Datatype, list[int]]]:
    extents: dict[str, list[Any]] = {name: [] for name in ONE_A_ROW} | {"because": [_ANY, REASONS]}
    return [(name, datatype, extents.get(name, [_ANY])) for name, datatype in OUTPUTS.items()]


def _config_type(datatype: Datatype) -> str:
    return "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"
