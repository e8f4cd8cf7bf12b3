"""The Kubeflow component: an encoded dataset to a trained run, private."""

from kfp import dsl
from kfp.dsl import HTML, Dataset, Input, Output

from lazydp.components.shared.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)  # type: ignore[untyped-decorator]
def train(
    dataset: Input[Dataset],
    config: str,
    runs_folder: str,
    run_id: str,
    page: Output[HTML],
    ledger_url: str = "",
    mode: str = "",
    operator: str = "",
    variant: str = "",
) -> str:
    """Train a recommender with differential privacy, or go on where a killed attempt stopped.

    A retry is the same run: it finds its checkpoint in `runs_folder` and its reservation in the ledger under `run_id`.

    Args:
        dataset: what ingest wrote.
        config: the training configuration, as YAML text.
        runs_folder: where the run's folder goes, on a volume that outlives the pod and that export mounts too. It
            holds checkpoints and the noise key, so it never passes through the artifact store.
        run_id: the run's name, which the gate returned.
        page: loss and epsilon over the steps; private.
        ledger_url: the ledger; empty for that of LAZYDP_LEDGER.
        mode: instead of the configuration's: lazydp, dpsgd or sgd.
        operator: who runs the pipeline, for the ledger.
        variant: tells this run from another one of the same pipeline run; empty where there is none.

    Returns:
        The run's name, for export.
    """
    from pathlib import Path

    from lazydp.components.shared.logs import log_to_stdout
    from lazydp.components.shared.pipeline_run import act_as, ledger_of, run_folder
    from lazydp.components.train.config import TrainConfig
    from lazydp.components.train.run.history import History, history_page
    from lazydp.components.train.run.train import train as run

    log_to_stdout()
    act_as(operator)
    settings = TrainConfig.parse_text(config, where="(parameter config)")
    if mode:
        settings = settings.with_changes(mode=mode)
    name = f"{run_id}-{variant}" if variant else run_id
    folder = run_folder(runs_folder, name)
    with History(folder):
        done = run(
            dataset=Path(dataset.path),
            config=settings,
            out=folder,
            ledger=ledger_of(ledger_url) if settings.private else None,
            resume=True,
            run_id=name,
        )
    Path(page.path).write_text(history_page(folder, done.identity))
    return done.identity.run_id
