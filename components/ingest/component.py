"""The Kubeflow component: Parquet by URI to an encoded dataset."""

from kfp import dsl
from kfp.dsl import HTML, Dataset, Output

from lazydp.components.shared.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)  # type: ignore[untyped-decorator]
def ingest(
    input_uri: str,
    spec: str,
    dataset: Output[Dataset],
    page: Output[HTML],
    users_uri: str = "",
    items_uri: str = "",
    memory_mib: int = 1024,
) -> None:
    """Encode interactions into a private dataset.

    Args:
        input_uri: file, folder, pattern or Delta table, by path or URI; several as a JSON list. Read where it lies: the
            data does not pass through the artifact store first.
        spec: the feature spec, as YAML text, path or URI.
        dataset: the encoded dataset.
        page: its data card; private.
        users_uri: the users table, where not as the spec says.
        items_uri: the items table, where not as the spec says.
        memory_mib: memory to work in, roughly.
    """
    from pathlib import Path

    from lazydp.components.ingest.card import data_card
    from lazydp.components.ingest.ingest import IngestOptions
    from lazydp.components.ingest.ingest import ingest as run
    from lazydp.components.shared.locations import split_locations
    from lazydp.components.shared.logs import log_to_stdout

    log_to_stdout()
    options = IngestOptions(
        users=users_uri or None, items=items_uri or None, memory_bytes=memory_mib << 20, replace=True
    )
    locations = split_locations(input_uri)
    # Counts and fingerprint are private and stay inside the dataset: Kubeflow's metadata is read by others.
    manifest = run(locations, spec, Path(dataset.path), options)
    Path(page.path).write_text(data_card(manifest))
