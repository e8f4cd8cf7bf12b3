"""A run from reservation to release, killed where it is told to be: run by test_killed.py as a program.

    reserve -> train -> stage -> commit -> publish

`KILL_AT=n` sends SIGKILL at the n-th of the points between the steps and inside the two writes to the ledger.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from lazydp.components.budget.accounting.events import dpsgd_event
from lazydp.components.budget.ledger.ledger import Ledger
from lazydp.components.budget.storage import sql as sql_storage

_passed = 0


def point() -> None:
    """A place to die."""
    global _passed  # noqa: PLW0603 - a program of one run
    _passed += 1
    if _passed == int(os.environ.get("KILL_AT", "0")):
        os.kill(os.getpid(), signal.SIGKILL)


def main(url: str, folder: Path) -> None:
    event = dpsgd_event(noise_multiplier=10.0, sampling_prob=1.0, steps=1)
    append = sql_storage.SqlTransaction.append

    def append_and_perhaps_die(self: sql_storage.SqlTransaction, entry: object) -> None:
        point()  # the lock is held, nothing is written
        append(self, entry)  # type: ignore[arg-type]
        point()  # written, not yet durable

    sql_storage.SqlTransaction.append = append_and_perhaps_die  # type: ignore[method-assign, assignment]
    with Ledger.open(url) as ledger:
        point()
        ledger.reserve(dataset="shop", event=event, run_id="run")
        point()
        if not (folder / "trained").exists():
            ledger.require_reservation("run", dataset="shop", event=event)
            (folder / "trained").touch()
        point()
        (folder / "staged").touch()
        point()
        ledger.commit("run", event=event, release="bundle")
        point()
        (folder / "staged").rename(folder / "published")
    print(_passed)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
