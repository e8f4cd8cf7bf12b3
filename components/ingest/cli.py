"""`lazydp ingest`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import click

from lazydp.components.ingest.dataset_option import local_dataset

if TYPE_CHECKING:
    from lazydp.components.ingest.engines import EngineName
    from lazydp.components.ingest.readers import Format

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
    help="File, folder, pattern (days/2024-*/*.parquet) or Delta table, by path or URI. May be given several times.",
)
@click.option("--spec", required=True, metavar="FILE", help="The feature spec (YAML), by path or URI.")
@click.option("--out", metavar="URI", help="The dataset folder to make, by path or URI (s3://bucket/folder); private.")
@click.option("--check", "dry", is_flag=True, help="Only say what would be read and left out; write nothing.")
@click.option("--users", metavar="URI", help="The users table, instead of the one that the spec names.")
@click.option("--items", metavar="URI", help="The items table, instead of the one that the spec names.")
@click.option(
    "--memory",
    type=_Bytes(),
    default="1g",
    show_default=True,
    help="Memory that the process, on an engine a task, may take; the rest is on disk. 128m is enough for most logs.",
)
@click.option(
    "--format",
    "kind",
    type=click.Choice(["auto", "parquet", "csv", "tsv", "jsonl", "criteo"]),
    default="auto",
    show_default=True,
    help="Format of the input files: by their content and extension, or this. criteo: tabs, no header, 40 columns.",
)
@click.option(
    "--max-rejected",
    type=click.FloatRange(0, 1),
    default=0.5,
    show_default=True,
    help="Share of rows that may have no usable user, item, time, label or split before it is an error.",
)
@click.option(
    "--workers", type=click.IntRange(min=1), help="Cores to work on; all by default. The dataset is the same."
)
@click.option(
    "--parts",
    type=click.IntRange(min=1),
    help="Sets of files to write, a power of two: 1 by default, on an engine by the number of rows. "
    "The dataset has the same fingerprint.",
)
@click.option(
    "--engine",
    type=click.Choice(["local", "ray", "spark"]),
    default="local",
    show_default=True,
    help="What does the work: this process, or workers of Ray or Spark. The dataset has the same fingerprint.",
)
@click.option(
    "--cluster",
    metavar="ADDRESS",
    help="A running cluster of the engine (auto, host:6379; spark://host:7077); by default workers of this machine.",
)
@click.option("--keep-rows", is_flag=True, help="Keep the encoded rows in the dataset, for --append.")
@click.option(
    "--append",
    metavar="DATASET",
    help="Add the rows to those of a dataset made with --keep-rows; what no new row touches is not written anew.",
)
@click.option("--replace", is_flag=True, help="Replace the dataset where it exists.")
def command(
    inputs: tuple[str, ...],
    spec: str,
    out: str | None,
    dry: bool,
    users: str | None,
    items: str | None,
    memory: int,
    kind: Format,
    max_rejected: float,
    workers: int | None,
    parts: int | None,
    engine: EngineName,
    cluster: str | None,
    keep_rows: bool,
    append: str | None,
    replace: bool,
) -> None:
    """Encode interactions (Parquet, CSV, TSV, JSON lines, Delta) into a dataset for training.

    The data may be larger than memory. At most k examples a user are kept for training, chosen from that user's rows
    alone, and one is held out for evaluation; the feature spec says how. The dataset is as private as its input.
    """
    from lazydp.components.ingest.distributed import ingest_by
    from lazydp.components.ingest.engines import engine_named
    from lazydp.components.ingest.ingest import IngestOptions
    from lazydp.components.ingest.locations import shown
    from lazydp.components.ingest.workers import cores

    if append and engine != "local":
        raise click.UsageError(f"--append is for --engine local alone: add the rows without --engine {engine}")
    options = IngestOptions(
        users=users,
        items=items,
        memory_bytes=memory,
        replace=replace,
        format=kind,
        max_rejected=max_rejected,
        workers=workers or cores(),
        keep_rows=keep_rows,
        append=local_dataset(append) if append else None,
    )
    if out is None and not dry:
        raise click.UsageError("give --out, or --check")
    running = engine_named(engine, cluster=cluster, workers=workers)
    if dry:
        from lazydp.components.ingest.check import check

        for line in check(inputs, spec, options):
            click.echo(line)
        return
    assert out is not None
    manifest = ingest_by(running, inputs, spec, out, options, parts=parts)
    counts = manifest.counts
    click.echo(
        f"{shown(out)}: {counts.train} examples for training and {counts.test} for evaluation, "
        f"{counts.users} users, {counts.items} items"
    )
    bound = manifest.max_examples_per_user
    click.echo(f"contribution bound: {f'{bound} training examples a user' if bound is not None else 'none'}")
    for reason, count in manifest.rejected.items():
        click.echo(f"left out: {count} rows, {reason}")
    click.echo(f"fingerprint (private, as the dataset is): {manifest.fingerprint}")
