"""`lazydp train`: one run, a run that releases snapshots (train and export), or a sweep (tune).

It stands above the components that it joins, so that none of them imports a later step of the pipeline.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lazydp.components.ingest.dataset_option import local_dataset
from lazydp.components.shared.ledger_url import LEDGER

if TYPE_CHECKING:
    from lazydp.components.train.config import TrainConfig


# Of a run that --resume lets go on where it stopped: a rank that ends takes the others with it, and all begin again.
_RESTARTS = 3


@click.command(
    name="train",
    epilog="Example: lazydp train --dataset out/dataset --config examples/sample/train.yaml --out out/run",
)
@click.option("--dataset", metavar="URI", required=True, help="What `lazydp ingest` wrote.")
@click.option("--config", type=click.Path(path_type=Path), required=True, help="Training configuration, YAML.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the run; private, mode 0700.")
@LEDGER
@click.option(
    "--mode",
    type=click.Choice(["lazydp", "dpsgd", "sgd"]),
    help="Instead of the configuration's: lazydp; dpsgd, noise on every row at every step; sgd, no privacy at all.",
)
@click.option("--device", metavar="DEVICE", help="Instead of the configuration's: cpu, cuda or cuda:N.")
@click.option(
    "--table-device",
    metavar="DEVICE",
    help="Instead of the configuration's: cpu keeps the tables in host memory and the dense layers on the GPU.",
)
@click.option(
    "--tune",
    type=click.Path(path_type=Path),
    help="A sweep, YAML: try settings, and leave the best run in the folder `best` of --out. Charged as a whole.",
)
@click.option("--publish-every", type=click.IntRange(min=1), metavar="STEPS", help="Release a snapshot every so often.")
@click.option(
    "--publish-to", type=click.Path(path_type=Path), help="Folder of the snapshots; serve its link `current`."
)
@click.option("--name", help="Name of the snapshots in the service.  [default: the feature spec's]")
@click.option(
    "--sign-key",
    type=click.Path(path_type=Path),
    envvar="LAZYDP_SIGN_KEY_FILE",
    help="File of an Ed25519 private key, PEM, to sign the snapshots with.  [default: LAZYDP_SIGN_KEY_FILE]",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    metavar="N",
    help="Train on N ranks of this machine, each a process with a part of the tables; needs `distributed` in --config.",
)
@click.option("--resume", is_flag=True, help="Go on with the run (or sweep) in --out, if it holds one.")
@click.option("--test-key", type=int, metavar="SEED", help="A known noise key: for tests; the model is NOT private.")
def command(
    dataset: str,
    config: Path,
    out: Path,
    ledger: str | None,
    mode: str | None,
    device: str | None,
    table_device: str | None,
    tune: Path | None,
    publish_every: int | None,
    publish_to: Path | None,
    name: str | None,
    sign_key: Path | None,
    workers: int | None,
    resume: bool,
    test_key: int | None,
) -> None:
    """Train a recommender with differential privacy.

    The budget is reserved in the ledger before the first step. The run's folder holds its checkpoints and the noise
    key: keep it where the data is. Interrupt it at any moment and go on with --resume, to the same bits.

    With `popularity` in the configuration the release carries noised counts of the items too, charged with the run:
    from them the service answers those whom the model does not know.

    With --publish-every the model is released as a bundle while training goes on. All snapshots and the final model are
    charged once, as one run; the service picks up each new one.

    With --workers, or started by torchrun on several machines, ranks train one model together (docs/distributed.md).
    """
    from lazydp.components.train.config import TrainConfig
    from lazydp.components.train.ranks.launch import launched
    from lazydp.kernels.noise_key import NoiseKey

    if name is not None and publish_to is None:
        raise click.UsageError("--name is that of the snapshots: say where they go with --publish-to")
    if tune is not None and publish_to is not None:
        raise click.UsageError("--tune releases nothing while it runs: leave out --publish-to")
    if tune is not None and (workers is not None or launched()):
        raise click.UsageError("--tune trains its trials one after the other, in one process: leave out the ranks")
    settings = TrainConfig.load(config)
    given = {"mode": mode, "device": device, "table_device": table_device, "publish_every": publish_every}
    changes = {name: value for name, value in given.items() if value is not None}
    if changes:
        settings = settings.with_changes(**changes)
    if tune is not None:
        _tune(dataset, settings, tune, out=out, ledger=ledger, resume=resume, test_key=test_key)
        return
    if workers is not None and workers > 1 and not launched():
        from lazydp.components.train.ranks.launch import start_ranks
        from lazydp.components.train.run.begun import refuse_number_of_ranks

        refuse_number_of_ranks(workers, settings)
        start_ranks(workers, sys.argv[1:], restarts=_RESTARTS if resume else 0)
    from lazydp.components.export.publish import Snapshots
    from lazydp.components.train.ranks.process_group import joined
    from lazydp.components.train.run.train import train

    with joined() as ranks:
        if ranks.rank:
            logging.getLogger("lazydp").setLevel(logging.WARNING)  # rank 0 says the rest
        run = train(
            dataset=local_dataset(dataset),
            config=settings,
            out=out,
            ledger=ledger,
            resume=resume,
            key=NoiseKey.for_tests(test_key) if test_key is not None else None,
            publish=Snapshots(publish_to, ledger, name, sign_key).release if publish_to is not None else None,
            ranks=ranks,
        )
        first = not ranks.rank
    if first:
        click.echo(f"run {run.identity.run_id}: {run.step} steps done")
        click.echo(f"release it with `{_export(run.folder, dataset, ledger)}`")


def _tune(
    dataset: str,
    settings: TrainConfig,
    file: Path,
    *,
    out: Path,
    ledger: str | None,
    resume: bool,
    test_key: int | None,
) -> None:
    from lazydp.components.tune.sweep import Sweep
    from lazydp.components.tune.tune import tune

    found = tune(
        dataset=local_dataset(dataset),
        config=settings,
        sweep=Sweep.load(file),
        out=out,
        ledger=ledger,
        resume=resume,
        test_key=test_key,
    )
    # The best trial's settings and score are what the sweep releases; how many others there were is not.
    click.echo(f"sweep {found.run_id}: best of its trials, score {found.score:.6g}, settings {found.settings}")
    click.echo(f"release it with `{_export(found.folder, dataset, ledger)}`")


def _export(run: Path, dataset: str, ledger: str | None) -> str:
    """The command that releases a run, to be pasted."""
    from lazydp.components.ingest.locations import shown

    words = ["lazydp", "export", "--run", str(run), "--dataset", shown(dataset), "--out", "bundle"]
    # From the environment it reaches the next command too, and a URL may hold a password.
    if ledger is not None and ledger != os.environ.get("LAZYDP_LEDGER"):
        words += ["--ledger", "URL" if "@" in ledger else ledger]
    return shlex.join(words)
