"""The command `lazydp`, killed where it is told to be: run by test_killed_commands.py, as a program or in a fork.

The functions between which a kill may fall are wrapped from outside (`support.kill_points`).

`GIVEN` (a global of a fork, or the program's argument as JSON) holds: `arguments` of the command, `kill_at` (a point or
empty), `trace` (a file that gets a line a point), `output` (a file for stdout and stderr), `database` (what ails it).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import torch

from lazydp.components.budget.storage import sql as sql_storage
from lazydp.components.bundle.manifest import BundleManifest
from lazydp.components.export import export
from lazydp.components.train.engine.step import Engine
from lazydp.components.train.run import checkpoint, train
from lazydp.components.train.run.folder import RunFolder
from lazydp.components.train.tables.embedding_tables import EmbeddingTables
from lazydp.kernels.noise_key import NoiseKey
from lazydp.pipelines.cli import main
from support.kill_points import KillPoints

STEPS: list[tuple[Any, str]] = [
    (RunFolder, "begin"),
    (sql_storage.SqlTransaction, "append"),  # within the database's transaction
    (train, "reserve"),
    (RunFolder, "save"),
    (Path, "rename"),  # what makes a checkpoint and a bundle appear
    (Engine, "step"),
    (NoiseKey, "destroy"),  # the key in memory, at the end of training
    (EmbeddingTables, "flush"),
    (export, "prove_flushed"),
    (export, "write_bundle"),
    (BundleManifest, "save"),
    (export, "commit"),
    (export, "write_json"),
    (checkpoint, "destroy_file"),  # a key on disk
]


def run(given: dict[str, Any]) -> None:
    """Run the command with every point armed."""
    torch.set_num_threads(1)
    output = os.open(given["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    points = KillPoints(given["kill_at"], Path(given["trace"]))
    for owner, name in STEPS:
        points.wrap(owner, name)
    if given["database"] == "locked":
        sql_storage.LOCK_SECONDS = 1  # type: ignore[attr-defined]
    if given["database"] == "full":
        sa.event.listen(sa.Engine, "connect", _no_room)
    main(given["arguments"])


def _no_room(connection: Any, _record: object) -> None:
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count={pages}")


if __name__ == "__main__":
    run(globals().get("GIVEN") or json.loads(sys.argv[1]))
