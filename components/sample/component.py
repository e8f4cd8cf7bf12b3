"""The Kubeflow component: makes the built-in sample."""

from kfp import dsl
from kfp.dsl import Dataset, Output

from lazydp.components.shared.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)  # type: ignore[untyped-decorator]
def sample_data(sample: Output[Dataset], seed: int = 1) -> None:
    """Make the built-in sample: interactions, users, items and their feature spec in one folder.

    Args:
        sample: the folder.
        seed: the same seed makes the same sample.
    """
    from pathlib import Path

    from lazydp.components.sample.sample import make_sample
    from lazydp.components.shared.logs import log_to_stdout

    log_to_stdout()
    make_sample(Path(sample.path), seed=seed, replace=True)
