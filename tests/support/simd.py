"""Runs a test with the kernels of another instruction set."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from lazydp.kernels import ops


@contextlib.contextmanager
def at_level(level: ops.SimdLevel) -> Iterator[None]:
    """The kernels of `level` inside; skips the test where this machine does not run them."""
    if level not in ops.simd_levels():
        pytest.skip(f"this machine does not run {level}; it runs {', '.join(ops.simd_levels())}")
    before = ops.simd_level()
    ops.set_simd_level(level)
    try:
        yield
    finally:
        ops.set_simd_level(before)
