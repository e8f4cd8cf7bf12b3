"""Kill one kind of process so many times at random moments, and print where it was killed.

    python tests/adversary/kills.py pipeline --count 20

Any loss, second charge or private file that others can read ends it with an error (`test_random_kills.py`).
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

TESTS = {"train-and-export": "test_train_and_export", "serve": "test_serve", "pipeline": "test_pipeline"}


@dataclass
class Kills:
    """How often to kill, at which moments, and what was killed where.

    Attributes:
        count: of kills, where somebody chose it.
        chance: draws the moments.
        noted: how many kills there were, by what was killed and how far it was.
    """

    count: int | None = None
    chance: random.Random = field(default_factory=lambda: random.Random(18))
    noted: Counter[tuple[str, str]] = field(default_factory=Counter)

    def wanted(self, usual: int) -> int:
        """How many kills to make."""
        return usual if self.count is None else self.count

    def note(self, killed: str, how_far: str) -> None:
        """Note a kill."""
        self.noted[killed, how_far] += 1

    def table(self) -> str:
        """What was noted, as lines of a table."""
        lines = ["| Killed | How far it was | Kills |", "| --- | --- | --- |"]
        lines += [f"| {killed} | {how_far} | {number} |" for (killed, how_far), number in sorted(self.noted.items())]
        return "\n".join([*lines, f"| all | | {self.noted.total()} |"])


KILLS = pytest.StashKey[Kills]()


class _Told:
    """A pytest plugin that hands the tests what was asked for."""

    def __init__(self, kills: Kills) -> None:
        self._kills = kills

    def pytest_configure(self, config: pytest.Config) -> None:
        """Hand it over."""
        config.stash[KILLS] = self._kills


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kind", choices=TESTS)
    parser.add_argument("--count", type=int, required=True, help="of kills")
    parser.add_argument("--seed", type=int, default=18, help="of the moments")
    given = parser.parse_args()
    kills = Kills(given.count, random.Random(given.seed))
    test = f"{Path(__file__).with_name('test_random_kills.py')}::{TESTS[given.kind]}"
    status = pytest.main(["-q", "-n0", "-m", "slow", test], plugins=[_Told(kills)])
    print(kills.table())
    return int(status)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from adversary import kills as this  # the same module as the tests see

    sys.exit(this.main())
