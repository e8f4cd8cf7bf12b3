"""The native endpoints that recommend."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from typing import Annotated

import orjson
from fastapi import APIRouter, Path, Query, Request
from pydantic import BaseModel, Field, TypeAdapter
from starlette.responses import Response

from lazydp.components.bundle import query as queries
from lazydp.components.bundle.query import Ranking
from lazydp.components.shared.errors import InputError
from lazydp.service import schemas
from lazydp.service.conditions import MAX_ID
from lazydp.service.http.etags import digest_of, tagged
from lazydp.service.http.problems import Problem, unprocessable
from lazydp.service.http.request_body import describe, json_body, parse_bytes
from lazydp.service.routes.deps import InContext, json_response
from lazydp.service.serving import cursors
from lazydp.service.serving.answer_cache import Answer
from lazydp.service.serving.checks import check_names
from lazydp.service.serving.context import Context
from lazydp.service.serving.ranker import Ranker
from lazydp.service.serving.served_version import ServedVersion, joined

router = APIRouter(tags=["recommendations"])

_QUERY = TypeAdapter(schemas.RecommendationQuery)
_BATCH = TypeAdapter(schemas.RecommendationBatch)
_PRIVATE = "private, no-cache"
# What the keys of kept answers begin with.
_BY_TAG, _BY_BODY = b"tag:", b"body:"

UserId = Annotated[str, Path(min_length=1, max_length=MAX_ID, description="a user of the model", examples=["196"])]
ItemId = Annotated[str, Path(min_length=1, max_length=MAX_ID, description="an item of the model", examples=["50"])]
MODEL = "name of the model; the default one if left out"
Model = Annotated[str | None, Query(max_length=64, description=MODEL)]


class Page(BaseModel):
    """Which part of a ranking is wanted, and of which model."""

    k: int = Field(schemas.DEFAULT_K, ge=1, le=schemas.MAX_K, description="items wanted")
    offset: int = Field(0, ge=0, le=schemas.MAX_OFFSET, description="items to skip: `next_offset` of the page before")
    cursor: str | None = Field(
        None,
        max_length=schemas.MAX_TEXT,
        description="empty for the first page, or `next_cursor` of the page before, for pages that never shift",
    )
    model: str | None = Field(None, max_length=64, description=MODEL)

    split_key: str | None = Field(
        None, min_length=1, max_length=MAX_ID, description="requests with one key get one version, where several answer"
    )

    def placed(self, ranker: Ranker, query: queries.Query) -> queries.Query:
        """`query` for this page."""
        paged = replace(query, k=self.k, offset=self.offset, alone=self.cursor is not None)
        return cursors.placed(ranker.identity, paged, self.cursor, pointer="cursor")


InPage = Annotated[Page, Query()]


@router.post(
    "/v1/recommendations",
    response_model=schemas.Recommendations | schemas.RecommendationResults,
    openapi_extra=describe("RecommendationQuery", "RecommendationBatch"),
    summary="Recommend for a user, a history, or several at once",
)
async def recommend(request: Request, context: InContext, model: Model = None) -> Response:
    """Items for one query (`RecommendationQuery`) or several (`RecommendationBatch`).

    A user or history that the model knows nothing of gets the most popular items where the bundle carries counts
    that were released with noise (`source: popular`), and 404 otherwise; in a batch, an empty answer with a notice.
    """
    return json_response(await recommended(context, request.scope["headers"], await request.body(), model=model))


async def recommended(
    context: Context, headers: Iterable[tuple[bytes, bytes]], body: bytes, *, model: str | None = None
) -> bytes:
    """What POST /v1/recommendations answers to `body`, as JSON.

    Raises:
        Problem: as that route does.
    """
    body = json_body(headers, body, max_bytes=context.settings.max_body_bytes)
    # The key that decides who answers stands in the body; otherwise a body that was answered before is not read again.
    parsed = parse(body) if context.deals(model) else None
    if isinstance(parsed, schemas.RecommendationBatch):
        return await _answered_together(context, parsed, model)
    ranker = context.ranker(model if parsed is None else context.dealt(model, parsed.key))
    served = ranker.served
    key = _BY_BODY + (body if ranker.retriever is None else ranker.identity.encode() + body)
    kept = served.cache.get(key)
    if kept is None:
        parsed = parsed or parse(body)
        if isinstance(parsed, schemas.RecommendationBatch):
            return await _answered_together(context, parsed, model)
        kept = await answered(context, ranker, _placed(ranker, parsed, pointer=""))
        served.cache.put(key, kept)
    else:
        context.metrics.answered(served.name, kept.source)
    if parsed is not None:
        context.copied(model, parsed.query)
    return kept.body


def recommended_at_once(
    context: Context, headers: Iterable[tuple[bytes, bytes]], body: bytes, reply: Callable[[bytes | Exception], None]
) -> bool:
    """Begin to answer POST /v1/recommendations where one quick model answers one query.

    Args:
        context: of the service.
        headers: of the request.
        body: of the request.
        reply: called once if this returns True, now or when the batch is ranked.

    Returns:
        Whether `reply` is called. Otherwise nothing was begun, and `recommended` answers.

    Raises:
        Problem: as `recommended` does.
    """
    body = json_body(headers, body, max_bytes=context.settings.max_body_bytes)
    ranker = context.ranker()
    if context.deals(None) or not ranker.is_quick or _is_batch(body):
        return False
    served = ranker.served
    key = _BY_BODY + body
    kept = served.cache.get(key)
    if kept is not None:
        context.metrics.answered(served.name, kept.source)
        reply(kept.body)
        return True
    query = _placed(ranker, parse_bytes(body, _QUERY), pointer="")
    check_names(served, query, pointer="")

    def ranked(outcome: Ranking | Exception) -> None:
        try:
            answer = _made(context, ranker, query, outcome)
        except Exception as error:
            reply(error)
        else:
            served.cache.put(key, answer)
            reply(answer.body)

    served.batcher.submit(query, ranked)
    return True


def _placed(ranker: Ranker, query: schemas.RecommendationQuery, *, pointer: str) -> queries.Query:
    return cursors.placed(ranker.identity, query.query(), query.cursor, pointer=f"{pointer}/cursor")


async def _answered_together(context: Context, batch: schemas.RecommendationBatch, model: str | None) -> bytes:
    if sum(query.k for query in batch.queries) > schemas.MAX_BATCH_ITEMS:
        raise unprocessable([("/queries", f"all k together may be {schemas.MAX_BATCH_ITEMS} at most")])
    numbers: dict[str | None, list[int]] = {}
    for number, query in enumerate(batch.queries):
        numbers.setdefault(context.dealt(model, query.key), []).append(number)
    rankers = {name: context.ranker(name) for name in numbers}
    found: dict[int, bytes] = {}
    for name, own in numbers.items():
        asked = {number: _placed(rankers[name], batch.queries[number], pointer=f"/queries/{number}") for number in own}
        found |= await _answers(context, rankers[name], asked)
    for query in batch.queries:
        context.copied(model, query.query)
    results = (found[number] for number in range(len(batch.queries)))
    return joined(results, by=next(iter(rankers.values())).served if len(rankers) == 1 else None)


async def _answers(context: Context, ranker: Ranker, asked: dict[int, queries.Query]) -> dict[int, bytes]:
    """Answers to queries of one request, by their numbers."""
    for number, query in asked.items():
        check_names(ranker.served, query, pointer=f"/queries/{number}")
    rankings = await _ranked_together(ranker, list(asked.values()))
    for ranking in rankings:
        context.metrics.answered(ranker.served.name, ranking.source)
    return {
        number: ranker.answer(query, ranking) for (number, query), ranking in zip(asked.items(), rankings, strict=True)
    }


@router.get(
    "/v1/users/{user_id:path}/recommendations",
    response_model=schemas.Recommendations,
    responses={304: {"description": "The answer has not changed."}},
    summary="Recommend for a known user",
)
async def recommend_to_user(request: Request, context: InContext, user_id: UserId, page: InPage) -> Response:
    """The best items for a user that the vocabulary knows; 404 for others (see POST /v1/recommendations).

    A hashed vocabulary knows everybody: a user never seen in training has some row of the table.
    """
    ranker = context.ranker(context.dealt(page.model, page.split_key or user_id))
    query = page.placed(ranker, queries.Query(user_id=user_id))
    context.copied(page.model, lambda: replace(query, after=None))
    tag = digest_of(ranker.identity, "user", user_id, page.k, page.offset, page.cursor)
    return await _tagged(request, context, ranker.served, tag, lambda: answered(context, ranker, query))


@router.get(
    "/v1/items/{item_id:path}/similar",
    response_model=schemas.Recommendations,
    responses={304: {"description": "The answer has not changed."}},
    summary="Items like an item",
)
async def similar(request: Request, context: InContext, item_id: ItemId, page: InPage) -> Response:
    """Items whose vectors have the greatest cosine with the item's; 404 for an item that the model does not know."""
    ranker = context.ranker(context.dealt(page.model, page.split_key))
    query = page.placed(ranker, queries.Query(similar_to=[item_id]))
    context.copied(page.model, lambda: replace(query, after=None))
    tag = digest_of(ranker.identity, "similar", item_id, page.k, page.offset, page.cursor)
    return await _tagged(request, context, ranker.served, tag, lambda: answered(context, ranker, query))


async def answered(context: Context, ranker: Ranker, query: queries.Query) -> Answer:
    """The answer to one query.

    Raises:
        Problem: 404 where there is none, 422 for a feature or attribute that the model does not have.
    """
    check_names(ranker.served, query, pointer="")
    try:
        ranking = await ranker.rank(query)
    except InputError as error:
        return _made(context, ranker, query, error)
    return _made(context, ranker, query, ranking)


def _made(context: Context, ranker: Ranker, query: queries.Query, outcome: Ranking | Exception) -> Answer:
    """The answer to a query from its ranking, or from what kept it from being ranked; raises as `answered` does."""
    if isinstance(outcome, InputError):
        raise unprocessable([("/features", str(outcome))])
    if isinstance(outcome, Exception):
        raise outcome
    context.metrics.answered(ranker.served.name, outcome.source)
    if outcome.source == "none":
        raise Problem(404, "unknown-item" if query.similar_to else "nothing-known", outcome.notice)
    return Answer(ranker.answer(query, outcome), outcome.source)


async def _ranked_together(ranker: Ranker, asked: list[queries.Query]) -> list[Ranking]:
    try:
        return await ranker.rank_all(asked)
    except InputError as error:
        raise unprocessable([("/queries", str(error))]) from None


async def _tagged(
    request: Request, context: Context, served: ServedVersion, tag: str, answer: Callable[[], Awaitable[Answer]]
) -> Response:
    """304 where the caller has the answer named `tag`, the one that was kept, or a new one."""

    async def body() -> bytes:
        # Apart from the bodies of POST, which are keys of the same cache.
        key = _BY_TAG + tag.encode()
        kept = served.cache.get(key)
        if kept is None:
            kept = await answer()
            served.cache.put(key, kept)
        else:
            context.metrics.answered(served.name, kept.source)
        return kept.body

    return await tagged(request.headers.get("if-none-match"), tag, body, cache_control=_PRIVATE)


def parse(body: bytes) -> schemas.RecommendationQuery | schemas.RecommendationBatch:
    """One query or several.

    Raises:
        Problem: as `parse_bytes` does.
    """
    return parse_bytes(body, _BATCH) if _is_batch(body) else parse_bytes(body, _QUERY)


def _is_batch(body: bytes) -> bool:
    """Whether `queries` is a member of the body's object; the word may stand in any id too, and be spelt by escapes."""
    if b"queries" not in body and b"\\u" not in body:
        return False
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        return False
    return isinstance(document, dict) and "queries" in document
