"""Disks that are full or fail, below ingest, training, export and the service: nothing is lost, nothing half-written.

What is durable is synced first, so a disk that fails at the n-th sync, for every n, fails between every two durable
writes. That of the ledger's own database is in tests/components/budget/storage.
"""

from __future__ import annotations

import errno
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from lazydp.components.budget.ledger.ledger import Ledger
from lazydp.components.bundle import inventory, tensors
from lazydp.components.bundle.manifest import BundleManifest
from lazydp.components.bundle.reader import Bundle
from lazydp.components.export.export import export
from lazydp.components.ingest.ingest import ingest
from lazydp.components.shared.errors import UnavailableError
from lazydp.components.train.run.train import train
from lazydp.service.serving import private_copy
from support.service import running
from support.service_load import eventually, point
from support.tiny import TINY_SPEC, write_interactions


@contextmanager
def failing_at(number: int) -> Iterator[list[int]]:
    """The disk is full at the `number`-th sync of this process, and at every later one; yields how many there were."""
    syncs: list[int] = []
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        syncs.append(descriptor)
        if len(syncs) >= number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        yield syncs


def until_it_succeeds(attempt: Callable[[], object], after_failure: Callable[[], object], *, stride: int) -> int:
    """Make the disk fail ever later, by `stride` syncs, until the command succeeds; how often it failed."""
    told: list[str] = []
    for number in itertools.count(1, stride):
        assert number < 200
        with failing_at(number) as syncs:
            try:
                attempt()
            except (OSError, UnavailableError) as error:
                told.append(str(error))
            else:
                assert len(syncs) < number, "a failed sync went unnoticed"
                break
        after_failure()
    assert all("No space left" in text for text in told)
    return len(told)


def statuses(folder: Path) -> list[str]:
    with Ledger.open(f"sqlite:///{folder / 'ledger.db'}") as ledger:
        return [run.status for run in ledger.runs()]


@pytest.mark.parametrize("stride", [pytest.param(1, marks=pytest.mark.slow), 9])
def test_a_disk_full_in_training_and_export(tiny: Any, stride: int) -> None:
    url = tiny.ledger()
    run, bundle = tiny.folder / "run", tiny.folder / "bundle"
    settings = tiny.config(steps=3, checkpoint_every=2)

    def training() -> None:
        train(dataset=tiny.dataset, config=settings, out=run, ledger=url, resume=True)

    def exporting() -> None:
        export(run=run, dataset=tiny.dataset, out=bundle, ledger=url)

    def unreleased() -> None:
        assert not bundle.exists() or statuses(tiny.folder) == ["committed"]

    assert until_it_succeeds(training, lambda: None, stride=stride) > 1
    assert statuses(tiny.folder) == ["reserved"]
    assert until_it_succeeds(exporting, unreleased, stride=stride) > 1
    assert Bundle.open(bundle).statement.private
    assert statuses(tiny.folder) == ["committed"]
    with Ledger.open(url) as ledger:
        kinds = [entry.kind for entry in ledger.entries()]
    assert kinds.count("reserved") == kinds.count("committed") == 1
    assert not list(run.rglob("noise.key"))
    assert not list(tiny.folder.glob(".*"))


def test_a_disk_full_of_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def full(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(tensors, "save_file", full)
    with pytest.raises(UnavailableError, match=r"cannot be written: .*No space left"):
        tensors.write(tmp_path / "a.safetensors", {"a": torch.zeros(3)})


def test_a_disk_full_in_ingest(tmp_path: Path) -> None:
    write_interactions(tmp_path / "log.parquet")
    (tmp_path / "spec.yaml").write_text(TINY_SPEC)

    def ingesting() -> None:
        ingest([str(tmp_path / "log.parquet")], str(tmp_path / "spec.yaml"), tmp_path / "dataset")

    def nothing_left() -> None:
        assert {path.name for path in tmp_path.iterdir()} <= {"log.parquet", "spec.yaml"}

    for number in (1, 2, 5, 9):
        with failing_at(number), pytest.raises(OSError, match="No space left"):
            ingesting()
        nothing_left()
    ingesting()
    assert (tmp_path / "dataset").is_dir()


def version_of(client: Any) -> str:
    return str(client.get("/v1/models").json()["models"][0]["version"])


def refused(client: Any) -> str:
    return client.get("/v1/models").json()["models"][0]["refused"] or ""


def test_no_room_for_the_copy_of_a_new_version(
    bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = tmp_path / "current"
    link.symlink_to(bundles["towers"])
    with running(link, poll_s=0.02, copy_folder=tmp_path) as client:
        first = version_of(client)
        with monkeypatch.context() as patch:
            patch.setattr(private_copy.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))  # type: ignore[attr-defined]
            point(link, bundles["newer"])
            eventually(lambda: "are free" in refused(client))
            assert version_of(client) == first
            assert client.get("/v1/users/7/recommendations").status_code == 200
        eventually(lambda: version_of(client) != first)
        assert [path.name for path in tmp_path.iterdir()] == ["current"]


def test_a_version_that_cannot_be_read(
    bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = tmp_path / "current"
    link.symlink_to(bundles["towers"])
    with running(link, poll_s=0.02) as client:
        first = version_of(client)
        with monkeypatch.context() as patch:
            patch.setattr(inventory, "sha256_file", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error")))
            point(link, bundles["newer"])
            eventually(lambda: "OSError" in refused(client))
            assert version_of(client) == first
            assert client.get("/v1/users/7/recommendations").status_code == 200
        eventually(lambda: version_of(client) == BundleManifest.load(bundles["newer"]).version)
