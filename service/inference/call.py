"""One inference call, however it came: its tensors to queries, and rankings to tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import orjson
from pydantic import Field, TypeAdapter, ValidationError

from lazydp.components.bundle.items import ItemTable
from lazydp.components.bundle.query import Query, Ranking, Scalar
from lazydp.components.bundle.scoring.base import Scorer
from lazydp.components.features.spec import DenseFeature, ListFeature
from lazydp.service import schemas
from lazydp.service.conditions import MAX_ID
from lazydp.service.http.problems import invalid, unprocessable
from lazydp.service.inference.tensors import FLOATS, INTEGERS, Datatype, Tensor, Value
from lazydp.service.serving import cursors
from lazydp.service.serving.ranker import Ranker
from lazydp.service.serving.served_version import ServedVersion

# Inputs that every model takes; a feature of such a name is asked for as `features.NAME`.
_WEIGHTS = {"history_weights": "history", "similar_weights": "similar_to"}
_IDS = ("user_id", "history", "exclude", "candidates", "similar_to")
_CURSOR = "cursor"
_OWN_INPUTS = (*_IDS, *_WEIGHTS, _CURSOR)
_FEATURES = "features."
# Where a row has fewer items than `k`.
_NO_SCORE = -3.4028234663852886e38
_LAST_PAGE = -1


# Parameters of the protocol are text, numbers and booleans; these may come as their JSON text.
_OF_SEVERAL_VALUES = (
    "exclude",
    "exclude_lists",
    "candidates",
    "candidate_lists",
    "filters",
    "boosts",
    "diversity",
    "similar_to",
    "similar_weights",
)


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


def queries_of(ranker: Ranker, call: Call) -> list[Query]:
    """One query for each row.

    Raises:
        Problem: 422 for a tensor that the model does not take, or whose shape or values do not fit; 409 for a cursor of
            another query or version.
    """
    rows = _rows(call.inputs)
    options = call.parameters
    if rows * options.k > schemas.MAX_BATCH_ITEMS:
        raise unprocessable([("/parameters/k", f"rows times k may be {schemas.MAX_BATCH_ITEMS} at most")])
    columns = row_values(call.inputs, rows)
    features = _features(ranker.served, call.inputs, columns, rows)
    common = options.asked()
    begins = columns.get(_CURSOR)
    found = []
    for row in range(rows):
        own = {name: values[row] for name, values in columns.items()}
        query = replace(common, features=features[row], **_asked_by_row(common, own))
        if query.similar_to and (query.user_id is not None or query.history or query.features):
            raise unprocessable([("/inputs", "expected either similar_to, or a person: user_id, history, features")])
        cursor = options.cursor if begins is None else "".join(begins[row])
        query = replace(query, alone=cursor is not None)
        found.append(cursors.placed(ranker.identity, query, cursor, pointer=f"/{_CURSOR}"))
    return found


def key_of(call: Call) -> str | None:
    """What decides, where several versions share calls, which of them answers: `split_key`, or the only user."""
    if call.parameters.split_key is not None:
        return str(call.parameters.split_key)
    users = next((tensor.values for tensor in call.inputs if tensor.name == "user_id"), ())
    return str(users[0]) or None if len(users) == 1 else None


def _asked_by_row(common: Query, own: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """What a row's own values, by input, change in the query that all rows have in common."""
    changed: dict[str, Any] = {"user_id": _only(own.get("user_id", ())), "history": own.get("history", ())}
    if "exclude" in own:
        changed["exclude"] = [*common.exclude, *own["exclude"]]
    if "candidates" in own:
        changed["candidates"] = [*(common.candidates or ()), *own["candidates"]]
    if own.get("similar_to"):
        changed |= {"similar_to": own["similar_to"], "similar_weights": None}
    return changed | {name: own[name] for name in _WEIGHTS if own.get(name)}


def _rows(inputs: Sequence[Tensor]) -> int:
    names = [tensor.name for tensor in inputs]
    if len(set(names)) < len(names):
        raise unprocessable([("/inputs", "each input comes once")])
    rows = {tensor.shape[0] for tensor in inputs}
    if len(rows) != 1 or not 1 <= max(rows) <= schemas.MAX_BATCH:
        raise unprocessable([("/inputs", f"expected equally many rows of every input, 1 to {schemas.MAX_BATCH}")])
    return rows.pop()


def row_values(inputs: Sequence[Tensor], rows: int) -> dict[str, list[Sequence[Any]]]:
    """Ids, weights and cursors of each row, by the name of the input; "" fills short rows."""
    tensors = {tensor.name: tensor for tensor in inputs if tensor.name in _OWN_INPUTS}
    texts = {name: _texts(tensor) for name, tensor in tensors.items() if name not in _WEIGHTS}
    columns: dict[str, list[Sequence[Any]]] = {
        name: [[text for text in row if text] for row in _split(values, rows)] for name, values in texts.items()
    }
    for name, of in _WEIGHTS.items():
        if name in tensors:
            columns[name] = _weights(tensors[name], tensors.get(of), texts.get(of, []), rows)
    return columns


def _split(values: Sequence[Any], rows: int) -> list[Sequence[Any]]:
    width = len(values) // rows
    return [values[start : start + width] for start in range(0, width * rows, width)] if width else [()] * rows


def _texts(tensor: Tensor) -> list[str]:
    where = f"/inputs/{tensor.name}"
    width = math.prod(tensor.shape[1:])
    limit = {"user_id": 1, _CURSOR: 1, "exclude": schemas.MAX_ITEMS, "candidates": schemas.MAX_ITEMS}.get(
        tensor.name, schemas.MAX_HISTORY
    )
    if (limit == 1 and width != 1) or width > limit:
        raise unprocessable([(where, f"expected {'one value' if limit == 1 else f'up to {limit} values'} a row")])
    if tensor.datatype != "BYTES" and tensor.datatype not in INTEGERS:
        raise unprocessable([(where, f"ids are BYTES or integers, found {tensor.datatype}")])
    texts = [str(value) for value in tensor.values]
    longest = schemas.MAX_TEXT if tensor.name == _CURSOR else MAX_ID
    if any(len(text) > longest for text in texts):
        raise unprocessable([(where, f"an id may have up to {longest} characters")])
    return texts


def _weights(tensor: Tensor, ids: Tensor | None, texts: Sequence[str], rows: int) -> list[Sequence[Any]]:
    """The weights of the ids of each row."""
    where = f"/inputs/{tensor.name}"
    if ids is None or tensor.shape != ids.shape:
        raise unprocessable([(where, f"expected the input {_WEIGHTS[tensor.name]}, and the same shape")])
    if tensor.datatype not in FLOATS and tensor.datatype not in INTEGERS:
        raise unprocessable([(where, f"weights are numbers, found {tensor.datatype}")])
    given = [float(value) if text else None for value, text in zip(tensor.values, texts, strict=True)]
    if any(weight is not None and not schemas.LEAST_WEIGHT <= weight <= schemas.MOST_WEIGHT for weight in given):
        limits = f"from {schemas.LEAST_WEIGHT:g} to {schemas.MOST_WEIGHT:g}"
        raise unprocessable([(where, f"a weight is a number {limits}")])
    return [[weight for weight in row if weight is not None] for row in _split(given, rows)]


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
    "next_cursor": "BYTES",
    "search": "BYTES",
    "user_known": "BYTES",
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


# Outputs of one value a row, and of several values an item.
ONE_A_ROW = ("source", "next_offset", "next_cursor", "search", "user_known")
REASONS = 3


def output(name: str, ranker: Ranker, queries: Sequence[Query], rankings: Sequence[Ranking]) -> Tensor:
    """One tensor of the answer; rows with fewer items than `k` end in "" and the lowest score."""
    rows, k = len(rankings), queries[0].k
    values: list[Value] = []
    for query, ranking in zip(queries, rankings, strict=True):
        if name in ONE_A_ROW:
            values.append(_of_row(name, ranker, query, ranking))
        else:
            values += _of_items(name, ranker.served.scorer.items, ranking, k)
    shape = (rows,) if name in ONE_A_ROW else (rows, k, REASONS) if name == "because" else (rows, k)
    return Tensor(name, OUTPUTS[name], shape, values)


def _of_row(name: str, ranker: Ranker, query: Query, ranking: Ranking) -> Value:
    match name:
        case "source":
            return ranking.source
        case "search":
            return "approximate" if ranking.approximate else "exact"
        case "user_known":
            return ranking.user_known or ""
        case "next_cursor":
            return (cursors.following(ranker.identity, query, ranking) if query.alone else None) or ""
        case _:
            return query.offset + len(ranking.codes) if ranking.more else _LAST_PAGE


def _of_items(name: str, items: ItemTable, ranking: Ranking, k: int) -> list[Value]:
    fill = k - len(ranking.codes)
    match name:
        case "item_id":
            return [*(items.ids[code - 1] for code in ranking.codes), *[""] * fill]
        case "score":
            return [*ranking.scores.tolist(), *[_NO_SCORE] * fill]
        case "title":
            return [*(items.title(code) or "" for code in ranking.codes), *[""] * fill]
        case _:
            nearest = [*ranking.reasons, *[()] * (k - len(ranking.reasons))]
            padded = [[*(items.ids[code - 1] for code in near), *[""] * (REASONS - len(near))] for near in nearest]
            return list(chain.from_iterable(padded))
