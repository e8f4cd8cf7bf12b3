"""The Kubeflow component: settings tried as one private mechanism, of which the best run is left to be released."""

from kfp import dsl
from kfp.dsl import HTML, Dataset, Input, Output

from lazydp.components.shared.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)  # type: ignore[untyped-decorator]
def tune(
    dataset: Input[Dataset],
    config: str,
    sweep: str,
    runs_folder: str,
    run_id: str,
    page: Output[HTML],
    ledger_url: str = "",
    operator: str = "",
) -> str:
    """Try settings, or go on where a killed attempt stopped; charged once, as one sweep.

    A retry is the same sweep: its draws, its trials and its noise follow from the key in `runs_folder`.

    Args:
        dataset: what ingest wrote.
        config: what the trials share: the training configuration, as YAML text.
        sweep: what to try, as YAML text; its score is that of held-out rows, with noise.
        runs_folder: where the sweep's folder goes, on a volume that outlives the pod and that export mounts too.
        run_id: the sweep's name, which the gate returned.
        page: the settings that won; private until the export has charged them.
        ledger_url: the ledger; empty for that of LAZYDP_LEDGER.
        operator: who runs the pipeline, for the ledger.

    Returns:
        The folder of the best run below `runs_folder`, for export.
    """
    from pathlib import Path

    from lazydp.components.shared.logs import log_to_stdout
    from lazydp.components.shared.pipeline_run import act_as, ledger_of, run_folder
    from lazydp.components.train.config import TrainConfig
    from lazydp.components.tune.page import sweep_page
    from lazydp.components.tune.sweep import Sweep
    from lazydp.components.tune.tune import tune as run

    log_to_stdout()
    act_as(operator)
    wanted = Sweep.parse_text(sweep, where="(parameter sweep)")
    found = run(
        dataset=Path(dataset.path),
        config=TrainConfig.parse_text(config, where="(parameter config)"),
        sweep=wanted,
        out=run_folder(runs_folder, run_id),
        ledger=ledger_of(ledger_url),
        resume=True,
        run_id=run_id,
    )
    Path(page.path).write_text(sweep_page(wanted, found))
    return str(found.folder.relative_to(runs_folder))
