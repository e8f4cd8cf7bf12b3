"""The Kubeflow component: no training before the ledger has reserved what it may at most spend."""

from kfp import dsl
from kfp.dsl import Dataset, Input

from lazydp.components.shared.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)  # type: ignore[untyped-decorator]
def budget_gate(
    dataset: Input[Dataset],
    config: str,
    run_id: str,
    ledger_url: str = "",
    mode: str = "",
    budget_epsilon: float = 0.0,
    budget_delta: float = 0.0,
    operator: str = "",
) -> str:
    """Reserve the budget of a training run; fail, with the figures, where the dataset's budget does not admit it.

    Args:
        dataset: what ingest wrote.
        config: the training configuration, as YAML text.
        run_id: names the run in the ledger, such as the pipeline's run id; a retry finds its own reservation.
        ledger_url: the ledger; empty for the default one.
        mode: instead of the configuration's: lazydp, dpsgd or sgd.
        budget_epsilon: budget of a dataset that never had one; 0 leaves that to `lazydp budget set`.
        budget_delta: its delta.
        operator: who runs the pipeline, for the ledger.

    Returns:
        The run's id, for train.
    """
    from pathlib import Path

    from lazydp.components.budget.gate import reserve_for_training
    from lazydp.components.ingest.dataset import EncodedDataset
    from lazydp.components.shared.logs import log_to_stdout
    from lazydp.components.train.config import TrainConfig
    from lazydp.components.train.run.costs import RunCost, calibrated_noise_multiplier

    log_to_stdout()
    settings = TrainConfig.parse_text(config, where="(parameter config)")
    if mode:
        settings = settings.with_changes(mode=mode)
    if not settings.private:
        return run_id
    manifest = EncodedDataset.open(Path(dataset.path)).manifest
    bound = manifest.max_examples_per_user
    reserve_for_training(
        ledger_url=ledger_url or None,
        dataset_fingerprint=manifest.fingerprint,
        dataset_name=manifest.spec["name"],
        event=RunCost(settings, bound, calibrated_noise_multiplier(settings, bound)).of_release(),
        run_id=run_id,
        privacy_unit=settings.privacy_unit,
        config_digest=settings.digest(),
        sources=[manifest.source.digest],
        first_budget=(budget_epsilon, budget_delta) if budget_epsilon else None,
        by=operator or None,
    )
    return run_id
