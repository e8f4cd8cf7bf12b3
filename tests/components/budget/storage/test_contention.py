"""Many processes want the last of a budget at once: it is never overspent, though some of them are killed."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lazydp.components.budget.accounting.epsilon import epsilon
from lazydp.components.budget.accounting.events import dpsgd_event
from lazydp.components.budget.ledger.ledger import Ledger
from lazydp.components.budget.ledger.verify import verify

ADMITS = 7


def contend(url: str, datasets: list[str], *, processes: int, kills: int) -> dict[str, dict[str, float]]:
    """Make budgets that admit exactly seven, and let the processes at each of them."""

    def cost(runs: int) -> float:
        return epsilon(dpsgd_event(noise_multiplier=10.0, sampling_prob=1.0, steps=runs), delta=1e-5)

    with Ledger.open(url) as ledger:
        for dataset in datasets:
            ledger.register_dataset(hashlib.sha256(dataset.encode()).hexdigest(), name=dataset)
            ledger.set_budget(dataset, epsilon=(cost(ADMITS) + cost(ADMITS + 1)) / 2, delta=1e-5)
    program = [sys.executable, str(Path(__file__).with_name("contend.py")), url, str(processes), str(kills), *datasets]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(program, env=environment, start_new_session=True, **pipes) as crowd:
        try:
            output, errors = crowd.communicate()
        except BaseException:
            os.killpg(crowd.pid, signal.SIGKILL)  # the crowd would outlive a test that ran out of time
            raise
    assert crowd.returncode == 0, errors[-3000:]
    print(errors)
    found: dict[str, dict[str, float]] = json.loads(output)
    assert all(one["failed"] == 0 for one in found.values()), errors[-3000:]
    return found


def check(url: str, *, crowds: int, processes: int, kills: int) -> None:
    found = contend(url, [f"shop-{crowd}" for crowd in range(crowds)], processes=processes, kills=kills)
    assert len(found) == crowds
    with Ledger.open(url, read_only=True) as ledger:
        for dataset, one in found.items():
            shown = ledger.show(dataset)
            assert shown.reserved_runs == ADMITS
            assert shown.charged_epsilon <= shown.epsilon  # type: ignore[operator]
            # A process that was killed may have been admitted without living to say so.
            assert ADMITS - one["killed"] <= one["admitted"] <= ADMITS
            assert one["admitted"] + one["refused"] + one["killed"] == processes
        assert verify(ledger.entries()).problems == ()


def test_exactly_seven_of_forty(ledger_url: str) -> None:
    check(ledger_url, crowds=1, processes=40, kills=5)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_exactly_seven_of_two_hundred(ledger_url: str) -> None:
    check(ledger_url, crowds=5, processes=200, kills=20)
