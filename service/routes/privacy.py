"""The endpoints that say what privacy was spent."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from lazydp.components.budget.ledger.views import DatasetBudget
from lazydp.components.budget.report.overview import LedgerOverview, Timeline
from lazydp.components.budget.storage.entries import Entry
from lazydp.service import schemas
from lazydp.service.routes.deps import InContext, tagged_document
from lazydp.service.serving.context import Context
from lazydp.service.serving.served_version import ServedVersion

router = APIRouter(prefix="/v1/privacy", tags=["privacy"])

# Figures of the ledger may change at any time; an answer a minute old is still true enough for a cache to show.
_NOT_IN_LEDGER = (
    "the ledger does not know this model's dataset: what else was spent on it, how much is left, and who released last "
    "cannot be told"
)
_CACHE = "private, max-age=5, must-revalidate"


@router.get(
    "/budget",
    response_model=schemas.PrivacyBudget,
    responses={304: {"description": "Nothing has changed."}},
    summary="Budget, spent and remaining, and the statements of the models being served",
)
async def budget(request: Request, context: InContext) -> Response:
    """Per dataset what may be spent, what was, and what remains; per served model the whole privacy statement."""
    body = (await privacy_budget(context)).model_dump_json().encode()
    return await tagged_document(request, body, cache_control=_CACHE)


@router.get(
    "/releases",
    response_model=schemas.Releases,
    responses={304: {"description": "Nothing has changed."}},
    summary="The ledger's entries",
)
async def releases(request: Request, context: InContext) -> Response:
    """Every entry of the ledger, oldest first; without a ledger the releases that are the served models."""
    overview = await context.budget.overview()
    if overview is None:
        found = [
            schemas.LedgerEntry(
                number=number,
                kind="committed",
                dataset=served.bundle.manifest.lineage.dataset,
                run_id=served.bundle.manifest.lineage.run_id,
                recorded_at=served.bundle.manifest.lineage.created,
                content={"epsilon": served.bundle.statement.epsilon, "release": served.version},
            )
            for number, served in enumerate(context.registry.versions(), start=1)
        ]
        document = schemas.Releases(source="statement", notice=context.budget.notice, entries=found)
    else:
        document = schemas.Releases(source="ledger", notice=None, entries=[_entry(entry) for entry in overview.entries])
    return await tagged_document(request, document.model_dump_json().encode(), cache_control=_CACHE)


async def ledger_overview(context: Context) -> LedgerOverview | None:
    """What the ledger says, noted in the metrics; None without a ledger, or where it does not answer."""
    found = await context.budget.overview()
    budgets = None if found is None else {part.dataset: part.committed_epsilon for part in found.budgets()}
    context.metrics.spending(budgets)
    return found


async def privacy_budget(context: Context) -> schemas.PrivacyBudget:
    """The document of GET /v1/privacy/budget."""
    overview = await ledger_overview(context)
    models = [_model(context, overview, served) for served in context.registry.versions()]
    if overview is None:
        return schemas.PrivacyBudget(
            source="statement", notice=context.budget.notice, datasets=_from_statements(models), models=models
        )
    unknown = ", ".join(model.name for model in models if model.budget is None)
    notices = [f"the ledger does not know the dataset of: {unknown}"] if unknown else []
    notices += [f"the ledger does not verify: {problem.line()}" for problem in overview.verification.problems[:1]]
    notices += [f"{name}: {problem}" for name, problem in ledger_problems(context).items()]
    datasets = [_dataset(budget) for budget in overview.budgets()]
    return schemas.PrivacyBudget(source="ledger", notice="; ".join(notices) or None, datasets=datasets, models=models)


def timeline_of(
    context: Context, overview: LedgerOverview | None, served: ServedVersion
) -> tuple[Timeline | None, str | None]:
    """The budget of a model's own dataset, and why there is none or why it is not to be trusted."""
    if overview is None:
        return None, context.budget.notice
    found = overview.timeline(served.bundle.manifest.lineage.dataset)
    return found, _NOT_IN_LEDGER if found is None else _problem(context, served)


def _model(context: Context, overview: LedgerOverview | None, served: ServedVersion) -> schemas.ModelStatement:
    timeline, notice = timeline_of(context, overview, served)
    lineage = served.bundle.manifest.lineage
    return schemas.ModelStatement(
        name=served.name,
        version=served.version,
        dataset=lineage.dataset,
        run_id=lineage.run_id,
        statement=served.bundle.statement,
        budget=None if timeline is None else _dataset(timeline.budget),
        notice=notice,
    )


def ledger_problems(context: Context) -> dict[str, str]:
    """By model why the ledger, as it last answered, cannot be trusted beside it; mostly none."""
    found = {served.name: _problem(context, served) for served in context.registry.versions()}
    return {name: problem for name, problem in found.items() if problem is not None}


def _problem(context: Context, served: ServedVersion) -> str | None:
    age = context.budget.age
    return None if age is None else age.problem(served.bundle.manifest)


def _from_statements(models: list[schemas.ModelStatement]) -> list[schemas.DatasetBudget]:
    """What the statements alone say: the spending of the models being served, and no budget."""
    return [
        schemas.DatasetBudget(
            dataset=model.dataset,
            name=None,
            privacy_unit=model.statement.privacy_unit,
            epsilon_budget=None,
            delta=model.statement.delta,
            epsilon_spent=model.statement.epsilon,
            epsilon_reserved=None,
            epsilon_remaining=None,
            releases=1,
        )
        for model in models
    ]


def _dataset(budget: DatasetBudget) -> schemas.DatasetBudget:
    return schemas.DatasetBudget(
        dataset=budget.dataset,
        name=budget.name,
        privacy_unit=budget.privacy_unit,
        epsilon_budget=budget.epsilon,
        delta=budget.delta,
        epsilon_spent=budget.committed_epsilon,
        epsilon_reserved=budget.reserved_epsilon,
        epsilon_remaining=budget.remaining_epsilon,
        releases=budget.releases,
        family=list(budget.family),
    )


def _entry(entry: Entry) -> schemas.LedgerEntry:
    return schemas.LedgerEntry(
        number=entry.number,
        kind=entry.kind,
        dataset=entry.dataset,
        run_id=entry.run_id or None,
        recorded_at=entry.recorded_at,
        recorded_by=entry.recorded_by or None,
        content=entry.content(),
        digest=entry.digest,
    )
