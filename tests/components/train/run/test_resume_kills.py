"""`kill -9` at any moment, resume, and the run ends in the bits of an undisturbed one.

A kill counts where it was one: the process died of it, after its first step and before its last. Every killed run is
resumed to its end, and every bit of the state compared, of each by itself.
"""

from __future__ import annotations

import dataclasses
import random
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from lazydp.components.bundle.manifest import BundleManifest
from lazydp.components.train.run import train as module
from lazydp.components.train.run.folder import RunFolder
from lazydp.components.train.run.train import train
from lazydp.kernels.noise_key import NoiseKey
from support.forks import Fork

PROGRAM = Path(__file__).with_name("resumed_run.py")
STEPS = 24
# Checkpoints so often that a kill often falls into the writing of one.
SETTINGS: dict[str, Any] = {"steps": STEPS, "checkpoint_every": 2, "target_delta": 1e-5}
MOMENTUM = {"embeddings": {"learning_rate": 1.0, "momentum": 0.5, "weight_decay": 0.01}}
# At this rate one float32 would round noise away: weights and velocities have two.
TWO_FLOATS = {"embeddings": {**MOMENTUM["embeddings"], "learning_rate": 1e-4}}
USERS = {
    "privacy_unit": "user",
    "sampling": "user",
    "user_gradient": "mean",
    "sampling_prob": 0.2,
    "expected_batch_size": 12,
    "max_grad_norm": {"dense": 0.2, "embeddings": 0.5},
}
VARIATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": MOMENTUM,
    "two floats": TWO_FLOATS,
    "users": USERS,
    "micro-batches": {"micro_batch_size": 7},
    "publishing": {"publish_every": 8, "popularity": {"noise_multiplier": 3.0}},
    "all of them": {
        **TWO_FLOATS,
        **USERS,
        "micro_batch_size": 40,
        "publish_every": 10,
        "popularity": {"noise_multiplier": 3.0},
    },
}


@dataclass(frozen=True)
class Outcome:
    """How a run ended: every leaf of its state by name, and the version (a digest) of each snapshot."""

    leaves: dict[str, Any]
    snapshots: dict[str, str]

    def differences(self, other: Outcome) -> list[str]:
        """Names of what is not the same to the last bit."""
        names = self.leaves.keys() | other.leaves.keys()
        found = [name for name in sorted(names) if not same(self.leaves.get(name), other.leaves.get(name))]
        return found + (["snapshots"] if self.snapshots != other.snapshots else [])


def same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
        return ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    return type(ours) is type(theirs) and bool(ours == theirs)


def leaves_of(node: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(node, dict | list):
        return {name: node}
    pairs = node.items() if isinstance(node, dict) else enumerate(node)
    return {key: leaf for part, inner in pairs for key, leaf in leaves_of(inner, f"{name}/{part}").items()}


class Runs:
    """Copies of one run that stands at step 0 with its key drawn and its budget reserved."""

    def __init__(self, tiny: Any, folder: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder = folder
        self._base = folder / "base"
        self._base.mkdir(parents=True)
        self._config = tiny.config(**SETTINGS, **settings)
        self._dataset = tiny.dataset
        self._dice = random.Random(5)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # a run that releases snapshots goes on with as many threads as it began with
        with monkeypatch.context() as patch:
            patch.setattr(module, "_loop", lambda *arguments: None)
            train(
                dataset=tiny.dataset,
                config=self._config,
                out=self._base / "run",
                ledger=dataclasses.replace(tiny, folder=self._base).ledger(privacy_unit=self._config.privacy_unit),
                key=NoiseKey.for_tests(21),
                publish=None if self._config.publish_every is None else lambda *arguments, **named: None,
            )
        torch.set_num_threads(threads)
        undisturbed = self.copy(self._base, "undisturbed")
        process = self.start(undisturbed)
        self._wait_for_step(undisturbed, process)
        began = time.monotonic()
        assert process.wait() == 0
        self._took = time.monotonic() - began
        self.expected = self.outcome(undisturbed)

    def copy(self, folder: Path, name: str) -> Path:
        return Path(shutil.copytree(folder, self._folder / name, symlinks=True))

    def start(self, folder: Path, *, forgets: str = "") -> Fork:
        given = {
            "dataset": str(self._dataset),
            "config": self._config.model_dump(mode="json"),
            "folder": str(folder),
            "forgets": forgets,
        }
        return Fork(PROGRAM, given={"GIVEN": given})  # at once: most of its life is training

    def step(self, folder: Path) -> int:
        """The step of the latest checkpoint that has its name."""
        steps = [int(path.name.rpartition("-")[2]) for path in (folder / "run" / "checkpoints").glob("step-*")]
        return max(steps)

    def _wait_for_step(self, folder: Path, process: Fork) -> None:
        while process.poll() is None and self.step(folder) == 0:
            time.sleep(0.001)

    def killed(self, name: str) -> Path:
        """A copy that was killed at a random moment after its first checkpoint and before its last."""
        for _ in range(50):
            folder = self.copy(self._base, name)
            process = self.start(folder)
            self._wait_for_step(folder, process)
            time.sleep(self._dice.uniform(0.0, 1.0) * self._took)
            process.kill()
            if process.wait() == -signal.SIGKILL and 0 < self.step(folder) < STEPS:
                return folder
            shutil.rmtree(folder)
        raise AssertionError("in fifty attempts no kill fell between the first step and the last")

    def finish(self, folder: Path, *, forgets: str = "") -> Outcome:
        assert self.start(folder, forgets=forgets).wait() == 0
        return self.outcome(folder)

    def outcome(self, folder: Path) -> Outcome:
        with RunFolder.locked(folder / "run") as held:
            found = held.latest()
        assert found is not None
        assert found.step == STEPS
        checkpoints = sorted(path.name for path in (folder / "run" / "checkpoints").iterdir())
        assert checkpoints == [f"step-{step:09d}" for step in (STEPS - 2, STEPS)]
        snapshots = {path.name: BundleManifest.load(path).version for path in (folder / "snapshots").glob("step-*")}
        assert not list((folder / "snapshots").glob(".*"))
        return Outcome(leaves_of(found.state), snapshots)


@dataclass
class Kills:
    """What the kills of a test hit."""

    number: int = 0
    torn: int = 0  # a checkpoint was being written
    unpublished: int = 0  # a snapshot was being written

    def kill_and_compare(self, runs: Runs) -> None:
        """Kill one more run, resume it to its end, and compare every bit."""
        folder = runs.killed(f"killed-{self.number}")
        self.number += 1
        self.torn += bool(list((folder / "run" / "checkpoints").glob(".*")))
        self.unpublished += bool(list((folder / "snapshots").glob(".*")))
        step = runs.step(folder)
        assert runs.finish(folder).differences(runs.expected) == [], f"killed after the checkpoint of step {step}"
        shutil.rmtree(folder)


def check_that_bugs_are_seen(runs: Runs, forgotten: list[str]) -> None:
    """The control: the same kill and the same comparison, of a run that does not restore a part of its state."""
    folder = runs.killed("to be resumed wrongly")
    for part in forgotten:
        wrong = runs.finish(runs.copy(folder, f"without {part}"), forgets=part).differences(runs.expected)
        assert any(name.endswith("/weight") for name in wrong), part
    assert runs.finish(folder).differences(runs.expected) == []


def test_a_few_random_kills(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, kills = Runs(tiny, tmp_path, VARIATIONS["all of them"], monkeypatch), Kills()
    assert len(runs.expected.snapshots) == 2
    for part in ("rest", "momentum_rest"):
        seconds = [leaf for name, leaf in runs.expected.leaves.items() if name.endswith(f"/{part}")]
        assert seconds
        assert all(bool(leaf.any()) for leaf in seconds)
    kills.kill_and_compare(runs)
    check_that_bugs_are_seen(runs, ["last", "momentum", "rest"])  # and one kill more


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIATIONS)
def test_a_hundred_random_kills(name: str, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its share of them, and more until some have left a checkpoint, and a snapshot, half written."""
    share = -(-100 // len(VARIATIONS))
    settings = VARIATIONS[name]
    publishes = "publish_every" in settings
    runs, kills = Runs(tiny, tmp_path, settings, monkeypatch), Kills()
    assert len(runs.expected.snapshots) == (2 if publishes else 0)
    while kills.number < share or not kills.torn or (publishes and not kills.unpublished):
        assert kills.number < 60, f"sixty kills, and none fell where it hurts most: {kills}"
        kills.kill_and_compare(runs)
    check_that_bugs_are_seen(runs, ["last", "momentum"] if "embeddings" in settings else ["last"])
