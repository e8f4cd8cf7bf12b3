"""`lazydp init`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lazydp.components.shared.privacy_unit import PrivacyUnitOption

if TYPE_CHECKING:
    from lazydp.components.ingest.first_files import Unit

SPEC_FILE = "spec.yaml"
CONFIG_FILE = "train.yaml"


@click.command(
    name="init",
    epilog="Example: lazydp init --input clicks.csv --items products.csv --users 50000 --interactions 2000000",
)
@click.option("--input", "inputs", required=True, multiple=True, metavar="URI", help="The log, as for lazydp ingest.")
@click.option("--items", metavar="URI", help="The public catalogue: CSV, TSV, JSON lines or Parquet, a row an item.")
@click.option(
    "--item-count", type=click.IntRange(min=1), help="Without a catalogue: ids are integers from 0 or 1 up to this."
)
@click.option(
    "--privacy-unit",
    "unit",
    type=PrivacyUnitOption(),
    default="user",
    show_default=True,
    help="What epsilon protects: all that one person did, or one interaction.",
)
@click.option(
    "--users", type=click.IntRange(min=1), prompt="About how many users (public)", help="Order of magnitude; public."
)
@click.option(
    "--interactions",
    type=click.IntRange(min=1),
    prompt="About how many interactions (public)",
    help="Order of magnitude; public.",
)
@click.option("--user", metavar="COLUMN", help="The column that names the user, where its name does not say so.")
@click.option("--item", metavar="COLUMN", help="The column that names the item.")
@click.option("--time", metavar="COLUMN", help="The column that says when.")
@click.option("--title", metavar="COLUMN", help="The column of the catalogue with titles.")
@click.option("--rating", metavar="COLUMN", help="The column of ratings.")
@click.option(
    "--liked-from", type=float, metavar="RATING", help="Rows with a lower rating are negative; else every row counts."
)
@click.option("--name", help="Of the dataset and the model; datasets of one name share a budget.  [default: the log's]")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=".",
    show_default=True,
    help="Folder for spec.yaml and train.yaml; files that are there are kept.",
)
def command(
    inputs: tuple[str, ...],
    items: str | None,
    item_count: int | None,
    unit: Unit,
    users: int,
    interactions: int,
    user: str | None,
    item: str | None,
    time: str | None,
    title: str | None,
    rating: str | None,
    liked_from: float | None,
    name: str | None,
    out: Path,
) -> None:
    """Write a first feature spec and training configuration for your own log.

    Reads the names and types of columns and no value: what a model makes public must not be chosen by looking at
    private rows. Give the numbers as you would tell them anybody.
    """
    from lazydp.components.features.spec_file import parse_spec
    from lazydp.components.ingest.first_files import Asked, Roles, first_config, first_spec
    from lazydp.components.ingest.locations import is_uri
    from lazydp.components.ingest.source import RowSource
    from lazydp.components.shared.errors import InputError
    from lazydp.components.shared.files import require_local, write_bytes

    require_local(out)
    for file in (SPEC_FILE, CONFIG_FILE):
        if (out / file).exists():
            raise InputError(f"{out / file} is there already: choose another folder by --out")
    located = items if items is None or is_uri(items) else str(Path(items).expanduser().absolute())
    asked = Asked(
        users=users,
        interactions=interactions,
        unit=unit,
        name=name or _name_of(inputs[0]),
        user=user,
        item=item,
        time=time,
        title=title,
        rating=rating,
        liked_from=liked_from,
        items_location=located,
        item_count=item_count,
    )
    log, catalogue = RowSource.open(inputs), None if items is None else RowSource.open([items])
    roles = Roles.of(log, catalogue, asked)
    spec = first_spec(log, catalogue, roles, asked)
    parse_spec(spec, where=SPEC_FILE)
    out.mkdir(parents=True, exist_ok=True)
    write_bytes(out / SPEC_FILE, spec.encode())
    write_bytes(out / CONFIG_FILE, first_config(asked).encode())
    click.echo(f"wrote {out / SPEC_FILE} and {out / CONFIG_FILE} from names, types and your numbers: no value was read")
    click.echo(f"the columns were taken for {roles.described()}")
    if roles.rating is not None and liked_from is None:
        click.echo(f"every row counts as positive, whatever its {roles.rating!r}: --liked-from says otherwise")
    for line in _next(inputs, out):
        click.echo(line)


def _name_of(location: str) -> str:
    """The file or folder of a log, without extensions and patterns, as the name of what is made of it."""
    parts = [part.split("?")[0] for part in location.rstrip("/").split("/")]
    plain = [part for part in parts if part and not set("*[=") & set(part)]
    return (plain or ["log"])[-1].lstrip(".").split(".")[0] or "log"


def _next(inputs: tuple[str, ...], out: Path) -> list[str]:
    """What to type next."""
    log = " ".join(f"--input {shlex.quote(location)}" for location in inputs)
    spec = f"--spec {shlex.quote(str(out / SPEC_FILE))}"
    made = out / "out"
    return [
        "",
        "Look through both files. Then see what would be read, and make and serve a model:",
        f"  lazydp ingest {log} {spec} --check",
        f"  lazydp pipeline run {log} {spec} --config {shlex.quote(str(out / CONFIG_FILE))} --budget-epsilon 8 "
        f"--out {shlex.quote(str(made))}",
        f"  lazydp serve --bundle {shlex.quote(str(made / 'bundle'))}",
    ]
