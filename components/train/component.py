"""The Kubeflow component: an encoded dataset to a trained run, private."""

from kfp import dsl
from kfp.dsl import Dataset, Input

from lazydp.components.shared.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)  # type: ignore[untyped-decorator]
def train(
    dataset: Input[Dataset],
    config: str,
    run_folder: str,
    run_id: str,
    ledger_url: str = "",
    mode: str = "",
) -> str:
    """Train a recommender with differential privacy, or go on where a killed attempt stopped.

    A retry is the same run: it finds its checkpoint in `run_folder` and its reservation in the ledger under `run_id`.

    Args:
        dataset: what ingest wrote.
        config: the training configuration, as YAML text.
        run_folder: where checkpoints go, on a volume that outlives the pod and that export mounts too. It holds the
            noise key, so it never passes through the artifact store.
        run_id: names the run in the ledger, such as the pipeline's run id.
        ledger_url: the ledger; empty for the default one.
        mode: instead of the configuration's: lazydp, dpsgd or sgd.

    Returns:
        The run's id, for export.
    """
    from pathlib import Path

    from lazydp.components.shared.logs import log_to_stdout
    from lazydp.components.train.config import TrainConfig
    from lazydp.components.train.run.train import train as run

    log_to_stdout()
    settings = TrainConfig.parse_text(config, where="(parameter config)")
    if mode:
        settings = settings.with_changes(mode=mode)
    done = run(
        dataset=Path(dataset.path),
        config=settings,
        out=Path(run_folder),
        ledger=ledger_url or None,
        resume=True,
        run_id=run_id,
    )
    return done.identity.run_id
