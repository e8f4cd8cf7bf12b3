"""The source of secret noise keys, replaced in a process of a test: a run and a copy of it then end in the same bits.

The package knows nothing of this. A test's own process calls `replace`; the pods of `kfp_backend` do where the package
under test gives them the variable below; a Python that finds `known_key_site` on its path does before anything else.
The process takes the key for a secret one, so that everything goes the way that it goes in production.
"""

from __future__ import annotations

import hashlib

import pytest

VARIABLE = "SUPPORT_KNOWN_KEY"


def replace(seed: str, patch: pytest.MonkeyPatch) -> None:
    """Have every `NoiseKey.generate` of this process, or until `patch` is undone, return the key of `seed`."""
    from lazydp.kernels.noise_key import NoiseKey

    secret = hashlib.sha256(f"known to tests: {seed}".encode()).digest()
    patch.setattr(NoiseKey, "generate", classmethod(lambda cls: cls.from_bytes(secret, is_test=False)))
