"""A release as an artifact of a pipeline: made beside the run, then copied to where the store takes it from."""

from __future__ import annotations

import shutil
from pathlib import Path

from lazydp.components.bundle.reader import Bundle
from lazydp.components.bundle.signature import key_file_of_environment
from lazydp.components.export.export import export


def export_artifact(
    *, run: Path, dataset: Path, out: Path, name: str | None, ledger: str | None, allow_non_private: bool = False
) -> dict[str, str]:
    """Release the run `run` as the bundle `out`; repeated after a crash, the same bundle again.

    Args:
        run: the run's folder; its name is the run's.
        dataset: what it was trained on.
        out: where the bundle goes.
        name: of the model in the service; None for the feature spec's.
        ledger: URL of the ledger.
        allow_non_private: release a run of mode sgd too, marked as not private.

    Returns:
        The artifact's metadata, as text: numbers in Kubeflow's metadata lose digits.
    """
    kept = run.with_name(f"{run.name}-bundle")
    manifest = export(
        run=run,
        dataset=dataset,
        out=kept,
        name=name,
        ledger=ledger,
        allow_non_private=allow_non_private,
        sign_key=key_file_of_environment(),
    )
    shutil.copytree(kept, out, dirs_exist_ok=True)
    released = Bundle.open(out, allow_test_key=True, allow_non_private=True)
    return {
        "name": manifest.name,
        "version": manifest.version,
        "privacy": released.statement.line(),
        "run_id": manifest.lineage.run_id,
        "ledger_dataset": manifest.lineage.dataset,
        "ledger_head": manifest.lineage.ledger_head,
        "code_version": manifest.lineage.code_version,
        "config": manifest.lineage.config,
    }
