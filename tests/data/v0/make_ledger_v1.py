"""Writes the ledger of version 1 entries; run with the code of commit be42a7d^ (see README.md).

python make_ledger_v1.py OUT
"""

import sys
from pathlib import Path

from lazydp.components.budget.accounting.events import dpsgd_event
from lazydp.components.budget.ledger.ledger import Ledger


def main(out: Path) -> None:
    event = dpsgd_event(noise_multiplier=4.0, sampling_prob=0.05, steps=30)
    shorter = dpsgd_event(noise_multiplier=4.0, sampling_prob=0.05, steps=10)
    with Ledger.open(f"sqlite:///{out}") as ledger:
        # Version 1 named datasets by their fingerprint, which version 2 no longer does.
        ledger.register_dataset("5" * 64, name="orders", sources=["7" * 64], by="ada")
        ledger.register_dataset("6" * 64, name="orders-march", parents=["orders"], by="ada")
        ledger.set_budget("orders", epsilon=8.0, delta=1e-5, privacy_unit="example", by="ada")
        ledger.reserve(dataset="orders", event=event, run_id="run-finished", by="grace")
        ledger.commit("run-finished", event=shorter, release="snapshot-10", step=10, final=False, by="grace")
        ledger.commit("run-finished", event=event, release="model-30", step=30, by="grace")
        ledger.reserve(dataset="orders", event=event, run_id="run-lost", by="grace")
        ledger.void("run-lost", by="ada", reason="crashed; checkpoints deleted")
        ledger.reserve(dataset="orders", event=event, run_id="run-open", by="grace")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
