"""Runs the pipeline locally and shows what came of it: metrics, privacy statement, answers of the service."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import dataset
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lazydp.components.shared.locations import split_locations
from lazydp.pipelines.ask import Answers, ask_service
from lazydp.pipelines.local import run_locally
from lazydp.pipelines.recommender import recommender_pipeline

_RANKING = {"auc": "AUC", "hr_at_10": "HR@10", "ndcg_at_10": "NDCG@10", "recall_at_20": "Recall@20"}
# A user id that no log has.
_NOBODY = "(nobody)"
_HISTORY = 10


def run_and_show(*, arguments: Mapping[str, Any], out: Path, compare: bool, ask: bool) -> None:
    """Run the pipeline in `out`, and show on one screen what came of it.

    `out/bundle` and `out/metrics.json` become links to what the last run made; `out/answers.json` holds the service's
    answers, where it was asked.

    Raises:
        PipelineFailedError: a component failed.
        UnavailableError: the service did not start.
    """
    console = Console(file=sys.stdout)  # this very stream: the runner's output is taken off sys.stdout
    outputs = run_locally(recommender_pipeline(compare=compare), arguments, folder=out, console=console)
    bundle = _link(out / "bundle", Path(outputs["bundle"].path))
    reports = {"with privacy": json.loads(_link(out / "metrics.json", Path(outputs["report"].path)).read_text())}
    if compare:
        floor = _link(out / "metrics-without-privacy.json", Path(outputs["floor"].path))
        reports["without privacy"] = json.loads(floor.read_text())
    ledger = arguments["ledger_url"]
    answers: Answers | None = None
    if ask:
        user_id, history = _somebody(arguments["input_uri"], bundle)
        answers = ask_service(bundle, ledger, user_id=user_id, history=history)
        answers.save(out / "answers.json")
    console.print()
    console.print(_metrics(reports))
    console.print(_privacy(json.loads((bundle / "manifest.json").read_text())["privacy"], answers))
    if answers is not None:
        console.print(_recommendations(answers))
    console.print(_next(out, bundle, ledger, asked=ask), soft_wrap=True, highlight=False)


def _link(link: Path, target: Path) -> Path:
    """`link` points to `target`, whatever it pointed to before."""
    fresh = link.with_name(f".{link.name}")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(os.path.relpath(target, link.parent))
    fresh.replace(link)
    return link


def _metrics(reports: Mapping[str, Mapping[str, Any]]) -> Table:
    table = _table("Metrics on held-out examples (private: for internal use only)")
    table.add_column("", no_wrap=True)
    for title in (*_RANKING.values(), "label AUC"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, report in reports.items():
        table.add_row(f"model {name}", *_figures(report["model"]), _figure(report["label_auc"]))
    table.add_row("popularity", *_figures(next(iter(reports.values()))["popularity"]), "")
    return table


def _figures(metrics: Mapping[str, Any] | None) -> list[str]:
    return [_figure(metrics[name] if metrics is not None else None) for name in _RANKING]


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _privacy(statement: Mapping[str, Any], answers: Answers | None) -> Table:
    """What the release cost: the figure for a person first, since that is what people ask about."""
    table = _table("Privacy", show_header=False)
    table.add_column("", style="bold", no_wrap=True)
    table.add_column("", overflow="fold")
    if not statement["private"]:
        table.add_row("none", str(statement["why_not_private"]))
        return table
    at = f"at delta {statement['delta']:g}"
    per_unit = f"epsilon {statement['epsilon']:.4g} {at}"
    if statement["privacy_unit"] == "user":
        table.add_row("per person", per_unit)
    else:
        person = statement["epsilon_user_level"]
        table.add_row(
            "per person",
            "no bound: a user may have any number of examples" if person is None else f"epsilon {person:.4g} {at}",
        )
        table.add_row("per example", per_unit)
    if answers is not None:
        for dataset in answers.budget["datasets"]:
            table.add_row("budget", _spent(dataset))
    table.add_row(
        "mechanism",
        f"{statement['steps']} steps, noise multiplier {statement['noise_multiplier']:.4g}, "
        f"sampling probability {statement['sampling_prob']:g}, accounted by {str(statement['accountant']).upper()}",
    )
    uncovered = [str(what).partition(":")[0] for what in statement["not_covered"]]
    table.add_row("not covered", f"{'; '.join(uncovered[:1])}; and {len(uncovered) - 1} more in the statement")
    return table


def _spent(dataset: Mapping[str, Any]) -> str:
    spent = f"epsilon {dataset['epsilon_spent']:.4g} spent"
    if dataset["epsilon_budget"] is None:
        return f"{spent} on {dataset['name']}, which has no budget"
    left = f"{dataset['epsilon_remaining']:.4g} of {dataset['epsilon_budget']:g} left"
    return f"{spent} on {dataset['name']}, {left} (per {dataset['privacy_unit']})"


def _recommendations(answers: Answers) -> Table:
    table = _table(f"Recommendations for user {answers.user_id}, from the service")
    table.add_column("", justify="right")
    table.add_column("title", overflow="ellipsis", no_wrap=True)
    table.add_column("item", justify="right")
    table.add_column("score", justify="right")
    for rank, item in enumerate(answers.recommendations["items"], start=1):
        table.add_row(str(rank), str(item.get("title") or ""), str(item["id"]), _figure(item["score"]))
    return table


def _next(out: Path, bundle: Path, ledger: str, *, asked: bool) -> str:
    """What to do now, and where everything is."""
    ledger = f" --ledger {ledger}" if ledger else ""
    made = ["bundle/manifest.json (the whole statement)", "metrics.json", *(["answers.json"] if asked else [])]
    return "\n".join(
        [
            "[bold]Next[/bold]",
            f"  try the service   lazydp serve --bundle {bundle}{ledger}",
            "                    then open http://127.0.0.1:8000",
            f"  see the budget    lazydp budget show{ledger}",
            "  your own data     README.md, How-to",
            f"  all of it, as JSON, in {out}: {', '.join(made)}; the log in pipeline.log",
        ]
    )


def _table(title: str, *, show_header: bool = True) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, show_header=show_header)


def _somebody(input_uri: str, bundle: Path) -> tuple[str, list[str]]:
    """A user of the data and the last items that the user took, to ask about.

    Of a log that is no Parquet no user is read: the answer then rests on a history of the first items.
    """
    spec = json.loads((bundle / "manifest.json").read_text())["features"]
    user, item, time = spec["user"]["column"], spec["item"]["column"], spec.get("timestamp")
    try:
        log = dataset.dataset(split_locations(input_uri)[0], format="parquet")
        somebody = log.head(1, columns=[user]).column(0)[0]
        taken = log.to_table(columns=[item, *([time] if time else [])], filter=dataset.field(user) == somebody)
    except (pa.ArrowException, OSError, IndexError):
        first = pq.read_table(bundle / "items.parquet", columns=["item"]).column(0)
        return _NOBODY, [str(item_id) for item_id in first.slice(0, _HISTORY).to_pylist()]
    if time:
        taken = taken.sort_by(time)
    return str(somebody), [str(item_id) for item_id in taken.column(item).to_pylist()[-_HISTORY:]]
