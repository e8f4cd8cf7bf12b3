"""What travels over HTTP: requests and responses of the native endpoints."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from lazydp.components.budget.statement import PrivacyStatement
from lazydp.components.bundle.query import CategoryCap, Query
from lazydp.service.conditions import (
    Boost,
    Filters,
    Id,
    Integer,
    Request,
    Text,
    condition,
    integral,
    texts,
)

MAX_K = 1000
MAX_OFFSET = 100_000
MAX_HISTORY = 1000
MAX_ITEMS = 10_000
MAX_BATCH = 256
DEFAULT_K = 10

# Items of all answers to one request together: what a slow reader may make the service hold.
MAX_BATCH_ITEMS = 50_000
# Characters of a feature's value, and of a cursor.
MAX_TEXT = 1024
LEAST_WEIGHT, MOST_WEIGHT = 1e-6, 1e6

Value: TypeAlias = (
    Annotated[str, Field(max_length=MAX_TEXT)] | Integer | Annotated[float, Field(allow_inf_nan=False)] | bool
)
Count = Annotated[int, Field(ge=1, le=MAX_K), BeforeValidator(integral)]
Extent = Annotated[int, Field(ge=0, le=MAX_ITEMS), BeforeValidator(integral)]
Offset = Annotated[int, Field(ge=0, le=MAX_OFFSET), BeforeValidator(integral)]
# Lists fail fast: a long list of garbage would take long to list every error of.
History: TypeAlias = Annotated[list[Id], Field(fail_fast=True, max_length=MAX_HISTORY)]
Items: TypeAlias = Annotated[list[Id], Field(fail_fast=True, max_length=MAX_ITEMS)]
Weights: TypeAlias = Annotated[
    list[Annotated[float, Field(ge=LEAST_WEIGHT, le=MOST_WEIGHT)]], Field(fail_fast=True, max_length=MAX_HISTORY)
]
# Several lists, as of a shop and of a country.
Lists: TypeAlias = Annotated[list[Items], Field(fail_fast=True, max_length=16)]
Cursor: TypeAlias = Annotated[str, Field(max_length=MAX_TEXT)]


class Diversity(Request):
    """At most `limit` items of one category."""

    attribute: Text = Field(description="item attribute whose values are the categories")
    limit: Count


class QueryOptions(Request):
    """For what somebody asks, whoever it is."""

    # Factories, because pydantic makes a deep copy of a default that can change.
    k: Count = Field(default=DEFAULT_K, description="items wanted")
    offset: Offset = Field(default=0, description="items to skip: `next_offset` of the page before")
    cursor: Cursor | None = Field(
        default=None,
        description='"" begins pages that never overlap and leave nothing out, whatever scores tie; `next_cursor` of '
        "the page before continues them, and is refused (409) once another version is served",
    )
    exclude_seen: bool = Field(default=True, description="leave out the items of `history`")
    exclude: Items = Field(default_factory=list, description="items to leave out")
    exclude_lists: Lists = Field(default_factory=list, description="further lists of items to leave out")
    candidates: Items | None = Field(default=None, description="the only items to choose from")
    candidate_lists: Lists = Field(
        default_factory=list, description="further such lists: an item must be in every one, and in `candidates`"
    )
    filters: Filters = Field(
        default_factory=dict,
        description="item attribute -> values, of which an item must have one, or a condition; all must hold",
    )
    boosts: Annotated[list[Boost], Field(fail_fast=True, max_length=32)] = Field(
        default_factory=list, description="changes of scores before items are ordered, applied one after the other"
    )
    half_life: Annotated[float, Field(ge=0.01, le=1e6)] | None = Field(
        default=None, description="so many items back, an item of `history` counts half"
    )
    similar_to: History = Field(
        default_factory=list,
        description="answer with items like these, by the mean of their cosines, instead of for a person",
    )
    similar_weights: Weights | None = Field(
        default=None, description="for each item of `similar_to` how much it counts; only ratios matter"
    )
    diversity: Diversity | None = Field(default=None, description="bound on items of one category")
    split_key: Id | None = Field(
        default=None,
        description="where the service deals requests to several versions: requests with one key get one version; "
        "`user_id` if left out",
    )
    explain: bool = Field(
        default=False, description="name the items of `history`, or of `similar_to`, that lie nearest to each answer"
    )

    @model_validator(mode="after")
    def _weighed(self) -> Self:
        _check_weights("similar_weights", self.similar_weights, self.similar_to)
        return self

    def asked(self) -> Query:
        """As the scorer takes it, of nobody yet."""
        return Query(**self._members())

    def _members(self) -> dict[str, Any]:
        """Arguments of a `Query`. What most requests leave out costs them a look and no more."""
        members: dict[str, Any] = {
            "k": self.k,
            "offset": self.offset,
            "exclude_seen": self.exclude_seen,
            "explain": self.explain,
            "half_life": self.half_life,
            "similar_weights": self.similar_weights,
            "alone": self.cursor is not None,
        }
        if self.exclude or self.exclude_lists:
            members["exclude"] = texts(list(chain(self.exclude, *self.exclude_lists)))
        if self.candidates is not None or self.candidate_lists:
            members["candidates"] = self._candidates()
        if self.filters:
            members["filters"] = {name: condition(given) for name, given in self.filters.items()}
        if self.boosts:
            members["boosts"] = [boost.boost() for boost in self.boosts]
        if self.similar_to:
            members["similar_to"] = texts(self.similar_to)
        if self.diversity is not None:
            members["cap"] = CategoryCap(attribute=self.diversity.attribute, limit=self.diversity.limit)
        return members

    def _candidates(self) -> list[str]:
        """What stands in every list, in the order of the first."""
        lists = [
            texts(given) for given in ([] if self.candidates is None else [self.candidates]) + self.candidate_lists
        ]
        others = [set(given) for given in lists[1:]]
        return [item for item in lists[0] if all(item in given for given in others)]


def _check_weights(name: str, weights: Sequence[float] | None, items: Sequence[object]) -> None:
    if weights is not None and len(weights) != len(items):
        raise ValueError(f"{name}: expected one for each of {len(items)} items, found {len(weights)}")


class RecommendationQuery(QueryOptions):
    """Who asks, and for what. Ids may be text or integers; 5 and "5" are the same id."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"user_id": "196", "k": 5},
                {"history": ["50", "181"], "k": 5, "filters": {"genre": ["Sci-Fi"]}, "explain": True},
                {"history": ["50", "181"], "history_weights": [1, 3], "filters": {"year": {"gte": 1980, "lt": 1990}}},
                {"similar_to": ["50", "181"], "boosts": [{"attribute": "genre", "matching": ["War"], "multiply": 2}]},
            ]
        }
    )

    user_id: Id | None = Field(default=None, description="a user that the model was trained with")
    history: History = Field(default_factory=list, description="items the person took, oldest first")
    history_weights: Weights | None = Field(
        default=None, description="for each item of `history` how much it counts; only ratios matter"
    )
    features: Annotated[
        dict[Text, Value | Annotated[list[Value], Field(fail_fast=True, max_length=MAX_HISTORY)] | None],
        Field(max_length=256),
    ] = Field(default_factory=dict, description="user and context features of the model, by name")

    @model_validator(mode="after")
    def _of_one_kind(self) -> Self:
        _check_weights("history_weights", self.history_weights, self.history)
        if self.similar_to and (self.user_id is not None or self.history or self.features):
            raise ValueError("expected either similar_to, or a person: user_id, history, features")
        return self

    @property
    def key(self) -> str | None:
        """What decides, where several versions share requests, which of them answers."""
        given = self.user_id if self.split_key is None else self.split_key
        return None if given is None else str(given)

    def query(self) -> Query:
        """As the scorer takes it."""
        return Query(
            user_id=None if self.user_id is None else str(self.user_id),
            history=texts(self.history) if self.history else (),
            history_weights=self.history_weights,
            features=self.features,
            **self._members(),
        )


class RecommendationBatch(Request):
    """Several queries at once, answered in order; from one model version, unless the service deals them to several."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"queries": [{"user_id": "196", "k": 3}, {"history": ["50"], "k": 3}]}]}
    )

    queries: Annotated[list[RecommendationQuery], Field(fail_fast=True, min_length=1, max_length=MAX_BATCH)]


class _Response(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ModelVersion(_Response):
    """The model that answered."""

    name: str
    version: str


class RecommendedItem(_Response):
    """One item of an answer."""

    id: str
    title: str | None = None
    score: float = Field(description="comparable within one answer only")
    because: list[str] | None = Field(default=None, description="nearest items of the history, where asked for")


Source = Literal["user", "history", "user+history", "features", "item", "popular", "none"]


class Recommendations(_Response):
    """Items, best first."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": {"name": "ml-100k", "version": "3f2a9c51d0e7"},
                    "source": "user",
                    "user_known": "yes",
                    "retriever": None,
                    "items": [{"id": "50", "title": "Star Wars (1977)", "score": 7.31}],
                    "next_offset": 1,
                    "next_cursor": None,
                    "search": "exact",
                    "unknown_items": [],
                    "notice": None,
                }
            ]
        }
    )

    model: ModelVersion
    source: Source = Field(
        description="what the answer rests on; `popular`: nothing is known of the person and the bundle carries "
        "popularity counts that were released with noise; `none`: no answer, and `notice` says why"
    )
    user_known: Literal["yes", "no", "cannot tell"] | None = Field(
        default=None,
        description="whether `user_id` is of the model's vocabulary; `cannot tell`: users are hashed, and whether a "
        "person was among those the model was trained with is what its privacy hides; null: no user, or none is read",
    )
    retriever: ModelVersion | None = Field(
        default=None, description="the model that chose the candidates which `model` ranked; null: it ranked them all"
    )
    items: list[RecommendedItem]
    next_offset: int | None = Field(description="`offset` of the next page; null on the last")
    next_cursor: str | None = Field(
        default=None, description="`cursor` of the next page; null on the last, and where the query has no cursor"
    )
    search: Literal["exact", "approximate"] = Field(
        default="exact",
        description="how items were found; a large catalogue with an approximate index is searched exactly where a "
        "query has candidates, filters, boosts, diversity, a cursor or similar_to, and on far pages",
    )
    unknown_items: list[str] = Field(description="items of the request that the model does not know; they were ignored")
    notice: str | None


class RecommendationResults(_Response):
    """Answers to a batch, in the order of its queries."""

    model: ModelVersion | None = Field(
        description="the model that answered; null where queries were dealt to several versions, which `results` name"
    )
    results: list[Recommendations]


class ServedModel(_Response):
    """A model that the service holds."""

    name: str
    version: str
    served: bool = Field(description="whether it answers where no model is named")
    kind: Literal["two_tower", "dlrm"]
    num_items: int
    dim: int
    index: str = Field(description="how items are found: exact, or the approximate index and its measured recall")
    recall: float | None = Field(
        description="share of the exact best 100 items that the approximate index finds, measured when it was built; "
        "null where search is exact"
    )
    attributes: list[str] = Field(description="item attributes that filters may name")
    features: list[str] = Field(description="user and context features that a request may carry")
    private: bool
    epsilon: float | None
    delta: float
    run_id: str
    loaded: str = Field(description="when the version was brought in, ISO 8601, UTC")
    refused: str | None = Field(description="why the latest attempt to bring in another version was refused")


class Models(_Response):
    """Every model that the service holds."""

    models: list[ServedModel]


class DatasetBudget(_Response):
    """Budget of one dataset, composed over all its releases."""

    dataset: str = Field(description="identifier in the ledger; it tells nothing of the content")
    name: str | None
    privacy_unit: str | None
    epsilon_budget: float | None
    delta: float | None = Field(description="of every epsilon here")
    epsilon_spent: float | None = Field(description="by what was released, composed")
    epsilon_reserved: float | None = Field(description="what runs under way may add to it at most")
    epsilon_remaining: float | None = Field(description="budget less spent and reserved")
    releases: int
    family: list[str] = Field(
        default=[], description="identifiers of other datasets made of the same data, whose runs count here too"
    )


class ModelStatement(_Response):
    """The privacy statement of a model being served, and the budget of its own dataset."""

    name: str
    version: str
    dataset: str
    run_id: str
    statement: PrivacyStatement
    budget: DatasetBudget | None = Field(
        default=None, description="of the model's own dataset, by the ledger; null where the ledger does not say"
    )
    notice: str | None = Field(
        default=None, description="why there is no budget, or why the ledger's figures are not to be trusted"
    )


class PrivacyBudget(_Response):
    """What was spent."""

    source: Literal["ledger", "statement"] = Field(
        description="`ledger`: figures of the ledger; `statement`: no ledger is configured or it does not answer, so "
        "only what the served models' own statements say"
    )
    notice: str | None
    datasets: list[DatasetBudget]
    models: list[ModelStatement]


class LedgerEntry(_Response):
    """One entry of the ledger."""

    number: int
    kind: str = Field(description="dataset, budget, reserved, bound, committed or voided")
    dataset: str = Field(description="identifier in the ledger; it tells nothing of the content")
    run_id: str | None = None
    recorded_at: str = Field(description="ISO 8601, UTC")
    recorded_by: str | None = Field(default=None, description="who did it")
    content: dict[str, Any]
    digest: str | None = Field(default=None, description="SHA-256 that chains the entry to the one before")


class Releases(_Response):
    """The ledger's entries, oldest first."""

    source: Literal["ledger", "statement"]
    notice: str | None
    entries: list[LedgerEntry]


class Health(_Response):
    """Whether the service lives, or takes requests."""

    status: Literal["ok", "not ready", "draining"]
    models: list[ModelVersion] = []
    background: dict[str, Literal["running", "restarting"]] = Field(
        default={}, description="work beside the requests: what ended is `restarting` until it runs again"
    )
    ledger: dict[str, str] = Field(
        default={}, description="by model why the ledger cannot be trusted beside it: it is older than the model"
    )
