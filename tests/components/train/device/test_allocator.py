"""Freed memory is kept: a step's temporary blocks come without fresh pages."""

import os
import resource
import subprocess
import sys

import pytest

from lazydp.components.shared import huge_pages

_CHURN = """
import resource, torch
from lazydp.components.train.device.allocator import keep_freed_memory
torch.set_num_threads(1)
if {keep}: assert keep_freed_memory()
def step():
    blocks = [torch.ones(1 << 20) for _ in range(8)]  # 4 MiB each, freed together
for _ in range(20): step()  # until the heap has found its size
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10): step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*, keep: bool) -> int:
    # glibc adapts its thresholds to luck and layout; fixed low ones make the control certain.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    environment.pop(huge_pages.VARIABLE, None)  # one fault would bring 512 pages
    command = [sys.executable, "-c", _CHURN.format(keep=keep)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_a_settled_step_asks_for_no_fresh_pages() -> None:
    pages_of_a_step = 8 * (4 << 20) // resource.getpagesize()
    assert faults(keep=True) < pages_of_a_step // 4
    assert faults(keep=False) > 5 * pages_of_a_step  # the control
