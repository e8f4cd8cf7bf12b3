"""The Kubeflow component: a bundle's metrics beside popularity. Internal: they are computed from private data."""

from kfp import dsl
from kfp.dsl import HTML, Artifact, Dataset, Input, Metrics, Output

from lazydp.components.shared.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)  # type: ignore[untyped-decorator]
def evaluate(
    bundle: Input[Artifact],
    dataset: Input[Dataset],
    metrics: Output[Metrics],
    report: Output[Artifact],
    page: Output[HTML],
) -> None:
    """Measure a bundle on the held-out split.

    Args:
        bundle: what export released.
        dataset: what the run was trained on.
        metrics: figures for Kubeflow's pages; private.
        report: the same as JSON; private.
        page: the comparison with popularity; private.
    """
    import math
    from pathlib import Path

    from lazydp.components.evaluate.evaluate import evaluate as run
    from lazydp.components.evaluate.page import comparison_page
    from lazydp.components.shared.logs import log_to_stdout

    log_to_stdout()
    found = run(bundle=Path(bundle.path), dataset=Path(dataset.path))
    found.save(Path(report.path))
    Path(page.path).write_text(comparison_page(found.to_json()))
    print(found.table())  # the log of a component is internal, like its metrics
    for name, value in found.figures().items():
        # NaN crashes Kubeflow's metadata; an exact count of users is private whoever reads it there.
        if math.isfinite(value) and not name.endswith("_users"):
            metrics.log_metric(name, value)


@dsl.component(base_image=IMAGE, install_kfp_package=False)  # type: ignore[untyped-decorator]
def evaluate_without_privacy(
    bundle: Input[Artifact],
    dataset: Input[Dataset],
    release: Input[Artifact],
    report: Output[Artifact],
    page: Output[HTML],
) -> None:
    """Measure the model without privacy, and set it beside the release.

    Args:
        bundle: the model without privacy.
        dataset: what both were trained on.
        release: the report of the release.
        report: the figures as JSON; private.
        page: both models and popularity; private.
    """
    import json
    from pathlib import Path

    from lazydp.components.evaluate.evaluate import evaluate as run
    from lazydp.components.evaluate.page import comparison_page
    from lazydp.components.shared.logs import log_to_stdout

    log_to_stdout()
    found = run(bundle=Path(bundle.path), dataset=Path(dataset.path))
    found.save(Path(report.path))
    beside = json.loads(Path(release.path).read_text())
    Path(page.path).write_text(comparison_page(beside, without_privacy=found.to_json()))
