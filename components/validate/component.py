"""The Kubeflow component: a release answers before it goes anywhere."""

from kfp import dsl
from kfp.dsl import Input, Metrics, Model, Output

from lazydp.components.shared.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)  # type: ignore[untyped-decorator]
def validate(bundle: Input[Model], metrics: Output[Metrics], queries: str = "", max_latency_ms: float = 1000.0) -> None:
    """Start the service on a bundle, ask it, and fail where it does not answer as it must.

    Args:
        bundle: what export released.
        metrics: the latency, for Kubeflow's pages.
        queries: bodies of POST /v1/recommendations that must be answered, as a JSON list; empty makes some of the
            catalogue.
        max_latency_ms: the 95th percentile that is tolerated, one request at a time.
    """
    import json
    from pathlib import Path

    from lazydp.components.shared.errors import InputError
    from lazydp.components.shared.logs import log_to_stdout
    from lazydp.components.validate.validate import validate as run

    log_to_stdout()
    try:
        asked = json.loads(queries) if queries else []
    except ValueError as error:
        raise InputError(f"queries: expected a JSON list of queries, found {queries!r:.80}") from error
    found = run(Path(bundle.path), queries=asked, max_latency_ms=max_latency_ms)
    metrics.log_metric("queries", found.queries)
    metrics.log_metric("median_ms", found.median_ms)
    metrics.log_metric("p95_ms", found.slowest_ms)
