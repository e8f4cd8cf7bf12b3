"""The Kubeflow component: a release in Kubeflow's Model Registry."""

from kfp import dsl
from kfp.dsl import Input, Model

from lazydp.components.shared.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)  # type: ignore[untyped-decorator]
def register(bundle: Input[Model], url: str, author: str = "", job_id: str = "") -> str:
    """Enter a release as a version of its model, with its privacy figures and its lineage.

    Args:
        bundle: what export released.
        url: of the registry: scheme, host and port. Its token is that of LAZYDP_REGISTRY_TOKEN.
        author: who runs the pipeline.
        job_id: the pipeline's own run id, for the lineage.

    Returns:
        The version's id in the registry.
    """
    import os
    from pathlib import Path

    from lazydp.components.register.register import register as run
    from lazydp.components.shared.logs import log_to_stdout

    log_to_stdout()
    entered = run(
        Path(bundle.path),
        uri=bundle.uri,
        url=url,
        author=author or "lazydp",
        token=os.environ.get("LAZYDP_REGISTRY_TOKEN", ""),
        job_id=job_id,
    )
    return entered.version
