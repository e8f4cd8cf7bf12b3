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
from rich.console import Console
from rich.table import Table

from lazydp.components.shared.locations import split_locations
from lazydp.pipelines.ask import ask_service
from lazydp.pipelines.local import run_locally
from lazydp.pipelines.recommender import recommender_pipeline

_RANKING = {"auc": "AUC", "hr_at_10": "HR@10", "ndcg_at_10": "NDCG@10", "recall_at_20": "Recall@20"}
# A user id that no log has.
_NOBODY = "(nobody)"
_HISTORY = 3


def run_and_show(*, arguments: Mapping[str, Any], out: Path, compare: bool, ask: bool) -> None:
    """Run the pipeline in `out`, show metrics and privacy statement, and ask the service where wanted.

    `out/bundle` and `out/metrics.json` become links to what the last run made.

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
    console.rule("metrics (private: computed from private data, internal use only)")
    console.print(_metrics(reports))
    console.rule("privacy statement")
    console.print(_statement(json.loads((bundle / "manifest.json").read_text())["privacy"]))
    if ask:
        user_id, history = _somebody(arguments["input_uri"], bundle)
        ask_service(bundle, arguments["ledger_url"], user_id=user_id, history=history, console=console)
    ledger = f" --ledger {arguments['ledger_url']}" if arguments["ledger_url"] else ""
    serve = f"lazydp serve --bundle {bundle}{ledger}"
    console.print(f"\nbundle: {bundle}\nserve it: {serve}", soft_wrap=True, highlight=False)


def _link(link: Path, target: Path) -> Path:
    """`link` points to `target`, whatever it pointed to before."""
    fresh = link.with_name(f".{link.name}")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(os.path.relpath(target, link.parent))
    fresh.replace(link)
    return link


def _metrics(reports: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table()
    table.add_column("", no_wrap=True)
    for title in (*_RANKING.values(), "label AUC"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, report in reports.items():
        table.add_row(f"model {name}", *_figures(report["model"]), _figure(report["label_auc"]))
    table.add_row("popularity", *_figures(next(iter(reports.values()))["popularity"]))
    return table


def _figures(metrics: Mapping[str, Any] | None) -> list[str]:
    return [_figure(metrics[name] if metrics is not None else None) for name in _RANKING]


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _statement(statement: Mapping[str, Any]) -> Table:
    table = Table(show_header=False)
    table.add_column("", style="bold", no_wrap=True)
    table.add_column("", overflow="fold")
    for name, value in statement.items():
        if name == "epsilon_over_steps" or value is None:
            continue
        table.add_row(name.replace("_", " "), _text(value))
    return table


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "\n".join(_text(part) for part in value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(part)}" for key, part in value.items())
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _somebody(input_uri: str, bundle: Path) -> tuple[str, list[str]]:
    """A user of the data and a short history of items, to ask about.

    Of a log that is no Parquet no user is read: the answer then rests on the history alone.
    """
    spec = json.loads((bundle / "manifest.json").read_text())["features"]
    user, item = spec["user"]["column"], spec["item"]["column"]
    try:
        rows = pq.ParquetDataset(split_locations(input_uri)[0]).read(columns=[user, item]).slice(0, 1).to_pylist()
    except (pa.ArrowException, OSError):
        rows = [{user: _NOBODY}]
    titles = pq.read_table(bundle / "items.parquet", columns=["item"]).slice(0, _HISTORY).column(0).to_pylist()
    return str(rows[0][user]), [str(item_id) for item_id in titles]
