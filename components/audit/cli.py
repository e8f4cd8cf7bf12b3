"""`lazydp audit`."""

from __future__ import annotations

from pathlib import Path

import click

from lazydp.components.ingest.dataset_option import local_dataset


@click.command(
    name="audit",
    epilog="Example: lazydp audit --dataset out/dataset --config examples/sample/train.yaml --out out/audit",
)
@click.option("--dataset", metavar="URI", required=True, help="What `lazydp ingest` wrote.")
@click.option("--config", type=click.Path(path_type=Path), required=True, help="Training configuration to audit, YAML.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the report; private, mode 0700.")
@click.option("--canaries", type=int, default=10_000, show_default=True, help="Coins to toss and guess.")
@click.option("--confidence", type=float, default=0.95, show_default=True, help="Of the lower bound.")
@click.option("--seed", type=int, metavar="SEED", help="Repeat an audit exactly: coins and noise from this number.")
def command(dataset: str, config: Path, out: Path, canaries: int, confidence: float, seed: int | None) -> None:
    """Bound epsilon from below by one training run with canaries.

    Trains as the configuration says, on the dataset and on made-up examples that are each in by the toss of a coin,
    guesses the coins from the model, and throws the model away. Writes audit.json and audit.svg. A lower bound above
    the claimed epsilon means that the training code is wrong: exit status 1.
    """
    from lazydp.components.audit.audit import audit
    from lazydp.components.shared.errors import InputError, PrivacyError
    from lazydp.components.train.config import TrainConfig
    from lazydp.kernels.noise_key import NoiseKey

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} already exists: choose another output folder or remove it first")
    key = NoiseKey.for_tests(seed) if seed is not None else None
    found = audit(
        dataset=local_dataset(dataset),
        config=TrainConfig.load(config),
        canaries=canaries,
        confidence=confidence,
        key=key,
    )
    found.write(out)
    for line in found.report.lines():
        click.echo(line)
    click.echo(f"report       {out} (private, like the run it audits)")
    if found.report.fault is not None:
        raise PrivacyError(found.report.fault)
