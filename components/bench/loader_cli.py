"""`lazydp bench loader`."""

from __future__ import annotations

from pathlib import Path

import click

from lazydp.components.ingest.dataset_option import local_dataset


@click.command(name="loader", epilog="Example: lazydp bench loader --dataset out/dataset")
@click.option("--dataset", metavar="URI", required=True, help="What `lazydp ingest` wrote.")
@click.option("--config", type=click.Path(path_type=Path), help="Training configuration, YAML; else a plain one.")
@click.option("--steps", type=click.IntRange(min=1), default=6, show_default=True, help="Batches of a run.")
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True, help="Interleaved rounds.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def command(dataset: str, config: Path | None, steps: int, repeats: int, as_json: bool) -> None:
    """Read batches of your own dataset: from memory, and from the disk with and without reading ahead.

    Seconds are those of one batch. `disk` reads as many pages as a batch does, at random, by 32 threads: the disk's
    bound. The kernel forgets the pages of the dataset between runs, and of nothing else.
    """
    from lazydp.components.bench import loader as bench
    from lazydp.components.ingest.dataset import EncodedDataset
    from lazydp.components.shared.bench_harness import print_table
    from lazydp.components.train.config import TrainConfig

    data = EncodedDataset.open(local_dataset(dataset), verify=False)
    settings = TrainConfig.load(config) if config is not None else None
    results = bench.run(data, settings, repeats=repeats, steps=steps)
    if as_json:
        for result in results:
            click.echo(result.to_json())
    else:
        print_table(results, unit=bench.UNIT)
