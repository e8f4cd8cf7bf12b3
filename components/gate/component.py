"""The Kubeflow component: no training before the ledger has reserved what it may at most spend."""

from kfp import dsl
from kfp.dsl import HTML, Dataset, Input, Output

from lazydp.components.shared.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)  # type: ignore[untyped-decorator]
def budget_gate(
    dataset: Input[Dataset],
    config: str,
    job_id: str,
    page: Output[HTML],
    ledger_url: str = "",
    mode: str = "",
    budget_epsilon: float = 0.0,
    budget_delta: float = 1e-5,
    family: str = "",
    other_people: str = "",
    operator: str = "",
    sweep: str = "",
) -> str:
    """Reserve the budget of a training run; fail, with the figures, where the dataset's budget does not admit it.

    Args:
        dataset: what ingest wrote.
        config: the training configuration, as YAML text.
        job_id: the pipeline's own run id, which names the run in the ledger; a retry finds its own reservation.
        page: the budget before and after.
        ledger_url: the ledger; empty for that of LAZYDP_LEDGER.
        mode: instead of the configuration's: lazydp, dpsgd or sgd.
        budget_epsilon: budget of a dataset that never had one; 0 leaves that to `lazydp budget set`.
        budget_delta: its delta.
        family: the family that the dataset must be of; empty for whichever its spec declares.
        other_people: why these people have no budget yet, where the ledger takes them for others that have one.
        operator: who runs the pipeline, for the ledger.
        sweep: what `tune` will try, as YAML text: the whole sweep is reserved; empty for a single run.

    Returns:
        The run's name, for train or tune.
    """
    from pathlib import Path

    from lazydp.components.gate.gate import identity_of
    from lazydp.components.gate.page import no_budget_page, page_of
    from lazydp.components.ingest.dataset import EncodedDataset
    from lazydp.components.shared.errors import InputError
    from lazydp.components.shared.logs import log_to_stdout
    from lazydp.components.shared.patience import patiently
    from lazydp.components.shared.pipeline_run import act_as, ledger_of, run_name
    from lazydp.components.train.config import TrainConfig
    from lazydp.components.train.run.spending import reserve

    log_to_stdout()
    act_as(operator)
    run_id = run_name(job_id)
    settings = TrainConfig.parse_text(config, where="(parameter config)")
    if mode:
        settings = settings.with_changes(mode=mode)
    if not settings.private:
        Path(page.path).write_text(no_budget_page(run_id))
        return run_id
    data = EncodedDataset.open(Path(dataset.path))
    declared = data.spec.family or data.manifest.family or ""
    if family and family != declared:
        raise InputError(
            f"the dataset is of family {declared or '(none)'}, and the pipeline is for family {family}: declare "
            "`family` in the feature spec of the data, or correct the parameter"
        )
    identity = identity_of(run_id, data, settings, sweep=sweep)
    # Kubeflow never starts the gate again, as a refused budget stays refused; a ledger that is away is asked here.
    reservation = patiently(
        lambda: reserve(
            ledger_of(ledger_url),
            identity,
            data,
            first_budget=(budget_epsilon, budget_delta) if budget_epsilon else None,
            other_people=other_people,
        )
    )
    Path(page.path).write_text(page_of(ledger_of(ledger_url), reservation))
    return run_id
