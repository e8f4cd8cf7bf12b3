"""The native endpoints that recommend."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Annotated

from fastapi import APIRouter, Path, Query, Request
from pydantic import TypeAdapter
from starlette.responses import Response

from lazydp.components.bundle import query as queries
from lazydp.components.bundle.query import Ranking
from lazydp.components.shared.errors import InputError
from lazydp.service import schemas
from lazydp.service.http.etags import digest_of, tagged
from lazydp.service.http.problems import Problem, unprocessable
from lazydp.service.routes.deps import Context, InContext, json_response
from lazydp.service.routes.request_body import describe, parse_bytes, require_json
from lazydp.service.serving.ranker import Ranker
from lazydp.service.serving.served_version import ServedVersion

router = APIRouter(tags=["recommendations"])

_QUERY = TypeAdapter(schemas.RecommendationQuery)
_BATCH = TypeAdapter(schemas.RecommendationBatch)
_PRIVATE = "private, no-cache"
# What the keys of kept answers begin with.
_BY_TAG, _BY_BODY = b"tag:", b"body:"

UserId = Annotated[str, Path(min_length=1, max_length=256, description="a user of the model", examples=["196"])]
ItemId = Annotated[str, Path(min_length=1, max_length=256, description="an item of the model", examples=["50"])]
K = Annotated[int, Query(ge=1, le=schemas.MAX_K, description="items wanted")]
Offset = Annotated[
    int, Query(ge=0, le=schemas.MAX_OFFSET, description="items to skip: `next_offset` of the page before")
]
Model = Annotated[str | None, Query(max_length=64, description="name of the model; the default one if left out")]


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
    ranker = context.ranker(model)
    served = ranker.served
    require_json(headers)
    key = _BY_BODY + (body if ranker.retriever is None else ranker.identity.encode() + body)
    cached = served.cache.get(key)
    if cached is not None:
        return cached
    parsed = _parse(body)
    if isinstance(parsed, schemas.RecommendationBatch):
        asked = [part.query() for part in parsed.queries]
        for number, query in enumerate(asked):
            check(served, query, pointer=f"/queries/{number}")
        rankings = await _ranked_together(ranker, asked)
        for ranking in rankings:
            context.metrics.answered(served.name, ranking.source)
        return served.answers(
            served.answer(query, ranking, retriever=ranker.found_by(query))
            for query, ranking in zip(asked, rankings, strict=True)
        )
    answer = await answered(context, ranker, parsed.query())
    served.cache.put(key, answer)
    return answer


@router.get(
    "/v1/users/{user_id:path}/recommendations",
    response_model=schemas.Recommendations,
    responses={304: {"description": "The answer has not changed."}},
    summary="Recommend for a known user",
)
async def recommend_to_user(
    *,
    request: Request,
    context: InContext,
    user_id: UserId,
    k: K = schemas.DEFAULT_K,
    offset: Offset = 0,
    model: Model = None,
) -> Response:
    """The best items for a user that the vocabulary knows; 404 for others (see POST /v1/recommendations).

    A hashed vocabulary knows everybody: a user never seen in training has some row of the table.
    """
    ranker = context.ranker(model)
    query = queries.Query(user_id=user_id, k=k, offset=offset)
    tag = digest_of(ranker.identity, "user", user_id, k, offset)
    return await _tagged(request, ranker.served, tag, lambda: answered(context, ranker, query))


@router.get(
    "/v1/items/{item_id:path}/similar",
    response_model=schemas.Recommendations,
    responses={304: {"description": "The answer has not changed."}},
    summary="Items like an item",
)
async def similar(
    *,
    request: Request,
    context: InContext,
    item_id: ItemId,
    k: K = schemas.DEFAULT_K,
    offset: Offset = 0,
    model: Model = None,
) -> Response:
    """Items whose vectors have the greatest cosine with the item's; 404 for an item that the model does not know."""
    served = context.served(model)

    async def answer() -> bytes:
        ranking = await served.similar(item_id, k=k, offset=offset)
        if ranking is None:
            raise Problem(404, "unknown-item", "the model does not know this item")
        return served.answer(queries.Query(k=k, offset=offset), ranking)

    tag = digest_of(f"{served.name} {served.version}", "similar", item_id, k, offset)
    return await _tagged(request, served, tag, answer)


async def answered(context: Context, ranker: Ranker, query: queries.Query) -> bytes:
    """The answer to one query as JSON.

    Raises:
        Problem: 404 where there is none, 422 for a feature or attribute that the model does not have.
    """
    served = ranker.served
    check(served, query, pointer="")
    try:
        ranking = await ranker.rank(query)
    except InputError as error:
        raise unprocessable([("/features", str(error))]) from None
    context.metrics.answered(served.name, ranking.source)
    if ranking.source == "none":
        raise Problem(404, "nothing-known", ranking.notice)
    return served.answer(query, ranking, retriever=ranker.found_by(query))


def check(served: ServedVersion, query: queries.Query, *, pointer: str) -> None:
    """Refuse names that the model does not have.

    Raises:
        Problem: 422 that names them.
    """
    if not (query.filters or query.cap or query.features):
        return
    attributes, features = served.scorer.items.attributes, served.scorer.encoder.features
    unknown = [(f"{pointer}/filters", attributes, name) for name in query.filters if name not in attributes]
    unknown += [(f"{pointer}/features", features, name) for name in query.features if name not in features]
    if query.cap is not None and query.cap.attribute not in attributes:
        unknown.append((f"{pointer}/diversity/attribute", attributes, query.cap.attribute))
    if unknown:
        raise unprocessable(
            [
                (where, f"the model has no such name; it has: {', '.join(known) or 'none'}")
                for where, known, _ in unknown
            ]
        )


async def _ranked_together(ranker: Ranker, asked: list[queries.Query]) -> list[Ranking]:
    try:
        return await ranker.rank_all(asked)
    except InputError as error:
        raise unprocessable([("/queries", str(error))]) from None


async def _tagged(
    request: Request, served: ServedVersion, tag: str, answer: Callable[[], Awaitable[bytes]]
) -> Response:
    """304 where the caller has the answer named `tag`, the one that was kept, or a new one."""

    async def kept() -> bytes:
        # Apart from the bodies of POST, which are keys of the same cache.
        key = _BY_TAG + tag.encode()
        body = served.cache.get(key)
        if body is None:
            body = await answer()
            served.cache.put(key, body)
        return body

    return await tagged(request.headers.get("if-none-match"), tag, kept, cache_control=_PRIVATE)


def _parse(body: bytes) -> schemas.RecommendationQuery | schemas.RecommendationBatch:
    if b'"queries"' not in body:
        return parse_bytes(body, _QUERY)
    return parse_bytes(body, _BATCH)
