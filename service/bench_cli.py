"""`lazydp bench serve`."""

from __future__ import annotations

import click


@click.command(name="serve", epilog="Example: lazydp bench serve --items 100000")
@click.option("--items", type=click.IntRange(min=100), default=3_700, show_default=True, help="Items of the catalogue.")
@click.option("--k", type=click.IntRange(min=1), default=50, show_default=True, help="Items asked for.")
@click.option("--dim", type=click.IntRange(min=1), default=64, show_default=True, help="Length of the vectors.")
@click.option("--requests", type=click.IntRange(min=1), default=1_000, show_default=True, help="Requests of a repeat.")
@click.option("--repeats", type=click.IntRange(min=1), default=9, show_default=True, help="Interleaved rounds.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def command(items: int, k: int, dim: int, requests: int, repeats: int, as_json: bool) -> None:
    """Requests at saturation: the service (nothing cached), a bare route with the same bytes, the bare product."""
    from lazydp.components.bench.harness import print_table
    from lazydp.service import bench

    results = bench.run(items=items, k=k, dim=dim, requests=requests, repeats=repeats)
    if as_json:
        for result in results:
            click.echo(result.to_json())
        return
    print_table(results, unit=bench.UNIT)
    for result in results:
        click.echo(f"{result.contestant:12} {1 / result.median_s:10,.0f} requests/s")
