"""Bodies of requests: read, decoded and validated in one pass, and described for the OpenAPI document."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from fastapi import Request
from pydantic import TypeAdapter, ValidationError

from lazydp.service.http.problems import Problem, invalid

Parsed = TypeVar("Parsed")


async def parse(request: Request, adapter: TypeAdapter[Parsed]) -> Parsed:
    """The body as the type of `adapter`.

    Raises:
        Problem: 415 for another media type, 400 for what is no JSON, 422 for what is not valid.
    """
    require_json(request.scope["headers"])
    return parse_bytes(await request.body(), adapter)


def require_json(headers: Iterable[tuple[bytes, bytes]]) -> None:
    """Refuse a body that does not say it is JSON; `headers` as ASGI has them.

    Raises:
        Problem: 415.
    """
    given = dict(headers)
    content_type = given.get(b"content-type", b"")
    if content_type == b"application/json" and b"content-encoding" not in given:
        return
    media_type, _, parameters = content_type.decode("latin-1").lower().partition(";")
    charset = parameters.strip().removeprefix("charset=").strip('" ')
    json = media_type.strip() == "application/json" or media_type.strip().endswith("+json")
    if not json or charset not in ("", "utf-8", "utf8"):
        raise Problem(
            415, "not-json", "send the body as application/json in UTF-8", headers={"accept": "application/json"}
        )
    if given.get(b"content-encoding", b"identity").lower() != b"identity":
        raise Problem(415, "encoded-body", "send the body without a content encoding")


def parse_bytes(body: bytes, adapter: TypeAdapter[Parsed]) -> Parsed:
    """`body` as the type of `adapter`.

    Raises:
        Problem: 400 for what is no JSON, 422 for what is not valid.
    """
    try:
        return adapter.validate_json(body)
    except ValidationError as error:
        raise invalid(error) from None


def describe(*schemas: str) -> dict[str, Any]:
    """`openapi_extra` of a handler whose body is one of the components `schemas` (see `openapi.BODIES`)."""
    references = [{"$ref": f"#/components/schemas/{schema}"} for schema in schemas]
    schema = references[0] if len(references) == 1 else {"anyOf": references}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
