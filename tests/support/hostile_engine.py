"""An engine in this process that does what an engine of a cluster may do, and on request what it must not do."""

from __future__ import annotations

import pickle
import random
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from lazydp.components.ingest.job import Job, error_of_task
from lazydp.components.shared.errors import LazyDPError


@dataclass
class HostileEngine:
    """Takes pieces in any order, ends tasks in the middle and starts them again, and runs a task twice at once.

    Attributes:
        seed: of the order of pieces and payloads.
        before_pieces: called after the work is planned and before it begins.
        loses, repeats: payloads of rows that get lost, or are taken twice.
    """

    name: str = "hostile"
    seed: int = 0
    before_pieces: Callable[[], None] = lambda: None
    loses: int = 0
    repeats: int = 0
    runs: int = field(default=0, init=False)

    def check(self) -> None:
        """Nothing is needed."""

    def run(self, job: Job) -> list[bytes]:
        """See `job.Engine`."""
        order = random.Random(self.seed)
        # As on another machine: functions and pieces arrive pickled.
        sent: Job = pickle.loads(pickle.dumps(job))
        self.before_pieces()
        try:
            return self._run(sent, order)
        except Exception as error:
            told = error_of_task(error)
            assert told is None or isinstance(told, LazyDPError)
            raise told or error from None

    def _run(self, job: Job, order: random.Random) -> list[bytes]:
        groups: dict[int, list[pa.Buffer]] = defaultdict(list)
        for piece in order.sample(job.pieces, len(job.pieces)):
            killed: Any = job.encode(piece)
            next(killed)
            killed.close()
            for key, payload in job.encode(piece):
                assert 0 <= key < job.num_keys
                groups[key].append(payload)
        last = job.num_keys - 1
        rows = [key for key in sorted(groups) if key != last]
        for key in rows[: self.loses]:
            groups[key].pop()
        for key in rows[: self.repeats]:
            groups[key].append(groups[key][-1])
        results = []
        with ThreadPoolExecutor(2) as pool:
            for key in order.sample(sorted(groups), len(groups)):
                payloads = order.sample(groups[key], len(groups[key]))
                twice = [pool.submit(job.assemble, key, payloads) for _ in range(2)]
                first, second = (run.result() for run in twice)
                assert first == second
                self.runs += 2
                results.append(first)
        return results
