"""Cursors: where the next page of a ranking begins, as text that the caller hands back.

A cursor names the versions that ranked, the query, and the last item of the page with its score. So a page begins
right behind an item instead of behind so many items, and scores that tie change nothing. It is no secret and holds
nothing of a person: the query stands in it as a digest of 64 bits.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from dataclasses import replace

import orjson

from lazydp.components.bundle.query import Position, Query, Ranking
from lazydp.service.http.problems import Problem

_DIGEST_BYTES = 8


def following(ranker: str, query: Query, ranking: Ranking) -> str | None:
    """The cursor of the page behind `ranking`, by which `ranker` answered `query`; None on the last page."""
    if not ranking.more or not ranking.codes:
        return None
    place = [ranker, _digest(query), float(ranking.scores[-1]), ranking.codes[-1]]
    return base64.urlsafe_b64encode(orjson.dumps(place)).rstrip(b"=").decode()


def placed(ranker: str, query: Query, cursor: str | None, *, pointer: str) -> Query:
    """`query` from where `cursor` says.

    Args:
        ranker: the versions that would answer.
        query: as asked.
        cursor: None or "" for the first page.
        pointer: where in the request the cursor stands.

    Raises:
        Problem: 409 for what is no cursor, or one of another query or version.
    """
    if not cursor:
        return query
    version, digest, score, code = _read(cursor, pointer)
    if version != ranker:
        detail = f'the cursor is of another version than {ranker}, which answers now: begin again with cursor ""'
        raise Problem(409, "outdated-cursor", detail)
    if digest != _digest(query):
        raise _foreign(pointer, "this cursor is of another query: only k, offset and explain may change")
    return replace(query, after=Position(score=score, code=code))


def _read(cursor: str, pointer: str) -> tuple[str, str, float, int]:
    try:
        place = orjson.loads(base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True))
    except (binascii.Error, ValueError):
        place = None
    if isinstance(place, list) and [type(part) for part in place] == [str, str, float, int] and place[3] >= 0:
        return place[0], place[1], place[2], place[3]
    raise _foreign(pointer, "this is no cursor of this service")


def _foreign(pointer: str, detail: str) -> Problem:
    return Problem(409, "foreign-cursor", f"{pointer}: {detail}", errors=[(pointer, detail)])


def _digest(query: Query) -> str:
    asked = replace(query, k=0, offset=0, after=None, explain=False)
    content = orjson.dumps(asked, option=orjson.OPT_SORT_KEYS)
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).hexdigest()
