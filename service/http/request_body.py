"""Bodies of requests: read, decoded and validated in one pass, and described for the OpenAPI document."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import orjson
from pydantic import TypeAdapter, ValidationError

from lazydp.service.http.problems import Problem, invalid

Parsed = TypeVar("Parsed")

_WINDOWS = {b"gzip": zlib.MAX_WBITS | 16, b"deflate": zlib.MAX_WBITS}
# Colons from which on a body is looked at for large objects; the features of one query are up to 256.
_MANY_MEMBERS = 2048
_LARGEST_OBJECT = 300


def json_body(headers: Iterable[tuple[bytes, bytes]], body: bytes, *, max_bytes: int) -> bytes:
    """`body` decoded, where `headers` (as ASGI has them) say that it is JSON.

    Raises:
        Problem: 415 for another media type or encoding, 413 for one that decodes to more than `max_bytes`.
    """
    given = dict(headers)
    content_type = given.get(b"content-type", b"")
    if content_type == b"application/json" and b"content-encoding" not in given:
        return body
    media_type, _, parameters = content_type.decode("latin-1").lower().partition(";")
    charset = parameters.strip().removeprefix("charset=").strip('" ')
    json = media_type.strip() == "application/json" or media_type.strip().endswith("+json")
    if not json or charset not in ("", "utf-8", "utf8"):
        raise Problem(
            415, "not-json", "send the body as application/json in UTF-8", headers={"accept": "application/json"}
        )
    return decoded(given, body, max_bytes=max_bytes)


def decoded(headers: Mapping[bytes, bytes], body: bytes, *, max_bytes: int) -> bytes:
    """`body` without its content encoding.

    Raises:
        Problem: 415 for an encoding that is not gzip or deflate, 400 for a body that is not what it says, 413 for one
            that decodes to more than `max_bytes`.
    """
    encoding = headers.get(b"content-encoding", b"identity").lower()
    if encoding == b"identity":
        return body
    window = _WINDOWS.get(encoding)
    if window is None:
        raise Problem(415, "encoded-body", "send the body plain, or encoded as gzip or deflate")
    stream = zlib.decompressobj(window)
    try:
        plain = stream.decompress(body, max_bytes + 1)
    except zlib.error:
        raise Problem(400, "malformed-encoding", "the body is not what its content-encoding says") from None
    if len(plain) > max_bytes:
        raise Problem(413, "too-large", f"a body may have up to {max_bytes} bytes once decoded")
    if not stream.eof or stream.unused_data:
        raise Problem(400, "malformed-encoding", "the body is cut short, or more follows its end")
    return plain


def parse_bytes(body: bytes, adapter: TypeAdapter[Parsed]) -> Parsed:
    """`body` as the type of `adapter`.

    Raises:
        Problem: 400 for what is no JSON, 422 for what is not valid.
    """
    if body.count(b":") > _MANY_MEMBERS:
        _refuse_large_objects(body)
    try:
        return adapter.validate_json(body)
    except ValidationError as error:
        raise invalid(error) from None


def _refuse_large_objects(body: bytes) -> None:
    """Refuse objects of more members than any request has, before each of them becomes an error of its own."""
    try:
        waiting = [orjson.loads(body)]
    except orjson.JSONDecodeError:
        # Told by the parser that every body passes.
        return
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            if len(part) > _LARGEST_OBJECT:
                raise Problem(422, "invalid-request", f"an object may have up to {_LARGEST_OBJECT} members")
            waiting += part.values()
        elif isinstance(part, list):
            waiting += [inner for inner in part if isinstance(inner, dict | list)]


def describe(*schemas: str, required: bool = True) -> dict[str, Any]:
    """`openapi_extra` of a handler whose body is one of the components `schemas` (see `openapi.BODIES`)."""
    references = [{"$ref": f"#/components/schemas/{schema}"} for schema in schemas]
    schema = references[0] if len(references) == 1 else {"anyOf": references}
    return {"requestBody": {"required": required, "content": {"application/json": {"schema": schema}}}}
