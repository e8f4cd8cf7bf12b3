"""The feature spec: which columns of an interaction log become which inputs of a model, and under which vocabularies.

Everything in a spec is declared by its author before the data is seen. Vocabularies are declared or hashed, dense
features are scaled by declared bounds, and so nothing that the spec makes public depends on the private rows.

Words: a *context* feature is a column of the interactions, a *user* or *item* feature a column of the side table of
users or items. Code 0 of every vocabulary means "unknown"; known values have codes 1..n, so a table has n + 1 rows.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from lazydp.components.shared.errors import FormatError, InputError
from lazydp.components.shared.suggest import field_names, suggestion

FORMAT_VERSION = 1
USER = "user"
ITEM = "item"
HISTORY = "history"
_RESERVED = (USER, ITEM, HISTORY)
# Codes are stored as int32.
_MAX_CODES = 2**31 - 2

# Names become tensor names and file names of a bundle.
Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_-]{0,63}$")]
Column = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1, le=_MAX_CODES, strict=True)]
Salt = Annotated[str, Field(min_length=1, max_length=64)]
Source = Literal["context", "user", "item"]
Pooling = Literal["sum", "mean"]


def _value_text(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        # ValueError, not TypeError: pydantic turns only the former into a validation error.
        raise ValueError(f"a value must be text or a number, found {value!r}: put it in quotes")  # noqa: TRY004
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if value == "":
        raise ValueError("an empty value stands for a missing one and cannot be declared")
    return str(value)


ValueText = Annotated[str, BeforeValidator(_value_text)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class HashedVocabulary(_Part):
    """Values fall into `buckets` codes by a hash keyed with a public salt; unbounded value sets, no list to release."""

    kind: Literal["hashed"]
    buckets: Count
    salt: Salt


class DeclaredVocabulary(_Part):
    """A public list of values; value i (from 0) has code i + 1.

    The list stands in the spec (`values`), in a `file` (text with one value a line, or a `column` of a Parquet, CSV or
    TSV file), or it is the key column of the side `table` "items". There is no such choice for users: who is a user is
    private, what is on offer is not. `size` and `sha256` are filled in when the list was read from elsewhere, and
    vouch for the copy that travels in `vocab/`.
    """

    kind: Literal["declared"]
    values: tuple[ValueText, ...] | None = None
    file: str | None = None
    column: Column | None = None
    table: Literal["items"] | None = None
    size: Count | None = None
    sha256: str | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if sum(origin is not None for origin in (self.values, self.file, self.table)) != 1:
            raise ValueError("a declared vocabulary needs exactly one of values, file, table")
        if self.column is not None and self.file is None:
            raise ValueError("column names a column of file, and there is no file")
        if self.values is not None:
            if not self.values:
                raise ValueError("values is empty")
            seen: set[str] = set()
            for value in self.values:
                if value in seen:
                    raise ValueError(f"value {value!r} is declared twice")
                seen.add(value)
        return self


class IntegerVocabulary(_Part):
    """Values that are integers `first` .. `first + size - 1` already; value v has code v - first + 1."""

    kind: Literal["integer"]
    size: Count
    first: Annotated[int, Field(strict=True)] = 0


class BucketVocabulary(_Part):
    """A number falls between declared boundaries; n boundaries make n + 1 codes, each including its lower boundary."""

    kind: Literal["buckets"]
    boundaries: Annotated[tuple[float, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        if not all(math.isfinite(b) for b in self.boundaries):
            raise ValueError("boundaries must be finite")
        if any(low >= high for low, high in zip(self.boundaries, self.boundaries[1:], strict=False)):
            raise ValueError("boundaries must be strictly ascending")
        return self


AnyVocabulary = HashedVocabulary | DeclaredVocabulary | IntegerVocabulary | BucketVocabulary
VocabularySpec = Annotated[AnyVocabulary, Field(discriminator="kind")]


def num_codes(vocabulary: AnyVocabulary) -> int:
    """Codes of known values, n; codes run from 0 (unknown) to n.

    Raises:
        InputError: a declared vocabulary whose file or table has not been read yet.
    """
    match vocabulary:
        case HashedVocabulary():
            return vocabulary.buckets
        case IntegerVocabulary():
            return vocabulary.size
        case BucketVocabulary():
            return len(vocabulary.boundaries) + 1
        case DeclaredVocabulary(values=values) if values is not None:
            return len(values)
        case DeclaredVocabulary(size=size) if size is not None:
            return size
    origin = vocabulary.file or f"the {vocabulary.table} table"
    raise InputError(f"the vocabulary declared by {origin} has not been read: use the spec of an ingested dataset")


class UserSpec(_Part):
    """The column that names the user, and the vocabulary of the user-id embedding (left out when `embed` is false)."""

    column: Column
    vocabulary: VocabularySpec | None = None
    embed: bool = True

    @model_validator(mode="after")
    def _vocabulary_when_embedded(self) -> Self:
        if self.embed and self.vocabulary is None:
            raise ValueError("an embedded user needs a vocabulary (or set embed: false)")
        return self


class ItemSpec(_Part):
    """The column that names the item; `title` and `metadata` are columns of the items table kept for display."""

    column: Column
    vocabulary: Annotated[DeclaredVocabulary | IntegerVocabulary, Field(discriminator="kind")]
    title: Column | None = None
    metadata: tuple[Column, ...] = ()


class ImplicitLabel(_Part):
    """Every interaction is a positive example."""

    kind: Literal["implicit"]


class ColumnLabel(_Part):
    """The label is a number in [0, 1] of a column."""

    kind: Literal["column"]
    column: Column


class ThresholdLabel(_Part):
    """1 where the column is at least `at_least`, else 0; with `drop_below`, rows below are no examples at all."""

    kind: Literal["threshold"]
    column: Column
    at_least: float
    drop_below: bool = False


class History(_Part):
    """The user's earlier positive items, latest `max_length` of them, as a bag over the item table."""

    max_length: Count
    pooling: Pooling = "mean"


class LeaveLastOut(_Part):
    """Each user's last interaction is for evaluation; a user's only one stays in training."""

    kind: Literal["leave_last_out"]


class ColumnSplit(_Part):
    """A column says which rows are for training and which for evaluation."""

    kind: Literal["column"]
    column: Column
    train: ValueText = "train"
    test: ValueText = "test"


class HashedSplit(_Part):
    """Rows fall into evaluation by a keyed hash of their own content."""

    kind: Literal["hashed"]
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    salt: Salt = "lazydp"


class NoSplit(_Part):
    """Every row is for training."""

    kind: Literal["none"]


SplitSpec = Annotated[LeaveLastOut | ColumnSplit | HashedSplit | NoSplit, Field(discriminator="kind")]


class SideTable(_Part):
    """A Parquet, CSV or TSV file of users or items; `key` is its id column, `path` is relative to the spec's folder."""

    path: str
    key: Column


class _Feature(_Part):
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


class FeatureSpec(_Part):
    """What an interaction log means. Read one with `read_spec`, see the module for the words."""

    format_version: Literal[1] = 1
    name: Name
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
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            field, message = _first_error(error)
            raise FormatError(f"{where}: the feature spec is invalid at {field or 'its top'}: {message}") from None


def _pooling(feature: SingleFeature | ListFeature) -> Pooling:
    return feature.pooling if isinstance(feature, ListFeature) else "sum"


def read_spec(path: Path) -> FeatureSpec:
    """Read a feature spec from a YAML file.

    Raises:
        InputError: the file is missing, is not YAML or not a feature spec; the message names file, line and field.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"no feature spec at {path}: the file does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the feature spec {path} cannot be read: {error}") from None
    return parse_spec(text, where=str(path))


def parse_spec(text: str, *, where: str) -> FeatureSpec:
    """Read a feature spec from YAML text; `where` names it in errors.

    Raises:
        InputError: not YAML or not a feature spec; the message names `where`, line and field.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        document = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark is not None else 1
        raise InputError(f"{where}:{line}: not YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{where}: not YAML: {error}") from None
    if not isinstance(root, yaml.MappingNode):
        raise InputError(f"{where}: expected a mapping of fields (name, user, item, ...), found {_kind(document)}")
    _refuse_duplicate_keys(root, where)
    version = document.get("format_version", FORMAT_VERSION)
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise InputError(f"{where}: format_version {version} is newer than this lazydp reads ({FORMAT_VERSION})")
    try:
        return FeatureSpec.model_validate(document)
    except ValidationError as error:
        field, message = _first_error(error, root)
        line = _line(error.errors()[0]["loc"], root)
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise InputError(f"{where}:{line}: {field + ': ' if field else ''}{message}{more}") from None


def _kind(document: object) -> str:
    return "nothing" if document is None else type(document).__name__


def _refuse_duplicate_keys(node: yaml.Node, where: str) -> None:
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            _refuse_duplicate_keys(child, where)
    elif isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                raise InputError(f"{where}:{key.start_mark.line + 1}: the field {key.value!r} stands there twice")
            seen.add(key.value)
            _refuse_duplicate_keys(value, where)


def _steps(location: tuple[int | str, ...], root: yaml.Node | None) -> Iterator[tuple[int | str, yaml.Node | None]]:
    """The parts of a pydantic location that exist in the YAML tree (tags of unions do not), with their nodes."""
    node = root
    for part in location:
        if root is None:
            yield part, None
        elif isinstance(node, yaml.MappingNode):
            child = next((value for key, value in node.value if key.value == part), None)
            if child is not None:
                node = child
                yield part, node
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            node = node.value[part]
            yield part, node


def _line(location: tuple[int | str, ...], root: yaml.Node) -> int:
    node: yaml.Node | None = root
    for _, step in _steps(location, root):
        node = step
    assert node is not None
    return int(node.start_mark.line) + 1


def _first_error(error: ValidationError, root: yaml.Node | None = None) -> tuple[str, str]:
    first = error.errors()[0]
    field = ""
    parts = [part for part, _ in _steps(first["loc"], root)]
    if first["type"] == "missing" and root is not None:
        parts.append(first["loc"][-1])
    for part in parts:
        field += f"[{part}]" if isinstance(part, int) else f".{part}" if field else part
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "there is no such field" + suggestion(first["loc"][-1], field_names(sys.modules[__name__]))
    elif first["type"] == "missing":
        message = "the field is missing"
    elif first["type"] == "union_tag_invalid":
        message = f"there is no kind {first['ctx']['tag']!r}; expected one of {first['ctx']['expected_tags']}"
    elif first["type"] == "union_tag_not_found":
        message = "the field kind is missing"
    elif first["type"] in {"model_type", "model_attributes_type", "dict_type"}:
        message = f"expected a mapping of fields, found {first['input']!r}"
    elif first["type"] != "value_error" and not isinstance(first["input"], (dict, list)):
        message += f", found {first['input']!r}"
    return field, message
