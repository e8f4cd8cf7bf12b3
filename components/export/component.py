"""The Kubeflow component: a finished run to a released bundle."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Model, Output

from lazydp.components.shared.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)  # type: ignore[untyped-decorator]
def export(
    dataset: Input[Dataset],
    run_folder: str,
    run_id: str,
    bundle: Output[Model],
    ledger_url: str = "",
    name: str = "",
    allow_non_private: bool = False,
) -> None:
    """Release a finished run: flush, prove, commit the budget, destroy the noise key.

    The bundle is made beside the run first, on its volume, and copied from there: a pod that dies before the artifact
    is stored loses nothing, though the key is gone.

    Args:
        dataset: what the run was trained on.
        run_folder: the run's folder, on the volume that train wrote.
        run_id: what train returned.
        bundle: the release.
        ledger_url: the ledger; empty for the default one.
        name: of the model in the service; empty for the feature spec's.
        allow_non_private: release a run of mode sgd too, marked as not private.
    """
    import shutil
    from pathlib import Path

    from lazydp.components.bundle.reader import Bundle
    from lazydp.components.export.export import export as run
    from lazydp.components.shared.logs import log_to_stdout

    log_to_stdout()
    kept = Path(run_folder).with_name(f"{Path(run_folder).name}-bundle-{run_id}")
    manifest = run(
        run=Path(run_folder),
        dataset=Path(dataset.path),
        out=kept,
        name=name or None,
        ledger=ledger_url or None,
        allow_non_private=allow_non_private,
    )
    shutil.copytree(kept, bundle.path, dirs_exist_ok=True)
    statement = Bundle.open(Path(bundle.path), allow_test_key=True, allow_non_private=True).statement
    # As text: numbers in Kubeflow's metadata lose digits.
    bundle.metadata["name"] = manifest.name
    bundle.metadata["version"] = manifest.version
    bundle.metadata["privacy"] = statement.line()
