"""Where lazydp's log lines go inside a Kubeflow component, whose host process configures no logging for others."""

from __future__ import annotations

import logging
import sys


def log_to_stdout() -> None:
    """Print the log lines of lazydp on standard output, which is what a pod's log shows; once, however often called."""
    logger = logging.getLogger("lazydp")
    if any(handler.get_name() == "lazydp-component" for handler in logger.handlers):
        return
    handler = logging.StreamHandler(sys.stdout)
    handler.set_name("lazydp-component")
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
