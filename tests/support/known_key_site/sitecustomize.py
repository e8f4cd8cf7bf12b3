"""Read by a Python that starts with this folder on its path: see `support.known_key`."""

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

_MODULE = "lazydp.kernels.noise_key"


class _Finder(importlib.abc.MetaPathFinder):
    """Replaces the source of keys when its module is loaded; to load it here would bring torch to every process."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _MODULE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None
        assert spec.loader is not None
        loader = spec.loader
        load = loader.exec_module

        def load_and_replace(module: ModuleType) -> None:
            load(module)
            sys.path.insert(0, str(Path(__file__).parents[2]))
            import pytest

            from support import known_key

            known_key.replace(os.environ[known_key.VARIABLE], pytest.MonkeyPatch())

        loader.exec_module = load_and_replace  # type: ignore[method-assign]
        return spec


if "SUPPORT_KNOWN_KEY" in os.environ:
    sys.meta_path.insert(0, _Finder())
