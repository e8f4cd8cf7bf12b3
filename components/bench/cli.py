"""`lazydp bench step | noise | flush | ingest`: each prints a table, or with --json one object a line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from lazydp.components.bench.harness import Result

_Command = Callable[..., Any]


def _common(repeats: int) -> Callable[[_Command], _Command]:
    """Options of every bench."""

    def add(command: _Command) -> _Command:
        command = click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")(command)
        command = click.option("--threads", type=click.IntRange(min=1), help="Threads; all cores if left out.")(command)
        return click.option(
            "--repeats", type=click.IntRange(min=1), default=repeats, show_default=True, help="Interleaved rounds."
        )(command)

    return add


def _use_threads(threads: int | None) -> None:
    import torch

    if threads is not None:
        torch.set_num_threads(threads)


def _show(results: Sequence[Result], *, unit: str, as_json: bool) -> None:
    from lazydp.components.bench.harness import print_table

    if as_json:
        for result in results:
            click.echo(result.to_json())
    else:
        print_table(results, unit=unit)


@click.command(name="noise", epilog="Example: lazydp bench noise --json")
@click.option("--count", type=click.IntRange(min=128), default=53_248 * 128, show_default=True, help="Normals to draw.")
@_common(21)
def noise(count: int, repeats: int, threads: int | None, as_json: bool) -> None:
    """Fill a tensor with standard normals: ours (ChaCha20), torch's and numpy's (neither secure)."""
    from lazydp.components.bench import noise as bench

    _use_threads(threads)
    _show(bench.run(count=count, repeats=repeats), unit=bench.UNIT, as_json=as_json)


@click.command(name="flush", epilog="Example: lazydp bench flush --mib 512")
@click.option("--mib", type=click.IntRange(min=1), default=2048, show_default=True, help="Size of the table.")
@click.option("--columns", type=click.IntRange(min=1), default=128, show_default=True, help="Embedding dimension.")
@_common(9)
def flush(mib: int, columns: int, repeats: int, threads: int | None, as_json: bool) -> None:
    """Flush a table whose every row owes noise, beside copying it and scaling it in place."""
    from lazydp.components.bench import flush as bench

    _use_threads(threads)
    results = bench.run(table_bytes=mib << 20, columns=columns, repeats=repeats)
    _show(results, unit=bench.UNIT, as_json=as_json)


@click.command(name="ingest", epilog="Example: lazydp bench ingest --rows 1000000")
@click.option("--rows", type=click.IntRange(min=1), default=1_000_000, show_default=True, help="Rows of the log.")
@_common(5)
def ingest(rows: int, repeats: int, threads: int | None, as_json: bool) -> None:
    """Encode a log of interactions, beside reading and dictionary-encoding it by pyarrow and pandas."""
    from lazydp.components.ingest import bench

    _use_threads(threads)
    _show(bench.run(rows=rows, repeats=repeats), unit=bench.UNIT, as_json=as_json)


@click.command(name="step", epilog="Example: lazydp bench step --shape mlperf --rows 200000")
@click.option("--shape", default="mlperf", show_default=True, help="mlperf, pooled or small.")
@click.option("--rows", type=click.IntRange(min=1), help="Rows of each table; the shape's, as memory allows.")
@click.option("--contestant", "contestants", multiple=True, help="Only these; may be repeated.")
@click.option("--breakdown", is_flag=True, help="Then also the time of each phase of a lazydp step.")
@_common(9)
def step(
    shape: str,
    rows: int | None,
    contestants: tuple[str, ...],
    breakdown: bool,
    repeats: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """One training step: plain torch SGD, ours without privacy, lazydp, eager dpsgd, and Opacus where it fits."""
    from lazydp.components.bench import step as bench

    _use_threads(threads)
    chosen = contestants or bench.CONTESTANTS
    _show(bench.run(shape=shape, rows=rows, repeats=repeats, contestants=chosen), unit=bench.UNIT, as_json=as_json)
    if breakdown:
        seconds = bench.breakdown(shape=shape, rows=rows, repeats=repeats)
        total = sum(seconds.values())
        for phase, spent in seconds.items():
            click.echo(f"{phase:18} {spent * 1e3:9.2f} ms {spent / total:6.1%}", err=as_json)
