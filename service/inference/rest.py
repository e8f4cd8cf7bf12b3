"""The protocol's requests and answers over HTTP: JSON, or JSON with tensors as bytes behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter

from lazydp.service import schemas
from lazydp.service.conditions import MAX_ID, Text
from lazydp.service.http.problems import Problem, unprocessable
from lazydp.service.http.request_body import parse_bytes
from lazydp.service.inference.call import OUTPUTS, Call, InferParameters, parse_parameters
from lazydp.service.inference.tensors import Datatype, Tensor, check_values, flatten, from_raw, to_raw

# Where tensors follow as bytes, the length of the JSON before them.
HEADER = b"inference-header-content-length"
_MAX_INPUTS = 64


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class InputParameters(_Message):
    """Of one input tensor."""

    binary_data_size: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="bytes of the tensor behind the JSON, in the order of the inputs"
    )


class InferInput(_Message):
    """One input tensor of B rows: `user_id` [B] or [B, 1]; `history`, `exclude`, `candidates` and `similar_to` [B, n],
    where "" fills short rows; `history_weights` and `similar_weights` of the same shape; `cursor` [B]; any user or
    context feature of the model by its name."""

    name: Text
    shape: Annotated[list[schemas.Extent], Field(min_length=1, max_length=2)]
    datatype: Datatype
    parameters: InputParameters = InputParameters()
    data: Annotated[list[Any], Field(max_length=schemas.MAX_BATCH * schemas.MAX_ITEMS)] | None = None


class OutputParameters(_Message):
    """Of one output tensor."""

    binary_data: bool = Field(default=False, description="send it as bytes behind the JSON")


class RequestedOutput(_Message):
    """One output tensor that is wanted."""

    name: Text
    parameters: OutputParameters = OutputParameters()


class InferRequest(_Message):
    """Open Inference Protocol: a request of B rows. What is not known is refused."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "inputs": [{"name": "user_id", "shape": [2], "datatype": "BYTES", "data": ["196", "22"]}],
                    "parameters": {"k": 5},
                    "outputs": [{"name": "item_id"}, {"name": "source"}],
                }
            ]
        },
    )

    id: Annotated[str, Field(max_length=MAX_ID)] | None = None
    model_name: Annotated[str, Field(max_length=MAX_ID)] | None = Field(
        default=None, description="some clients repeat it here; the path decides"
    )
    inputs: Annotated[list[InferInput], Field(fail_fast=True, min_length=1, max_length=_MAX_INPUTS)]
    parameters: Annotated[InferParameters, BeforeValidator(parse_parameters)] = InferParameters()
    outputs: Annotated[list[RequestedOutput], Field(max_length=len(OUTPUTS))] = Field(
        default_factory=list, description=f"of {', '.join(OUTPUTS)}; left out: item_id, score and source"
    )


class InferOutput(BaseModel):
    """Open Inference Protocol: one output tensor."""

    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, int] | None = None
    data: list[Any] | None = None


class InferResponse(BaseModel):
    """Open Inference Protocol: B rows of `k` items, best first; rows with fewer end in "" and the lowest float.

    `source` says for each row what it rests on; a score is comparable with others of the same row only.
    """

    model_config = ConfigDict(protected_namespaces=())

    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[InferOutput]


_REQUEST = TypeAdapter(InferRequest)


def read(headers: Mapping[bytes, bytes], body: bytes) -> Call:
    """The call that a request is.

    Raises:
        Problem: 400 for what is no JSON or where lengths do not fit together, 422 for what is not valid.
    """
    given = headers.get(HEADER)
    length = len(body) if given is None else _length(given, len(body))
    request = parse_bytes(body[:length], _REQUEST)
    raw = memoryview(body)[length:]
    inputs = []
    for number, part in enumerate(request.inputs):
        size = part.parameters.binary_data_size
        if size is not None and size > len(raw):
            raise Problem(400, "binary-data", f"input {number}: fewer bytes follow the JSON than its binary_data_size")
        inputs.append(_tensor(number, part, None if size is None else bytes(raw[:size])))
        raw = raw[size or 0 :]
    if len(raw):
        raise Problem(400, "binary-data", f"{len(raw)} bytes follow the tensors of the request")
    outputs = [(part.name, part.parameters.binary_data) for part in request.outputs]
    return Call(request.id, inputs, request.parameters, outputs)


def _length(given: bytes, available: int) -> int:
    if not given.isdigit() or len(given) > 12 or int(given) > available:
        detail = "Inference-Header-Content-Length: expected the length of the JSON at the start of the body"
        raise Problem(400, "binary-data", detail)
    return int(given)


def _tensor(number: int, part: InferInput, raw: bytes | None) -> Tensor:
    if (raw is None) == (part.data is None):
        raise unprocessable([(f"/inputs/{number}", "expected either data or parameters.binary_data_size")])
    try:
        values = flatten(part.data or [], part.shape) if raw is None else from_raw(raw, part.datatype, part.shape)
        check_values(values, part.datatype)
    except ValueError as error:
        raise unprocessable([(f"/inputs/{number}/data", str(error))]) from None
    return Tensor(part.name, part.datatype, tuple(part.shape), values)


def write(
    *, model: str, version: str, call_id: str | None, outputs: Sequence[tuple[Tensor, bool]]
) -> tuple[bytes, int | None]:
    """An answer.

    Args:
        model: name that was asked for.
        version: that answered.
        call_id: the caller's name for the call.
        outputs: tensors, and whether each goes as bytes.

    Returns:
        The body, and the length of its JSON where bytes follow it.
    """
    raws: list[bytes] = []
    described: list[dict[str, Any]] = []
    for tensor, as_bytes in outputs:
        about: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape}
        if as_bytes:
            raws.append(to_raw(tensor))
            about["parameters"] = {"binary_data_size": len(raws[-1])}
        else:
            about["data"] = tensor.values
        described.append(about)
    document = {"model_name": model, "model_version": version, "outputs": described}
    head = orjson.dumps(document if call_id is None else {**document, "id": call_id})
    return (b"".join([head, *raws]), len(head)) if raws else (head, None)
