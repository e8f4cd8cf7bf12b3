"""`lazydp bench scale`: what is measured, and how it is counted and drawn."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from click.testing import CliRunner

from lazydp.components.bench import cli, scale
from lazydp.components.bench.shapes import Access, shape_of
from lazydp.components.shared.errors import InputError

SMALL = shape_of("small")
GIB = 1000 * 3 * 8 * 4 / 2**30  # a thousand rows


def test_each_combination_is_measured_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = scale.run
    monkeypatch.setattr(scale, "run", lambda **settings: run(**settings, shape=SMALL))
    chosen = ["--gib", str(GIB), "--gib", str(2 * GIB), "--batch", "8", "--batch", "16"]
    plot = tmp_path / "scale.svg"
    shown = CliRunner().invoke(cli.scale, [*chosen, "--repeats", "1", "--json", "--plot", str(plot)])
    assert shown.exit_code == 0, shown.output
    lines = [json.loads(line) for line in shown.output.splitlines()]
    found = {(line["rows"], line["batch_size"], line["access"]) for line in lines}
    assert found == set(itertools.product((1000, 2000), (8, 16), ("uniform", "zipf")))
    assert ElementTree.parse(plot).getroot().tag.endswith("svg")
    table = CliRunner().invoke(cli.scale, ["--gib", str(GIB), "--batch", "8", "--access", "zipf", "--repeats", "1"])
    assert len(table.output.splitlines()) == 2


def test_a_lazy_step_is_counted_with_its_part_of_a_flush() -> None:
    seconds = {"torch_sgd": 1.0, "torch_eager": 60.0, "dpsgd": 12.0, "lazydp": 2.0, "flush": 10.0}
    found = scale.Scale(
        gib=1.0,
        rows=1,
        batch_size=1,
        access="uniform",
        threads=1,
        repeats=1,
        flush_every=10,
        seconds=seconds,
        peak_rss_bytes=1,
    )
    assert found.step_s("lazydp") == 3.0
    assert found.times("torch_eager") == 20.0


def test_plain_torch_adds_noise_to_every_row() -> None:
    shape = replace(SMALL, rows=20_000)
    weights, before = shape.weights(), shape.weights()
    trainer = scale.TorchEager(shape, weights)
    trainer.step(shape.batch(1))
    for name, weight in weights.items():
        moved = weight - before[name]
        assert bool(moved.any(dim=1).all())
        assert float(moved.std()) == pytest.approx(1 / shape.batch_size, rel=0.05)


@pytest.mark.parametrize(("access", "first", "second"), [("uniform", 0.001, 0.001), ("zipf", 0.1003, 0.0587)])
def test_rows_are_drawn_as_stated(access: Access, first: float, second: float) -> None:
    """Of n rows the k-th by frequency has log(1 + 1 / k) / log(n + 1) of the draws, or each has 1 / n."""
    shape = replace(SMALL, batch_size=50_000, access=access)
    rows = shape.examples(0).bags["table0"].values
    shares = torch.bincount(rows, minlength=shape.rows) / rows.numel()
    assert shares.numel() == shape.rows
    largest = shares.sort(descending=True).values
    # Of a thousand equal shares the largest lies some four standard deviations above the mean.
    assert float(largest[0]) == pytest.approx(first, rel=0.05 if access == "zipf" else 1.0)
    assert float(largest[1]) == pytest.approx(second, rel=0.05 if access == "zipf" else 1.0)


def test_tables_of_no_row_are_refused() -> None:
    with pytest.raises(InputError, match="less than one row"):
        list(scale.run(gib=[1e-9], batch_sizes=[1], accesses=["uniform"], repeats=1))
