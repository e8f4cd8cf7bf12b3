"""`kill -9` at any moment, resume, and the run ends in the bits of an undisturbed one."""

import multiprocessing
import random
import shutil
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from lazydp.components.train.checkpoint import Checkpoint, RunFolder
from lazydp.components.train.train import train
from lazydp.kernels.noise_key import NoiseKey

# Checkpoints so often that a kill often falls into the writing of one.
SETTINGS = {"steps": 40, "checkpoint_every": 2}


class Runs:
    """Copies of one run that stands at step 0 with its key drawn and its budget reserved."""

    def __init__(self, tiny: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from lazydp.components.train import train as module

        self._folder = folder
        self._base = folder / "base"
        self._arguments = {"dataset": tiny.dataset, "config": tiny.config(**SETTINGS), "ledger": tiny.ledger()}
        # A server that has everything imported: a child is there in no time, and most of its life is training.
        monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the children's: many small steps beside other processes
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload([module.__name__, "lazydp.components.budget.charges"])
        with monkeypatch.context() as patch:
            patch.setattr(module, "_loop", lambda *arguments: None)
            train(**self._arguments, out=self._base, key=NoiseKey.for_tests(21))

    def copy(self, name: str) -> Path:
        return Path(shutil.copytree(self._base, self._folder / name))

    def start(self, out: Path) -> ForkServerProcess:
        process = self._processes.Process(target=train, kwargs={**self._arguments, "out": out, "resume": True})
        process.start()
        return process

    def finish(self, out: Path) -> Checkpoint:
        process = self.start(out)
        process.join()
        assert process.exitcode == 0
        with RunFolder.locked(out) as folder:
            found = folder.latest()
        assert found is not None
        return found


def tensors(state: Any, name: str = "") -> dict[str, torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return {name: state}
    pairs = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    return {key: value for part, node in pairs for key, value in tensors(node, f"{name}/{part}").items()}


def kill_and_compare(runs: Runs, *, copies: int, kills: int) -> None:
    began = time.monotonic()
    expected = runs.finish(runs.copy("undisturbed"))
    took = time.monotonic() - began
    dice = random.Random(5)
    for number in range(copies):
        out = runs.copy(f"killed-{number}")
        for _ in range(kills):
            process = runs.start(out)
            time.sleep(dice.uniform(0.0, 1.0) * took)
            process.kill()
            process.join()
        found = runs.finish(out)
        assert found.step == expected.step == 40
        ours, theirs = tensors(found.state), tensors(expected.state)
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert torch.equal(tensor, theirs[name]), f"{out}: {name}"
        left = sorted(path.name for path in (out / "checkpoints").iterdir())
        assert left == ["step-000000038", "step-000000040"]


def test_a_few_random_kills(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kill_and_compare(Runs(tiny, tmp_path, monkeypatch), copies=1, kills=3)


@pytest.mark.slow
def test_a_hundred_random_kills(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kill_and_compare(Runs(tiny, tmp_path, monkeypatch), copies=25, kills=4)
