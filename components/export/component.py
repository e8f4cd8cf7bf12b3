"""The Kubeflow components: a finished run to a released bundle, and the run without privacy to one that is compared."""

from kfp import dsl
from kfp.dsl import HTML, Artifact, Dataset, Input, Metrics, Model, Output

from lazydp.components.shared.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)  # type: ignore[untyped-decorator]
def export(
    dataset: Input[Dataset],
    runs_folder: str,
    run_id: str,
    bundle: Output[Model],
    page: Output[HTML],
    metrics: Output[Metrics],
    ledger_url: str = "",
    name: str = "",
    operator: str = "",
) -> None:
    """Release a finished run: flush, prove, commit the budget, destroy the noise key.

    The bundle is made beside the run first, on its volume, and copied from there: a pod that dies before the artifact
    is stored loses nothing, though the key is gone.

    Args:
        dataset: what the run was trained on.
        runs_folder: the folder of runs, on the volume that train wrote.
        run_id: what train returned.
        bundle: the release.
        page: its privacy card; public.
        metrics: what it spent, for Kubeflow's pages; public.
        ledger_url: the ledger; empty for that of LAZYDP_LEDGER.
        name: of the model in the service; empty for the feature spec's.
        operator: who runs the pipeline, for the ledger.
    """
    from pathlib import Path

    from lazydp.components.bundle.reader import Bundle
    from lazydp.components.export.artifact import export_artifact
    from lazydp.components.export.card import privacy_card
    from lazydp.components.shared.logs import log_to_stdout
    from lazydp.components.shared.pipeline_run import act_as, ledger_of, run_folder

    log_to_stdout()
    act_as(operator)
    bundle.metadata |= export_artifact(
        run=run_folder(runs_folder, run_id),
        dataset=Path(dataset.path),
        out=Path(bundle.path),
        name=name or None,
        ledger=ledger_of(ledger_url),
    )
    released = Bundle.open(Path(bundle.path), allow_test_key=True, allow_non_private=True)
    Path(page.path).write_text(privacy_card(released.manifest, released.statement))
    if released.statement.epsilon is not None:
        metrics.log_metric("epsilon", released.statement.epsilon)
        metrics.log_metric("delta", released.statement.delta)


@dsl.component(base_image=IMAGE, install_kfp_package=False)  # type: ignore[untyped-decorator]
def export_without_privacy(
    dataset: Input[Dataset], runs_folder: str, run_id: str, bundle: Output[Artifact], name: str = ""
) -> None:
    """Write the model of a run without privacy, to be measured beside the release; private, and never a release.

    Its artifact is no system.Model, and its name ends in -without-privacy: nothing that looks for models finds it.

    Args:
        dataset: what the run was trained on.
        runs_folder: the folder of runs, on the volume that train wrote.
        run_id: what train returned.
        bundle: the model; as private as the dataset.
        name: of the release that it is compared with; empty for the feature spec's.
    """
    from pathlib import Path

    from lazydp.components.export.artifact import export_artifact
    from lazydp.components.ingest.dataset import EncodedDataset
    from lazydp.components.shared.logs import log_to_stdout
    from lazydp.components.shared.pipeline_run import run_folder

    log_to_stdout()
    spec_name = EncodedDataset.open(Path(dataset.path)).spec.name
    bundle.metadata |= export_artifact(
        run=run_folder(runs_folder, run_id),
        dataset=Path(dataset.path),
        out=Path(bundle.path),
        name=f"{(name or spec_name)[:48]}-without-privacy",
        ledger=None,
        allow_non_private=True,
    )
