"""A service over bundles of untrained models, for the conftest.py of a folder to import."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from lazydp.components.bundle.untrained import write_untrained
from support.service import Start, running


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bundles by kind: a two-tower, one with popularity, a DLRM, and another version of the first."""
    folder = tmp_path_factory.mktemp("bundles")
    write_untrained(folder / "towers", num_items=60)
    write_untrained(folder / "popular", num_items=60, popularity=True, name="popular")
    write_untrained(folder / "dlrm", kind="dlrm", num_items=60, name="dlrm")
    write_untrained(folder / "newer", num_items=60, seed=1)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="session")
def start() -> Start:
    """Start a service."""
    return running


@pytest.fixture(scope="session")
def client(bundles: dict[str, Path]) -> Iterator[httpx.Client]:
    """One service for tests that change nothing."""
    with running(bundles["towers"], bundles["popular"], bundles["dlrm"]) as client:
        yield client
