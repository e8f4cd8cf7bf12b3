"""`lazydp sample-data`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(name="sample-data", epilog="Example: lazydp sample-data --out sample")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The folder to make.")
@click.option("--seed", default=1, show_default=True, help="The same seed makes the same sample.")
@click.option("--users", default=2_000, show_default=True, type=click.IntRange(min=1), help="Number of users.")
@click.option("--items", default=3_000, show_default=True, type=click.IntRange(min=1), help="Number of items.")
@click.option(
    "--interactions", default=200_000, show_default=True, type=click.IntRange(min=1), help="Number of interactions."
)
@click.option("--replace", is_flag=True, help="Replace the sample where it exists.")
def command(out: Path, seed: int, users: int, items: int, interactions: int, replace: bool) -> None:
    """Make the built-in sample: interactions, users, items (Parquet) and their feature spec.

    Drawn from a latent-factor model with skewed popularity; nobody's data.
    """
    from lazydp.components.sample.sample import SampleSize, make_sample

    size = SampleSize(users=users, items=items, interactions=interactions)
    make_sample(out, seed=seed, size=size, replace=replace)
    click.echo(f"{out}: {interactions} interactions of {users} users with {items} items")
    click.echo(f"next: lazydp ingest --input {out}/interactions.parquet --spec {out}/spec.yaml --out dataset")
