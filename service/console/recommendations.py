"""The page to try recommendations on: users, histories, filters, similar items, and two models side by side."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, replace
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import ValidationError
from starlette.responses import HTMLResponse

from lazydp.components.bundle.items import ItemTable
from lazydp.service import schemas
from lazydp.service.console.rendering import page
from lazydp.service.console.trial import FORM, Trial
from lazydp.service.http.problems import Problem, invalid
from lazydp.service.routes.deps import InContext
from lazydp.service.routes.recommendations import answered
from lazydp.service.serving.context import Context
from lazydp.service.settings import Settings

router = APIRouter(tags=["pages"])

# What the form offers: attributes, values of each, and only of a catalogue that is looked through at once.
_MOST_ATTRIBUTES = 12
_MOST_CHOICES = 200
_MOST_ITEMS = 20_000
# What is said of an item beside its title.
_MOST_DETAILS = 4
_MOST_CHARACTERS = 80
_MOST_REASONS = 2
# What an answer rests on, to a person.
_RESTS_ON: dict[schemas.Source, str] = {
    "user": "by the user",
    "history": "by the items taken before",
    "user+history": "by the user and the items taken before",
    "popular": "the most popular",
    "item": "by the item",
    "features": "by the features",
}


@dataclass(frozen=True, slots=True)
class Shown:
    """One item of an answer, as the page shows it.

    Attributes:
        picture: its address; None where there is none that may be shown.
        details: further attributes.
        because: titles of the nearest items of the history.
        elsewhere: its rank in the answer beside this one; None where it is not there.
    """

    id: str
    title: str
    score: float
    picture: str | None
    details: tuple[str, ...]
    because: tuple[str, ...]
    elsewhere: int | None = None


@dataclass(frozen=True, slots=True)
class Side:
    """What one model answered, or why it did not."""

    name: str
    version: str
    problem: str | None = None
    rests_on: str = ""
    notice: str | None = None
    unknown: tuple[str, ...] = ()
    items: tuple[Shown, ...] = ()

    @property
    def pictured(self) -> bool:
        """Whether an item has a picture."""
        return any(item.picture for item in self.items)

    def beside(self, other: Side) -> Side:
        """The same with the rank of each item in `other`."""
        ranks = {item.id: rank for rank, item in enumerate(other.items, start=1)}
        return replace(self, items=tuple(replace(item, elsewhere=ranks.get(item.id)) for item in self.items))


@router.get("/try", response_class=HTMLResponse, summary="The page to try recommendations on")
async def try_page(
    context: InContext,
    model: Annotated[str | None, Query(max_length=64, description="model to ask; the default one if left out")] = None,
) -> HTMLResponse:
    """Forms for users, histories, filters and similar items."""
    return await _page(context, Trial(model=model or ""), [])


# Ids of users and items travel in the body: paths and queries are kept in histories of browsers and logs of proxies.
@router.post("/try", response_class=HTMLResponse, openapi_extra=FORM, summary="Try a user, a history or an item")
async def try_on_page(request: Request, context: InContext) -> HTMLResponse:
    """The page with what one or two models answer to its form."""
    trial = await Trial.of(request)
    asked = [trial.model, *([trial.beside] if trial.beside and trial.beside != trial.model else [])]
    sides = [side for name in asked if (side := await _side(context, trial, name)) is not None]
    if len(sides) > 1:
        sides = [sides[0].beside(sides[1]), sides[1].beside(sides[0])]
    return await _page(context, trial, sides)


async def _page(context: Context, trial: Trial, sides: list[Side]) -> HTMLResponse:
    served = context.served(trial.model or None)
    return page(
        context,
        "try.html",
        trial=trial,
        served=served,
        models=context.registry.versions(),
        sides=sides,
        shared=len({item.id for item in sides[0].items if item.elsewhere}) if len(sides) > 1 else 0,
        attributes=await _attributes(context.settings, served.scorer.items),
        example=served.scorer.items.ids[:3],
        answers_unknown_users=served.bundle.popularity is not None,
    )


async def _attributes(settings: Settings, items: ItemTable) -> list[tuple[str, tuple[str, ...]]]:
    """The attributes that the form has fields for, with the values that it offers."""
    names = [name for name in items.attributes if name != settings.image_attribute][:_MOST_ATTRIBUTES]
    if len(items) > _MOST_ITEMS:
        return [(name, ()) for name in names]
    return await asyncio.to_thread(lambda: [(name, items.columns.choices(name, most=_MOST_CHOICES)) for name in names])


async def _side(context: Context, trial: Trial, name: str) -> Side | None:
    """What the model called `name` answers; None where nothing was asked of it.

    Raises:
        Problem: 404 for a model that is not served.
    """
    ranker = context.ranker(name or None)
    served = ranker.served
    side = Side(served.name, served.version)
    nobody = not (trial.user_id or trial.items or trial.item_id)
    if nobody and served.bundle.popularity is None:
        return None
    try:
        answer = json.loads((await answered(context, ranker, trial.query().query())).body)
    except ValidationError as error:
        return replace(side, problem=invalid(error).detail)
    except Problem as problem:
        return replace(side, problem=problem.detail)
    return replace(
        side,
        rests_on=_RESTS_ON.get(answer["source"], answer["source"]),
        notice=answer["notice"],
        unknown=tuple(answer["unknown_items"]),
        items=tuple(_shown(context.settings, served.scorer.items, item) for item in answer["items"]),
    )


def _shown(settings: Settings, items: ItemTable, item: dict[str, Any]) -> Shown:
    code = items.code(item["id"])
    about = {name: text for name, text in items.metadata(code).items() if text}
    picture = about.pop(settings.image_attribute or "", None)
    details = [text.replace("|", ", ")[:_MOST_CHARACTERS] for text in about.values()]
    return Shown(
        id=item["id"],
        title=item["title"] or item["id"],
        score=item["score"],
        picture=picture if picture is not None and _may_be_shown(picture, settings.image_origins) else None,
        details=tuple(details[:_MOST_DETAILS]),
        because=tuple(items.title(items.code(near)) or near for near in (item.get("because") or ())[:_MOST_REASONS]),
    )


def _may_be_shown(address: str, origins: tuple[str, ...]) -> bool:
    """What the pages' content security policy lets through: other addresses would be a fault in the console."""
    if address.startswith("/"):
        return not address.startswith(("//", "/\\"))
    return address.startswith(("data:image/", *(f"{origin}/" for origin in origins)))
