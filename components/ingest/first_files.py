"""First versions of a feature spec and a training configuration, for somebody's own log.

Nothing here looks at a value: names and types of columns come from schemas, sizes from what the owner states as public.
What cannot be known so stands in a comment, for the owner to decide.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from lazydp.components.features.encode import is_list_type
from lazydp.components.features.values import is_scalar_type, plain_type
from lazydp.components.ingest.column_roles import column_for, is_description, is_free_text, same_name
from lazydp.components.ingest.source import RowSource
from lazydp.components.shared.errors import InputError

Unit = Literal["user", "example"]
_CONTRIBUTIONS = (8, 16, 32, 64, 128, 256)
_MAX_BUCKETS = 2**24


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the owner of a log states: columns where their names say too little, and public orders of magnitude."""

    users: int
    interactions: int
    unit: Unit = "user"
    name: str = "mine"
    user: str | None = None
    item: str | None = None
    time: str | None = None
    title: str | None = None
    rating: str | None = None
    liked_from: float | None = None
    items_location: str | None = None
    item_count: int | None = None

    @property
    def max_examples_per_user(self) -> int:
        """A bound near what users have on average, from the stated numbers alone."""
        average = self.interactions / self.users
        return next((bound for bound in _CONTRIBUTIONS if bound >= average), _CONTRIBUTIONS[-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """What the columns are taken for.

    Attributes:
        user: column of the log.
        item: column of the log.
        time: column of the log; None where none is called so.
        rating: column of the log; None where none is called so.
        key: column of the catalogue with the id of the item; None without a catalogue.
        title: column of the catalogue; None where none is called so.
    """

    user: str
    item: str
    time: str | None
    rating: str | None
    key: str | None
    title: str | None

    @classmethod
    def of(cls, log: RowSource, items: RowSource | None, asked: Asked) -> Roles:
        """Take the columns that were named, and others by their names.

        Raises:
            InputError: a column was named that isn't there, or none or several can be the user, the item or the key.
        """
        user = asked.user or _required(log, log.column_names, "user")
        time = asked.time or column_for([name for name in log.column_names if name != user], "time")
        others = [name for name in log.column_names if name not in (user, time)]
        # What log and catalogue both have is what joins them.
        shared = [name for name in others if items is not None and same_name(items.column_names, name)]
        item = asked.item or (shared[0] if len(shared) == 1 else _required(log, shared or others, "item"))
        rating = asked.rating or column_for([name for name in others if name != item], "rating")
        key = title = None
        if items is not None:
            key = _key(items, item)
            title = asked.title or _title([name for name in items.column_names if name != key])
        for source, names in ((log, (user, item, time, rating)), (items, (key, title))):
            for name in names:
                if source is not None and name is not None and name not in source.column_names:
                    listed = ", ".join(source.column_names)
                    raise InputError(f"{source.where} has no column {name!r}; it has: {listed}")
        return cls(user=user, item=item, time=time, rating=rating, key=key, title=title)

    def described(self) -> str:
        """The columns in a line, for whoever has to check them."""
        named = {"user": self.user, "item": self.item, "time": self.time, "title": self.title}
        return ", ".join(f"{role}: {'none' if column is None else repr(column)}" for role, column in named.items())


def first_spec(log: RowSource, items: RowSource | None, roles: Roles, asked: Asked) -> str:
    """The text of a feature spec.

    Args:
        log: the interactions, of which schemas are read.
        items: the public catalogue; None where item ids are integers up to `item_count`.
        roles: what the columns are.
        asked: see `Asked`.

    Raises:
        InputError: neither a catalogue nor a number of items was given, or a threshold without a column of ratings.
    """
    taken = [name for name in (roles.user, roles.item, roles.time) if name is not None]
    bound = asked.max_examples_per_user
    name = _identifier(asked.name)
    lines = [
        "# Written by `lazydp init` from the names and types of columns and from the numbers that you gave.",
        "# No value of your data was looked at. Whatever stands here is public with every model:",
        "# never choose it by counting private rows.",
        "format_version: 1",
        f"name: {name}    # datasets of one name share one budget",
        "",
        "user:",
        f"  column: {_text(roles.user)}",
        "  # Ids fall into so many rows of a table by a keyed hash; about twice the users keeps most apart.",
        f"  vocabulary: {{kind: hashed, buckets: {_buckets(asked.users)}, salt: {_text(name)}}}",
        "",
        *_item_lines(roles, asked),
        "",
        *_time_lines(roles.time),
        *_label_lines(roles.rating, asked.liked_from),
        "",
        f"# At most so many training examples a user: {asked.interactions:,} interactions of {asked.users:,} users are "
        f"{asked.interactions / asked.users:.3g} each.",
        f"max_examples_per_user: {bound}",
        f"history: {{max_length: {min(bound, 50)}, pooling: mean}}",
        "split: {kind: leave_last_out}    # each user's last interaction is for evaluation",
        "",
        "features:",
        *_feature_lines(log, taken, source="context"),
    ]
    if items is not None:
        lines += _feature_lines(items, [name for name in (roles.key, roles.title) if name is not None], source="item")
    if not any(line.startswith("  - ") for line in lines):
        lines[lines.index("features:")] = "features: []"
    return "\n".join(lines) + "\n"


def first_config(asked: Asked) -> str:
    """The text of a training configuration: a start at epsilon 8, which is what `lazydp plan` answers as well."""
    delta = 10.0 ** -(math.ceil(math.log10(asked.users)) + 2)
    covers = "all that one user did" if asked.unit == "user" else "one interaction; for a whole user it is larger"
    return "\n".join(
        [
            "# Written by `lazydp init` from the numbers that you gave; no value of your data was looked at.",
            "format_version: 1",
            f"privacy_unit: {asked.unit}    # what epsilon covers: {covers}",
            "start: {}    # a model from statistics that are released once, with noise (docs/quality.md)",
            "steps: 0    # and no training after that; docs/training.md says how to train with steps",
            "target_epsilon: 8    # `lazydp plan` says what quality to expect of an epsilon",
            f"target_delta: {delta:.1e}    # well below one over the number of users",
            "",
        ]
    )


def _item_lines(roles: Roles, asked: Asked) -> list[str]:
    if roles.key is not None:
        return [
            "item:",
            f"  column: {_text(roles.item)}",
            "  vocabulary: {kind: declared, table: items}    # the catalogue is public",
            *([f"  title: {_text(roles.title)}"] if roles.title is not None else []),
            f"items: {{path: {_text(asked.items_location or '')}, key: {_text(roles.key)}}}",
        ]
    if asked.item_count is None:
        raise InputError(
            "what is on offer must be declared, since answers name it: give the catalogue (--items), a table of CSV or "
            "Parquet with a row for each item; or --item-count, where ids are the integers up to it"
        )
    return [
        "item:",
        f"  column: {_text(roles.item)}",
        "  # Ids are integers from 0 or 1 up to the number that you gave.",
        f"  vocabulary: {{kind: integer, first: 0, size: {asked.item_count + 1}}}",
    ]


def _time_lines(time: str | None) -> list[str]:
    if time is None:
        missing = "# No column's name says that it is a time. With one, a user's latest examples are kept and held out:"
        return [missing, "# timestamp: at"]
    return [f"timestamp: {_text(time)}"]


def _label_lines(rating: str | None, liked_from: float | None) -> list[str]:
    """Which rows count as positive."""
    column = _text(rating if rating is not None else "rating")
    if liked_from is None:
        return [
            "label: {kind: implicit}    # every row is a positive example",
            "# For ratings, let only good ones count:",
            f"# label: {{kind: threshold, column: {column}, at_least: 4}}",
        ]
    if rating is None:
        raise InputError("--liked-from needs a column of ratings, and none is called so: name it by --rating")
    return [f"label: {{kind: threshold, column: {column}, at_least: {liked_from:g}}}    # the other rows are negative"]


def _feature_lines(source_of: RowSource, taken: Iterable[str], *, source: str) -> list[str]:
    """A line for every further column: text becomes a hashed feature, a number waits in a comment for its bounds."""
    lines = []
    names: set[str] = {"user", "item", "history", *taken}
    for column in source_of.column_names:
        if column in taken:
            continue
        kinds = list(source_of.types(column))
        name = _identifier(column)
        of = "" if source == "context" else f", source: {source}"
        named = "" if name == column else f", column: {_text(column)}"
        numeric = all(_is_number(kind) for kind in kinds)
        if name in names or not all(is_scalar_type(kind) or is_list_type(kind) for kind in kinds):
            lines.append(f"  # column {column!r} ({', '.join(map(str, kinds))}) is left out")
            continue
        names.add(name)
        if source == "context":
            # What describes an interaction may be its outcome, such as a rating: that is for the owner to know.
            mark, note = "# ", "    # of the interaction: only if it is known when you ask for recommendations"
        else:
            mark, note = ("# ", "    # TODO: its public range") if numeric else ("", "")
            if is_free_text(column):
                mark, note = "# ", "    # a text of each item's own tells a model little"
        if numeric:
            lines.append(f"  {mark}- {{name: {name}{of}{named}, kind: dense, bounds: [0, 1]}}{note}")
        else:
            kind = "list" if all(is_list_type(found) for found in kinds) else "single"
            vocabulary = f"{{kind: hashed, buckets: 1000, salt: {_text(name)}}}"
            lines.append(f"  {mark}- {{name: {name}{of}{named}, kind: {kind}, vocabulary: {vocabulary}}}{note}")
    return lines


def _is_number(kind: pa.DataType) -> bool:
    kind = plain_type(kind)
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def _key(items: RowSource, item: str) -> str:
    """The column of the catalogue that holds the item's id."""
    columns = items.column_names
    found = same_name(columns, item) or column_for(columns, "item") or same_name(columns, "id")
    if found is None:
        raise InputError(
            f"{items.where} has neither a column {item!r} nor one called like an id; it has: {', '.join(columns)}"
        )
    return found


def _title(columns: Sequence[str]) -> str | None:
    """The column with titles; without one a text that describes the item, whose words tell items apart as well."""
    return column_for(columns, "title") or next((name for name in columns if is_description(name)), None)


def _required(source: RowSource, columns: Sequence[str], role: Literal["user", "item"]) -> str:
    found = column_for(columns, role)
    if found is None:
        raise InputError(
            f"no column of {source.where} has a name that says {role}; it has: {', '.join(source.column_names)}. "
            f"Name the column by --{role}"
        )
    return found


def _identifier(text: str) -> str:
    """A name that a spec accepts."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "_", text)[:64].strip("-") or "x"
    return plain if re.match(r"[A-Za-z_]", plain) else f"c_{plain}"[:64]


def _text(value: str) -> str:
    """A YAML scalar in a mapping in braces: plain where nothing could be misread."""
    plain = re.fullmatch(r"[A-Za-z_/.][A-Za-z0-9_./-]*", value) and not _READ_OTHERWISE.fullmatch(value)
    return value if plain else json.dumps(value, ensure_ascii=False)


_READ_OTHERWISE = re.compile(r"y|n|yes|no|true|false|on|off|null", re.IGNORECASE)


def _buckets(users: int) -> int:
    return int(min(_MAX_BUCKETS, 2 ** math.ceil(math.log2(2 * max(users, 8)))))
