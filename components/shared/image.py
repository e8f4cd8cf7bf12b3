"""The container image that every Kubeflow component of lazydp runs in."""

import os

from lazydp.components.shared.version import release

# Read when a pipeline is compiled: it is part of the compiled text, not a setting of a run.
IMAGE = os.environ.get("LAZYDP_IMAGE", f"lazydp:{release()}")
