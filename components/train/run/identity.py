"""Which run a folder or checkpoint belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from lazydp.components.budget.accounting.tuning import Tuning
from lazydp.components.shared.errors import FormatError
from lazydp.components.train.config import TrainConfig
from lazydp.kernels.noise_key import NoiseKey

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, slots=True)
class RunIdentity:
    """Which run it is.

    Attributes:
        run_id: names the run in the ledger; kept over every restart.
        config: the settings it was started with.
        dataset_fingerprint: what it is trained on.
        code_version: the lazydp that started it, sources included (`shared.version`).
        noise_multiplier: sigma, as configured or as calibrated when the run began; None without privacy.
        tuning: the sweep that the run is a trial of; all trials of a sweep share its run id.
        trial: which trial of the sweep it is, from 1; None outside a sweep.
        selected: whether the sweep is over and kept this trial; no other trial may be released.
        dataset_files: digest of the files that it is trained on; empty where an older lazydp began it.
        ledger: which ledger its reservation is in (`Ledger.name`); empty before it has one.
    """

    run_id: str
    config: TrainConfig
    dataset_fingerprint: str
    code_version: str
    noise_multiplier: float | None
    tuning: Tuning | None = None
    trial: int | None = None
    selected: bool = False
    dataset_files: str = ""
    ledger: str = ""

    def noise_key(self, root: NoiseKey) -> NoiseKey:
        """The key that the run draws under: its root key, or what a trial derives from that of its sweep."""
        return root if self.trial is None else root.derive(f"trial {self.trial}")

    def differences(self, other: RunIdentity) -> list[str]:
        """`what: other's != ours` for everything in which `other` could not go on with this run."""
        found = other.config.differences(self.config)
        for what, theirs, ours in (
            ("dataset", other.what_it_reads(self), self.what_it_reads(other)),
            ("run id", other.run_id, self.run_id),
            ("lazydp version", other.code_version, self.code_version),
            ("sweep", other.tuning, self.tuning),
        ):
            if theirs != ours:
                found.append(difference(what, theirs, ours))
        return found

    def what_it_reads(self, other: RunIdentity) -> tuple[str, str]:
        """The dataset by its fingerprint, and by its files where both runs know them."""
        return self.dataset_fingerprint, self.dataset_files if other.dataset_files else ""

    def marks(self) -> dict[str, Any]:
        """What a checkpoint of the run says of itself; private, for it holds the dataset's fingerprint."""
        return {
            "run id": self.run_id,
            "configuration": self.config.digest(),
            "dataset": self.dataset_fingerprint,
            "noise_multiplier": self.noise_multiplier,
            "lazydp version": self.code_version,
        }

    def to_json(self) -> dict[str, Any]:
        """As stored in run.json."""
        return {
            "run_id": self.run_id,
            "config": self.config.model_dump(mode="json"),
            "config_digest": self.config.digest(),
            "dataset_fingerprint": self.dataset_fingerprint,
            "code_version": self.code_version,
            "noise_multiplier": self.noise_multiplier,
            "tuning": None if self.tuning is None else self.tuning.model_dump(mode="json"),
            "trial": self.trial,
            "selected": self.selected,
            "dataset_files": self.dataset_files,
            "ledger": self.ledger,
        }

    @classmethod
    def from_json(cls, document: dict[str, Any], *, where: Path) -> RunIdentity:
        """The reverse of `to_json`.

        Raises:
            FormatError: a field is missing.
        """
        try:
            return cls(
                run_id=document["run_id"],
                config=TrainConfig.parse(document["config"], where=str(where)),
                dataset_fingerprint=document["dataset_fingerprint"],
                code_version=document["code_version"],
                noise_multiplier=document["noise_multiplier"],
                tuning=None if document.get("tuning") is None else Tuning.model_validate(document["tuning"]),
                trial=document.get("trial"),
                selected=document.get("selected", False),
                dataset_files=document.get("dataset_files", ""),
                ledger=document.get("ledger", ""),
            )
        except KeyError as error:
            raise FormatError(f"run {where} lacks {error}: it was not written whole") from error
        except ValidationError as error:
            raise FormatError(f"run {where} names a sweep that is none: {error.errors()[0]['msg']}") from error


def difference(what: str, theirs: Any, ours: Any) -> str:
    """`what: theirs != ours`; of a dataset no fingerprint, for more people read messages than may read the data."""
    return "dataset: its content is another" if what == "dataset" else f"{what}: {theirs!r} != {ours!r}"
