"""Rates of the CUDA operators beside the card's copy bandwidth; one JSON object a line (`make gpu`).

Times are CUDA events, medians of repeats interleaved over the contestants, so that a change of clocks meets all alike.
The device is kept busy while a contestant is launched, so that the host's part is not in its time. `bytes` is what must
move at least: each row once in, once out.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median, quantiles

import torch
from torch import Tensor

from lazydp.kernels import ops
from lazydp.kernels.noise_key import NoiseKey

KEY = NoiseKey.for_tests(1).tensor()
COLUMNS = 128
REPEATS = 15
HEAD_START_CYCLES = 2_000_000  # about a millisecond


@dataclass(frozen=True)
class Contestant:
    """`prepare` runs before each timed `run`, outside the clock."""

    run: Callable[[], object]
    bytes: int
    normals: int = 0
    prepare: Callable[[], object] = lambda: None


def measure(bench: str, shape: str, contestants: dict[str, Contestant]) -> None:
    for contestant in contestants.values():
        contestant.prepare()
        contestant.run()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(REPEATS):
        for name, contestant in contestants.items():
            contestant.prepare()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(HEAD_START_CYCLES)
            begin.record()
            contestant.run()
            end.record()
            torch.cuda.synchronize()
            times[name].append(begin.elapsed_time(end) / 1e3)
    for name, contestant in contestants.items():
        middle, deciles = median(times[name]), quantiles(times[name], n=10)
        line = {
            "bench": bench,
            "shape": shape,
            "contestant": name,
            "median_s": middle,
            "p10_s": deciles[0],
            "p90_s": deciles[-1],
            "repeats": REPEATS,
            "bytes": contestant.bytes,
            "gb_per_s": round(contestant.bytes / middle / 1e9, 1),
            "normals_per_s": round(contestant.normals / middle) if contestant.normals else None,
            "ratios": {other: median(ts) / middle for other, ts in times.items() if other != name},
        }
        print(json.dumps(line), flush=True)


def whole_table(num_rows: int) -> None:
    weight = torch.zeros(num_rows, COLUMNS, device="cuda")
    velocity = torch.zeros_like(weight)
    other = torch.empty_like(weight)
    last = torch.zeros(num_rows, dtype=torch.int32, device="cuda")
    one, m, chol = (torch.rand(2, n, device="cuda") for n in (1, 4, 3))
    size, count = weight.numel() * 4, weight.numel()
    contestants = {
        "copy": Contestant(lambda: other.copy_(weight), 2 * size),
        "scale": Contestant(lambda: weight.mul_(0.999), 2 * size),
        "lazydp": Contestant(
            lambda: ops.flush_(weight, last, KEY, table=1, step=1, transition=one, factor=one),
            2 * size,
            count,
            last.zero_,
        ),
        "lazydp_momentum": Contestant(
            lambda: ops.flush_(weight, last, KEY, table=1, step=1, transition=m, factor=chol, momentum=velocity),
            4 * size,
            2 * count,
            last.zero_,
        ),
        "up_to_date": Contestant(
            lambda: ops.flush_(weight, last, KEY, table=1, step=1, transition=one, factor=one),
            4 * num_rows,
            0,
            lambda: last.fill_(1),
        ),
    }
    measure("flush", f"{num_rows}x{COLUMNS}", contestants)
    fill = {
        "torch": Contestant(other.normal_, size, count),
        "lazydp": Contestant(lambda: ops.normal_(other, KEY, table=1, first_row=0, step=1), size, count),
    }
    measure("noise", f"{num_rows}x{COLUMNS}", fill)


def one_step(num_rows: int, batch: int, tables: int) -> None:
    """The embedding part of a step of `tables` tables, as one table of all their rows: one lookup a bag, uniform."""
    total, lookups = num_rows * tables, batch * tables
    weight = torch.zeros(total, COLUMNS, device="cuda")
    last = torch.zeros(total, dtype=torch.int32, device="cuda")
    one = torch.rand(2, 1, device="cuda")
    indices = torch.randint(0, total, (lookups,), device="cuda")
    offsets = torch.arange(lookups + 1, device="cuda")
    bags = torch.arange(lookups, device="cuda")
    grad, scale = torch.randn(lookups, COLUMNS, device="cuda"), torch.rand(lookups, device="cuda")
    groups = ops.group_rows(indices, num_rows=total)
    skip = {"table": 1, "step": 1, "transition": one, "factor": one}
    moved = lookups * COLUMNS * 4

    def fused() -> Tensor:
        return ops.catch_up_bag_sum_(weight, last, groups, KEY, indices, offsets, bags, **skip)  # type: ignore[arg-type]

    def scatter() -> None:
        ops.scatter_add_(weight, groups, bags, grad, scale, alpha=-0.1)

    def norms() -> Tensor:
        return ops.bag_sq_norms(indices, offsets, grad.view(1, lookups, COLUMNS))

    def step() -> None:
        ops.group_rows(indices, num_rows=total)
        fused()
        norms()
        scatter()

    def floor() -> None:
        ops.group_rows(indices, num_rows=total)
        ops.bag_sum(weight, indices, offsets)
        scatter()

    contestants = {
        "group_rows": Contestant(lambda: ops.group_rows(indices, num_rows=total), 4 * 8 * lookups),
        "catch_up": Contestant(
            lambda: ops.catch_up_(weight, last, groups.rows, KEY, **skip),  # type: ignore[arg-type]
            2 * moved,
            lookups * COLUMNS,
            last.zero_,  # type: ignore[arg-type]
        ),
        "gather": Contestant(lambda: ops.bag_sum(weight, indices, offsets), 2 * moved),
        "catch_up_and_gather": Contestant(fused, 3 * moved, lookups * COLUMNS, last.zero_),
        "norms": Contestant(norms, moved),
        "scatter": Contestant(scatter, 3 * moved),
        "lazydp": Contestant(step, 7 * moved, lookups * COLUMNS, last.zero_),
        "sgd": Contestant(floor, 5 * moved),
    }
    measure("step", f"{tables}x{num_rows}x{COLUMNS}, batch {batch}", contestants)


def main() -> None:
    free = torch.cuda.mem_get_info()[0]
    print(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__, "free_bytes": free}))
    whole_table(min(8 << 20, free // (4 * COLUMNS * 4)))
    torch.cuda.empty_cache()
    for batch in (2048, 16384):
        one_step(min(1_000_000, free // (2 * 26 * COLUMNS * 4)), batch, 26)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
