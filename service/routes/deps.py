"""What the handlers share, and how they get hold of it."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request
from starlette.responses import Response

from lazydp.service.http.etags import digest_of, tagged
from lazydp.service.serving.context import Context

JSON = "application/json"


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
