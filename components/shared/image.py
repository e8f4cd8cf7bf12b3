"""The container image that every Kubeflow component of lazydp runs in."""

import os

# Read when a pipeline is compiled: it is part of the compiled text, not a setting of a run.
IMAGE = os.environ.get("LAZYDP_IMAGE", "lazydp:0.1.0")
