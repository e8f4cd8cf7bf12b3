"""Answers that a caller may have already (RFC 9110, sections 8.8 and 13)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Awaitable, Callable

from starlette.responses import Response

_TAG = re.compile(r'(?:W/)?("[^"]*")')
# An answer depends on the key that asks: a shared cache must not give one caller what another was given.
_VARY = "authorization, x-api-key"


def digest_of(*parts: object) -> str:
    """ETag for what `parts` determine: an answer's bytes, or the versions and the question that it is a function of."""
    text = parts[0] if len(parts) == 1 and isinstance(parts[0], bytes) else repr(parts).encode()
    return f'"{hashlib.blake2b(text, digest_size=16).hexdigest()}"'


async def tagged(
    if_none_match: str | None,
    tag: str,
    answer: Callable[[], Awaitable[bytes]],
    *,
    cache_control: str,
    media_type: str = "application/json",
) -> Response:
    """304 where the caller has the answer named `tag`, else the answer.

    Args:
        if_none_match: the caller's header.
        tag: ETag of the answer.
        answer: makes it; asked only where it is sent, or where its existence must be known.
        cache_control: who may keep it, and for how long.
        media_type: of the answer.
    """
    headers = {"etag": tag, "cache-control": cache_control, "vary": _VARY}
    if if_none_match is not None and if_none_match.strip() == "*":
        # "Any representation": there must be one, so whatever raises 404 raises it here.
        await answer()
        return Response(status_code=304, headers=headers)
    if if_none_match is not None and tag in _TAG.findall(if_none_match):
        return Response(status_code=304, headers=headers)
    return Response(await answer(), media_type=media_type, headers=headers)
