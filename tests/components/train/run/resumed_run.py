"""A run that begins or goes on in a fork: run by test_resume_kills.py, which kills it.

`GIVEN` (a global of the fork) holds what `train` takes, as plain values, and `forgets`: a part of the state that is not
restored from the checkpoint, a bug planted from outside.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lazydp.components.export.publish import Snapshots
from lazydp.components.train.config import TrainConfig
from lazydp.components.train.run.train import train
from lazydp.components.train.tables.embedding_tables import EmbeddingTables


def forget(part: str) -> None:
    """From now on every table's `part` (last, momentum) is that of a fresh run once its state has been loaded."""
    right = EmbeddingTables.load_state_dict

    def loaded(self: EmbeddingTables, state: Any) -> None:
        right(self, state)
        for table in self.state_dict()["tables"].values():
            table[part].zero_()

    EmbeddingTables.load_state_dict = loaded  # type: ignore[method-assign]


def run(given: dict[str, Any]) -> None:
    """Go on with the run to its end."""
    torch.set_num_threads(1)
    if given["forgets"]:
        forget(given["forgets"])
    config = TrainConfig.parse(given["config"], where="test")
    folder = Path(given["folder"])
    ledger = f"sqlite:///{folder / 'ledger.db'}"
    snapshots = Snapshots(folder / "snapshots", ledger) if config.publish_every is not None else None
    train(
        dataset=Path(given["dataset"]),
        config=config,
        out=folder / "run",
        ledger=ledger,
        resume=True,
        publish=snapshots.release if snapshots is not None else None,
    )


if __name__ == "__main__":
    run(globals()["GIVEN"])
