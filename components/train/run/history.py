"""The figures of a run over its steps, kept in its private folder and across its attempts, and their page."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Self

from lazydp.components.shared.files import PRIVATE_FILE
from lazydp.components.shared.page import Facts, Line, page
from lazydp.components.train.run.identity import RunIdentity

_FILE = "history.jsonl"
_EPSILON = re.compile(r"epsilon[ \w]* ([-\d.e+]+|inf) \|")
_LOSS = re.compile(r"loss ([-\d.e+]+|nan|inf)")


class History(logging.Handler):
    """Takes down what `PrivateLog` logs; use it as a context.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._file = folder / _FILE
        self._logger = logging.getLogger("lazydp.train")

    def __enter__(self) -> Self:
        self._logger.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._logger.removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """A line of the log: steps are appended to the file, the rest is not for it."""
        if record.msg != "step %d/%d: %s" or not isinstance(record.args, tuple):
            return
        step, _, line = record.args
        spent, loss = _EPSILON.search(str(line)), _LOSS.search(str(line))
        entry = {
            "step": step,
            "epsilon": None if spent is None else float(spent[1]),
            "loss": None if loss is None else float(loss[1]),
        }
        self._file.touch(mode=PRIVATE_FILE)
        with self._file.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def history_page(folder: Path, identity: RunIdentity) -> str:
    """Loss and epsilon over the steps.

    Args:
        folder: of the run.
        identity: of the run.
    """
    entries = {}
    if (folder / _FILE).exists():
        for line in (folder / _FILE).read_text().splitlines():
            entry = json.loads(line)
            entries[entry["step"]] = entry  # a step that was repeated after a crash counts once
    config = identity.config
    settings = [
        ("mode", config.mode),
        ("steps", f"{config.steps:,}"),
        ("sampling_prob", f"{config.sampling_prob:g}"),
        ("expected_batch_size", f"{config.expected_batch_size:g}"),
        ("noise_multiplier", "none" if identity.noise_multiplier is None else f"{identity.noise_multiplier:.4g}"),
        ("max_grad_norm", str(config.max_grad_norm)),
        ("privacy_unit", config.privacy_unit),
        ("code version", identity.code_version),
    ]

    def curve(name: str) -> list[tuple[float, float]]:
        return [(step, entry[name]) for step, entry in sorted(entries.items()) if entry[name] is not None]

    return page(
        f"Training of {identity.run_id}",
        audience="private",
        sections=[
            Line("Loss (mean since the point before)", "loss", curve("loss")),
            Line(f"Epsilon spent, at delta {config.target_delta or 0:g}", "epsilon", curve("epsilon")),
            Facts("Settings", settings),
        ],
    )
