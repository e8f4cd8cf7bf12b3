"""The command `lazydp`, killed where it is told to be: run by test_killed_commands.py, as a program or in a fork.

The product has no hook for this: the functions between which a kill may fall are wrapped here, from outside, and each
call passes two points, before and after. A point has a name and a number (the how-manieth of that name), so that a
checkpoint written in the background doesn't move the others.

`GIVEN` (a global of a fork, or the program's argument as JSON) holds: `arguments` of the command, `kill_at` (a point or
empty), `trace` (a file that gets a line a point), `output` (a file for stdout and stderr), `database` (what ails it).
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
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
    seen: Counter[str] = Counter()

    def point(name: str) -> None:
        seen[name] += 1
        passed = f"{name} {seen[name]}"
        with Path(given["trace"]).open("a") as trace:
            trace.write(passed + "\n")
        if passed == given["kill_at"]:
            os.kill(os.getpid(), signal.SIGKILL)

    for owner, name in STEPS:
        setattr(owner, name, _between(getattr(owner, name), name, point))
    if given["database"] == "locked":
        sql_storage.LOCK_SECONDS = 1  # type: ignore[attr-defined]
    if given["database"] == "full":
        sa.event.listen(sa.Engine, "connect", _no_room)
    main(given["arguments"])


def _between(original: Callable[..., Any], name: str, point: Callable[[str], None]) -> Callable[..., Any]:
    def wrapped(*arguments: Any, **named: Any) -> Any:
        point(f"before {name}")
        result = original(*arguments, **named)
        point(f"after {name}")
        return result

    return wrapped


def _no_room(connection: Any, _record: object) -> None:
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count={pages}")


if __name__ == "__main__":
    run(globals().get("GIVEN") or json.loads(sys.argv[1]))
