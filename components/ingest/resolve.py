"""From a spec as written to a spec that can be applied: its public lists and tables are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pyarrow as pa

from lazydp.components.features.spec import (
    DenseFeature,
    FeatureSpec,
    ItemSpec,
    ListFeature,
    SideTable,
    SingleFeature,
    Source,
    UserSpec,
)
from lazydp.components.features.spec_file import parse_spec
from lazydp.components.features.vocabulary import Vocabularies, check_values, values_digest
from lazydp.components.features.vocabulary_spec import DeclaredVocabulary
from lazydp.components.ingest.locations import is_uri, read_text, resolve_location, shown
from lazydp.components.ingest.source import RowSource, require_columns
from lazydp.components.shared.errors import InputError

_Part = TypeVar("_Part", UserSpec, ItemSpec, SingleFeature, ListFeature)


@dataclass(frozen=True)
class ResolvedSpec:
    """A spec whose vocabularies have sizes, with the vocabularies and the side tables it names."""

    spec: FeatureSpec
    vocabularies: Vocabularies
    users: RowSource | None
    items: pa.Table | None


def load_spec(source: str) -> tuple[FeatureSpec, str]:
    """Read a spec from a path, a URI, or YAML text itself: anything with a line break, or that begins with a brace.

    (A pipeline is compiled with its spec on one line, as a YAML mapping between braces.)

    Returns:
        The spec, and the folder that its relative paths start from (the working directory for text).

    Raises:
        InputError: it does not exist or is invalid.
    """
    if "\n" in source or source.lstrip().startswith("{"):
        return parse_spec(source, where="feature spec"), str(Path.cwd())
    text = read_text(source)
    base = source.rsplit("/", 1)[0] if is_uri(source) else str(Path(source).expanduser().absolute().parent)
    return parse_spec(text, where=shown(source)), base


def resolve(spec: FeatureSpec, *, base: str | Path, users: str | None = None, items: str | None = None) -> ResolvedSpec:
    """Read what the spec refers to.

    Args:
        spec: the spec as written.
        base: the folder (path or URI) that relative paths start from.
        users: location of the users table, instead of the one in the spec.
        items: location of the items table, instead of the one in the spec.

    Raises:
        InputError: a file is missing, lacks a column, or its list has gaps or repeats.
    """
    users_location = _side_location(spec.users, "users", users, base)
    items_location = _side_location(spec.items, "items", items, base)
    users_source = None
    if users_location is not None:
        users_source = RowSource.open([users_location])
        require_columns(_user_columns(spec), users_source, where=f"the users table {shown(users_location)}")
    items_table = None
    if items_location is not None:
        items_table = _read_table(items_location, _item_columns(spec), where=f"the items table {shown(items_location)}")
    lists = {}
    for table, vocabulary in spec.vocabularies().items():
        if isinstance(vocabulary, DeclaredVocabulary) and vocabulary.values is None:
            key = spec.items.key if spec.items is not None else None
            lists[table] = _declared_values(table, vocabulary, items=items_table, key=key, base=base)
    resolved = _with_sizes(spec, lists)
    return ResolvedSpec(resolved, Vocabularies(resolved, lists), users_source, items_table)


def _read_table(location: str, columns: list[tuple[str, str]], *, where: str) -> pa.Table:
    source = RowSource.open([location])
    require_columns(columns, source, where=where)
    return source.table(list(dict.fromkeys(name for name, _ in columns)))


def _side_location(side: SideTable | None, name: str, override: str | None, base: str | Path) -> str | None:
    if side is None:
        if override:
            raise InputError(f"a {name} table is given, but the feature spec declares no {name}")
        return None
    return override or resolve_location(side.path, base)


def _user_columns(spec: FeatureSpec) -> list[tuple[str, str]]:
    assert spec.users is not None
    return [(spec.users.key, "users.key"), *_feature_columns(spec, "user")]


def _item_columns(spec: FeatureSpec) -> list[tuple[str, str]]:
    assert spec.items is not None
    columns = [(spec.items.key, "items.key"), *_feature_columns(spec, "item")]
    if spec.item is not None:
        columns += [(spec.item.title, "item.title")] if spec.item.title is not None else []
        columns += [(column, "item.metadata") for column in spec.item.metadata]
    return columns


def _feature_columns(spec: FeatureSpec, source: Source) -> list[tuple[str, str]]:
    return [(f.column_name, f"feature {f.name!r}") for f in spec.features if f.source == source]


def _declared_values(
    table: str, vocabulary: DeclaredVocabulary, *, items: pa.Table | None, key: str | None, base: str | Path
) -> pa.Array:
    where = f"vocabulary of {table}"
    if vocabulary.table == "items":
        assert items is not None
        return check_values(items.column(key), where=f"{where} (key of the items table)")
    assert vocabulary.file is not None
    location = resolve_location(vocabulary.file, base)
    if vocabulary.column is None:
        # Only line feeds end a line here: U+2028 and U+0085 may stand within a value.
        lines = [line.strip(" \t\r") for line in read_text(location).split("\n")]
        texts = pa.array([line for line in lines if line], pa.string())
        return check_values(texts, where=f"{where} ({shown(location)})")
    found = _read_table(location, [(vocabulary.column, where)], where=shown(location))
    return check_values(found.column(vocabulary.column), where=f"{where} ({shown(location)})")


def _with_sizes(spec: FeatureSpec, lists: dict[str, pa.Array]) -> FeatureSpec:
    """The spec with size and digest of every list that stands outside it."""

    def sized(part: _Part, table: str) -> _Part:
        if not isinstance(part.vocabulary, DeclaredVocabulary) or table not in lists:
            return part
        values = lists[table]
        update = {"size": len(values), "sha256": values_digest(values)}
        return part.model_copy(update={"vocabulary": part.vocabulary.model_copy(update=update)})

    def sized_feature(
        feature: SingleFeature | ListFeature | DenseFeature,
    ) -> SingleFeature | ListFeature | DenseFeature:
        match feature:
            case SingleFeature():
                return sized(feature, feature.table_name)
            case ListFeature():
                return sized(feature, feature.table_name)
            case DenseFeature():
                return feature

    return spec.model_copy(
        update={
            "user": sized(spec.user, "user") if spec.user is not None else None,
            "item": sized(spec.item, "item") if spec.item is not None else None,
            "features": tuple(sized_feature(feature) for feature in spec.features),
        }
    )
