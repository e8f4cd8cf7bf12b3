"""One rank of a run, as a process of a gloo group: run in a fork by test_rank_processes.py, which kills it.

`GIVEN` (a global of the fork) holds what `train` takes, as plain values; `rank`, `ranks`, `port`; `kill_at` (a point,
or empty) and `trace` (a file that gets a line a point); and `lags` (a step before which the rank sleeps, or 0).
Points lie before and after each collective, by its purpose and number, and before and after the rename of a checkpoint.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from lazydp.components.shared.errors import LazyDPError
from lazydp.components.train.config import TrainConfig
from lazydp.components.train.engine.step import Engine
from lazydp.components.train.ranks.process_group import ProcessGroup, joined
from lazydp.components.train.run.train import train
from lazydp.kernels.noise_key import NoiseKey
from support.kill_points import KillPoints


def arm(given: dict[str, Any]) -> None:
    """Let every point be passed, and one be the last."""
    points = KillPoints(given["kill_at"], Path(given["trace"]))
    for name in ("exchange", "gather", "tell", "check_together"):
        points.wrap(ProcessGroup, name)
    points.wrap(Path, "rename")


def lag(given: dict[str, Any]) -> None:
    """Sleep before a step for longer than the others wait."""
    right = Engine.step

    def step(self: Engine, batch: Any) -> Any:
        if self.steps_done + 1 == given["lags"]:
            time.sleep(given["wait"] + 5)
        return right(self, batch)

    Engine.step = step  # type: ignore[method-assign]


def main(given: dict[str, Any]) -> None:
    """Train; 1 and a line on stderr where lazydp refuses."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(given["rank"]), WORLD_SIZE=str(given["ranks"]))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(given["port"]))
    arm(given)
    if given["lags"]:
        lag(given)
    try:
        with joined(wait_seconds=given["wait"]) as ranks:
            train(
                dataset=Path(given["dataset"]),
                config=TrainConfig.parse(given["config"], where="test"),
                out=Path(given["folder"]) / "run",
                ledger=given["ledger"],
                resume=True,
                run_id="mine",
                key=NoiseKey.for_tests(11),
                ranks=ranks,
            )
    except LazyDPError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # as a process that ends: nothing waits for other ranks


if __name__ == "__main__":
    main(globals()["GIVEN"])
