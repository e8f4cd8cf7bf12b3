"""`lazydp ingest`."""

from __future__ import annotations

import re
from pathlib import Path

import click

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


class _Bytes(click.ParamType[int]):
    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"(\d+)\s*([kmgt]?)(i?b)?", str(value).strip().lower())
        if match is None or int(match[1]) == 0:
            self.fail(f"{value!r} is no size; write bytes, or a number with k, m, g or t, such as 512m", param, ctx)
        return int(match[1]) * _UNITS[match[2]]


@click.command(
    name="ingest",
    epilog="Example: lazydp ingest --input interactions.parquet --spec spec.yaml --out dataset",
)
@click.option(
    "--input",
    "inputs",
    required=True,
    multiple=True,
    metavar="URI",
    help="Parquet file, or folder of them, by path or URI (s3://...). May be given several times.",
)
@click.option("--spec", required=True, metavar="FILE", help="The feature spec (YAML), by path or URI.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The dataset folder to make; private.")
@click.option("--users", metavar="URI", help="The users table, instead of the one that the spec names.")
@click.option("--items", metavar="URI", help="The items table, instead of the one that the spec names.")
@click.option(
    "--memory", type=_Bytes(), default="1g", show_default=True, help="Memory to work in, roughly; the rest is on disk."
)
@click.option("--replace", is_flag=True, help="Replace the dataset where it exists.")
def command(
    inputs: tuple[str, ...],
    spec: str,
    out: Path,
    users: str | None,
    items: str | None,
    memory: int,
    replace: bool,
) -> None:
    """Encode interactions from Parquet into a dataset for training.

    The data may be larger than memory. At most k examples a user are kept for training, chosen from that user's rows
    alone, and one is held out for evaluation; the feature spec says how. The dataset is as private as its input.
    """
    from lazydp.components.ingest.ingest import IngestOptions, ingest

    manifest = ingest(inputs, spec, out, IngestOptions(users=users, items=items, memory_bytes=memory, replace=replace))
    counts = manifest.counts
    click.echo(
        f"{out}: {counts.train} examples for training and {counts.test} for evaluation, "
        f"{counts.users} users, {counts.items} items"
    )
    bound = manifest.max_examples_per_user
    click.echo(f"contribution bound: {f'{bound} training examples a user' if bound is not None else 'none'}")
    for reason, count in manifest.rejected.items():
        click.echo(f"left out: {count} rows, {reason}")
    click.echo(f"fingerprint (private, as the dataset is): {manifest.fingerprint}")
