"""The measuring harness: what it records, how it interleaves, what it prints."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from lazydp.components.bench import flush, noise, operations
from lazydp.components.shared.bench_harness import Contestant, Result, measure, print_table

TIMES = ["median_s", "p10_s", "p90_s", "repeats"]
COUNTS = ["bytes", "flops", "minor_faults", "peak_rss_bytes", "ratios"]
FIELDS = ["bench", "shape", "contestant", *TIMES, *COUNTS]


def burn(loops: int) -> int:
    return sum(range(loops))


def measured(repeats: int = 9) -> list[Result]:
    contestants = [
        Contestant("short", lambda: burn(20_000), bytes=10, flops=20_000),
        Contestant("long", lambda: burn(200_000), bytes=20),
    ]
    return measure("burn", shape={"loops": 20_000}, contestants=contestants, repeats=repeats)


def test_results_have_the_fields_of_the_design() -> None:
    for result in measured(3):
        assert list(json.loads(result.to_json())) == FIELDS
        assert result.p10_s <= result.median_s <= result.p90_s
        assert result.peak_rss_bytes > 2**20
        assert result.repeats == 3


def test_ratio_is_this_median_over_the_other() -> None:
    short, long = measured()
    assert long.ratios["short"] == pytest.approx(long.median_s / short.median_s)
    assert long.ratios["short"] == pytest.approx(1 / short.ratios["long"])
    assert long.ratios["short"] > 3, "ten times the work"


def test_repeats_are_interleaved_and_prepared() -> None:
    seen: list[str] = []
    contestants = [
        Contestant(
            name,
            lambda name=name: seen.append(name),  # type: ignore[misc]
            bytes=0,
            prepare=lambda name=name: seen.append(f"prepare {name}"),  # type: ignore[misc]
        )
        for name in ("a", "b", "c")
    ]
    measure("order", shape={}, contestants=contestants, repeats=3, warm_ups=0)
    runs = [name for name in seen if not name.startswith("prepare")]
    assert seen[::2] == [f"prepare {name}" for name in runs]
    assert runs == [*"abc", *"bca", *"cab"]


def test_nothing_to_measure_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one repeat"):
        measure("none", shape={}, contestants=[], repeats=1)


def test_table_shows_every_contestant_with_its_operations() -> None:
    out = io.StringIO()
    print_table(measured(3), unit="loops", console=Console(file=out, width=80))
    assert "short" in out.getvalue()
    assert "long: 0.001 bytes" in out.getvalue()
    assert "short: 0.0005 bytes, 1 operations" in out.getvalue()
    assert max(map(len, out.getvalue().splitlines())) <= 80, "fits a terminal"


def test_noise_measures_its_contestants() -> None:
    results = noise.run(count=128 * 100, repeats=2)
    assert [result.contestant for result in results] == ["lazydp", "torch", "numpy"]
    assert results[0].shape[noise.UNIT] == 12800
    assert results[0].flops == operations.of_draw(100, 128)
    with pytest.raises(ValueError, match="at least 128"):
        noise.run(count=127)


def test_flush_measures_its_contestants_and_applies_all_noise() -> None:
    results = flush.run(table_bytes=2**20, repeats=2)
    assert [result.contestant for result in results] == ["lazydp", "copy", "scale"]
    assert results[0].shape[flush.UNIT] == 2048
    assert results[0].bytes > results[1].bytes == 2 * 2**20
    with pytest.raises(ValueError, match="at least one row"):
        flush.run(table_bytes=100)
