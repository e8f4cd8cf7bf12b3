"""What the pipeline costs over its own commands: `lazydp pipeline run`, beside ingest, budget, train, export, evaluate.

Both do the same work on the same data, each command in a process of its own, interleaved. The difference is what
Kubeflow's local runner adds: its own start, and a process for each task.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from lazydp.components.shared.bench_harness import Contestant, Result, measure
from lazydp.components.shared.errors import LazyDPError

PIPELINE, PLAIN = "pipeline run", "plain commands"
_EPSILON, _DELTA = "1000", "1e-5"


def run(*, sample: Path, scratch: Path, repeats: int) -> list[Result]:
    """Measure both.

    Args:
        sample: what `lazydp sample-data` wrote: interactions, spec and configuration.
        scratch: an empty folder, which is emptied before each run.
        repeats: interleaved rounds.

    Raises:
        LazyDPError: a command failed; its own words.
    """

    def empty() -> None:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()

    contestants = [
        Contestant(name, lambda commands=commands: _all(commands), bytes=0, prepare=empty)  # type: ignore[misc]
        for name, commands in commands_of(sample, scratch).items()
    ]
    size = (sample / "interactions.parquet").stat().st_size
    return measure("pipeline", shape={"bytes": size}, contestants=contestants, repeats=repeats)


def commands_of(sample: Path, out: Path) -> dict[str, list[list[str]]]:
    """The commands of each contestant, in order; what they make goes to `out`."""
    ledger = ["--ledger", f"sqlite:///{out / 'ledger.db'}"]
    data = ["--input", str(sample / "interactions.parquet"), "--spec", str(sample / "spec.yaml")]
    config = ["--config", str(sample / "train.yaml")]
    dataset, trained, bundle = (str(out / name) for name in ("dataset", "run", "bundle"))
    budget = ["--epsilon", _EPSILON, "--delta", _DELTA]
    return {
        PIPELINE: [
            ["pipeline", "run", *data, *config, "--out", str(out / "all"), "--budget-epsilon", _EPSILON, *ledger]
        ],
        PLAIN: [
            ["ingest", *data, "--out", dataset],
            ["budget", "set", "--dataset", dataset, *budget, *ledger],
            ["train", "--dataset", dataset, *config, "--out", trained, *ledger],
            ["export", "--run", trained, "--dataset", dataset, "--out", bundle, *ledger],
            ["evaluate", "--bundle", bundle, "--dataset", dataset],
        ],
    }


def _all(commands: Sequence[Sequence[str]]) -> None:
    for command in commands:
        done = subprocess.run(  # noqa: S603 - our own commands
            [sys.executable, "-m", "lazydp.pipelines.cli", *command],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise LazyDPError(f"`lazydp {' '.join(command)}` failed: {done.stderr.strip()[-500:]}")
