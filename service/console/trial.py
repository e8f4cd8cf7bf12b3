"""What a person asks on the page: the fields of its forms, and the queries that they make."""

from __future__ import annotations

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
    "seen": "anything, to keep the items of the history in the answer",
    "model": "model to ask; the default one if left out",
    "beside": "another model to ask the same",
}
DEFAULT_K = "10"
_MOST_K = 100
_MOST_FIELDS = 48
_MOST_DIGITS = 4

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
        filters: item attribute -> values, separated by commas.
    """

    user_id: str = ""
    history: str = ""
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

    def query(self) -> schemas.RecommendationQuery:
        """The query.

        Raises:
            ValidationError: a field is not valid.
        """
        if self.item_id:
            return schemas.RecommendationQuery(similar_to=[self.item_id], k=self.count)
        return schemas.RecommendationQuery(
            user_id=self.user_id or None,
            history=list(self.items),
            k=self.count,
            exclude_seen=not self.seen,
            filters={name: list(_listed(values)) for name, values in self.filters.items()},
            explain=bool(self.items),
        )


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
