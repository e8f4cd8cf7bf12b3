"""A typed client of the service; its methods and fields are checked against the OpenAPI document by a test."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel

from lazydp.components.shared.errors import LazyDPError, UnavailableError
from lazydp.service import schemas
from lazydp.service.http.problems import ProblemDocument

Answer = TypeVar("Answer", bound=BaseModel)


class RequestRefusedError(LazyDPError):
    """The service answered with a problem document.

    Attributes:
        problem: the document.
    """

    def __init__(self, problem: ProblemDocument) -> None:
        super().__init__(f"{problem.status} {problem.title}: {problem.detail or problem.type}")
        self.problem = problem


class Client:
    """Talks to one service; a context manager.

    Every method raises `RequestRefusedError` for a problem document and `UnavailableError` where nothing answers.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 10.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """Talk to the service at `url`.

        Args:
            url: for example http://127.0.0.1:8000.
            api_key: where the service asks for one.
            timeout_s: for each request.
            transport: instead of the network.
        """
        headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout_s, transport=transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let the connections go."""
        self._http.close()

    def recommend(self, query: schemas.RecommendationQuery, *, model: str | None = None) -> schemas.Recommendations:
        """POST /v1/recommendations with one query."""
        return self._post("/v1/recommendations", query, schemas.Recommendations, model=model)

    def recommend_all(
        self, queries: Sequence[schemas.RecommendationQuery], *, model: str | None = None
    ) -> schemas.RecommendationResults:
        """POST /v1/recommendations with several queries, answered in order from one version."""
        batch = schemas.RecommendationBatch(queries=list(queries))
        return self._post("/v1/recommendations", batch, schemas.RecommendationResults, model=model)

    def pages(
        self, query: schemas.RecommendationQuery, *, model: str | None = None
    ) -> Iterator[schemas.Recommendations]:
        """Every page of a query, from its offset on, by cursors: no item comes twice and none is left out.

        Raises:
            RequestRefusedError: 409 where another version is served before the last page was read.
        """
        query = query.model_copy(update={"cursor": query.cursor or ""})
        while True:
            page = self.recommend(query, model=model)
            yield page
            if page.next_cursor is None:
                return
            query = query.model_copy(update={"offset": 0, "cursor": page.next_cursor})

    def recommend_to_user(
        self,
        user_id: str,
        *,
        k: int = schemas.DEFAULT_K,
        offset: int = 0,
        cursor: str | None = None,
        split_key: str | None = None,
        model: str | None = None,
    ) -> schemas.Recommendations:
        """GET /v1/users/{user_id}/recommendations."""
        path = f"/v1/users/{quote(user_id, safe='')}/recommendations"
        page = {"k": k, "offset": offset, "cursor": cursor, "split_key": split_key, "model": model}
        return self._get(path, schemas.Recommendations, **page)

    def similar(
        self,
        item_id: str,
        *,
        k: int = schemas.DEFAULT_K,
        offset: int = 0,
        cursor: str | None = None,
        split_key: str | None = None,
        model: str | None = None,
    ) -> schemas.Recommendations:
        """GET /v1/items/{item_id}/similar."""
        path = f"/v1/items/{quote(item_id, safe='')}/similar"
        page = {"k": k, "offset": offset, "cursor": cursor, "split_key": split_key, "model": model}
        return self._get(path, schemas.Recommendations, **page)

    def budget(self) -> schemas.PrivacyBudget:
        """GET /v1/privacy/budget."""
        return self._get("/v1/privacy/budget", schemas.PrivacyBudget)

    def releases(self) -> schemas.Releases:
        """GET /v1/privacy/releases."""
        return self._get("/v1/privacy/releases", schemas.Releases)

    def models(self) -> schemas.Models:
        """GET /v1/models."""
        return self._get("/v1/models", schemas.Models)

    def ready(self) -> bool:
        """GET /readyz: whether the service takes requests."""
        try:
            return self._http.get("/readyz").status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    def _get(self, path: str, answer: type[Answer], **parameters: str | int | None) -> Answer:
        given = {name: value for name, value in parameters.items() if value is not None}
        return self._ask(self._http.build_request("GET", path, params=given), answer)

    def _post(self, path: str, body: BaseModel, answer: type[Answer], *, model: str | None) -> Answer:
        request = self._http.build_request(
            "POST",
            path,
            params={} if model is None else {"model": model},
            content=body.model_dump_json(exclude_defaults=True, by_alias=True),
            headers={"content-type": "application/json"},
        )
        return self._ask(request, answer)

    def _ask(self, request: httpx.Request, answer: type[Answer]) -> Answer:
        try:
            response = self._http.send(request)
        except httpx.HTTPError as error:
            raise UnavailableError(f"{request.url.copy_with(path='/', query=None)} does not answer: {error}") from error
        if response.is_success:
            return answer.model_validate_json(response.content)
        if response.headers.get("content-type") == "application/problem+json":
            raise RequestRefusedError(ProblemDocument.model_validate_json(response.content))
        raise UnavailableError(f"{request.url.host} answered {response.status_code} without a problem document")
