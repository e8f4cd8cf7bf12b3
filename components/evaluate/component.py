"""The Kubeflow component: a bundle's metrics beside popularity. Internal: they are computed from private data."""

from kfp import dsl
from kfp.dsl import Artifact, Dataset, Input, Metrics, Output

from lazydp.components.shared.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)  # type: ignore[untyped-decorator]
def evaluate(
    bundle: Input[Artifact], dataset: Input[Dataset], metrics: Output[Metrics], report: Output[Artifact]
) -> None:
    """Measure a bundle on the held-out split.

    Args:
        bundle: what export released, or the model without privacy.
        dataset: what the run was trained on.
        metrics: figures for Kubeflow's pages; private.
        report: the same as JSON; private.
    """
    import math
    from pathlib import Path

    from lazydp.components.evaluate.evaluate import evaluate as run
    from lazydp.components.shared.logs import log_to_stdout

    log_to_stdout()
    found = run(bundle=Path(bundle.path), dataset=Path(dataset.path))
    found.save(Path(report.path))
    print(found.table())  # the log of a component is internal, like its metrics
    for name, value in found.figures().items():
        # NaN crashes Kubeflow's metadata; an exact count of users is private whoever reads it there.
        if math.isfinite(value) and not name.endswith("_users"):
            metrics.log_metric(name, value)
