"""One inference call, however it came: its tensors to queries, and rankings to tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import orjson
from pydantic import Field, TypeAdapter, ValidationError

from lazydp.components.bundle.query import Query, Ranking, Scalar
from lazydp.components.bundle.scoring.base import Scorer
from lazydp.components.features.spec import DenseFeature, ListFeature
from lazydp.service import schemas
from lazydp.service.http.problems import invalid, unprocessable
from lazydp.service.inference.tensors import FLOATS, INTEGERS, Datatype, Tensor, Value
from lazydp.service.serving.served_version import ServedVersion

# Inputs that every model takes; a feature of such a name is asked for as `features.NAME`.
_OWN_INPUTS = ("user_id", "history", "exclude", "candidates")
_FEATURES = "features."
_REASONS = 3
# Where a row has fewer items than `k`.
_NO_SCORE = -3.4028234663852886e38
_LAST_PAGE = -1


# Parameters of the protocol are text, numbers and booleans; these may come as their JSON text.
_OF_SEVERAL_VALUES = ("exclude", "candidates", "filters", "diversity")


class InferParameters(schemas.QueryOptions):
    """Parameters of a request, the same for every row. A list or an object may be given as its JSON text."""

    binary_data_output: bool = Field(default=False, description="send every output as bytes behind the JSON")


_PARAMETERS = TypeAdapter(InferParameters)


@dataclass(frozen=True, slots=True)
class Call:
    """What a caller asks for.

    Attributes:
        id: the caller's name for the call; comes back with the answer.
        inputs: tensors, all of as many rows.
        parameters: of the request.
        outputs: names of the tensors wanted, with whether each is sent as bytes; empty for the usual ones.
    """

    id: str | None
    inputs: Sequence[Tensor]
    parameters: InferParameters
    outputs: Sequence[tuple[str, bool]] = ()


def parse_parameters(given: Any) -> InferParameters:
    """Parameters as they came.

    Raises:
        Problem: 422 for one that is not known or not valid.
    """
    if isinstance(given, InferParameters):
        return given
    if not isinstance(given, dict):
        raise unprocessable([("/parameters", "expected an object")])
    # Once more as JSON, since strict pydantic reads nothing but JSON as objects.
    members = [f"{json.dumps(str(name))}:{_member(name, value)}" for name, value in given.items()]
    try:
        return _PARAMETERS.validate_json("{" + ",".join(members) + "}")
    except ValidationError as error:
        raise invalid(error, prefix="/parameters") from None


def _member(name: str, value: object) -> str:
    if name not in _OF_SEVERAL_VALUES or not isinstance(value, str):
        return json.dumps(value)
    try:
        orjson.loads(value)
    except orjson.JSONDecodeError:
        raise unprocessable([(f"/parameters/{name}", "expected JSON, or its text")]) from None
    return value


def queries_of(served: ServedVersion, call: Call) -> list[Query]:
    """One query for each row.

    Raises:
        Problem: 422 for a tensor that the model does not take, or whose shape or values do not fit.
    """
    rows = _rows(call.inputs)
    options = call.parameters
    if rows * options.k > schemas.MAX_BATCH_ITEMS:
        raise unprocessable([("/parameters/k", f"rows times k may be {schemas.MAX_BATCH_ITEMS} at most")])
    columns = {"user_id": [()] * rows, "history": [()] * rows} | {
        tensor.name: _by_row(tensor, rows) for tensor in call.inputs
    }
    features = _features(served, call.inputs, columns, rows)
    common = options.asked()
    exclude, candidates = columns.get("exclude"), columns.get("candidates")
    return [
        replace(
            common,
            user_id=_only(columns["user_id"][row]),
            history=columns["history"][row],
            features=features[row],
            exclude=common.exclude if exclude is None else [*common.exclude, *exclude[row]],
            candidates=common.candidates if candidates is None else [*(common.candidates or ()), *candidates[row]],
        )
        for row in range(rows)
    ]


def _rows(inputs: Sequence[Tensor]) -> int:
    names = [tensor.name for tensor in inputs]
    if len(set(names)) < len(names):
        raise unprocessable([("/inputs", "each input comes once")])
    rows = {tensor.shape[0] for tensor in inputs}
    if len(rows) != 1 or not 1 <= max(rows) <= schemas.MAX_BATCH:
        raise unprocessable([("/inputs", f"expected equally many rows of every input, 1 to {schemas.MAX_BATCH}")])
    return rows.pop()


def _by_row(tensor: Tensor, rows: int) -> list[Sequence[Any]]:
    """Ids of each row; "" fills short rows."""
    if tensor.name not in _OWN_INPUTS:
        return []
    where = f"/inputs/{tensor.name}"
    width = math.prod(tensor.shape[1:])
    limit = {"user_id": 1, "history": schemas.MAX_HISTORY}.get(tensor.name, schemas.MAX_ITEMS)
    if (tensor.name == "user_id" and width != 1) or width > limit:
        raise unprocessable([(where, f"expected {'one value' if limit == 1 else f'up to {limit} values'} a row")])
    if tensor.datatype != "BYTES" and tensor.datatype not in INTEGERS:
        raise unprocessable([(where, f"ids are BYTES or integers, found {tensor.datatype}")])
    texts = [str(value) for value in tensor.values]
    if any(len(text) > schemas.MAX_ID for text in texts):
        raise unprocessable([(where, f"an id may have up to {schemas.MAX_ID} characters")])
    return [[text for text in texts[row * width : (row + 1) * width] if text] for row in range(rows)]


def _only(values: Sequence[str]) -> str | None:
    return values[0] if values else None


def _features(
    served: ServedVersion, inputs: Sequence[Tensor], columns: Mapping[str, object], rows: int
) -> list[dict[str, Scalar | Sequence[Scalar]]]:
    found: list[dict[str, Scalar | Sequence[Scalar]]] = [{} for _ in range(rows)]
    kinds = feature_inputs(served.scorer)
    for tensor in inputs:
        if tensor.name in _OWN_INPUTS:
            continue
        name = tensor.name if tensor.name in kinds else _FEATURES + tensor.name
        if name not in kinds:
            name = tensor.name.removeprefix(_FEATURES)
        if name not in kinds:
            known = ", ".join([*_OWN_INPUTS, *kinds])
            raise unprocessable([("/inputs", f"the model takes no such input; it takes: {known}")])
        for row, value in enumerate(_feature_values(tensor, kinds[name])):
            if value not in (None, []):
                found[row][name.removeprefix(_FEATURES)] = value
    return found


def _feature_values(tensor: Tensor, datatypes: tuple[Datatype, bool]) -> list[Any]:
    """Value or values of each row; "" is none."""
    datatype, several = datatypes
    where = f"/inputs/{tensor.name}"
    width = math.prod(tensor.shape[1:])
    if (width != 1 and not several) or width > schemas.MAX_HISTORY:
        raise unprocessable(
            [(where, f"expected {f'up to {schemas.MAX_HISTORY} values' if several else 'one value'} a row")]
        )
    if datatype in FLOATS and tensor.datatype == "BYTES":
        raise unprocessable([(where, "expected numbers, found BYTES")])
    values = [None if value == "" else value for value in tensor.values]
    if any(isinstance(value, str) and len(value) > schemas.MAX_TEXT for value in values):
        raise unprocessable([(where, f"a value may have up to {schemas.MAX_TEXT} characters")])
    if not several:
        return values
    rows = (
        [values[start : start + width] for start in range(0, len(values), width)] if width else [[]] * tensor.shape[0]
    )
    return [[value for value in row if value is not None] for row in rows]


def feature_inputs(scorer: Scorer) -> dict[str, tuple[Datatype, bool]]:
    """Feature tensors that a model takes: name of the input -> datatype, and whether a row has several values."""
    found: dict[str, tuple[Datatype, bool]] = {}
    for feature in scorer.bundle.spec.features:
        if feature.name in scorer.encoder.features:
            name = _FEATURES + feature.name if feature.name in _OWN_INPUTS else feature.name
            found[name] = ("FP32" if isinstance(feature, DenseFeature) else "BYTES", isinstance(feature, ListFeature))
    return found


# What an answer may hold, what it holds where nothing is said, and what it holds besides where reasons are asked for.
OUTPUTS: dict[str, Datatype] = {
    "item_id": "BYTES",
    "score": "FP32",
    "source": "BYTES",
    "title": "BYTES",
    "because": "BYTES",
    "next_offset": "INT64",
}
_USUAL = ("item_id", "score", "source")


def wanted_outputs(call: Call) -> list[tuple[str, bool]]:
    """Names of the outputs to send, with whether each goes as bytes.

    Raises:
        Problem: 422 for a name that there is not, or one named twice.
    """
    binary = call.parameters.binary_data_output
    if not call.outputs:
        usual = [*_USUAL, "because"] if call.parameters.explain else _USUAL
        return [(name, binary) for name in usual]
    names = [name for name, _ in call.outputs]
    if not set(names) <= OUTPUTS.keys():
        raise unprocessable([("/outputs", f"there is no such output; there are: {', '.join(OUTPUTS)}")])
    if len(set(names)) < len(names):
        raise unprocessable([("/outputs", "each output is named once")])
    return [(name, as_bytes or binary) for name, as_bytes in call.outputs]


def output(name: str, served: ServedVersion, call: Call, rankings: Sequence[Ranking]) -> Tensor:
    """One tensor of the answer; rows with fewer items than `k` end in "" and the lowest score."""
    k, offset = call.parameters.k, call.parameters.offset
    items = served.scorer.items
    values: list[Value] = []
    shape: tuple[int, ...] = (len(rankings), k)
    for ranking in rankings:
        fill = k - len(ranking.codes)
        match name:
            case "item_id":
                values += [*(items.ids[code - 1] for code in ranking.codes), *[""] * fill]
            case "score":
                values += [*ranking.scores.tolist(), *[_NO_SCORE] * fill]
            case "title":
                values += [*(items.title(code) or "" for code in ranking.codes), *[""] * fill]
            case "because":
                shape = (len(rankings), k, _REASONS)
                reasons = [*ranking.reasons, *[()] * (k - len(ranking.reasons))]
                for near in reasons:
                    values += [*(items.ids[code - 1] for code in near), *[""] * (_REASONS - len(near))]
            case "source":
                shape = (len(rankings),)
                values.append(ranking.source)
            case "next_offset":
                shape = (len(rankings),)
                values.append(offset + len(ranking.codes) if ranking.more else _LAST_PAGE)
    return Tensor(name, OUTPUTS[name], shape, values)
