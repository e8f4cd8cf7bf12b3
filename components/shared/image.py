"""The container image that every Kubeflow component of lazydp runs in."""

import importlib.metadata
import os

# Read when a pipeline is compiled: it is part of the compiled text, not a setting of a run.
IMAGE = os.environ.get("LAZYDP_IMAGE", f"lazydp:{importlib.metadata.version('lazydp')}")
