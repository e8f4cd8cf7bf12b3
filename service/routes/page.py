"""Pages for people: what is served, what was spent, a box to try it, and the documentation of the interface."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from jinja2 import DictLoader, Environment, StrictUndefined
from starlette.responses import HTMLResponse, Response

from lazydp.components.bundle import query as queries
from lazydp.service import schemas
from lazydp.service.http.problems import Problem
from lazydp.service.routes.deps import InContext
from lazydp.service.routes.plot import budget_bars, epsilon_curve
from lazydp.service.routes.privacy import privacy_budget
from lazydp.service.routes.recommendations import answered
from lazydp.service.serving.context import Context
from lazydp.service.serving.ranker import Ranker

router = APIRouter(tags=["pages"])

_FILES = ("page.html", "docs.html", "page.css")
_ICON = (
    b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><rect width="16" height="16" rx="3" fill="#0b57a4"/>'
    b'<path d="M4 3v9h8" fill="none" stroke="#fff" stroke-width="2"/></svg>'
)
_DAY = "private, max-age=86400"
# What an answer rests on, to a person.
_RESTS_ON: dict[schemas.Source, str] = {
    "user": "by the user",
    "history": "by the items taken before",
    "user+history": "by the user and the items taken before",
    "popular": "the most popular",
}


@functools.cache
def _texts() -> dict[str, str]:
    # importlib.resources cannot read a namespace package of an editable install.
    folder = Path(__file__).parent / "templates"
    return {name: (folder / name).read_text(encoding="utf-8") for name in _FILES}


@functools.cache
def _templates() -> Environment:
    found = Environment(
        loader=DictLoader(_texts()), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    found.filters["moment"] = _moment
    return found


@dataclass(frozen=True, slots=True)
class Trial:
    """What a person tried on the page, and what came of it."""

    user_id: str
    history: str
    k: int
    asked: bool
    answer: dict[str, Any] | None = None
    problem: str | None = None


@router.get("/", response_class=HTMLResponse, summary="The page")
async def page(
    context: InContext,
    user_id: Annotated[str | None, Query(max_length=256, description="user to try")] = None,
    history: Annotated[str | None, Query(max_length=4096, description="items to try, separated by commas")] = None,
    k: Annotated[int, Query(ge=1, le=100, description="items wanted")] = 10,
    model: Annotated[str | None, Query(max_length=64, description="model to show; the default one if left out")] = None,
) -> HTMLResponse:
    """The model served, the budget, and recommendations for the user or history given."""
    ranker = context.ranker(model)
    served = ranker.served
    budget = await privacy_budget(context)
    asked = user_id is not None or history is not None
    tried = await _try(context, ranker, (user_id or "").strip(), (history or "").strip(), k, asked=asked)
    statement = served.bundle.statement
    text = (
        _templates()
        .get_template("page.html")
        .render(
            version=importlib.metadata.version("lazydp"),
            served=served,
            models=[version.name for version in context.registry.versions()],
            kind=served.bundle.model.config.kind.replace("_", "-"),
            lineage=served.bundle.manifest.lineage,
            statement=statement,
            budget=budget,
            bars=[budget_bars(dataset) for dataset in budget.datasets],
            curve=epsilon_curve(statement),
            tried=tried,
            rests_on=_RESTS_ON,
            item_hint=", ".join(served.scorer.items.ids[:3]),
            answers_unknown_users=served.bundle.popularity is not None,
        )
    )
    return HTMLResponse(text, headers={"cache-control": "no-store"})


@router.get("/docs", response_class=HTMLResponse, summary="The documentation of the interface")
async def docs(request: Request) -> HTMLResponse:
    """Every path with its parameters, bodies, answers and examples; /openapi.json is the same for machines."""
    document = request.app.openapi()
    by_tag: dict[str, list[dict[str, Any]]] = {}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            tag = (operation.get("tags") or ["other"])[0]
            by_tag.setdefault(tag, []).append({**operation, "path": path, "method": method.upper()})
    text = (
        _templates()
        .get_template("docs.html")
        .render(
            document=document, by_tag=by_tag, schemas=document["components"]["schemas"], dump=_pretty, type_of=type_name
        )
    )
    return HTMLResponse(text, headers={"cache-control": _DAY})


@router.get("/assets/page.css", response_class=Response, include_in_schema=False)
async def style() -> Response:
    """The style of both pages."""
    return Response(_texts()["page.css"], media_type="text/css", headers={"cache-control": _DAY})


@router.get("/assets/icon.svg", response_class=Response, include_in_schema=False)
async def icon() -> Response:
    """What a browser shows beside the title."""
    return Response(_ICON, media_type="image/svg+xml", headers={"cache-control": _DAY})


async def _try(context: Context, ranker: Ranker, user_id: str, history: str, k: int, *, asked: bool) -> Trial:
    items = [item.strip() for item in history.split(",") if item.strip()]
    of_nobody = not user_id and not items
    if not asked or (of_nobody and ranker.served.bundle.popularity is None):
        return Trial(user_id, history, k, asked=False)
    query = queries.Query(user_id=user_id or None, history=items[: schemas.MAX_HISTORY], k=k, explain=bool(items))
    try:
        answer = json.loads((await answered(context, ranker, query)).body)
    except Problem as problem:
        return Trial(user_id, history, k, asked=True, problem=problem.detail)
    titles = ranker.served.scorer.items
    for item in answer["items"]:
        because = item.get("because") or []
        item["because"] = [titles.title(titles.code(near)) or near for near in because]
    return Trial(user_id, history, k, asked=True, answer=answer)


def _moment(iso: str) -> str:
    """A time of ISO 8601 to the minute, in UTC."""
    return datetime.datetime.fromisoformat(iso).astimezone(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


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
