"""Writes the tables of docs/scaling.md: what a step sends, holds and takes on 8 to 512 hosts. No cluster is needed.

Run it from the root of the repository: `.venv/bin/python docs/generate_scaling.py`.

Bytes follow the table in docs/distributed.md, which a test holds against what ranks count. Distinct rows and bags are
counted from drawn batches. Speeds of networks, memories and processors are assumptions, named in the page: times are
estimates of what bounds a step, not measurements.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from lazydp.components.train.ranks.places import Places, shard

PAGE = Path(__file__).with_name("scaling.md")
BEGIN, END = "<!-- tables -->", "<!-- end of tables -->"

# Rows and lookups of an example in each table of MLPerf's DLRM-v2 (Criteo 1TB, multi-hot).
TABLES: tuple[tuple[int, int], ...] = (
    (40_000_000, 3),
    (39_060, 2),
    (17_295, 1),
    (7_424, 2),
    (20_265, 6),
    (3, 1),
    (7_122, 1),
    (1_543, 1),
    (63, 1),
    (40_000_000, 7),
    (3_067_956, 3),
    (405_282, 8),
    (10, 1),
    (2_209, 6),
    (11_938, 9),
    (155, 5),
    (4, 1),
    (976, 1),
    (14, 1),
    (40_000_000, 12),
    (40_000_000, 100),
    (40_000_000, 27),
    (590_152, 10),
    (12_973, 3),
    (108, 1),
    (36, 1),
)
DIM = 128
PARAMETERS = 16_000_000
"""Of the dense layers: about those of MLPerf's reference model (DCN-v2 of rank 512 over 3,456 inputs)."""
ZIPF = 1.05
HOSTS = (8, 64, 512)
BATCHES = (2048, 8192, 65536)
MOST_DRAWN = 8192
"""Examples that are drawn of a step; the ranks beyond them read alike."""
NETWORKS = {"100 Gb/s": 100e9 / 8, "400 Gb/s": 400e9 / 8}
USED = 0.5
"""Share of a network's rate that an all-to-all reaches: an assumption."""
MESSAGE_SECONDS = 20e-6
"""Of a message, however short: an assumption."""
CHECKPOINT_RATE = 2e9
"""Bytes a second that a host writes to shared storage: an assumption."""
FLUSH_RATES = {"two CPU threads": 1.16e9, "an H100": 136e9}
"""Elements a second, measured (docs/benchmarks.md): 2 GiB in 461 ms, and 4 GiB at 136 G normals a second."""


@dataclass(frozen=True, slots=True)
class Step:
    """What a rank sends in a step.

    Attributes:
        ids, rows, gradients, dense: bytes by purpose.
        busiest: rows that the busiest owner serves, over the mean.
    """

    ids: float
    rows: float
    gradients: float
    dense: float
    busiest: float

    @property
    def sent(self) -> float:
        """All bytes."""
        return self.ids + self.rows + self.gradients + self.dense


def drawn(rows: int, lookups: int, generator: np.random.Generator) -> npt.NDArray[np.int64]:
    """Row numbers with Zipf frequencies, by inversion of the continuous law."""
    a = 1.0 - ZIPF
    uniform = generator.random(lookups)
    found = ((rows + 1) ** a - 1.0) * uniform + 1.0
    return np.minimum((found ** (1.0 / a)).astype(np.int64) - 1, rows - 1)


def step(hosts: int, batch: int) -> Step:
    """One step of `batch` examples, of which each rank has the same number; bytes are means over the ranks drawn."""
    generator = np.random.default_rng(0)
    examples = max(1, batch // hosts)
    ranks = max(1, min(hosts, MOST_DRAWN // examples))
    elsewhere = (hosts - 1) / hosts
    ids = rows = gradients = 0.0
    served = np.zeros(hosts)
    for num_rows, lookups in TABLES:
        read = drawn(num_rows, ranks * examples * lookups, generator)
        places = Places.of_table(num_rows, "spread").of(torch.from_numpy(read)).numpy()
        starts = [shard(num_rows, rank=rank, ranks=hosts).start for rank in range(1, hosts)]
        example = np.repeat(np.arange(ranks * examples), lookups)
        distinct = np.unique(example // examples * num_rows + places) % num_rows  # of each rank
        served += np.bincount(np.searchsorted(starts, distinct, side="right"), minlength=hosts)
        bags = len(np.unique(example * hosts + np.searchsorted(starts, places, side="right")))
        ids += 4 * (len(distinct) + 2 * len(places)) * elsewhere / ranks
        rows += 4 * DIM * len(distinct) * elsewhere / ranks
        gradients += 4 * (DIM + 1) * bags * elsewhere / ranks
    dense = 16 * -(-PARAMETERS // hosts) * (hosts - 1)
    return Step(ids, rows, gradients, dense, float(served.max() / served.mean()))


def row_of_step(hosts: int, batch: int) -> str:
    """A line of the table of steps."""
    found = step(hosts, batch)
    messages = 9 * (hosts - 1) * MESSAGE_SECONDS
    times = [found.sent / (rate * USED) + messages for rate in NETWORKS.values()]
    cells = [_megabytes(x) for x in (found.ids, found.rows, found.gradients, found.dense, found.sent)]
    cells += [f"{found.busiest:.2f}", *(f"{1e3 * time:.0f} ms" for time in times)]
    return f"| {hosts} | {batch:,} | " + " | ".join(cells) + " |"


def memory_table() -> Iterator[str]:
    """The table of memory, checkpoints and the flush."""
    total = sum(rows for rows, _ in TABLES)
    names = ["hosts", "weights and `last`", "with momentum", "dense layers, Adam, float64 sums", "checkpoint", "write"]
    names += [f"flush by {name}" for name in FLUSH_RATES]
    yield "| " + " | ".join(names) + " |"
    yield "| --- " * len(names) + "|"
    for hosts in HOSTS:
        weights = total * (4 * DIM + 4) / hosts
        dense = PARAMETERS * (4 + 4 + 8 + 8)
        written = weights + PARAMETERS * 12 / hosts
        cells = [weights / 1e9, (weights + total * 4 * DIM / hosts) / 1e9, dense / 1e9]
        flushes = [total * DIM / hosts / rate for rate in FLUSH_RATES.values()]
        yield (
            f"| {hosts} | "
            + " | ".join(f"{cell:.2f} GB" for cell in cells)
            + f" | {weights * hosts / 1e9:.0f} GB | {written / CHECKPOINT_RATE:.1f} s | "
            + " | ".join(f"{seconds:.2g} s" for seconds in flushes)
            + " |"
        )


def tables() -> Iterator[str]:
    """The lines of the page between its marks."""
    total = sum(rows for rows, _ in TABLES)
    yield (
        f"{total / 1e6:.1f} million rows of {DIM} columns, {total * DIM * 4 / 1e9:.0f} GB of weights; "
        f"{PARAMETERS / 1e6:.0f} million dense parameters.\n"
    )
    yield "### Bytes that a rank sends in a step, and what they take\n"
    names = ["hosts", "batch", "ids", "rows", "gradients", "dense sums", "all", "busiest owner", *NETWORKS]
    yield "| " + " | ".join(names) + " |"
    yield "| --- " * len(names) + "|"
    for hosts in HOSTS:
        for batch in BATCHES:
            yield row_of_step(hosts, batch)
    yield "\n### Memory of a host, checkpoints and the flush\n"
    yield from memory_table()


def _megabytes(count: float) -> str:
    return f"{count / 1e6:.1f} MB"


def main() -> None:
    """Put the tables into the page."""
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n\n" + "\n".join(tables()) + f"\n\n{END}{after}")


if __name__ == "__main__":
    main()
