"""Ingest that is ended at any moment: nothing that looks complete and isn't, nothing private left behind."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.ingest.ingest import ingest

KILLS = 50
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)
SPEC = (
    "name: a\nlabel: {kind: implicit}\nuser: {column: u, embed: false}\ntimestamp: t\nhistory: {max_length: 20}\n"
    "item: {column: i, vocabulary: {kind: integer, size: 1000}}\n"
)


def started(folder: Path) -> subprocess.Popen[bytes]:
    """Ingest over what is there, in small parts, so that there is much to be killed in."""
    program = [sys.executable, "-c", "from lazydp.pipelines.cli import main; main()", "ingest"]
    files = ["--input", str(folder / "log.parquet"), "--spec", str(folder / "spec.yaml"), "--out", str(folder / "out")]
    words = [*program, *files, "--replace", "--memory", "16m", "--parts", "4"]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_killed_ingest_leaves_the_old_dataset_or_the_new_one(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    logs = []
    for users in (20_000, 30_000):
        columns = [generator.integers(0, users, 10**6), generator.integers(0, 1000, 10**6), np.arange(10**6)]
        logs.append(pa.table(columns, names=["u", "i", "t"]))
    (tmp_path / "spec.yaml").write_text(SPEC)
    expected = set()
    for number, log in enumerate(logs):
        pq.write_table(log, tmp_path / "log.parquet")
        begun = time.monotonic()
        assert started(tmp_path).wait() == 0
        took = time.monotonic() - begun
        expected.add(EncodedDataset.open(tmp_path / "out").manifest.fingerprint)
        assert len(expected) == number + 1
    inputs = {"log.parquet", "spec.yaml", "out"}
    moments = random.Random(0)
    left_by_kill = ended = 0
    for number in range(KILLS):
        # Now this log, now that one, over what the other made.
        pq.write_table(logs[number % 2], tmp_path / "log.parquet")
        kind = SIGNALS[number % len(SIGNALS)]
        process = started(tmp_path)
        time.sleep(moments.uniform(0.05, 0.9) * took)
        process.send_signal(kind)
        process.wait()
        ended += process.returncode != 0
        left = {path.name for path in tmp_path.iterdir()} - inputs
        if kind is signal.SIGKILL:
            left_by_kill += bool(left)
            # Whoever writes there next removes what is left of it, also another dataset.
            small = pa.table({"u": [1, 2], "i": [1, 2], "t": [1, 2]})
            pq.write_table(small, tmp_path / "log.parquet")
            ingest([str(tmp_path / "log.parquet")], SPEC, tmp_path / "other")
            left = {path.name for path in tmp_path.iterdir()} - inputs - {"other"}
            shutil.rmtree(tmp_path / "other")
        assert left == set(), f"{kind.name} left {left}"
        # Every digest of it is compared.
        assert EncodedDataset.open(tmp_path / "out").manifest.fingerprint in expected
    # The controls: many were killed while they worked, and SIGKILL leaves something to be removed.
    assert ended > KILLS // 4
    assert left_by_kill > 0
