"""Messages of the Open Inference Protocol over gRPC, made from the table below at run time.

They live in a pool of their own, not in protobuf's default one: clients of the protocol bring messages of the same
names, and two of a name cannot live in one pool. Field numbers are those of the protocol and of its repository,
configuration and statistics extensions; the two published forms of RepositoryModelLoad and -Unload differ in where the
name stands, so both fields are there.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import Message

SERVICE = "inference.GRPCInferenceService"
_PACKAGE = "inference"
_FIELD = descriptor_pb2.FieldDescriptorProto
_SCALARS = {
    "bool": _FIELD.TYPE_BOOL,
    "int32": _FIELD.TYPE_INT32,
    "int64": _FIELD.TYPE_INT64,
    "uint32": _FIELD.TYPE_UINT32,
    "uint64": _FIELD.TYPE_UINT64,
    "float": _FIELD.TYPE_FLOAT,
    "double": _FIELD.TYPE_DOUBLE,
    "string": _FIELD.TYPE_STRING,
    "bytes": _FIELD.TYPE_BYTES,
    "DataType": _FIELD.TYPE_ENUM,
}
# `[]` marks a repeated field, `{}` a map from text, `?` a member of the message's one choice.
_Fields: TypeAlias = dict[str, tuple[int, str]]
_NAME_AND_VERSION: _Fields = {"name": (1, "string"), "version": (2, "string")}
_TENSOR: _Fields = {"name": (1, "string"), "datatype": (2, "string"), "shape": (3, "int64[]")}
_INFER_TENSOR: _Fields = _TENSOR | {"parameters": (4, "InferParameter{}"), "contents": (5, "InferTensorContents")}
_LOAD: _Fields = {
    "repository_name": (1, "string"),
    "model_name": (2, "string"),
    "parameters": (3, "ModelRepositoryParameter{}"),
}
_MESSAGES: dict[str, _Fields] = {
    "ServerLiveRequest": {},
    "ServerLiveResponse": {"live": (1, "bool")},
    "ServerReadyRequest": {},
    "ServerReadyResponse": {"ready": (1, "bool")},
    "ModelReadyRequest": _NAME_AND_VERSION,
    "ModelReadyResponse": {"ready": (1, "bool")},
    "ServerMetadataRequest": {},
    "ServerMetadataResponse": {"name": (1, "string"), "version": (2, "string"), "extensions": (3, "string[]")},
    "ModelMetadataRequest": _NAME_AND_VERSION,
    "ModelMetadataResponse.TensorMetadata": _TENSOR,
    "ModelMetadataResponse": {
        "name": (1, "string"),
        "versions": (2, "string[]"),
        "platform": (3, "string"),
        "inputs": (4, "ModelMetadataResponse.TensorMetadata[]"),
        "outputs": (5, "ModelMetadataResponse.TensorMetadata[]"),
    },
    "InferParameter": {
        "bool_param": (1, "bool?"),
        "int64_param": (2, "int64?"),
        "string_param": (3, "string?"),
        "double_param": (4, "double?"),
        "uint64_param": (5, "uint64?"),
    },
    "InferTensorContents": {
        "bool_contents": (1, "bool[]"),
        "int_contents": (2, "int32[]"),
        "int64_contents": (3, "int64[]"),
        "uint_contents": (4, "uint32[]"),
        "uint64_contents": (5, "uint64[]"),
        "fp32_contents": (6, "float[]"),
        "fp64_contents": (7, "double[]"),
        "bytes_contents": (8, "bytes[]"),
    },
    "ModelInferRequest.InferInputTensor": _INFER_TENSOR,
    "ModelInferRequest.InferRequestedOutputTensor": {"name": (1, "string"), "parameters": (2, "InferParameter{}")},
    "ModelInferRequest": {
        "model_name": (1, "string"),
        "model_version": (2, "string"),
        "id": (3, "string"),
        "parameters": (4, "InferParameter{}"),
        "inputs": (5, "ModelInferRequest.InferInputTensor[]"),
        "outputs": (6, "ModelInferRequest.InferRequestedOutputTensor[]"),
        "raw_input_contents": (7, "bytes[]"),
    },
    "ModelInferResponse.InferOutputTensor": _INFER_TENSOR,
    "ModelInferResponse": {
        "model_name": (1, "string"),
        "model_version": (2, "string"),
        "id": (3, "string"),
        "parameters": (4, "InferParameter{}"),
        "outputs": (5, "ModelInferResponse.InferOutputTensor[]"),
        "raw_output_contents": (6, "bytes[]"),
    },
    "ModelConfigRequest": _NAME_AND_VERSION,
    "ModelInput": {
        "name": (1, "string"),
        "data_type": (2, "DataType"),
        "dims": (4, "int64[]"),
        "optional": (8, "bool"),
    },
    "ModelOutput": {"name": (1, "string"), "data_type": (2, "DataType"), "dims": (3, "int64[]")},
    "ModelVersionPolicy.Latest": {"num_versions": (1, "uint32")},
    "ModelVersionPolicy": {"latest": (1, "ModelVersionPolicy.Latest")},
    "ModelConfig": {
        "name": (1, "string"),
        "platform": (2, "string"),
        "version_policy": (3, "ModelVersionPolicy"),
        "max_batch_size": (4, "int32"),
        "input": (5, "ModelInput[]"),
        "output": (6, "ModelOutput[]"),
        "backend": (17, "string"),
    },
    "ModelConfigResponse": {"config": (1, "ModelConfig")},
    "ModelStatisticsRequest": _NAME_AND_VERSION,
    "StatisticDuration": {"count": (1, "uint64"), "ns": (2, "uint64")},
    "InferStatistics": {
        "success": (1, "StatisticDuration"),
        "fail": (2, "StatisticDuration"),
        "compute_input": (4, "StatisticDuration"),
        "compute_infer": (5, "StatisticDuration"),
        "compute_output": (6, "StatisticDuration"),
    },
    "ModelStatistics": {
        "name": (1, "string"),
        "version": (2, "string"),
        "last_inference": (3, "uint64"),
        "inference_count": (4, "uint64"),
        "execution_count": (5, "uint64"),
        "inference_stats": (6, "InferStatistics"),
    },
    "ModelStatisticsResponse": {"model_stats": (1, "ModelStatistics[]")},
    "RepositoryIndexRequest": {"repository_name": (1, "string"), "ready": (2, "bool")},
    "RepositoryIndexResponse.ModelIndex": {
        "name": (1, "string"),
        "version": (2, "string"),
        "state": (3, "string"),
        "reason": (4, "string"),
    },
    "RepositoryIndexResponse": {"models": (1, "RepositoryIndexResponse.ModelIndex[]")},
    "ModelRepositoryParameter": {
        "bool_param": (1, "bool?"),
        "int64_param": (2, "int64?"),
        "string_param": (3, "string?"),
        "bytes_param": (4, "bytes?"),
    },
    "RepositoryModelLoadRequest": _LOAD,
    "RepositoryModelLoadResponse": {"model_name": (1, "string"), "isLoaded": (2, "bool")},
    "RepositoryModelUnloadRequest": _LOAD,
    "RepositoryModelUnloadResponse": {"model_name": (1, "string"), "isUnloaded": (2, "bool")},
}
# Of the configuration extension.
DATA_TYPES = (
    "TYPE_INVALID",
    "TYPE_BOOL",
    *(f"TYPE_{kind}{size}" for kind in ("UINT", "INT") for size in (8, 16, 32, 64)),
    *("TYPE_FP16", "TYPE_FP32", "TYPE_FP64", "TYPE_STRING"),
)
METHODS = (
    "ServerLive",
    "ServerReady",
    "ModelReady",
    "ServerMetadata",
    "ModelMetadata",
    "ModelInfer",
    "ModelConfig",
    "ModelStatistics",
    "RepositoryIndex",
    "RepositoryModelLoad",
    "RepositoryModelUnload",
)


def message(name: str) -> type[Message]:
    """The class of a message of the protocol."""
    return _CLASSES[name]


def _file() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(name="lazydp/inference.proto", package=_PACKAGE, syntax="proto3")
    values = file.enum_type.add(name="DataType")
    for number, name in enumerate(DATA_TYPES):
        values.value.add(name=name, number=number)
    outer: dict[str, Any] = {}
    for name in sorted(_MESSAGES, key=lambda name: name.count(".")):
        within, _, own = name.rpartition(".")
        parent = outer[within].nested_type if within else file.message_type
        outer[name] = made = parent.add(name=own)
        for field, (number, kind) in _MESSAGES[name].items():
            _add_field(made, name, field, number, kind)
    return file


def _add_field(made: Any, owner: str, field: str, number: int, kind: str) -> None:
    plain = kind.rstrip("[]{}?")
    added = made.field.add(name=field, number=number, label=_FIELD.LABEL_OPTIONAL)
    if kind.endswith(("[]", "{}")):
        added.label = _FIELD.LABEL_REPEATED
    if kind.endswith("?"):
        if not made.oneof_decl:
            made.oneof_decl.add(name="parameter_choice")
        added.oneof_index = 0
    if kind.endswith("{}"):
        entry = made.nested_type.add(name=f"{field.capitalize()}Entry")
        entry.options.map_entry = True
        entry.field.add(name="key", number=1, label=_FIELD.LABEL_OPTIONAL, type=_FIELD.TYPE_STRING)
        _add_field(entry, owner, "value", 2, plain)
        added.type, added.type_name = _FIELD.TYPE_MESSAGE, f".{_PACKAGE}.{owner}.{entry.name}"
        return
    added.type = _SCALARS.get(plain, _FIELD.TYPE_MESSAGE)
    if added.type in (_FIELD.TYPE_MESSAGE, _FIELD.TYPE_ENUM):
        added.type_name = f".{_PACKAGE}.{plain}"


def _classes() -> dict[str, type[Message]]:
    pool = descriptor_pool.DescriptorPool()
    pool.Add(_file())
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}")) for name in _MESSAGES
    }


_CLASSES = _classes()
