"""What travels over HTTP: requests and responses of the native endpoints."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from lazydp.components.budget.statement import PrivacyStatement
from lazydp.components.bundle.query import CategoryCap, Query
from lazydp.components.features import values

MAX_K = 1000
MAX_OFFSET = 100_000
MAX_HISTORY = 1000
MAX_ITEMS = 10_000
MAX_BATCH = 256
DEFAULT_K = 10

# Items of all answers to one request together: what a slow reader may make the service hold.
MAX_BATCH_ITEMS = 50_000
# Characters of an id, as the data may have it, and of a feature's value.
MAX_ID = values.MAX_ID
MAX_TEXT = 1024

Text = Annotated[str, Field(min_length=1, max_length=MAX_ID)]


def _integral(value: object) -> object:
    """JSON knows no integers, and JSON Schema takes 5.0 for one; strict pydantic does not."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Integer = Annotated[int, Field(ge=-(2**63), lt=2**63), BeforeValidator(_integral)]
Id: TypeAlias = Text | Integer
Value: TypeAlias = (
    Annotated[str, Field(max_length=MAX_TEXT)] | Integer | Annotated[float, Field(allow_inf_nan=False)] | bool
)
Count = Annotated[int, Field(ge=1, le=MAX_K), BeforeValidator(_integral)]
Extent = Annotated[int, Field(ge=0, le=MAX_ITEMS), BeforeValidator(_integral)]
Offset = Annotated[int, Field(ge=0, le=MAX_OFFSET), BeforeValidator(_integral)]
# Lists fail fast: a long list of garbage would take long to list every error of.
History: TypeAlias = Annotated[list[Id], Field(fail_fast=True, max_length=MAX_HISTORY)]
Items: TypeAlias = Annotated[list[Id], Field(fail_fast=True, max_length=MAX_ITEMS)]
Filters: TypeAlias = Annotated[
    dict[Text, Annotated[list[Id], Field(fail_fast=True, min_length=1, max_length=256)]], Field(max_length=32)
]


class _Request(BaseModel):
    # Strict: "10" is no number, and what the OpenAPI document calls a string is one.
    model_config = ConfigDict(extra="forbid", strict=True)


class Diversity(_Request):
    """At most `limit` items of one category."""

    attribute: Text = Field(description="item attribute whose values are the categories")
    limit: Count


class QueryOptions(_Request):
    """For what somebody asks, whoever it is."""

    # Factories, because pydantic makes a deep copy of a default that can change.
    k: Count = Field(default=DEFAULT_K, description="items wanted")
    offset: Offset = Field(default=0, description="items to skip: `next_offset` of the page before")
    exclude_seen: bool = Field(default=True, description="leave out the items of `history`")
    exclude: Items = Field(default_factory=list, description="items to leave out")
    candidates: Items | None = Field(default=None, description="the only items to choose from")
    filters: Filters = Field(
        default_factory=dict, description="item attribute -> values; an item must have one of them, for every attribute"
    )
    diversity: Diversity | None = Field(default=None, description="bound on items of one category")
    explain: bool = Field(default=False, description="name the items of `history` that lie nearest to each answer")

    def asked(self) -> Query:
        """As the scorer takes it, of nobody yet."""
        return Query(
            k=self.k,
            offset=self.offset,
            exclude=[str(item) for item in self.exclude],
            exclude_seen=self.exclude_seen,
            candidates=None if self.candidates is None else [str(item) for item in self.candidates],
            filters={name: [str(value) for value in values] for name, values in self.filters.items()},
            cap=None
            if self.diversity is None
            else CategoryCap(attribute=self.diversity.attribute, limit=self.diversity.limit),
            explain=self.explain,
        )


class RecommendationQuery(QueryOptions):
    """Who asks, and for what. Ids may be text or integers; 5 and "5" are the same id."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"user_id": "196", "k": 5},
                {"history": ["50", "181"], "k": 5, "filters": {"genre": ["Sci-Fi"]}, "explain": True},
            ]
        }
    )

    user_id: Id | None = Field(default=None, description="a user that the model was trained with")
    history: History = Field(default_factory=list, description="items the person took, oldest first")
    features: Annotated[
        dict[Text, Value | Annotated[list[Value], Field(fail_fast=True, max_length=MAX_HISTORY)] | None],
        Field(max_length=256),
    ] = Field(default_factory=dict, description="user and context features of the model, by name")

    def query(self) -> Query:
        """As the scorer takes it."""
        return replace(
            self.asked(),
            user_id=None if self.user_id is None else str(self.user_id),
            history=[str(item) for item in self.history],
            features=dict(self.features),
        )


class RecommendationBatch(_Request):
    """Several queries at once, answered in order from one model version."""

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
                    "retriever": None,
                    "items": [{"id": "50", "title": "Star Wars (1977)", "score": 7.31}],
                    "next_offset": 1,
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
    retriever: ModelVersion | None = Field(
        default=None, description="the model that chose the candidates which `model` ranked; null: it ranked them all"
    )
    items: list[RecommendedItem]
    next_offset: int | None = Field(description="`offset` of the next page; null on the last")
    unknown_items: list[str] = Field(description="items of the request that the model does not know; they were ignored")
    notice: str | None


class RecommendationResults(_Response):
    """Answers to a batch, in the order of its queries."""

    model: ModelVersion
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
