"""What the handlers share, and how they get hold of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request
from starlette.responses import Response

from lazydp.service.http.etags import digest_of, tagged
from lazydp.service.http.metrics import Metrics
from lazydp.service.http.problems import Problem
from lazydp.service.serving.budget import BudgetSource
from lazydp.service.serving.ranker import Ranker
from lazydp.service.serving.registry import Registry
from lazydp.service.serving.served_version import ServedVersion
from lazydp.service.settings import Settings

JSON = "application/json"


@dataclass(slots=True)
class Context:
    """Everything that one service holds.

    Attributes:
        settings: as started.
        registry: the models.
        budget: the ledger, read only.
        metrics: counters.
        draining: whether it is about to stop and should get no more traffic.
    """

    settings: Settings
    registry: Registry
    budget: BudgetSource
    metrics: Metrics
    draining: bool = False

    def served(self, name: str | None = None) -> ServedVersion:
        """The version that answers.

        Raises:
            Problem: 404 for a model that is not served, 503 where there is none at all.
        """
        found = self.registry.get(name)
        if found is not None:
            return found
        if name is None:
            raise Problem(503, "not-ready", "no model is loaded yet", headers={"retry-after": "1"})
        raise Problem(404, "unknown-model", "no such model is served; /v1/models lists those that are")

    def ranker(self, name: str | None = None) -> Ranker:
        """What answers a request for recommendations by a model.

        Raises:
            Problem: as `served` does.
        """
        served = self.served(name)
        retriever = None if served.ranks_whole else self.registry.get(self.settings.retrievers.get(served.name, ""))
        return Ranker(served, retriever, self.settings.retrieved_items)


async def context_of(request: Request) -> Context:
    """The context of the application that handles `request`."""
    # A coroutine, though it waits for nothing: the framework would hand a plain function to a thread.
    context = request.app.state.context
    assert isinstance(context, Context)
    return context


InContext = Annotated[Context, Depends(context_of)]


def json_response(body: bytes) -> Response:
    """Ready JSON."""
    return Response(body, media_type=JSON)


async def tagged_document(request: Request, body: bytes, *, cache_control: str) -> Response:
    """A ready JSON document with an ETag, or 304 where the caller has it already."""

    async def ready() -> bytes:
        return body

    return await tagged(request.headers.get("if-none-match"), digest_of(body), ready, cache_control=cache_control)
