"""`lazydp evaluate`."""

from __future__ import annotations

from pathlib import Path

import click

from lazydp.components.ingest.dataset_option import local_dataset


@click.command(
    name="evaluate", epilog="Example: lazydp evaluate --bundle out/bundle --dataset out/dataset --out out/metrics.json"
)
@click.option("--bundle", type=click.Path(path_type=Path), required=True, help="What `lazydp export` wrote.")
@click.option("--dataset", metavar="URI", required=True, help="What `lazydp ingest` wrote.")
@click.option(
    "--candidates",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Rank each user's held-out items among the items that this file gives the user: a row for each pair, in the "
    "spec's columns of user and item; users that it lacks are left out.  [default: the whole catalogue]",
)
@click.option("--out", type=click.Path(path_type=Path), help="Also write the metrics as JSON to this file (mode 0600).")
def command(bundle: Path, dataset: str, candidates: Path | None, out: Path | None) -> None:
    """Measure a bundle beside popularity: AUC, HR@10, NDCG@10, Recall@20 over the whole catalogue.

    The figures are computed from private data without noise: they are for internal use, and releasing them is not
    covered by the bundle's privacy statement.
    """
    from lazydp.components.evaluate.evaluate import evaluate

    found = evaluate(bundle=bundle, dataset=local_dataset(dataset), candidates=candidates)
    click.echo(found.table())
    if out is not None:
        found.save(out)
