"""Conditions on item attributes, and boosts, as they travel in requests."""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from lazydp.components.bundle import query as queries
from lazydp.components.features import values

# Characters of an id, as the data may have it.
MAX_ID = values.MAX_ID
_MAX_VALUES = 256
_SMALLEST_FACTOR, _LARGEST = 1e-6, 1e6


class Request(BaseModel):
    """A part of a request. Strict: "10" is no number, and what the OpenAPI document calls a string is one."""

    model_config = ConfigDict(extra="forbid", strict=True)


def integral(value: object) -> object:
    """JSON knows no integers, and JSON Schema takes 5.0 for one; strict pydantic does not."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Text = Annotated[str, Field(min_length=1, max_length=MAX_ID)]
Integer = Annotated[int, Field(ge=-(2**63), lt=2**63), BeforeValidator(integral)]
Id: TypeAlias = Text | Integer
# Lists fail fast: a long list of garbage would take long to list every error of.
Values: TypeAlias = Annotated[list[Id], Field(fail_fast=True, min_length=1, max_length=_MAX_VALUES)]
_Number: TypeAlias = Annotated[float, Field(allow_inf_nan=False)]


class Range(Request):
    """What an item must have in one attribute: everything that is named here."""

    any_of: Values | None = Field(default=None, description="one of these values")
    gte: _Number | None = Field(default=None, description="a number of at least this")
    gt: _Number | None = Field(default=None, description="a number above this")
    lte: _Number | None = Field(default=None, description="a number of at most this")
    lt: _Number | None = Field(default=None, description="a number below this")

    @model_validator(mode="after")
    def _something(self) -> Range:
        if not self.model_fields_set or all(getattr(self, name) is None for name in self.model_fields_set):
            raise ValueError("expected at least one member of a condition: any_of, gte, gt, lte, lt, not")
        return self

    def condition(self) -> queries.Condition:
        """As the scorer takes it."""
        any_of = None if self.any_of is None else texts(self.any_of)
        return queries.Condition(any_of=any_of, gte=self.gte, gt=self.gt, lte=self.lte, lt=self.lt)


Part = TypeVar("Part")
# Names of the branches of a union. They are no part of where an error is: nothing in a request has such a name.
_LIST, _OBJECT = "\0list", "\0object"
BRANCHES = frozenset({_LIST, _OBJECT})


def _kind(value: Any) -> str:
    return _LIST if isinstance(value, list) else _OBJECT


ListOr: TypeAlias = Annotated[Annotated[Values, Tag(_LIST)] | Annotated[Part, Tag(_OBJECT)], Discriminator(_kind)]


class Condition(Range):
    """A condition that an item must meet, and one that it must not."""

    model_config = ConfigDict(populate_by_name=True)

    without: ListOr[Range] | None = Field(
        default=None,
        alias="not",
        description="values of which the item must have none, or a condition that it must not meet",
    )

    def condition(self) -> queries.Condition:
        """As the scorer takes it."""
        own = super().condition()
        if self.without is None:
            return own
        return queries.Condition(
            any_of=own.any_of, gte=own.gte, gt=own.gt, lte=own.lte, lt=own.lt, without=condition(self.without)
        )


Filters: TypeAlias = Annotated[dict[Text, ListOr[Condition]], Field(max_length=32)]


class Boost(Request):
    """A change of the scores of some items. Give `multiply` or `add`."""

    attribute: Text = Field(description="item attribute")
    matching: ListOr[Condition] | None = Field(
        default=None,
        description="values or a condition: these items are boosted; left out, items with a number in the attribute, "
        "by `multiply` or `add` times their (first) number",
    )
    multiply: Annotated[float, Field(ge=_SMALLEST_FACTOR, le=_LARGEST)] | None = Field(
        default=None,
        description="a positive score is multiplied by it and a negative one divided, so that more than 1 raises both",
    )
    add: Annotated[float, Field(ge=-_LARGEST, le=_LARGEST)] | None = Field(
        default=None, description="added to the score"
    )

    @model_validator(mode="after")
    def _one_of_two(self) -> Boost:
        if (self.multiply is None) == (self.add is None):
            raise ValueError("expected either multiply or add")
        return self

    def boost(self) -> queries.Boost:
        """As the scorer takes it."""
        amount = self.add if self.multiply is None else self.multiply
        assert amount is not None
        return queries.Boost(
            attribute=self.attribute,
            matching=None if self.matching is None else condition(self.matching),
            multiply=self.multiply is not None,
            amount=amount,
        )


def condition(given: list[str | int] | Range) -> queries.Condition:
    """A list of values, or a condition, as the scorer takes it."""
    return given.condition() if isinstance(given, Range) else queries.Condition(any_of=texts(given))


def texts(ids: list[str | int]) -> list[str]:
    """Ids as text; 5 and "5" are the same id."""
    return [str(name) for name in ids]
