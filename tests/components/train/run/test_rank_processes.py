"""Ranks as processes that speak through gloo: killed anywhere, they go on to the same bits, charged once."""

from __future__ import annotations

import random
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lazydp.components.budget.ledger.ledger import Ledger
from lazydp.components.train.run.folder import RunFolder
from lazydp.components.train.run.train import train
from lazydp.kernels.noise_key import NoiseKey
from support.forks import Fork

PROGRAM = Path(__file__).with_name("rank.py")
SETTINGS: dict[str, Any] = {
    "steps": 4,
    "checkpoint_every": 2,
    "distributed": {"lanes": 2},
    "embeddings": {"learning_rate": 1.0, "momentum": 0.5},
}
WAIT = 60.0


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@dataclass
class Job:
    """A run on two processes."""

    tiny: Any
    folder: Path
    ledger: str

    def start(self, *, kill_at: tuple[int, str] = (0, ""), wait: float = WAIT, lags: tuple[int, int] = (0, 0)) -> Any:
        """Start both ranks, and let them end; their statuses and what they said."""
        port = free_port()
        forks = []
        for rank in (0, 1):
            given = {
                "rank": rank,
                "ranks": 2,
                "port": port,
                "dataset": str(self.tiny.dataset),
                "config": self.tiny.config(**SETTINGS).model_dump(mode="json"),
                "folder": str(self.folder),
                "ledger": self.ledger,
                "kill_at": kill_at[1] if kill_at[0] == rank else "",
                "trace": str(self.folder / f"trace {rank}"),
                "wait": wait,
                "lags": lags[1] if lags[0] == rank else 0,
            }
            output = tuple(self.folder / f"{name} {rank}" for name in ("stdout", "stderr"))
            forks.append(Fork(PROGRAM, given={"GIVEN": given}, output=output))  # type: ignore[arg-type]
        statuses = [fork.wait(180.0) for fork in forks]
        return statuses, [(self.folder / f"stderr {rank}").read_text() for rank in (0, 1)]

    def points(self, rank: int) -> list[str]:
        return (self.folder / f"trace {rank}").read_text().splitlines()

    def tensors(self) -> dict[str, Tensor]:
        with RunFolder.locked(self.folder / "run") as folder:
            found = folder.latest()
        assert found is not None
        assert found.step == SETTINGS["steps"]
        return tensors(found.state)

    def assert_charged_once(self) -> None:
        with Ledger.open(self.ledger) as ledger:
            assert [(run.run_id, run.status) for run in ledger.runs()] == [("mine", "reserved")]


def tensors(state: Any, name: str = "") -> dict[str, Tensor]:
    if isinstance(state, Tensor):
        return {name: state}
    pairs = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    return {key: value for part, node in pairs for key, value in tensors(node, f"{name}/{part}").items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.fixture
def job(tiny: Any, tmp_path: Path) -> Job:
    return Job(tiny, tmp_path, tiny.ledger())


def expected(job: Job) -> dict[str, Tensor]:
    """What one process comes to, in a folder and a ledger of its own."""
    alone = job.folder / "alone"
    alone.mkdir()
    other = Job(type(job.tiny)(job.tiny.dataset, alone), alone, "")
    other.ledger = other.tiny.ledger()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(
        dataset=job.tiny.dataset,
        config=job.tiny.config(**SETTINGS),
        out=alone / "run",
        ledger=other.ledger,
        run_id="mine",
        key=NoiseKey.for_tests(11),
    )
    torch.set_num_threads(threads)
    return other.tensors()


def test_a_killed_rank_ends_the_job_which_goes_on_to_the_bits_of_one_process(job: Job) -> None:
    wanted = expected(job)
    statuses, said = job.start(kill_at=(1, "before exchange gradients 3"))
    assert statuses == [1, -9]
    assert "UnavailableError: rank 0 of 2 cannot go on" in said[0]
    assert "another rank ended" in said[0]
    statuses, said = job.start()
    assert statuses == [0, 0], said
    assert_equal(job.tensors(), wanted)
    job.assert_charged_once()


@pytest.mark.slow
def test_a_rank_that_lags_is_waited_for_and_then_ends_the_job(job: Job) -> None:
    statuses, said = job.start(wait=10.0, lags=(1, 3))
    assert statuses[0] == 1
    assert "cannot go on" in said[0]
    with RunFolder.locked(job.folder / "run") as folder:
        found = folder.latest()
    assert found is not None
    assert found.step == 2
    job.assert_charged_once()


@pytest.mark.slow
def test_any_kill_ends_in_the_same_bits_and_one_charge(job: Job) -> None:
    """Sixty kills, drawn from all points of both ranks; every one falls, and every job comes to the same end."""
    wanted = expected(job)
    statuses, said = job.start()
    assert statuses == [0, 0], said
    points = [(rank, point) for rank in (0, 1) for point in job.points(rank)]
    kinds = {point.rsplit(" ", 1)[0] for _, point in points}
    assert {"before rename", "after rename", "before exchange ids", "after gather dense sums"} <= kinds
    drawn = random.Random(1).sample(points, 60)
    for number, kill_at in enumerate(drawn):
        folder = job.folder / f"killed {number}"
        folder.mkdir()
        killed = Job(type(job.tiny)(job.tiny.dataset, folder), folder, "")
        killed.ledger = killed.tiny.ledger()
        statuses, _ = killed.start(kill_at=kill_at)
        assert statuses[kill_at[0]] == -9, kill_at
        statuses, said = killed.start()
        assert statuses == [0, 0], (kill_at, said)
        assert_equal(killed.tensors(), wanted)
        killed.assert_charged_once()
        shutil.rmtree(folder)
