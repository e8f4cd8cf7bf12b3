"""A dataset that a command is given by path or URI."""

from __future__ import annotations

from pathlib import Path

import click


def local_dataset(dataset: str) -> Path:
    """The dataset as a folder of this machine until the present command ends; a stored one is copied, privately.

    Raises:
        FormatError: no complete dataset is at the URI.
        UnavailableError: the store does not answer.
    """
    from lazydp.components.ingest.stored import dataset_here  # noqa: PLC0415 - pyarrow is slow to import

    return click.get_current_context().with_resource(dataset_here(dataset))


def local_manifest(dataset: str) -> Path:
    """The manifest of the dataset, likewise; where no URI is given, the file need not be there."""
    if "://" not in dataset:
        return Path(dataset) / "dataset.json"
    from lazydp.components.ingest.stored import manifest_here  # noqa: PLC0415 - pyarrow is slow to import

    return click.get_current_context().with_resource(manifest_here(dataset))
