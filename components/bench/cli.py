"""`lazydp bench step | scale | train | noise | ...`: each prints a table, or with --json one object a line."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from lazydp.components.bench.scale import Scale
    from lazydp.components.bench.shapes import Access
    from lazydp.components.bench.step import Part
    from lazydp.components.shared.bench_harness import Result

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
    from lazydp.components.shared.bench_harness import print_table

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
    """Flush a table whose every row has pending noise, beside copying it and scaling it in place."""
    from lazydp.components.bench import flush as bench

    _use_threads(threads)
    results = bench.run(table_bytes=mib << 20, columns=columns, repeats=repeats)
    _show(results, unit=bench.UNIT, as_json=as_json)


@click.command(name="ingest", epilog="Example: lazydp bench ingest --rows 1000000")
@click.option("--rows", type=click.IntRange(min=1), default=1_000_000, show_default=True, help="Rows of the log.")
@click.option(
    "--shape",
    type=click.Choice(["interactions", "criteo"]),
    default="interactions",
    show_default=True,
    help="A log of user, item and time, or one of 42 columns like Criteo's.",
)
@_common(5)
def ingest(rows: int, shape: str, repeats: int, threads: int | None, as_json: bool) -> None:
    """Encode a log of interactions, beside reading and dictionary-encoding it by pyarrow and pandas."""
    from lazydp.components.bench import ingest as bench

    _use_threads(threads)
    run = bench.run_wide if shape == "criteo" else bench.run
    _show(run(rows=rows, repeats=repeats), unit=bench.UNIT, as_json=as_json)


_MODULES = ("sasrec", "dcn")


def _of_module(
    shape: str, rows: int | None, repeats: int, contestants: tuple[str, ...], *, plain: bool
) -> list[Result]:
    from lazydp.components.bench import modules

    if not plain:
        raise click.UsageError(f"--shape {shape} is measured as a whole, on the CPU, with --rows, --contestant alone")
    if not contestants:
        click.echo(modules.OPACUS[shape], err=True)
    return modules.run(shape, rows=rows or modules.ROWS, repeats=repeats, contestants=contestants or None)


@click.command(name="step", epilog="Example: lazydp bench step --data out/dataset --config train.yaml --plot step.svg")
@click.option(
    "--shape",
    type=click.Choice(["mlperf", "pooled", "small", "sasrec", "dcn"]),
    default="mlperf",
    show_default=True,
    help="A model: of the pipeline, or (sasrec, dcn) a module of your own with layers on the slow path.",
)
@click.option("--rows", type=click.IntRange(min=2), help="Rows of each table; the shape's, as memory allows.")
@click.option(
    "--data",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="An encoded dataset instead of a shape: its tables, skew, pooling and batch.",
)
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Training configuration for --data: model, sampling, negatives. Batches of 2048 if left out.",
)
@click.option(
    "--part",
    type=click.Choice(["whole", "embeddings"]),
    default="whole",
    show_default=True,
    help="The whole step, or reading and moving rows alone.",
)
@click.option("--device", metavar="DEVICE", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
@click.option(
    "--table-device", metavar="DEVICE", help="cpu keeps the tables in host memory.  [default: with the dense layers]"
)
@click.option("--growth", type=click.IntRange(min=2), help="Also on tables with so many times fewer rows.")
@click.option("--contestant", "contestants", multiple=True, help="Only these; may be repeated.")
@click.option("--breakdown", is_flag=True, help="Then also the time of each phase of a lazydp step.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw it, as SVG.")
@_common(9)
def step(
    shape: str,
    rows: int | None,
    data: Path | None,
    config: Path | None,
    part: Part,
    device: str,
    table_device: str | None,
    growth: int | None,
    contestants: tuple[str, ...],
    breakdown: bool,
    plot: Path | None,
    repeats: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """One training step: plain torch SGD, ours without privacy, lazydp, eager dpsgd, and Opacus where it fits.

    With --data on your own encoded dataset: is noise our bottleneck, and what do we gain? Its figures tell of your data
    (rows, lookups): keep them as private as the data.
    """
    from lazydp.components.bench import step as bench
    from lazydp.components.bench.plot import svg
    from lazydp.components.bench.workload import Workload
    from lazydp.components.shared.files import write_bytes
    from lazydp.components.train.device.placement import Placement

    if data is None and config is not None:
        raise click.UsageError("--config belongs to --data")
    if data is not None and rows is not None:
        raise click.UsageError("--rows belongs to --shape: the tables of a dataset have the size they have")
    if plot is not None and plot.suffix != ".svg":
        raise click.UsageError(f"--plot draws an SVG: name it so, as {plot.with_suffix('.svg')}")
    _use_threads(threads)
    if shape in _MODULES and data is None:
        plain = (device, part) == ("cpu", "whole") and not (table_device or growth or breakdown or plot)
        _show(_of_module(shape, rows, repeats, contestants, plain=plain), unit=bench.UNIT, as_json=as_json)
        return
    workload: Workload
    if data is None:
        workload = bench.named(shape, rows=rows)
    else:
        from lazydp.components.bench.dataset_workload import DatasetWorkload

        workload = DatasetWorkload.open(data, config)
    placement = Placement.of(device, table_device)
    chosen = contestants or bench.CONTESTANTS
    for reason in (bench.left_out(name, workload, part, placement) for name in chosen):
        if reason is not None:
            click.echo(reason, err=True)
    results = bench.run(workload, repeats=repeats, contestants=chosen, part=part, growth=growth, placement=placement)
    _show(results, unit=bench.UNIT, as_json=as_json)
    spent = bench.breakdown(workload, repeats=repeats, placement=placement) if breakdown or plot is not None else None
    if as_json:
        phases = None if spent is None else {"step_s": spent.step_s, "phases_s": spent.parts()}
        click.echo(json.dumps({"bench": "step", "answer": bench.answer(results), "breakdown": phases}))
    else:
        for name, seconds in (spent.parts() if spent is not None else {}).items():
            click.echo(f"{name:18} {seconds * 1e3:9.2f} ms")
        click.echo(bench.answer(results))
    if plot is not None:
        picture = svg(results, title=bench.answer(results), parts=spent.parts() if spent is not None else None)
        write_bytes(plot, picture.encode())


@click.command(name="scale", epilog="Example: lazydp bench scale --gib 0.25 --gib 1 --plot scale.svg")
@click.option(
    "--gib",
    type=click.FloatRange(min=0, min_open=True),
    multiple=True,
    default=(0.25, 1.0, 4.0, 10.0),
    show_default=True,
    help="Size of all tables together; may be repeated.",
)
@click.option("--batch", "batches", type=click.IntRange(min=1), multiple=True, default=(256, 2048), show_default=True)
@click.option(
    "--access",
    "accesses",
    type=click.Choice(["uniform", "zipf"]),
    multiple=True,
    default=("uniform", "zipf"),
    show_default=True,
    help="How the rows of a batch are drawn.",
)
@click.option(
    "--flush-every", type=click.IntRange(min=1), default=1000, show_default=True, help="Steps that share a flush."
)
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw it, as SVG.")
@_common(5)
def scale(
    gib: tuple[float, ...],
    batches: tuple[int, ...],
    accesses: tuple[Access, ...],
    flush_every: int,
    plot: Path | None,
    repeats: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """A step with eager noise (ours; plain torch) and with lazy noise, flush counted in, against the size of tables."""
    from lazydp.components.bench import scale as bench
    from lazydp.components.bench.scale_plot import draw
    from lazydp.components.shared.files import write_bytes

    _use_threads(threads)
    if not as_json:
        titles = "".join(f"{name:>18}" for name in (*bench.CONTESTANTS, bench.FLUSH))
        click.echo(f"{'GiB':>6}{'batch':>7}  {'access':9}{titles}   (ms; times a lazy step with its part of a flush)")
    results = []
    for result in bench.run(gib=gib, batch_sizes=batches, accesses=accesses, repeats=repeats, flush_every=flush_every):
        results.append(result)
        click.echo(result.to_json() if as_json else _scale_row(result))
    if plot is not None:
        write_bytes(plot, draw(results))


def _scale_row(result: Scale) -> str:
    from lazydp.components.bench.scale import CONTESTANTS, FLUSH

    steps = "".join(f"{result.step_s(one) * 1e3:10.4g} ({result.times(one):5.3g})" for one in CONTESTANTS)
    return f"{result.gib:6g}{result.batch_size:7}  {result.access:9}{steps}{result.seconds[FLUSH] * 1e3:18.4g}"


@click.command(
    name="train", epilog="Example: lazydp bench train --dataset out/dataset --config examples/sample/train.yaml"
)
@click.option(
    "--dataset", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True, help="Encoded."
)
@click.option(
    "--config", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True, help="Of a private run."
)
@click.option("--steps", type=click.IntRange(min=1), help="Instead of the configuration's, at the same noise.")
@_common(3)
def train(dataset: Path, config: Path, steps: int | None, repeats: int, threads: int | None, as_json: bool) -> None:
    """Whole runs of `lazydp train`, private and not, beside a loop in plain torch with a DataLoader."""
    from lazydp.components.bench import train as bench

    _use_threads(threads)
    results = bench.run(dataset, config, steps=steps, repeats=repeats)
    if as_json:
        for result in results:
            click.echo(result.to_json())
        return
    for result in results:
        examples = result.shape[bench.UNIT]
        click.echo(
            f"{result.contestant:12}{result.median_s:9.2f} s{examples / result.median_s:12,.0f} examples/s"
            f"{result.median_s / results[0].median_s:8.2f} times {results[0].contestant}"
        )
