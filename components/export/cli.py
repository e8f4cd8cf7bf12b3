"""`lazydp export`."""

from __future__ import annotations

from pathlib import Path

import click

from lazydp.components.ingest.dataset_option import local_dataset
from lazydp.components.shared.ledger_url import LEDGER


@click.command(name="export", epilog="Example: lazydp export --run out/run --dataset out/dataset --out out/bundle")
@click.option("--run", type=click.Path(path_type=Path), required=True, help="The run's folder, from `lazydp train`.")
@click.option("--dataset", metavar="URI", required=True, help="The dataset it was trained on.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Where the bundle goes; must not exist.")
@click.option("--name", help="Name of the model in the service.  [default: the feature spec's]")
@LEDGER
@click.option("--audit", type=click.Path(path_type=Path), help="Audit of the run's configuration, for its statement.")
@click.option("--link", type=click.Path(path_type=Path), help="Point this link at it too: what `lazydp serve` watches.")
@click.option("--allow-non-private", is_flag=True, help="Release a run of mode sgd too, marked as not private.")
@click.option(
    "--sign-key",
    type=click.Path(path_type=Path),
    envvar="LAZYDP_SIGN_KEY_FILE",
    help="File of an Ed25519 private key, PEM, to sign the bundle with.  [default: LAZYDP_SIGN_KEY_FILE]",
)
def command(
    run: Path,
    dataset: str,
    out: Path,
    name: str | None,
    ledger: str | None,
    audit: Path | None,
    link: Path | None,
    allow_non_private: bool,
    sign_key: Path | None,
) -> None:
    """Release a finished run: flush, prove that no row has pending noise, commit the budget, destroy the noise key.

    Afterwards the run can neither be resumed nor exported again. Interrupted at any moment, the same command finishes.
    """
    from lazydp.components.bundle.reader import Bundle
    from lazydp.components.export.export import export
    from lazydp.components.export.publish import point

    manifest = export(
        run=run,
        dataset=local_dataset(dataset),
        out=out,
        name=name,
        ledger=ledger,
        audit=audit,
        allow_non_private=allow_non_private,
        sign_key=sign_key,
    )
    if link is not None:
        point(link, out)
    click.echo(f"bundle {out}: {manifest.name}, version {manifest.version}")
    statement = Bundle.open(out, verify=False, allow_test_key=True, allow_non_private=True).statement
    click.echo(statement.line())
