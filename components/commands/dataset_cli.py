"""`lazydp dataset show`."""

from __future__ import annotations

from pathlib import Path

import click

from lazydp.components.ingest.dataset_option import local_dataset


@click.group(name="dataset")
def command() -> None:
    """Look into an encoded dataset. Everything shown is private."""


@command.command(name="show", epilog="Example: lazydp dataset show out/dataset --html profile.html")
@click.argument("dataset")
@click.option("--html", "page", type=click.Path(path_type=Path, dir_okay=False), help="Write it as a page, too.")
def show(dataset: str, page: Path | None) -> None:
    """Show a private profile: counts, rows left out, sparsity, popularity, and what other bounds would keep."""
    from lazydp.components.ingest.dataset import EncodedDataset
    from lazydp.components.ingest.profile import as_html, as_text, profile
    from lazydp.components.shared.files import PRIVATE_FILE, write_bytes

    data = EncodedDataset.open(local_dataset(dataset), verify=False)
    sections = profile(data)
    click.echo(as_text(sections, name=data.spec.name))
    if page is not None:
        write_bytes(page, as_html(sections, name=data.spec.name).encode(), mode=PRIVATE_FILE)
        click.echo(f"\nwrote {page} (private)")
