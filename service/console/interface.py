"""The documentation of the interface for people, and what all pages load."""

from __future__ import annotations

import json
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse, Response

from lazydp.components.shared.page import style
from lazydp.service.console.rendering import KEPT_FOR_A_DAY, page
from lazydp.service.routes.deps import InContext

router = APIRouter(tags=["pages"])

_ICON = (
    b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><rect width="16" height="16" rx="3" fill="#0b57a4"/>'
    b'<path d="M4 3v9h8" fill="none" stroke="#fff" stroke-width="2"/></svg>'
)


@router.get("/docs", response_class=HTMLResponse, summary="The documentation of the interface")
async def docs(request: Request, context: InContext) -> HTMLResponse:
    """Every path with its parameters, bodies, answers and examples; /openapi.json is the same for machines."""
    document = request.app.openapi()
    by_tag: dict[str, list[dict[str, Any]]] = {}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            tag = (operation.get("tags") or ["other"])[0]
            by_tag.setdefault(tag, []).append({**operation, "path": path, "method": method.upper()})
    return page(
        context,
        "docs.html",
        cache_control=KEPT_FOR_A_DAY,
        document=document,
        by_tag=by_tag,
        schemas=document["components"]["schemas"],
        dump=_pretty,
        type_of=type_name,
    )


@router.get("/assets/page.css", response_class=Response, include_in_schema=False)
async def style_sheet() -> Response:
    """The style of all pages."""
    return Response(style(), media_type="text/css", headers={"cache-control": KEPT_FOR_A_DAY})


@router.get("/assets/icon.svg", response_class=Response, include_in_schema=False)
async def icon() -> Response:
    """What a browser shows beside the title."""
    return Response(_ICON, media_type="image/svg+xml", headers={"cache-control": KEPT_FOR_A_DAY})


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def type_name(schema: dict[str, Any]) -> str:
    """A schema in a few words: `text`, `list of integer`, `RecommendationQuery`."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(type_name(part) for part in schema["anyOf"]))
    if "$ref" in schema:
        return str(schema["$ref"]).rsplit("/", 1)[1]
    if "enum" in schema or "const" in schema:
        return " or ".join(json.dumps(value) for value in schema.get("enum", [schema.get("const")]))
    kind = str(schema.get("type", "anything"))
    if kind == "array":
        return f"list of {type_name(schema.get('items', {}))}"
    return {"string": "text", "object": "mapping"}.get(kind, kind)
