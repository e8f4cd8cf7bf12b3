"""`lazydp bench serve`."""

from __future__ import annotations

import click

_ITEMS = {"service": 3_700, "cpu": 3_700, "ann": 1_000_000}
_K = {"service": 50, "cpu": 50, "ann": 100}


@click.command(name="serve", epilog="Example: lazydp bench serve --items 100000")
@click.option(
    "--shape",
    type=click.Choice(["service", "cpu", "ann"]),
    default="service",
    show_default=True,
    help="service: requests at saturation. cpu: CPU time of a request and of its parts, without sockets. "
    "ann: the approximate index beside exact search.",
)
@click.option("--items", type=click.IntRange(min=100), help="Items of the catalogue; 3700, or 1000000 for ann.")
@click.option("--k", type=click.IntRange(min=1), help="Items asked for; 50, or 100 for ann.")
@click.option("--dim", type=click.IntRange(min=1), default=64, show_default=True, help="Length of the vectors.")
@click.option(
    "--requests",
    type=click.IntRange(min=1),
    default=1_000,
    show_default=True,
    help="Requests of a repeat.",
)
@click.option("--repeats", type=click.IntRange(min=1), default=9, show_default=True, help="Interleaved rounds.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def command(shape: str, items: int | None, k: int | None, dim: int, requests: int, repeats: int, as_json: bool) -> None:
    """The service at saturation beside a bare route that returns the same bytes, and the bare product.

    `lazydp` keeps no answers and scores every request; `lazydp_cached` runs with the settings as shipped. The lines
    below the table hold requests a second, the share of what is bare (`bare_matmul_together`: the product of as many
    queries at once as there are connections), the latency of 99 of 100 requests, and the server's memory. With
    --shape cpu: microseconds of CPU that a request takes in one process without sockets, by contestant and by part.
    With --shape ann: seconds a query, recall at 100, and speed-up.
    """
    items, k = items or _ITEMS[shape], k or _K[shape]
    if shape == "ann":
        _index(items=items, k=k, dim=dim, repeats=repeats, as_json=as_json)
    elif shape == "cpu":
        _cpu(items=items, k=k, dim=dim, requests=requests, repeats=repeats, as_json=as_json)
    else:
        _service(items=items, k=k, dim=dim, requests=requests, repeats=repeats, as_json=as_json)


def _service(*, items: int, k: int, dim: int, requests: int, repeats: int, as_json: bool) -> None:
    from lazydp.components.shared.bench_harness import print_table
    from lazydp.service.bench import serve as bench

    results = bench.run(items=items, k=k, dim=dim, requests=requests, repeats=repeats)
    if as_json:
        for result in results:
            click.echo(result.to_json())
        return
    print_table(results, unit=bench.UNIT)
    for result in results:
        line = f"{result.contestant:20} {1 / result.median_s:8,.0f} requests/s"
        if result.contestant.startswith("lazydp"):
            # A ratio is of times: the share of the other's rate is its inverse.
            shares = (f"{1 / ratio:.0%} of {other}" for other, ratio in result.ratios.items() if "bare" in other)
            line += f"  {', '.join(shares)}"
        if result.p99_s is not None and result.rss_bytes is not None:
            line += f"  p99 {result.p99_s * 1e3:.1f} ms, {result.rss_bytes / 2**20:,.0f} MiB"
        click.echo(line)


def _cpu(*, items: int, k: int, dim: int, requests: int, repeats: int, as_json: bool) -> None:
    from lazydp.service.bench import cost

    for result in cost.run(items=items, k=k, dim=dim, requests=requests, repeats=repeats):
        if as_json:
            click.echo(result.to_json())
            continue
        line = f"{result.contestant:30} {result.median_s * 1e6:7.1f} microseconds"
        if result.contestant.startswith("lazydp"):
            shares = (f"{1 / result.ratios[name]:.0%} of {name}" for name in ("bare_route", "bare_matmul"))
            line += f"  {', '.join(shares)}"
        click.echo(line)


def _index(*, items: int, k: int, dim: int, repeats: int, as_json: bool) -> None:
    from lazydp.components.bundle.index import DEPTHS
    from lazydp.service.bench import index as bench_index

    if k >= DEPTHS[0]:
        raise click.BadParameter(f"expected fewer than {DEPTHS[0]} with --shape ann", param_hint="--k")
    for results in bench_index.run(items=items, k=k, dim=dim, repeats=repeats):
        approximate, exact = results
        if as_json:
            for result in results:
                click.echo(result.to_json())
            continue
        click.echo(
            f"{approximate.vectors}, {items:,} items: approximate {approximate.median_s * 1e3:.2f} ms a query, exact "
            f"{exact.median_s * 1e3:.2f} ms: {approximate.ratios['exact'] ** -1:.1f} times faster; {approximate.index}"
        )
