"""`lazydp budget`: the ledger on a terminal. `show` must answer at once, so nothing heavy is imported on its way."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lazydp.components.ingest.dataset_option import local_manifest
from lazydp.components.shared.errors import InputError, IntegrityError
from lazydp.components.shared.ledger_url import LEDGER
from lazydp.components.shared.privacy_unit import PrivacyUnitOption

if TYPE_CHECKING:
    from lazydp.components.budget.ledger.ledger import Ledger
    from lazydp.components.budget.ledger.verify import Verification
    from lazydp.components.budget.ledger.views import DatasetBudget
    from lazydp.components.budget.storage.entries import Entry

_BUDGET_COLUMNS = (
    *("dataset", "family", "identifier", "unit", "delta", "budget"),
    *("committed", "reserved", "remaining", "runs", "releases"),
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_BY = click.option("--by", envvar="LAZYDP_OPERATOR", help="Your name, for the ledger.")
_DATASET = click.option("--dataset", help="One dataset: identifier, its first characters, or name.")


@click.group(name="budget", epilog="Example: lazydp budget show")
def command() -> None:
    """Show and govern the privacy budget."""


@command.command(epilog="Example: lazydp budget show --json")
@LEDGER
@_DATASET
@_JSON
def show(ledger: str | None, dataset: str | None, as_json: bool) -> None:
    """What each dataset may spend, what is spent or promised, and what remains."""
    with _open(ledger, read_only=True) as opened:
        budgets = [opened.show(dataset)] if dataset else list(opened.budgets())
    if as_json:
        _print_json([asdict(budget) for budget in budgets])
        return
    _print_table(
        list(_BUDGET_COLUMNS),
        [_budget_row(budget) for budget in budgets],
        title="epsilon, composed by PLD: committed by releases; reserved: what open runs may add; and what remains",
        empty="no dataset yet: `lazydp budget set` registers one",
    )


@command.command(
    name="set", epilog="Example: lazydp budget set --dataset out/dataset --epsilon 8 --delta 1e-5 --by 'A. Turing'"
)
@LEDGER
@click.option("--dataset", required=True, help="Folder or URI that `lazydp ingest` wrote, or identifier or name.")
@click.option("--epsilon", type=float, required=True, help="The budget.")
@click.option("--delta", type=float, required=True, help="Its delta.")
@click.option(
    "--privacy-unit",
    type=PrivacyUnitOption(),
    default="user",
    show_default=True,
    help="Whose presence the budget bounds.",
)
@click.option("--name", help="Name of a dataset that is new to the ledger.")
@click.option("--family", help="Name of the population it is of, where its feature spec declares none.")
@click.option("--parent", "parents", multiple=True, help="A dataset of the ledger that shares users with it.")
@click.option(
    "--other-people",
    default="",
    help="Why its people have no budget yet, though the ledger knows its name, user column or source from a family "
    "that has one; the ledger keeps your words.",
)
@_BY
@click.option("--reason", default="", help="Why; must be given to raise a budget.")
def set_(
    ledger: str | None,
    dataset: str,
    epsilon: float,
    delta: float,
    privacy_unit: str,
    name: str | None,
    family: str | None,
    parents: tuple[str, ...],
    other_people: str,
    by: str | None,
    reason: str,
) -> None:
    """Set what may be spent on a dataset and its family; to raise it takes a name and a reason."""
    with _open(ledger) as opened:
        named = _register(opened, dataset, name=name, family=family, parents=parents, by=by)
        budget = opened.set_budget(
            named,
            epsilon=epsilon,
            delta=delta,
            privacy_unit=privacy_unit,
            by=by,
            reason=reason,
            other_people=other_people,
        )
    click.echo(
        f"{_called(budget)}: epsilon {budget.epsilon:g} at delta {budget.delta:g} per {budget.privacy_unit}; "
        f"charged {budget.charged_epsilon:.4g}, remaining {budget.remaining_epsilon:.4g}"
    )


@command.command(epilog="Example: lazydp budget history --dataset ml-100k")
@LEDGER
@_DATASET
@_JSON
def history(ledger: str | None, dataset: str | None, as_json: bool) -> None:
    """Every entry of the ledger, oldest first."""
    with _open(ledger, read_only=True) as opened:
        entries = opened.entries()
        if dataset:
            state = opened.state()
            family = state.family(state.resolve(dataset))
            entries = tuple(entry for entry in entries if entry.dataset in family)
    if as_json:
        _print_json([{**asdict(entry), "body": entry.content()} for entry in entries])
        return
    _print_table(
        ["entry", "at (UTC)", "by", "kind", "dataset", "run", "what", "digest"],
        [_entry_row(entry) for entry in entries],
        title=f"{len(entries)} entries",
        empty="no entry yet",
    )


@command.command(epilog="Example: lazydp budget void run-1f2e --by 'A. Turing' --reason 'crashed; checkpoints deleted'")
@click.argument("run_id")
@LEDGER
@_BY
@click.option("--reason", required=True, help="Why nothing of the run was or will be released.")
def void(run_id: str, ledger: str | None, by: str | None, reason: str) -> None:
    """Give back what a run reserved, when nothing of it was or will be released.

    Delete its checkpoints first: they hold what was learnt. What its snapshots released stays charged.
    """
    with _open(ledger) as opened:
        opened.void(run_id, by=by or "", reason=reason)
    click.echo(f"run {run_id} is voided")


@command.command(name="verify", epilog="Example: lazydp budget verify --expect-head 41:0f3c...")
@LEDGER
@click.option("--expect-head", help="NUMBER:DIGEST that an earlier verify printed: it must still be there.")
@click.option("--remember", is_flag=True, help="Where everything holds: decide from now on from where the ledger ends.")
@_JSON
def verify_(ledger: str | None, expect_head: str | None, remember: bool, as_json: bool) -> None:
    """Recompute the chain of entries and every epsilon; exit status 1 where anything does not hold."""
    with _open(ledger, read_only=True) as opened:
        entries = opened.entries()
    found = _verified(entries, expect_head)
    if as_json:
        _print_json({**asdict(found), "ok": not found.problems})
    else:
        for problem in found.problems:
            click.echo(problem.line())
        click.echo(f"{found.entries} entries, {found.epsilons} epsilons recomputed; head {found.head}")
    if found.problems:
        more = f" and {len(found.problems) - 1} more" if len(found.problems) > 1 else ""
        raise IntegrityError(f"the ledger does not verify: {found.problems[0].line()}{more}")
    if remember:
        with _open(ledger) as opened:
            head = opened.remember()
        click.echo(f"decisions go on from head {head}", err=as_json)


@command.command(epilog="Example: lazydp budget export --html budget.html")
@LEDGER
@click.option(
    "--html", "html_file", type=click.Path(path_type=Path, dir_okay=False), help="A one-page report, with plots."
)
@click.option(
    "--entries", "entries_file", type=click.Path(path_type=Path, dir_okay=False), help="Every entry, one JSON a line."
)
def export(ledger: str | None, html_file: Path | None, entries_file: Path | None) -> None:
    """Write a report for a review, or the entries for an archive."""
    from lazydp.components.budget.report.overview import LedgerOverview
    from lazydp.components.budget.report.report import report
    from lazydp.components.shared.files import write_bytes

    if html_file is None and entries_file is None:
        raise click.UsageError("say what to write: --html FILE or --entries FILE")
    with _open(ledger, read_only=True) as opened:
        entries = opened.entries()
    page = ""
    if html_file is not None:
        page = report(LedgerOverview.of(entries, _verified(entries, None)), source=opened.url)
    try:
        if html_file is not None:
            write_bytes(html_file, page.encode())
            click.echo(f"wrote {html_file}")
        if entries_file is not None:
            lines = "".join(json.dumps(asdict(entry), ensure_ascii=False) + "\n" for entry in entries)
            write_bytes(entries_file, lines.encode())
            click.echo(f"wrote {entries_file}: {len(entries)} entries")
    except OSError as error:
        raise InputError(f"cannot write {error.filename or html_file or entries_file}: {error.strerror}") from error


@command.command(epilog="Example: lazydp budget migrate")
@LEDGER
def migrate(ledger: str | None) -> None:
    """Bring an older ledger to the schema of this lazydp (keep a copy first)."""
    from lazydp.components.budget.storage.sql import migrate as migrated
    from lazydp.components.shared.ledger_url import default_ledger_url

    migrated(ledger or default_ledger_url())
    click.echo("the ledger has the schema of this lazydp")


def _open(url: str | None, *, read_only: bool = False) -> Ledger:
    from lazydp.components.budget.ledger.ledger import Ledger

    return Ledger.open(url, read_only=read_only)


def _verified(entries: Sequence[Entry], expect_head: str | None) -> Verification:
    from lazydp.components.budget.ledger.verify import verify
    from lazydp.components.shared.progress import Progress

    with Progress("verify", total=len(entries), unit="entries") as progress:
        return verify(entries, expect_head=expect_head, progress=progress.advance)


def _called(budget: DatasetBudget) -> str:
    return f"{budget.name} (family {budget.declared_family})" if budget.declared_family else budget.name


def _register(
    ledger: Ledger, dataset: str, *, name: str | None, family: str | None, parents: tuple[str, ...], by: str | None
) -> str:
    """The identifier of `dataset`: a folder, what the ledger knows, or a fingerprint given together with a name."""
    from lazydp.components.budget.ledger.identifiers import register

    manifest = local_manifest(dataset)
    if manifest.is_file():
        known_by = _read(manifest, name=name, family=family)
        return register(ledger, parents=parents, by=by, **known_by).identifier
    known = ledger.state()
    if name is not None and dataset not in known.datasets:
        fingerprint = dataset
        return register(
            ledger, fingerprint=fingerprint, name=name, family=family or "", parents=parents, by=by
        ).identifier
    identifier = known.resolve(dataset)
    if parents or family:
        named = known.datasets[identifier].name
        ledger.register_dataset(identifier, name=named, family=family or "", parents=parents, by=by)
    return identifier


def _read(manifest: Path, *, name: str | None, family: str | None) -> dict[str, Any]:
    """What the ledger is told of the dataset that ingest wrote."""
    try:
        document = json.loads(manifest.read_bytes())
        spec, source = document["spec"], document["source"]
        declared = spec.get("family", "")
        if family and declared and family != declared:
            raise InputError(
                f"{manifest.parent} declares family {declared} in its feature spec, and --family says {family}: "
                "leave --family out"
            )
        return {
            "fingerprint": document["fingerprint"],
            "name": name or spec["name"],
            "sources": [source["digest"]],
            "family": family or declared,
            "default_family": document.get("family") or "",
            "user_column": spec.get("user", {}).get("column", ""),
            "places": source.get("locations", ()),
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{manifest} is not a dataset of lazydp: {error!r}") from error


def _budget_row(budget: DatasetBudget) -> list[str]:
    def figure(value: float | None) -> str:
        return "none set" if value is None else f"{value:.4g}"

    return [
        budget.name,
        budget.declared_family or "-",
        budget.dataset[:12],
        budget.privacy_unit or "-",
        "-" if budget.delta is None else f"{budget.delta:g}",
        figure(budget.epsilon),
        f"{budget.committed_epsilon:.4g}",
        f"{budget.reserved_epsilon:.4g}",
        "-" if budget.remaining_epsilon is None else figure(budget.remaining_epsilon),
        f"{budget.reserved_runs} reserved, {budget.committed_runs} committed",
        str(budget.releases),
    ]


def _entry_row(entry: Entry) -> list[str]:
    return [
        str(entry.number),
        entry.recorded_at[:19].replace("T", " "),
        entry.recorded_by,
        entry.kind,
        entry.dataset[:12],
        entry.run_id or "-",
        _what(entry.kind, entry.content()),
        entry.digest[:12],
    ]


def _what(kind: str, content: dict[str, Any]) -> str:
    if kind == "dataset":
        parents = ", ".join(name[:12] for name in content["parents"]) or "none"
        return f"{content['name']}; family: {content.get('family') or 'none declared'}; parents: {parents}"
    if kind == "budget":
        why = f": {content['reason']}" if content["reason"] else ""
        why += f"; other people: {content['other_people']}" if content.get("other_people") else ""
        return f"epsilon {content['epsilon']:g} at delta {content['delta']:g} per {content['privacy_unit']}{why}"
    if kind == "reserved":
        return f"{content['purpose']}, epsilon {content['epsilon']:.4g} alone"
    if kind in ("bound", "leased"):
        return (
            f"attempt {content['generation']}"
            if kind == "leased"
            else f"to noise key {content['key'][:12] or 'none yet'}"
        )
    if kind == "committed":
        step = "" if content["step"] is None else f" at step {content['step']}"
        return f"{'release' if content['final'] else 'snapshot'}{step}, epsilon {content['epsilon']:.4g} alone"
    return str(content.get("reason", ""))


def _print_json(document: Any) -> None:
    click.echo(json.dumps(document, indent=2, ensure_ascii=False))


def _print_table(columns: list[str], rows: list[list[str]], *, title: str, empty: str) -> None:
    """A table for people: drawn on a terminal, plain columns elsewhere."""
    if not rows:
        click.echo(empty)
        return
    # Names and reasons were typed by somebody: no control character of theirs reaches the terminal.
    rows = [["".join(c if c.isprintable() else "?" for c in cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(*columns, caption=title, caption_justify="left")
        for row in rows:
            table.add_row(*map(Text, row))
        Console().print(table)
        return
    widths = [max(len(row[place]) for row in [columns, *rows]) for place in range(len(columns))]
    for row in [columns, *rows]:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
