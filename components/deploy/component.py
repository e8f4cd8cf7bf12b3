"""The Kubeflow component: a release behind KServe."""

from kfp import dsl
from kfp.dsl import Artifact, Input, Model, Output

from lazydp.components.shared.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)  # type: ignore[untyped-decorator]
def deploy(
    bundle: Input[Model],
    manifest: Output[Artifact],
    name: str,
    namespace: str,
    image: str,
    service_account: str = "",
    changes: str = "",
    apply: bool = False,
) -> str:
    """Write the InferenceService of a release, and apply it where that is asked.

    Args:
        bundle: what export released.
        manifest: the InferenceService, as YAML; public.
        name: of the service, and of the model in it.
        namespace: of the service.
        image: that holds lazydp.
        service_account: of the service's pods, with the keys of the artifact store; empty for the default one.
        changes: merged over the manifest, YAML text, such as `{spec: {predictor: {maxReplicas: 9}}}`.
        apply: create or replace the service with the rights of this pod's service account.

    Returns:
        What was done: written, created or replaced.
    """
    from pathlib import Path

    import yaml

    from lazydp.components.deploy.deploy import apply as run
    from lazydp.components.deploy.deploy import in_cluster, inference_service, parse_changes
    from lazydp.components.shared.logs import log_to_stdout

    log_to_stdout()
    written = inference_service(
        Path(bundle.path),
        uri=bundle.uri,
        name=name,
        namespace=namespace,
        image=image,
        service_account=service_account,
        changes=parse_changes(changes),
    )
    Path(manifest.path).write_text(yaml.safe_dump(written, sort_keys=False))
    if not apply:
        return "written"
    with in_cluster() as client:
        return run(written, client)
