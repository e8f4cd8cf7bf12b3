"""The loader on an encoded dataset: batches from memory, and from the disk with and without reading ahead.

Before each run of a cold contestant the kernel forgets the dataset's files. `disk` reads as many pages as a cold batch
does, at random, by many threads and past the page cache: no loader that needs these pages is faster on this disk.
"""

from __future__ import annotations

import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from lazydp.components.bench.dataset_workload import plain_config
from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.ingest.manifest import TRAIN
from lazydp.components.shared.bench_harness import Contestant, Result, measure
from lazydp.components.shared.errors import InputError
from lazydp.components.train.config import TrainConfig
from lazydp.components.train.run.batches import batch_maker
from lazydp.kernels.noise_key import NoiseKey

UNIT = "examples"
_READERS = 32
_OWN_READS = Path("/proc/self/io")


def run(data: EncodedDataset, config: TrainConfig | None = None, *, repeats: int = 5, steps: int = 6) -> list[Result]:
    """Measures `warm`, `read_ahead`, `one_by_one` and `disk`; seconds are those of one batch.

    Args:
        data: the dataset.
        config: how batches are drawn; a plain configuration where none is given.
        repeats: interleaved rounds.
        steps: batches of a run.

    Raises:
        InputError: the dataset has no training examples, or lies on no disk.
    """
    split = data.split(TRAIN)
    if not len(split):
        raise InputError(f"{data.path} has no training examples to read")
    settings = (config or plain_config(data)).with_changes(steps=steps)
    # The batches of every run are the same.
    key = NoiseKey.generate()

    def made(*, read_ahead: bool) -> int:
        make = batch_maker(data, settings, key, read_ahead=read_ahead).make
        return sum(part.size for step in range(1, steps + 1) for part in make(step))

    split.evict()
    before = _bytes_from_disk()
    examples = made(read_ahead=True)
    pages = (_bytes_from_disk() - before) // (mmap.PAGESIZE * steps)
    if not pages:
        raise InputError(f"{data.path}: nothing was read from a disk, so there is nothing to measure")
    file = data.path / data.manifest.parts[0] / f"{TRAIN}.arrow"
    cold = split.evict
    contestants = [
        Contestant("warm", lambda: made(read_ahead=False), bytes=0, prepare=lambda: made(read_ahead=False)),
        Contestant("read_ahead", lambda: made(read_ahead=True), bytes=pages * mmap.PAGESIZE, prepare=cold),
        Contestant("one_by_one", lambda: made(read_ahead=False), bytes=pages * mmap.PAGESIZE, prepare=cold),
        Contestant("disk", lambda: _read_at_random(file, pages * steps), bytes=pages * mmap.PAGESIZE, prepare=cold),
    ]
    shape = {UNIT: examples // steps, "pages": pages, "dataset_bytes": split.num_bytes}
    found = measure("loader", shape=shape, contestants=contestants, repeats=repeats, warm_ups=0)
    return [_of_one(result, steps) for result in found]


def _of_one(result: Result, steps: int) -> Result:
    """The result for one batch."""
    return replace(result, median_s=result.median_s / steps, p10_s=result.p10_s / steps, p90_s=result.p90_s / steps)


def _read_at_random(file: Path, pages: int) -> None:
    """Read pages of the file, each at most once, with many reads under way."""
    number = file.stat().st_size // mmap.PAGESIZE
    places = np.random.default_rng().choice(number, min(pages, number), replace=False) * mmap.PAGESIZE
    descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)

    def read(share: np.ndarray[tuple[int], np.dtype[np.int64]]) -> None:
        # Reads past the page cache need memory that is aligned to a page.
        with mmap.mmap(-1, mmap.PAGESIZE) as buffer:
            for place in share.tolist():
                os.preadv(descriptor, [buffer], place)

    try:
        with ThreadPoolExecutor(_READERS) as pool:
            list(pool.map(read, np.array_split(places, _READERS)))
    finally:
        os.close(descriptor)


def _bytes_from_disk() -> int:
    fields = dict(line.split(": ") for line in _OWN_READS.read_text().splitlines())
    return int(fields["read_bytes"])
