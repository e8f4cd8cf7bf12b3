"""SIGTERM: the run ends after the step under way with a checkpoint, and goes on to the same bits."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from lazydp.components.train.engine.step import Engine
from lazydp.components.train.run.folder import RunFolder
from lazydp.components.train.run.termination import TerminatedError
from lazydp.components.train.run.train import train
from lazydp.kernels.noise_key import NoiseKey


def weights(run: Path) -> dict[str, torch.Tensor]:
    with RunFolder.locked(run) as folder:
        found = folder.latest()
    assert found is not None
    return {name: table["weight"] for name, table in found.state["embeddings"]["tables"].items()}


def test_a_terminated_run_keeps_its_step(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, config = tiny.ledger(), tiny.config(checkpoint_every=1000)
    common = {"dataset": tiny.dataset, "config": config, "ledger": url}
    train(**common, out=tmp_path / "whole", key=NoiseKey.for_tests(11), run_id="whole")
    step = Engine.step

    def terminated(self: Engine, *given: Any) -> Any:
        report = step(self, *given)
        if self.steps_done == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return report

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", terminated)
        with pytest.raises(TerminatedError, match="at step 7 of 30"):
            train(**common, out=tmp_path / "run", key=NoiseKey.for_tests(11), run_id="stopped")
    assert signal.getsignal(signal.SIGTERM) is before, "the signal does what it did before"
    with RunFolder.locked(tmp_path / "run") as folder:
        kept = folder.latest()
    assert kept is not None
    assert kept.step == 7
    assert train(**common, out=tmp_path / "run", resume=True, run_id="stopped").step == 30
    ours, theirs = weights(tmp_path / "run"), weights(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
