"""The Kubeflow component that ends a pipeline run, whatever happened in it."""

from kfp import dsl
from kfp.dsl import PipelineTaskFinalStatus

from lazydp.components.shared.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)  # type: ignore[untyped-decorator]
def finish(
    status: PipelineTaskFinalStatus,
    job_id: str,
    runs_folder: str,
    ledger_url: str = "",
    on_failure: str = "keep",
    operator: str = "",
) -> str:
    """Clear the run's private files, and void or report a reservation that can no longer be spent.

    Args:
        status: how the tasks before ended.
        job_id: the pipeline's own run id.
        runs_folder: the folder of runs, on the volume that train wrote.
        ledger_url: the ledger; empty for that of LAZYDP_LEDGER.
        on_failure: of a run that failed: keep its folder and reservation, or void them.
        operator: who runs the pipeline, for the ledger.

    Returns:
        What was done, in one line.
    """
    from pathlib import Path

    from lazydp.components.finish.finish import finish as run
    from lazydp.components.shared.logs import log_to_stdout
    from lazydp.components.shared.pipeline_run import act_as, ledger_of, run_name

    log_to_stdout()
    act_as(operator)
    return run(
        succeeded=status.state == "SUCCEEDED",
        name=run_name(job_id),
        runs_folder=Path(runs_folder),
        ledger=ledger_of(ledger_url),
        on_failure=on_failure,  # type: ignore[arg-type]  # judged there
    )
