"""Imported by servers of forks: what every fork would compute anew is computed once, and inherited.

These are pure functions of a configuration that whole test files share: the figures of its privacy statement, which
take half a second, and the version of the code. Nothing else lies in the memory of such a server.
"""

from __future__ import annotations

import gc
from typing import Any

import yaml

from lazydp.components.export.statement import statement_of
from lazydp.components.features.spec_file import parse_spec
from lazydp.components.shared.version import code_version
from lazydp.components.train.config import TrainConfig
from lazydp.components.train.run.identity import RunIdentity
from support.tiny import RUN_CONFIG, SAMPLE_CONFIG, TINY_CONFIG, TINY_SPEC

# Configurations of runs in forks and pods, and the bound on a user's examples of their datasets.
_RUNS: list[tuple[dict[str, Any], int]] = [
    ({**TINY_CONFIG, "steps": 3}, 20),
    (SAMPLE_CONFIG, 4),
    (yaml.safe_load(RUN_CONFIG), 4),
]


def _state(settings: dict[str, Any], max_examples_per_user: int) -> None:
    config = TrainConfig.parse(settings, where="test")
    identity = RunIdentity("run", config, "dataset", "version", config.noise_multiplier)
    statement_of(
        identity,
        spec=parse_spec(TINY_SPEC, where="test"),
        max_examples_per_user=max_examples_per_user,
        steps=config.steps,
        test_key=False,
    )


code_version()
for _settings, _bound in _RUNS:
    _state(_settings, _bound)
# What all forks share stays where it is: looked through, it would be copied into each.
gc.freeze()
