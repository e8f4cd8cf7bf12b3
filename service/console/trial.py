"""What a person asks on the page: the fields of its forms, and the queries that they make."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import parse_qs

from starlette.requests import Request

from lazydp.service import schemas
from lazydp.service.http.problems import Problem

FORM_TYPE = "application/x-www-form-urlencoded"
FILTER = "filter."
_FIELDS = {
    "user_id": "user to try",
    "history": "items to try, separated by commas",
    "item_id": "item to find similar items of; then user and history are left alone",
    "k": "items wanted, 1 to 100",
    "weights": "how much each item of the history counts, separated by commas",
    "half_life": "so many items back, an item of the history counts half",
    "boost": "item attribute whose items are raised or lowered",
    "boosted": "which of them, as in a filter; left out, by their number",
    "boost_how": "multiply or add",
    "boost_by": "the factor or the amount; without it nothing is boosted",
    "seen": "anything, to keep the items of the history in the answer",
    "model": "model to ask; the default one if left out",
    "beside": "another model to ask the same",
}
DEFAULT_K = "10"
_MOST_K = 100
_MOST_FIELDS = 48
_MOST_DIGITS = 4
_BOUND = re.compile(r"(>=|<=|>|<)(.*)")
_MEMBERS = {">=": "gte", ">": "gt", "<=": "lte", "<": "lt"}
_NOT = "not "

FORM: dict[str, Any] = {
    "requestBody": {
        "required": False,
        "content": {
            FORM_TYPE: {
                "schema": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {name: {"type": "string", "description": text} for name, text in _FIELDS.items()},
                    "patternProperties": {f"^{FILTER}".replace(".", r"\."): {"type": "string"}},
                }
            }
        },
    }
}


@dataclass(frozen=True, slots=True)
class Trial:
    """What a person tried, as typed.

    Attributes:
        filters: item attribute -> condition, as `_condition` reads it.
    """

    user_id: str = ""
    history: str = ""
    weights: str = ""
    half_life: str = ""
    boost: str = ""
    boosted: str = ""
    boost_how: str = "multiply"
    boost_by: str = ""
    item_id: str = ""
    k: str = DEFAULT_K
    seen: bool = False
    model: str = ""
    beside: str = ""
    filters: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    async def of(cls, request: Request) -> Self:
        """From the form in the body of a request.

        Raises:
            Problem: 415 for another body, 422 for fields that the form does not have.
        """
        if request.headers.get("content-type", FORM_TYPE).partition(";")[0].strip().lower() != FORM_TYPE:
            raise Problem(415, "no-form", f"send the form as {FORM_TYPE}")
        try:
            text = (await request.body()).decode("utf-8", "replace")
            form = parse_qs(text, keep_blank_values=True, max_num_fields=_MOST_FIELDS)
        except ValueError:
            raise Problem(422, "invalid-request", f"a form may have up to {_MOST_FIELDS} fields") from None
        given = {name: values[0].strip() for name, values in form.items()}
        filters = {name[len(FILTER) :]: given.pop(name) for name in list(given) if name.startswith(FILTER)}
        if not given.keys() <= _FIELDS.keys():
            known = ", ".join(sorted(_FIELDS))
            raise Problem(422, "invalid-request", f"a form may have the fields {known}, and {FILTER}<attribute>")
        texts = {name: value for name, value in given.items() if name != "seen" and value}
        return cls(**texts, seen="seen" in given, filters={name: value for name, value in filters.items() if value})

    @property
    def items(self) -> list[str]:
        """The ids of the history."""
        return _listed(self.history)

    @property
    def count(self) -> int:
        """Items wanted; 0, which is refused, for what is no number up to the most that a page shows."""
        known = self.k.isascii() and self.k.isdecimal() and len(self.k) < _MOST_DIGITS
        return int(self.k) if known and int(self.k) <= _MOST_K else 0

    @property
    def has_further(self) -> bool:
        """Whether a field is filled in that the page shows on demand."""
        return bool(self.filters or self.seen or self.weights or self.half_life or self.boost_by)

    def query(self) -> schemas.RecommendationQuery:
        """The query.

        Raises:
            ValidationError: a field is not valid.
            Problem: 422 for a field that cannot be read.
        """
        if self.item_id:
            return schemas.RecommendationQuery(similar_to=[self.item_id], k=self.count)
        query: dict[str, Any] = {
            "user_id": self.user_id or None,
            "history": self.items,
            "history_weights": [_number(part, "a weight") for part in _listed(self.weights)] or None,
            "half_life": _number(self.half_life, "the half-life") if self.half_life else None,
            "k": self.count,
            "exclude_seen": not self.seen,
            "filters": {name: _condition(text) for name, text in self.filters.items()},
            "boosts": [self._boost()] if self.boost_by else [],
            "explain": bool(self.items),
        }
        return schemas.RecommendationQuery.model_validate(query)

    def _boost(self) -> dict[str, Any]:
        how = "add" if self.boost_how == "add" else "multiply"
        boost: dict[str, Any] = {"attribute": self.boost, how: _number(self.boost_by, "a boost")}
        return boost | ({"matching": _condition(self.boosted)} if self.boosted else {})


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _number(text: str, what: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise _unreadable(f"expected a number for {what}") from None


def _unreadable(detail: str) -> Problem:
    return Problem(422, "invalid-request", detail)


def _condition(text: str) -> dict[str, Any]:
    """A condition of values, values after `not`, and bounds, separated by commas: `Drama, not War`, `>= 1980, < 1990`.

    Raises:
        Problem: 422 for a bound that is no number, or that is given twice.
    """
    condition: dict[str, Any] = {}
    for part in _listed(text):
        bound = _BOUND.fullmatch(part)
        if bound is not None:
            member = _MEMBERS[bound[1]]
            if member in condition:
                raise _unreadable(f"the bound {bound[1]} is given twice")
            condition[member] = _number(bound[2], f"the bound {bound[1]}")
        elif part.startswith(_NOT):
            condition.setdefault("not", []).append(part.removeprefix(_NOT).strip())
        else:
            condition.setdefault("any_of", []).append(part)
    return condition
