"""Whole runs on another device, simulated: train, be killed, resume, publish, release."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from lazydp.components.export.export import export
from lazydp.components.export.publish import Snapshots
from lazydp.components.shared.errors import InputError
from lazydp.components.train.engine.step import Engine
from lazydp.components.train.run.folder import RunFolder
from lazydp.components.train.run.train import train
from lazydp.kernels.noise_key import NoiseKey

pytestmark = pytest.mark.usefixtures("one_thread", "simulated_gpu")

PLACEMENTS = {"on the GPU": ("cuda", None), "tables in host memory": ("cuda", "cpu")}


def killed_at(stop: int, step: Any) -> Any:
    def killed(engine: Engine, examples: Any) -> Any:
        if engine.steps_done == stop:
            raise KeyboardInterrupt
        return step(engine, examples)

    return killed


@pytest.mark.parametrize("place", PLACEMENTS)
def test_a_run_trains_resumes_and_is_released(
    tiny: Any, tmp_path: Path, place: str, assert_close_weights: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, table_device = PLACEMENTS[place]
    where = {"device": device, "table_device": table_device}
    given = {"dataset": tiny.dataset, "ledger": tiny.ledger()}
    weights = {}
    for name, config in (("cpu", tiny.config()), ("gpu", tiny.config(**where)), ("parts", tiny.config(**where))):
        run = {**given, "config": config, "out": tmp_path / name, "key": NoiseKey.for_tests(3)}
        if name == "parts":
            monkeypatch.setattr(Engine, "step", killed_at(17, Engine.step))
            with pytest.raises(KeyboardInterrupt):
                train(**run)
            monkeypatch.undo()
        train(**run, resume=name == "parts")
        with RunFolder.locked(tmp_path / name) as folder:
            checkpoint = folder.latest()
        assert checkpoint is not None
        embeddings, dense = checkpoint.state["embeddings"]["tables"], checkpoint.state["dense"]["model"]
        weights[name] = dense | {table: state["weight"] for table, state in embeddings.items()}
    assert all(torch.equal(weights["parts"][name], value) for name, value in weights["gpu"].items())
    assert_close_weights(weights["gpu"], weights["cpu"])
    manifest = export(run=tmp_path / "gpu", dataset=tiny.dataset, out=tmp_path / "bundle", ledger=given["ledger"])
    assert manifest.step == 30


def test_a_run_on_the_gpu_releases_snapshots(tiny: Any, tmp_path: Path) -> None:
    ledger = tiny.ledger()
    train(
        dataset=tiny.dataset,
        config=tiny.config(device="cuda", publish_every=10),
        out=tmp_path / "run",
        ledger=ledger,
        publish=Snapshots(tmp_path / "snapshots", ledger).release,
    )
    assert [folder.name for folder in sorted((tmp_path / "snapshots").glob("step-*"))] == [
        "step-000000010",
        "step-000000020",
    ]


def test_a_run_that_goes_on_elsewhere_says_so(tiny: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    given = {"dataset": tiny.dataset, "ledger": tiny.ledger()}
    train(**given, config=tiny.config(device="cuda", table_device="cpu"), out=tmp_path / "run")
    caplog.clear()
    train(**given, config=tiny.config(device="cuda", table_device="cpu"), out=tmp_path / "run", resume=True)
    assert "rounded" not in caplog.text
    with caplog.at_level(logging.WARNING):
        assert train(**given, config=tiny.config(), out=tmp_path / "run", resume=True).step == 30
    assert "was computed with device cuda, table_device cpu, processor torch" in caplog.text
    assert "it would go on with device cpu, table_device cpu, processor torch" in caplog.text
    publish = Snapshots(tmp_path / "snapshots", given["ledger"]).release
    train(**given, config=tiny.config(publish_every=10), out=tmp_path / "published", publish=publish)
    elsewhere = tiny.config(publish_every=10, device="cuda")
    with pytest.raises(InputError, match="releases snapshots goes on where it began"):
        train(**given, config=elsewhere, out=tmp_path / "published", publish=publish, resume=True)
