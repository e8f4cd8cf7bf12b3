"""What was acknowledged to callers and must outlive the process: models that they loaded and unloaded by request.

Everything else that a service answers with is in bundles, ledger and settings, which are not the service's to lose.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from pydantic import TypeAdapter, ValidationError

from lazydp.components.shared.errors import FormatError
from lazydp.components.shared.files import read_json, sync_directory, write_json

_FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class Loaded:
    """A version brought in from the repository: its folder within the repository, links followed, and what it held."""

    folder: str
    version: str


@dataclass(frozen=True, slots=True)
class State:
    """Models loaded from the repository, and models unloaded, by name."""

    loaded: Mapping[str, Loaded] = field(default_factory=dict)
    unloaded: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: Path) -> Self:
        """The state at `path`; empty where there is none yet.

        Raises:
            FormatError: the file is not one of ours.
        """
        if not path.exists():
            return cls()
        document = read_json(path, format_version=_FORMAT_VERSION, what="state of the service")
        try:
            return _STATE.validate_python({name: document.get(name) for name in ("loaded", "unloaded")})  # type: ignore[return-value]
        except ValidationError as error:
            raise FormatError(
                f"{path} is no state of the service ({error.error_count()} problems): remove it"
            ) from None

    def with_loaded(self, name: str, loaded: Loaded | None) -> State:
        """After a load; None for one that the configuration brings back by itself."""
        others = {other: value for other, value in self.loaded.items() if other != name}
        kept = others if loaded is None else {**others, name: loaded}
        return State(kept, tuple(other for other in self.unloaded if other != name))

    def with_unloaded(self, name: str) -> State:
        """After an unload."""
        others = {other: value for other, value in self.loaded.items() if other != name}
        return State(others, tuple(sorted({*self.unloaded, name})))

    def write(self, path: Path) -> None:
        """Keep at `path`, through a loss of power."""
        loaded: dict[str, Any] = {
            name: {"folder": value.folder, "version": value.version} for name, value in self.loaded.items()
        }
        document = {"loaded": loaded, "unloaded": list(self.unloaded)}
        write_json(path, document, format_version=_FORMAT_VERSION)
        sync_directory(path.parent)


_STATE = TypeAdapter(State)
