"""`lazydp bench quality | search`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lazydp.components.shared.privacy_unit import PrivacyUnitOption

if TYPE_CHECKING:
    from lazydp.components.bench.protocol import Quality
    from lazydp.components.bench.search import Metric
    from lazydp.components.onepass.rules import PrivacyUnit

_METRIC = click.Choice(["hr_at_10", "ndcg_at_10", "recall_at_20"])


@click.command(
    name="quality", epilog="Example: lazydp bench quality --dataset out/dataset --seeds 3 --plot quality.svg"
)
@click.option(
    "--dataset",
    "datasets",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    multiple=True,
    required=True,
    help="An encoded dataset with a test split; may be given several times.",
)
@click.option("--epsilon", "epsilons", type=float, multiple=True, default=(1.0, 3.0, 8.0), show_default=True)
@click.option("--delta", type=float, default=1e-5, show_default=True)
@click.option(
    "--privacy-unit", "--unit", "units", type=PrivacyUnitOption(), multiple=True, default=("user",), show_default=True
)
@click.option("--seeds", type=click.IntRange(min=1), default=5, show_default=True, help="Noise keys a private figure.")
@click.option("--users", type=click.IntRange(min=1), help="Measure by so many users, drawn at random; all if left out.")
@click.option(
    "--negatives",
    type=click.IntRange(min=1),
    help="Rank each held-out item among so many drawn at random, not among the whole catalogue.",
)
@click.option(
    "--config",
    "configs",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    multiple=True,
    help="A run with steps as another contestant, named after the file; may be given several times.",
)
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="SVG against epsilon, or users.")
@click.option("--metric", type=_METRIC, default="hr_at_10")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def quality(
    datasets: tuple[Path, ...],
    epsilons: tuple[float, ...],
    delta: float,
    units: tuple[PrivacyUnit, ...],
    seeds: int,
    users: int | None,
    negatives: int | None,
    configs: tuple[Path, ...],
    plot: Path | None,
    metric: str,
    as_json: bool,
) -> None:
    """Rank held-out items by every contestant: popularity, PureSVD, EASE, iALS, and starts with and without privacy.

    The figures are computed from private data without noise: for internal use, not a release.
    """
    from lazydp.components.bench import quality as bench
    from lazydp.components.ingest.dataset import EncodedDataset
    from lazydp.components.shared.files import PRIVATE_FILE, write_bytes
    from lazydp.components.train.config import TrainConfig

    if not as_json:
        click.echo(
            f"{'dataset':12}{'contestant':16}{'unit':9}{'epsilon':>8}{'HR@10':>9}{'NDCG@10':>9}{'Recall@20':>11}"
            "  95 % interval of HR@10, seeds"
        )
    results = []
    for dataset in datasets:
        for result in bench.run(
            EncodedDataset.open(dataset),
            epsilons=epsilons,
            units=units,
            seeds=seeds,
            delta=delta,
            most_users=users,
            negatives=negatives,
            configs={config.stem: TrainConfig.load(config) for config in configs},
        ):
            results.append(result)
            click.echo(result.to_json() if as_json else _quality_row(result))
    if plot is not None:
        from lazydp.components.bench.quality_plot import draw

        write_bytes(plot, draw(results, metric=metric), mode=PRIVATE_FILE)


def _quality_row(result: Quality) -> str:
    epsilon = "none" if result.epsilon is None else f"{result.epsilon:g}"
    mean = result.mean
    figures = f"{mean['hr_at_10']:9.4f}{mean['ndcg_at_10']:9.4f}{mean['recall_at_20']:11.4f}"
    spread = f"  +- {result.interval['hr_at_10']:.4f}, {result.seeds}"
    return f"{result.dataset:12}{result.contestant:16}{result.privacy_unit or '':9}{epsilon:>8}{figures}{spread}"


@click.command(
    name="search",
    epilog="Example: lazydp bench search --dataset out/dataset --validation out/validation --epsilon 3",
)
@click.option(
    "--dataset",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    required=True,
    help="An encoded dataset with a test split.",
)
@click.option(
    "--validation",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    required=True,
    help="Another, whose test split is cut from the first one's training rows.",
)
@click.option("--epsilon", type=float, required=True, help="Of the starts.")
@click.option("--delta", type=float, default=1e-5, show_default=True)
@click.option("--privacy-unit", "--unit", "unit", type=PrivacyUnitOption(), default="user", show_default=True)
@click.option("--metric", type=_METRIC, default="hr_at_10", show_default=True, help="That settings are compared by.")
@click.option("--settings", type=click.IntRange(min=1), default=60, show_default=True, help="Drawn beside the rule.")
@click.option("--seeds", type=click.IntRange(min=2), default=8, show_default=True, help="Fresh keys at the end.")
@click.option("--users", type=click.IntRange(min=1), help="Measure by so many users, drawn at random; all if left out.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def search(
    dataset: Path,
    validation: Path,
    epsilon: float,
    delta: float,
    unit: PrivacyUnit,
    metric: Metric,
    settings: int,
    seeds: int,
    users: int | None,
    as_json: bool,
) -> None:
    """Compare the rule of a start with the best of settings drawn at random.

    The settings are compared on the validation dataset. Those that were best there are then measured beside the rule
    on the dataset, with fresh noise keys. The figures are computed from private data: for internal use.
    """
    from lazydp.components.bench import search as bench
    from lazydp.components.ingest.dataset import EncodedDataset

    for found in bench.run(
        EncodedDataset.open(dataset),
        EncodedDataset.open(validation),
        epsilon=epsilon,
        delta=delta,
        unit=unit,
        metric=metric,
        settings=settings,
        seeds=seeds,
        most_users=users,
    ):
        click.echo(found.to_json() if as_json else found.row())
