"""Which column of a log or a catalogue holds what, by the names of the columns alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from lazydp.components.shared.errors import InputError

Role = Literal["user", "item", "time", "title", "rating"]
# Words that say what a column holds, the likeliest first.
_WORDS: dict[Role, tuple[str, ...]] = {
    "user": (
        *("user", "customer", "member", "visitor", "person", "client", "viewer", "reader", "listener", "subscriber"),
        *("buyer", "shopper", "player", "patron", "guest", "reviewer", "profile", "household", "account", "uid"),
    ),
    "item": (
        *("item", "product", "sku", "movie", "film", "article", "song", "track", "video", "book", "place", "venue"),
        *("poi", "business", "restaurant", "hotel", "show", "game", "app", "recipe", "course", "offer", "listing"),
        *("content", "asin", "isbn", "iid", "artist", "album", "episode", "podcast", "post", "ad", "location"),
    ),
    "time": ("timestamp", "time", "ts", "datetime", "date", "at", "when", "day", "epoch"),
    "title": ("title", "name", "label", "headline"),
    "rating": ("rating", "ratings", "stars", "star", "score", "grade"),
}
# These only say that a column holds ids.
_OF_IDS = {"id", "ids", "no", "nr", "num", "number", "code", "key", "uuid", "guid", "hash", "ref"}
_UNITS = {"s", "sec", "seconds", "ms", "millis", "us", "micros", "ns", "utc", "gmt", "unix", "local"}
# A time after one of these is a duration, or not the time of the row.
_NO_TIME_OF_ROW = {"watch", "watched", "play", "played", "dwell", "reading", "listening", "spent", "birth", "release"}
_DESCRIPTION = {"description", "summary", "abstract", "plot", "text"}
_FREE_TEXT = _DESCRIPTION | {"comment", "url", "link", "image", "photo", "picture", "poster", "isbn", "ean", "gtin"}
# Where several columns are as likely, only these decide what a model is trained on.
_MUST_BE_ONE = {"user", "item", "time"}


@dataclass(frozen=True, slots=True)
class _Name:
    """A column's name in words: lower case, without marks, units and words for ids."""

    column: str
    words: tuple[str, ...]

    @classmethod
    def of(cls, column: str, role: Role) -> _Name:
        split = _split(column)
        dropped = {"user": _OF_IDS, "item": _OF_IDS, "time": _UNITS}.get(role, set())
        return cls(column, tuple(word for word in split if word not in dropped) or tuple(split))


def column_for(columns: Sequence[str], role: Role) -> str | None:
    """The column whose name says that it holds `role`; None where none does.

    A name that consists of one known word, words such as "id" left out, comes before one that ends in a known word.

    Raises:
        InputError: two columns are equally likely.
    """
    names = [_Name.of(column, role) for column in columns]
    return _likeliest([name for name in names if len(name.words) == 1], role) or _likeliest(
        [name for name in names if len(name.words) > 1 and not _means_otherwise(name, role)], role
    )


def same_name(columns: Iterable[str], wanted: str) -> str | None:
    """The column of this name; where there is none, one whose name differs in case and marks alone."""
    listed = list(columns)
    if wanted in listed:
        return wanted
    return next((column for column in listed if _split(column) == _split(wanted) != []), None)


def is_free_text(column: str) -> bool:
    """Whether the name is that of a text or an address, of which each item has its own."""
    return any(word in _FREE_TEXT for word in _split(column))


def is_description(column: str) -> bool:
    """Whether the name is that of a text about an item."""
    return any(word in _DESCRIPTION for word in _split(column))


def _split(column: str) -> list[str]:
    apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", column)
    words = [word for word in re.split(r"[\W_]+", apart.lower()) if word]
    return [part for word in words for part in _parted(word)]


def _parted(word: str) -> list[str]:
    """A known word and "id", where a name joins them without a mark: userid, movieid, eventtime."""
    for known in (*_WORDS["user"], *_WORDS["item"]):
        if word == f"{known}id":
            return [known, "id"]
        if word in (f"{known}name", f"{known}title"):
            return [known, word.removeprefix(known)]
    for known in ("timestamp", "time", "date", "at"):
        if word in (f"event{known}", f"created{known}"):
            return [word.removesuffix(known), known]
    return [word]


def _likeliest(names: Sequence[_Name], role: Role) -> str | None:
    for known in _WORDS[role]:
        # A name in brackets or with a number after it, such as "Stars (1-5)", is still that of its first word.
        found = [name.column for name in names if _last_word(name) == known]
        if len(found) > 1:
            found = [column for column in found if _says_id(column)] or found
        if len(found) > 1 and role in _MUST_BE_ONE:
            raise InputError(
                f"the columns {', '.join(map(repr, found))} could each be the {role}: name one by --{role}"
            )
        if found:
            return found[0]
    return None


def _last_word(name: _Name) -> str:
    return next((word for word in reversed(name.words) if not word.isdigit()), "")


def _says_id(column: str) -> bool:
    return any(word in _OF_IDS for word in _split(column))


def _means_otherwise(name: _Name, role: Role) -> bool:
    """Whether the words before the last one make it something else: the name of a brand is no title."""
    before = name.words[:-1]
    if role == "time":
        return any(word in _NO_TIME_OF_ROW for word in before)
    if role == "title":
        return name.words[-1] != "title" and not any(word in _WORDS["item"] for word in before)
    return False
