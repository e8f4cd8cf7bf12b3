"""A step and a flush allocate nothing of table size."""

from __future__ import annotations

import subprocess
import sys

import pytest

TABLE_MIB = 256

# In a process of its own: the peak resident set only grows, and pytest's own is large already.
PROGRAM = """
import torch
from lazydp.kernels import ops
from lazydp.kernels.noise_key import NoiseKey

def peak_mib():
    # Not ru_maxrss: a process inherits that of the one that started it.
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024

rows, columns, batch = {table_mib} * 2**20 // 512, 128, 256
key = NoiseKey.for_tests(1).tensor()
weight, last = torch.zeros(rows, columns), torch.zeros(rows, dtype=torch.int32)
weight.fill_(1.0); last.fill_(0)
one = torch.ones(8, 1)
indices = torch.randint(0, rows, (batch,))
offsets = torch.arange(batch + 1)
grad = torch.randn(batch, columns)

def step(number):
    groups = ops.group_rows(indices, num_rows=rows)
    ops.catch_up_(weight, last, groups.rows, key, table=0, step=number, transition=one, factor=one)
    ops.bag_sum(weight, indices, offsets)
    norms = ops.bag_sq_norms(indices, offsets, grad[None])
    ops.scatter_add_(weight, groups, ops.bag_ids(offsets), grad, norms.float(), alpha=-0.1, bound=1.0)

def flush(number):
    ops.flush_(weight, last, key, table=0, step=number, transition=one, factor=one)

def copy(number):
    weight.clone().fill_(0.0)

# Threads and code pages are paid for on a small table.
small, small_last = torch.zeros(4096, columns), torch.zeros(4096, dtype=torch.int32)
ops.flush_(small, small_last, key, table=1, step=1, transition=one, factor=one)
ops.bag_sum(small, indices % 4096, offsets)
for action in (step, flush, copy):
    before = peak_mib()
    for number in range(3):
        action(3 * (action is flush) + number + 1)
    print(action.__name__, peak_mib() - before)
"""


@pytest.fixture(scope="module")
def growth_mib() -> dict[str, float]:
    """Growth of the peak resident set, in MiB, over three calls of each action on a table of TABLE_MIB."""
    program = PROGRAM.replace("{table_mib}", str(TABLE_MIB))
    output = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    return {name: float(growth) for name, growth in (line.split() for line in output.splitlines())}


@pytest.mark.parametrize("action", ["step", "flush"])
def test_allocates_nothing_of_table_size(action: str, growth_mib: dict[str, float]) -> None:
    assert growth_mib[action] < TABLE_MIB / 16


def test_the_measurement_sees_a_copy_of_the_table(growth_mib: dict[str, float]) -> None:
    assert growth_mib["copy"] > TABLE_MIB * 0.9
