"""The feature spec: which columns of an interaction log become which inputs of a model, and under which vocabularies.

Everything in a spec is declared by its author before the data is seen. Vocabularies are declared or hashed, dense
features are scaled by declared bounds, and so nothing that the spec makes public depends on the private rows.

Words: a *context* feature is a column of the interactions, a *user* or *item* feature a column of the side table of
users or items. Code 0 of every vocabulary means "unknown"; known values have codes 1..n, so a table has n + 1 rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from lazydp.components.features.vocabulary_spec import (
    AnyVocabulary,
    Column,
    Count,
    DeclaredVocabulary,
    IntegerVocabulary,
    Salt,
    ValueText,
    VocabularySpec,
    num_codes,
)
from lazydp.components.shared.errors import FormatError
from lazydp.components.shared.frozen_model import FrozenModel
from lazydp.components.shared.validation import Document

FORMAT_VERSION = 1
USER = "user"
ITEM = "item"
HISTORY = "history"
_RESERVED = (USER, ITEM, HISTORY)

# Names become tensor names and file names of a bundle.
Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_-]{0,63}$")]
Source = Literal["context", "user", "item"]
Pooling = Literal["sum", "mean", "sqrt", "recent"]
"""How the rows of a bag become one vector; `pooling` says what each means."""


class UserSpec(FrozenModel):
    """The column that names the user, and the vocabulary of the user-id embedding (left out when `embed` is false)."""

    column: Column
    vocabulary: VocabularySpec | None = None
    embed: bool = True

    @model_validator(mode="after")
    def _vocabulary_when_embedded(self) -> Self:
        if self.embed and self.vocabulary is None:
            raise ValueError("an embedded user needs a vocabulary (or set embed: false)")
        return self


class ItemSpec(FrozenModel):
    """The column that names the item; `title` and `metadata` are columns of the items table kept for display."""

    column: Column
    vocabulary: Annotated[DeclaredVocabulary | IntegerVocabulary, Field(discriminator="kind")]
    title: Column | None = None
    metadata: tuple[Column, ...] = ()


class ImplicitLabel(FrozenModel):
    """Every interaction is a positive example."""

    kind: Literal["implicit"]


class ColumnLabel(FrozenModel):
    """The label is a number in [0, 1] of a column."""

    kind: Literal["column"]
    column: Column


class ThresholdLabel(FrozenModel):
    """1 where the column is at least `at_least`, else 0; with `drop_below`, rows below are no examples at all."""

    kind: Literal["threshold"]
    column: Column
    at_least: float
    drop_below: bool = False


class History(FrozenModel):
    """The user's earlier positive items, latest `max_length` of them, as a bag over the item table."""

    max_length: Count
    pooling: Pooling = "mean"


class LeaveLastOut(FrozenModel):
    """Each user's last interaction is for evaluation; a user's only one stays in training."""

    kind: Literal["leave_last_out"]


class ColumnSplit(FrozenModel):
    """A column says which rows are for training and which for evaluation."""

    kind: Literal["column"]
    column: Column
    train: ValueText = "train"
    test: ValueText = "test"


class HashedSplit(FrozenModel):
    """Rows fall into evaluation by a keyed hash of their own content."""

    kind: Literal["hashed"]
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    salt: Salt = "lazydp"


class NoSplit(FrozenModel):
    """Every row is for training."""

    kind: Literal["none"]


SplitSpec = Annotated[LeaveLastOut | ColumnSplit | HashedSplit | NoSplit, Field(discriminator="kind")]


class SideTable(FrozenModel):
    """A Parquet, CSV or TSV file of users or items; `key` is its id column, `path` is relative to the spec's folder."""

    path: str
    key: Column


class _Feature(FrozenModel):
    name: Name
    source: Source = "context"
    column: Column | None = None

    @property
    def column_name(self) -> str:
        """The column read; the feature's own name unless stated."""
        return self.column if self.column is not None else self.name


class SingleFeature(_Feature):
    """One value an example, embedded."""

    kind: Literal["single"]
    vocabulary: VocabularySpec | None = None
    table: Name | None = None

    @property
    def table_name(self) -> str:
        """The embedding table it reads."""
        return self.table if self.table is not None else self.name


class ListFeature(_Feature):
    """Several values an example, embedded and pooled; text is cut at `separator`; the first `max_length` count."""

    kind: Literal["list"]
    vocabulary: VocabularySpec | None = None
    table: Name | None = None
    pooling: Pooling = "mean"
    separator: Annotated[str, Field(min_length=1)] | None = None
    max_length: Count | None = None

    @property
    def table_name(self) -> str:
        """The embedding table it reads."""
        return self.table if self.table is not None else self.name


class DenseFeature(_Feature):
    """A number, clipped to declared `bounds` and mapped linearly to [-1, 1]; missing is 0.

    With `transform: log1p`, sign(x) log(1 + |x|) is taken of the value and of the bounds first.
    """

    kind: Literal["dense"]
    bounds: tuple[float, float]
    transform: Literal["linear", "log1p"] = "linear"

    @model_validator(mode="after")
    def _bounds_ascend(self) -> Self:
        low, high = self.bounds
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"bounds must be finite and ascending, found [{low}, {high}]")
        return self


Feature = Annotated[SingleFeature | ListFeature | DenseFeature, Field(discriminator="kind")]


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedFeature:
    """A feature as a model sees it: one bag an example (or an item) over the rows of one table."""

    name: str
    table: str
    num_rows: int
    pooling: Pooling


class FeatureSpec(FrozenModel):
    """What an interaction log means. Read one with `spec_file.read_spec`, see the module for the words."""

    format_version: Literal[1] = 1
    name: Name
    # Whose data it is: every dataset of one family draws on one privacy budget. The name, where it is left out.
    family: Name | None = None
    user: UserSpec | None = None
    item: ItemSpec | None = None
    label: Annotated[ImplicitLabel | ColumnLabel | ThresholdLabel, Field(discriminator="kind")]
    timestamp: Column | None = None
    max_examples_per_user: Count | None = None
    # latest: the last k by time; sample: k by a keyed hash of the row. Both look at one user's rows only.
    selection: Literal["latest", "sample"] | None = None
    history: History | None = None
    split: SplitSpec | None = None
    users: SideTable | None = None
    items: SideTable | None = None
    features: tuple[Feature, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for complaint in self._complaints():
            raise ValueError(complaint)
        return self

    def _complaints(self) -> Iterator[str]:
        yield from self._user_complaints()
        yield from self._feature_complaints()
        if self.item is None and self.history is not None:
            yield "history is made of items, and the spec has no item"
        if self.item is None and self.label.kind == "implicit":
            yield "an implicit label says that the user took the item, and the spec has no item"
        if self.item is not None and (self.item.title or self.item.metadata) and self.items is None:
            yield "item.title and item.metadata are columns of the items table, and the spec has no items"
        if self.selection == "latest" and self.timestamp is None:
            yield "selection: latest needs a timestamp"
        for table, vocabulary in self._vocabularies_in_order():
            if isinstance(vocabulary, DeclaredVocabulary) and vocabulary.table is not None and self.items is None:
                yield f"the vocabulary of {table} is declared by the items table, and the spec has no items"

    def _user_complaints(self) -> Iterator[str]:
        if self.user is not None:
            return
        needs_user = {
            "max_examples_per_user": self.max_examples_per_user,
            "selection": self.selection,
            "history": self.history,
            "users": self.users,
        }
        for field, value in needs_user.items():
            if value is not None:
                yield f"{field} needs a user column, and the spec has no user"
        if self.split is not None and self.split.kind == "leave_last_out":
            yield "split: leave_last_out needs a user column, and the spec has no user"

    def _feature_complaints(self) -> Iterator[str]:
        names = set(_RESERVED)
        stated: dict[str, AnyVocabulary] = dict(self._own_vocabularies())
        for feature in self.features:
            if feature.name in names:
                reserved = "a reserved name" if feature.name in _RESERVED else "used twice"
                yield f"feature name {feature.name!r} is {reserved}"
            names.add(feature.name)
            if feature.source == "user" and self.users is None:
                yield f"feature {feature.name!r} has source user, and the spec has no users table"
            if feature.source == "item" and (self.items is None or self.item is None):
                yield f"feature {feature.name!r} has source item, and the spec lacks item or the items table"
            if isinstance(feature, DenseFeature) or feature.vocabulary is None:
                continue
            if stated.setdefault(feature.table_name, feature.vocabulary) != feature.vocabulary:
                yield (
                    f"feature {feature.name!r} shares the table {feature.table_name!r}, "
                    "and features that share a table need the same vocabulary"
                )
        for feature in self.features:
            if not isinstance(feature, DenseFeature) and feature.table_name not in stated:
                yield f"feature {feature.name!r} needs a vocabulary, or a table whose vocabulary is stated elsewhere"

    def _own_vocabularies(self) -> Iterator[tuple[str, AnyVocabulary]]:
        if self.user is not None and self.user.embed and self.user.vocabulary is not None:
            yield USER, self.user.vocabulary
        if self.item is not None:
            yield ITEM, self.item.vocabulary

    def _vocabularies_in_order(self) -> Iterator[tuple[str, AnyVocabulary]]:
        yield from self._own_vocabularies()
        for feature in self.features:
            if not isinstance(feature, DenseFeature) and feature.vocabulary is not None:
                yield feature.table_name, feature.vocabulary

    def vocabularies(self) -> dict[str, AnyVocabulary]:
        """Table name -> vocabulary, in the order in which the spec names them."""
        found: dict[str, AnyVocabulary] = {}
        for table, vocabulary in self._vocabularies_in_order():
            found.setdefault(table, vocabulary)
        return found

    def tables(self) -> dict[str, int]:
        """Embedding table name -> number of rows (known codes and the unknown row 0), in a fixed order.

        Raises:
            InputError: a declared vocabulary that has not been read yet.
        """
        return {table: num_codes(vocabulary) + 1 for table, vocabulary in self.vocabularies().items()}

    def _embedded(self, name: str, table: str, pooling: Pooling) -> EmbeddedFeature:
        return EmbeddedFeature(name=name, table=table, num_rows=self.tables()[table], pooling=pooling)

    def example_features(self) -> list[EmbeddedFeature]:
        """Embedded features of an example: user id, user and context features in spec order, history."""
        found = []
        if self.user is not None and self.user.embed:
            found.append(self._embedded(USER, USER, "sum"))
        for feature in self.embedded("user", "context"):
            found.append(self._embedded(feature.name, feature.table_name, _pooling(feature)))
        if self.history is not None:
            found.append(self._embedded(HISTORY, ITEM, self.history.pooling))
        return found

    def item_features(self) -> list[EmbeddedFeature]:
        """Embedded features of an item: item id, item features in spec order; empty without an item."""
        if self.item is None:
            return []
        rest = [self._embedded(f.name, f.table_name, _pooling(f)) for f in self.embedded("item")]
        return [self._embedded(ITEM, ITEM, "sum"), *rest]

    def embedded(self, *sources: Source) -> list[SingleFeature | ListFeature]:
        """The spec's embedded features of these sources, in spec order."""
        return [f for f in self.features if not isinstance(f, DenseFeature) and f.source in sources]

    def dense(self, *sources: Source) -> list[DenseFeature]:
        """The spec's dense features of these sources, in spec order: columns of `Batch.dense` for user and context."""
        return [f for f in self.features if isinstance(f, DenseFeature) and f.source in sources]

    @property
    def num_dense(self) -> int:
        """Width of `Batch.dense`."""
        return len(self.dense("user", "context"))

    @property
    def num_item_dense(self) -> int:
        """Width of `ItemCatalogue.dense`."""
        return len(self.dense("item"))

    @property
    def effective_split(self) -> LeaveLastOut | ColumnSplit | HashedSplit | NoSplit:
        """The split, where none is stated: leave the last out with a user column, else by hash of the row."""
        if self.split is not None:
            return self.split
        return LeaveLastOut(kind="leave_last_out") if self.user is not None else HashedSplit(kind="hashed")

    @property
    def effective_selection(self) -> Literal["latest", "sample"]:
        """How k examples of a user are chosen, where not stated: the latest with a timestamp, else a keyed sample."""
        return self.selection or ("latest" if self.timestamp is not None else "sample")

    def document(self) -> dict[str, Any]:
        """The spec as a JSON document, without what was left out."""
        return self.model_dump(mode="json", exclude_none=True)

    @classmethod
    def from_document(cls, document: Mapping[str, Any], *, where: str) -> FeatureSpec:
        """Read back `document()`.

        Raises:
            FormatError: not a feature spec; the message names `where` and the field.
        """
        return Document(f"{where}: feature spec", dict(document)).validated(cls, raises=FormatError)


def _pooling(feature: SingleFeature | ListFeature) -> Pooling:
    return feature.pooling if isinstance(feature, ListFeature) else "sum"
