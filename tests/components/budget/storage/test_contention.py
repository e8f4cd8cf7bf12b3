"""Many processes want the last of a budget at once: it is never overspent, though some of them are killed."""

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


def contend(url: str, *, processes: int, kills: int, seed: int) -> dict[str, int]:
    """Make a budget that admits exactly seven, and let the processes at it."""

    def cost(runs: int) -> float:
        return epsilon(dpsgd_event(noise_multiplier=10.0, sampling_prob=1.0, steps=runs), delta=1e-5)

    with Ledger.open(url) as ledger:
        ledger.register_dataset("a" * 64, name="shop")
        ledger.set_budget("shop", epsilon=(cost(ADMITS) + cost(ADMITS + 1)) / 2, delta=1e-5)
    program = [sys.executable, str(Path(__file__).with_name("contend.py")), url, str(processes), str(kills), str(seed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(program, env=environment, start_new_session=True, **pipes) as crowd:
        try:
            output, errors = crowd.communicate()
        except BaseException:
            os.killpg(crowd.pid, signal.SIGKILL)  # the crowd would outlive a test that ran out of time
            raise
    assert crowd.returncode == 0, errors[-3000:]
    found: dict[str, int] = json.loads(output)
    assert found["failed"] == 0, errors[-3000:]
    return found


def check(url: str, *, processes: int, kills: int, seed: int) -> None:
    found = contend(url, processes=processes, kills=kills, seed=seed)
    with Ledger.open(url, read_only=True) as ledger:
        shown = ledger.show("shop")
        assert shown.reserved_runs == ADMITS
        assert shown.charged_epsilon <= shown.epsilon  # type: ignore[operator]
        assert verify(ledger.entries()).problems == ()
    # A process that was killed may have been admitted without living to say so.
    assert ADMITS - found["killed"] <= found["admitted"] <= ADMITS
    assert found["admitted"] + found["refused"] + found["killed"] == processes


def test_exactly_seven_of_forty(ledger_url: str) -> None:
    check(ledger_url, processes=40, kills=5, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(20))
def test_exactly_seven_of_two_hundred(ledger_url: str, seed: int) -> None:
    check(ledger_url, processes=200, kills=20, seed=seed)
