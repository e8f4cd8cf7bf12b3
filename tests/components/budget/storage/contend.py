"""Crowds of processes that want budget at once, some of them killed: run by test_contention.py as a program.

The processes are forked after everything is imported and composed, so that they spend their time contending. One crowd
comes after another, each for a dataset of its own. Prints, for each, how many were told that they hold a reservation,
how many were refused, how many were killed, and after how many seconds the last one had its answer.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time

from lazydp.components.budget.accounting.events import dpsgd_event, event_to_json
from lazydp.components.budget.ledger.charges import epsilon_of
from lazydp.components.budget.ledger.ledger import Ledger
from lazydp.components.shared.errors import BudgetExceededError

ADMITTED, REFUSED, FAILED = 0, 3, 4


def contend(url: str, dataset: str, number: int, gate: int) -> int:
    """One process: wait at the gate, then try to reserve."""
    os.read(gate, 1)  # ends when the parent closes its side
    event = dpsgd_event(noise_multiplier=10.0, sampling_prob=1.0, steps=1)
    try:
        with Ledger.open(url) as ledger:
            ledger.reserve(dataset=dataset, event=event, run_id=f"{dataset}-{number}", by="contender")
    except BudgetExceededError:
        return REFUSED
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return FAILED
    return ADMITTED


def crowd(url: str, dataset: str, *, count: int, kills: int, seed: int) -> dict[str, float]:
    """Let so many processes at the budget of a dataset."""
    chance = random.Random(seed)
    gate, opened = os.pipe()
    children = []
    for number in range(count):
        child = os.fork()
        if child == 0:
            os.close(opened)
            os._exit(contend(url, dataset, number, gate))
        children.append(child)
    os.close(gate)
    begun = time.monotonic()
    os.close(opened)  # all start now
    for child in chance.sample(children, kills):
        time.sleep(chance.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
    codes = [os.waitpid(child, 0)[1] for child in children]
    outcomes = [-os.WTERMSIG(code) if os.WIFSIGNALED(code) else os.WEXITSTATUS(code) for code in codes]
    return {
        "admitted": outcomes.count(ADMITTED),
        "refused": outcomes.count(REFUSED),
        "failed": outcomes.count(FAILED),
        "killed": outcomes.count(-signal.SIGKILL),
        "seconds": round(time.monotonic() - begun, 1),
    }


def main(url: str, count: int, kills: int, datasets: list[str]) -> None:
    # Compose what every process will ask for once, so that they inherit the answers and spend their time contending.
    event = event_to_json(dpsgd_event(noise_multiplier=10.0, sampling_prob=1.0, steps=1))
    for runs in range(1, 10):
        epsilon_of([event] * runs, delta=1e-5)
    Ledger.open(url).close()  # imports what every process needs
    found = {}
    for seed, dataset in enumerate(datasets, start=1):
        found[dataset] = crowd(url, dataset, count=count, kills=kills, seed=seed)
        print(f"{dataset}: {found[dataset]}", file=sys.stderr, flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
