"""Pages for people: what is served, what was spent, a box to try it, and the documentation of the interface."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qs

from fastapi import APIRouter, Query, Request
from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup, escape
from pydantic import ValidationError
from starlette.responses import HTMLResponse, Response

from lazydp.service import schemas
from lazydp.service.http.problems import Problem, invalid
from lazydp.service.routes.deps import InContext
from lazydp.service.routes.plot import epsilon_curve
from lazydp.service.routes.privacy import privacy_budget
from lazydp.service.routes.privacy_view import privacy_view
from lazydp.service.routes.recommendations import answered
from lazydp.service.serving.context import Context
from lazydp.service.serving.ranker import Ranker
from lazydp.service.serving.served_version import ServedVersion

router = APIRouter(tags=["pages"])

_FILES = ("page.html", "docs.html", "page.css")
_ICON = (
    b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><rect width="16" height="16" rx="3" fill="#0b57a4"/>'
    b'<path d="M4 3v9h8" fill="none" stroke="#fff" stroke-width="2"/></svg>'
)
# Fields of the form, digits of a number in it, and entries of the ledger that are shown.
_DEFAULT_K = "10"
_MOST_FIELDS = 16
_MOST_DIGITS = 6
_MOST_ENTRIES = 20
_DAY = "private, max-age=86400"
_BACKTICKS = re.compile(r"`([^`]+)`")
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
    found.filters["code"] = _code
    return found


@dataclass(frozen=True, slots=True)
class Trial:
    """What a person tried on the page, as typed, and what came of it."""

    user_id: str = ""
    history: str = ""
    k: str = _DEFAULT_K
    asked: bool = False
    answer: dict[str, Any] | None = None
    problem: str | None = None


_FIELDS = frozenset({"user_id", "history", "k", "model"})
_FORM_TYPE = "application/x-www-form-urlencoded"
_FORM: dict[str, Any] = {
    "requestBody": {
        "required": False,
        "content": {
            _FORM_TYPE: {
                "schema": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "user_id": {"type": "string", "description": "user to try"},
                        "history": {"type": "string", "description": "items to try, separated by commas"},
                        "k": {"type": "string", "description": "items wanted, 1 to 100"},
                        "model": {"type": "string", "description": "model to ask; the default one if left out"},
                    },
                }
            }
        },
    }
}


@router.get("/", response_class=HTMLResponse, summary="The page")
async def page(
    context: InContext,
    model: Annotated[str | None, Query(max_length=64, description="model to show; the default one if left out")] = None,
) -> HTMLResponse:
    """The model served, what it cost in privacy, and a box to try it."""
    return await _page(context, context.ranker(model), Trial())


# Ids of users and items travel in the body: paths and queries are kept in histories of browsers and logs of proxies.
@router.post("/try", response_class=HTMLResponse, openapi_extra=_FORM, summary="Try a user or a history on the page")
async def try_on_page(request: Request, context: InContext) -> HTMLResponse:
    """The page with recommendations for the user or history of its form."""
    if request.headers.get("content-type", _FORM_TYPE).partition(";")[0].strip().lower() != _FORM_TYPE:
        raise Problem(415, "no-form", f"send the form as {_FORM_TYPE}")
    try:
        text = (await request.body()).decode("utf-8", "replace")
        form = parse_qs(text, keep_blank_values=True, max_num_fields=_MOST_FIELDS)
    except ValueError:
        raise Problem(422, "invalid-request", f"a form may have up to {_MOST_FIELDS} fields") from None
    if not form.keys() <= _FIELDS:
        raise Problem(422, "invalid-request", f"a form may have the fields {', '.join(sorted(_FIELDS))}")
    given = {name: values[0].strip() for name, values in form.items()}
    ranker = context.ranker(given.get("model") or None)
    trial = Trial(given.get("user_id", ""), given.get("history", ""), given.get("k") or _DEFAULT_K)
    return await _page(context, ranker, await _tried(context, ranker, trial))


async def _page(context: Context, ranker: Ranker, trial: Trial) -> HTMLResponse:
    served = ranker.served
    budget = await privacy_budget(context)
    views = [privacy_view(model, warn_above=context.settings.epsilon_warning) for model in budget.models]
    text = (
        _templates()
        .get_template("page.html")
        .render(
            root=context.settings.root_path,
            version=importlib.metadata.version("lazydp"),
            served=served,
            kind=served.bundle.model.config.kind.replace("_", "-"),
            lineage=served.bundle.manifest.lineage,
            statement=served.bundle.statement,
            views=views,
            view=next(view for view in views if view.model.name == served.name),
            releases=await _releases(context, served),
            curve=epsilon_curve(served.bundle.statement),
            tried=trial,
            rests_on=_RESTS_ON,
            item_hint=", ".join(served.scorer.items.ids[:3]),
            answers_unknown_users=served.bundle.popularity is not None,
        )
    )
    return HTMLResponse(text, headers={"cache-control": "no-store"})


async def _releases(context: Context, served: ServedVersion) -> list[schemas.LedgerEntry]:
    """The latest entries of the ledger on the served model's dataset, latest first."""
    entries = await context.budget.entries() or []
    dataset = served.bundle.manifest.lineage.dataset
    return [entry for entry in reversed(entries) if entry.dataset == dataset][:_MOST_ENTRIES]


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
            root=request.app.state.context.settings.root_path,
            document=document,
            by_tag=by_tag,
            schemas=document["components"]["schemas"],
            dump=_pretty,
            type_of=type_name,
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


async def _tried(context: Context, ranker: Ranker, trial: Trial) -> Trial:
    """`trial` with its answer, or with what is wrong with it."""
    items = [item.strip() for item in trial.history.split(",") if item.strip()]
    of_nobody = not trial.user_id and not items
    if of_nobody and ranker.served.bundle.popularity is None:
        return trial
    try:
        asked = schemas.RecommendationQuery(
            user_id=trial.user_id or None,
            history=list(items),
            k=int(trial.k) if trial.k.isdecimal() and len(trial.k) < _MOST_DIGITS else 0,
            explain=bool(items),
        )
        answer = json.loads((await answered(context, ranker, asked.query())).body)
    except ValidationError as error:
        return replace(trial, asked=True, problem=invalid(error).detail)
    except Problem as problem:
        return replace(trial, asked=True, problem=problem.detail)
    titles = ranker.served.scorer.items
    for item in answer["items"]:
        because = item.get("because") or []
        item["because"] = [titles.title(titles.code(near)) or near for near in because]
    return replace(trial, asked=True, answer=answer)


def _moment(iso: str) -> str:
    """A time of ISO 8601 to the minute, in UTC."""
    return datetime.datetime.fromisoformat(iso).astimezone(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def _code(text: str) -> Markup:
    """Text with what stands between backticks as code."""
    parts = _BACKTICKS.split(text)
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if number % 2 else escape(part) for number, part in enumerate(parts)
    )


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
