"""Inference calls of gRPC: messages to calls, and answers to messages."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from lazydp.service import schemas
from lazydp.service.http.problems import unprocessable
from lazydp.service.inference.call import OUTPUTS, Call, parse_parameters
from lazydp.service.inference.grpc_messages import message
from lazydp.service.inference.infer import Answer
from lazydp.service.inference.tensors import DATATYPES, Tensor, check_values, from_raw, to_raw

_MOST_EXTENTS = 2
# Parameters of one tensor that clients send as they do over HTTP; here every tensor goes as bytes.
_OF_INPUT, _OF_OUTPUT = "binary_data_size", "binary_data"
# Where the values of a datatype stand.
_CONTENTS = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    "INT64": "int64_contents",
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


def read(request: Any) -> Call:
    """The call that a ModelInferRequest is.

    Raises:
        Problem: 422 for what is not valid.
    """
    if len(request.inputs) > len(OUTPUTS) + schemas.MAX_BATCH:
        raise unprocessable([("/inputs", "too many inputs")])
    raws = list(request.raw_input_contents)
    if raws and len(raws) != len(request.inputs):
        raise unprocessable([("/raw_input_contents", f"expected one for each of {len(request.inputs)} inputs")])
    inputs = [_tensor(number, part, raws[number] if raws else None) for number, part in enumerate(request.inputs)]
    if not inputs:
        raise unprocessable([("/inputs", "expected at least one")])
    for kind, parts, known in (("inputs", request.inputs, _OF_INPUT), ("outputs", request.outputs, _OF_OUTPUT)):
        for number, part in enumerate(parts):
            _check_known(f"/{kind}/{number}/parameters", part.parameters, known)
    outputs = [(part.name, True) for part in request.outputs]
    return Call(request.id or None, inputs, parse_parameters(parameters(request.parameters)), outputs)


def _check_known(where: str, given: Iterable[str], known: str) -> None:
    if not set(given) <= {known}:
        raise unprocessable([(where, f"there is no such parameter; there is: {known}")])


def parameters(given: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of a message by name, whatever kind of value each has."""
    return {
        name: getattr(value, value.WhichOneof("parameter_choice") or "string_param") for name, value in given.items()
    }


def _tensor(number: int, part: Any, raw: bytes | None) -> Tensor:
    where = f"/inputs/{number}"
    shape = tuple(part.shape)
    if not 1 <= len(shape) <= _MOST_EXTENTS or not all(0 <= extent <= schemas.MAX_ITEMS for extent in shape):
        raise unprocessable([(where, f"expected one or two extents from 0 to {schemas.MAX_ITEMS}")])
    if part.datatype not in DATATYPES:
        raise unprocessable([(where, f"there is no such datatype; there are: {', '.join(DATATYPES)}")])
    try:
        values = from_raw(raw, part.datatype, shape) if raw is not None else _contents(part, math.prod(shape))
        check_values(values, part.datatype)
    except ValueError as error:
        raise unprocessable([(where, str(error))]) from None
    return Tensor(part.name, part.datatype, shape, values)


def _contents(part: Any, count: int) -> list[Any]:
    field = _CONTENTS.get(part.datatype)
    if field is None:
        raise ValueError(f"send {part.datatype} as raw_input_contents")
    values = list(getattr(part.contents, field))
    if len(values) != count:
        raise ValueError(f"expected {count} values in {field}, found {len(values)}")
    if part.datatype != "BYTES":
        return values
    try:
        return [value.decode() for value in values]
    except UnicodeDecodeError:
        raise ValueError("expected UTF-8 text") from None


def write(name: str, answer: Answer) -> Any:
    """The ModelInferResponse of an answer; every tensor goes as bytes."""
    described = [
        message("ModelInferResponse.InferOutputTensor")(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        for tensor, _ in answer.outputs
    ]
    return message("ModelInferResponse")(
        model_name=name,
        model_version=answer.served.version,
        id=answer.call_id or "",
        outputs=described,
        raw_output_contents=[to_raw(tensor) for tensor, _ in answer.outputs],
    )
