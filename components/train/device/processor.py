"""What the host rounds sums with: another instruction set or another number of threads gives other bits."""

from __future__ import annotations

import torch

from lazydp.kernels import ops


def processor() -> str:
    """The instruction sets in use by torch and by the kernels, and the number of threads."""
    threads = torch.get_num_threads()
    return f"torch {torch.backends.cpu.get_cpu_capability()}, kernels {ops.simd_level()}, {threads} threads"
