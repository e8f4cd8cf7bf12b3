"""The page about privacy, for whoever answers for the budget; and the report to take away."""

from __future__ import annotations

import asyncio
import datetime

from fastapi import APIRouter
from starlette.responses import HTMLResponse

from lazydp.components.budget.report.claim import ModelCard, model_card
from lazydp.components.budget.report.overview import LedgerOverview, Timeline
from lazydp.components.budget.report.report import report
from lazydp.service.console.rendering import page
from lazydp.service.routes.deps import InContext
from lazydp.service.routes.privacy import ledger_overview, timeline_of
from lazydp.service.serving.context import Context
from lazydp.service.serving.served_version import ServedVersion

router = APIRouter(tags=["pages"])

# Rows of a table that the page shows; the report has them all.
_MOST_ROWS = 10


@router.get("/", response_class=HTMLResponse, summary="The page about privacy")
async def privacy_page(context: InContext) -> HTMLResponse:
    """For each served model what it cost a person in privacy and what is left of its dataset's budget; the ledger."""
    overview = await ledger_overview(context)
    cards = _cards(context, overview)
    return page(
        context,
        "privacy.html",
        cards=cards,
        overview=overview,
        notice=context.budget.notice,
        datasets=_datasets(cards),
        until=datetime.datetime.now(datetime.UTC).timestamp(),
        most=_MOST_ROWS,
    )


@router.get("/report", response_class=HTMLResponse, summary="The report on the budget, as a file")
async def report_file(context: InContext) -> HTMLResponse:
    """One HTML file without outside assets: what `lazydp budget export --html` writes, and the served models."""
    overview = await ledger_overview(context)
    source = "read by the service" if overview is not None else context.budget.notice
    # In a thread: a ledger may be long, and others wait for the event loop.
    text = await asyncio.to_thread(report, overview, source=source or "", models=_cards(context, overview))
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    headers = {"content-disposition": f'attachment; filename="privacy-budget-{day}.html"', "cache-control": "no-store"}
    return HTMLResponse(text, headers=headers)


def _cards(context: Context, overview: LedgerOverview | None) -> list[ModelCard]:
    return [_card(context, overview, served) for served in context.registry.versions()]


def _card(context: Context, overview: LedgerOverview | None, served: ServedVersion) -> ModelCard:
    timeline, notice = timeline_of(context, overview, served)
    kind = served.bundle.model.config.kind.replace("_", "-")
    return model_card(
        served.name,
        (
            f"{kind}, {served.scorer.num_items:,} items",
            f"version {served.version}",
            f"made by {served.bundle.manifest.lineage.run_id}",
            f"released {served.bundle.manifest.lineage.created[:10]}",
        ),
        served.bundle.statement,
        timeline=timeline,
        notice=notice,
        warn_above=context.settings.epsilon_warning,
    )


def _datasets(cards: list[ModelCard]) -> list[tuple[Timeline, list[str]]]:
    """The datasets of the served models, each once, with the names of its models."""
    found: dict[str, tuple[Timeline, list[str]]] = {}
    for card in cards:
        if card.timeline is not None:
            found.setdefault(card.timeline.budget.dataset, (card.timeline, []))[1].append(card.name)
    return list(found.values())
