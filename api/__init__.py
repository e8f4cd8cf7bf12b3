"""The public Python API of lazydp. The names that it exports are stable; other Python names may change in any release.

    from lazydp.api import make_private_with_epsilon, export_module      # a module of your own, in one call
    from lazydp.api import make_private, PrivacyParameters, epsilon      # the same, with a loop of your own
    from lazydp.api import ingest, train, export, evaluate              # the steps of the pipeline, as functions
    from lazydp.api import Ledger, Bundle, Client                       # the budget, a release, the service

A name is loaded when it is first used, so importing this module is instant and loads no torch. `__init__.pyi` says the
same to type checkers and editors.
"""

import importlib

# name -> the module that defines it
_HOMES = {
    "AccountedTrainer": "lazydp.components.train.accounted_trainer",
    "Bundle": "lazydp.components.bundle.reader",
    "Client": "lazydp.service.client",
    "DenseOptimizer": "lazydp.components.train.engine.dense",
    "EmbeddingSgd": "lazydp.components.train.tables.skip_ahead",
    "Ledger": "lazydp.components.budget.ledger.ledger",
    "NoiseKey": "lazydp.kernels.noise_key",
    "PoissonSampler": "lazydp.components.train.data.sampler",
    "PrivacyParameters": "lazydp.components.train.mechanism.parameters",
    "PrivateTrainer": "lazydp.components.train.private",
    "calibrate_noise_multiplier": "lazydp.components.budget.accounting.epsilon",
    "epsilon": "lazydp.components.budget.accounting.epsilon",
    "evaluate": "lazydp.api.steps",
    "export": "lazydp.api.steps",
    "export_module": "lazydp.components.export.module",
    "fix": "lazydp.components.train.replacements",
    "ingest": "lazydp.api.steps",
    "load_module_release": "lazydp.components.bundle.module_release",
    "make_private": "lazydp.components.train.private",
    "make_private_with_epsilon": "lazydp.components.train.private_with_epsilon",
    "train": "lazydp.api.steps",
}

__all__ = [*_HOMES, "__version__"]  # noqa: PLE0604 - names, all of them


def __getattr__(name: str) -> object:
    """Load `name` from the module that defines it; kept, so that this runs once a name."""
    if name == "__version__":
        from importlib import metadata  # noqa: PLC0415 - slow, and rarely needed

        found: object = metadata.version("lazydp")
    elif name in _HOMES:
        found = getattr(importlib.import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it exports {', '.join(sorted(__all__))}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
