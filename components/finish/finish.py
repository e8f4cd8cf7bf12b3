"""The end of a pipeline run, however it ended: no private file stays for nothing, and no reservation without a word."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Literal

from lazydp.components.budget.ledger.ledger import Ledger
from lazydp.components.budget.ledger.state import Run
from lazydp.components.budget.ledger.writing import operator
from lazydp.components.shared.errors import InputError
from lazydp.components.train.run.folder import RunFolder

OnFailure = Literal["keep", "void"]
_log = logging.getLogger("lazydp.finish")


def finish(*, succeeded: bool, name: str, runs_folder: Path, ledger: str, on_failure: OnFailure) -> str:
    """Clear what a pipeline run left, and say how its reservation stands.

    After a success the folders of the run hold nothing that anybody needs: checkpoints without a key, the bundle that
    the artifact store has, the model without privacy. They are erased, keys first.

    After a failure, `keep` leaves folder and reservation, so that Kubeflow's own retry of the run goes on from its
    checkpoint. `void` erases the folder and then voids the reservation: without weights and key nothing of the run can
    be released any more, so nothing was spent. A run that released something (a snapshot, or a bundle that no artifact
    store has yet) is kept under either: its budget is spent.

    Args:
        succeeded: whether every task did.
        name: of the run.
        runs_folder: the folder of runs.
        ledger: URL of the ledger.
        on_failure: the policy.

    Returns:
        What was done, in one line.

    Raises:
        InputError: `on_failure` is no policy.
    """
    if on_failure not in ("keep", "void"):
        raise InputError(f"on_failure: expected keep or void, found {on_failure!r}")
    with Ledger.open(ledger, read_only=True) as opened:
        run = opened.state().runs.get(name)
    line = _finish(run, succeeded=succeeded, name=name, runs_folder=runs_folder, ledger=ledger, on_failure=on_failure)
    _log.info("%s", line)
    return line


def _finish(
    run: Run | None, *, succeeded: bool, name: str, runs_folder: Path, ledger: str, on_failure: OnFailure
) -> str:
    if succeeded:
        _erase(runs_folder, name)
        return f"run {name} is finished: its private files are erased"
    if run is None:
        _erase(runs_folder, name)
        return f"run {name} failed and reserved nothing: its private files are erased"
    if run.releases:
        return (
            f"run {name} failed after it released {run.releases[-1].release}: the budget is spent and its folder "
            f"{runs_folder / name} kept; retry the run in Kubeflow to finish it"
        )
    if run.status == "reserved" and on_failure == "void":
        _erase(runs_folder, name)
        with Ledger.open(ledger) as opened:
            opened.void(name, by=operator(), reason="the pipeline failed; its checkpoints and noise key were destroyed")
        return f"run {name} failed: its private files are erased and its reservation is voided"
    if run.status == "reserved":
        return (
            f"run {name} failed and still reserves epsilon {run.epsilon:.4g}: retry the run in Kubeflow to go on from "
            f"its checkpoint, or erase {runs_folder / name} and run `lazydp budget void {name}`"
        )
    return f"run {name} failed; it is {run.status} in the ledger"


def _erase(runs_folder: Path, name: str) -> None:
    """Remove the folders of a run (of a sweep: its trials too) and of what was compared with it: noise keys first."""
    for path in (runs_folder / name, runs_folder / f"{name}-without-privacy"):
        if path.is_dir():
            for trial in sorted(file.parent for file in path.glob("*/run.json")):
                with RunFolder.locked(trial) as folder:
                    folder.erase()
            with RunFolder.locked(path) as folder:
                folder.erase()
        shutil.rmtree(path.with_name(f"{path.name}-bundle"), ignore_errors=True)
