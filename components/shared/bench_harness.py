"""Contestants measured against each other in one run: interleaved repeats, medians, ratios; one JSON object each.

Repeats are interleaved (every contestant once a round, in rotating order) so that whatever else the machine does in the
meantime falls on all of them alike.
"""

from __future__ import annotations

import json
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from rich.console import Console
from rich.table import Table

_KIB = 1024


def _nothing() -> None:
    return None


@dataclass(frozen=True, slots=True)
class Contestant:
    """One way to do the work.

    Attributes:
        name: as it stands in the results.
        run: does the work once; this is what is timed.
        bytes: read plus written by one run, counted from the shapes.
        flops: arithmetic operations of one run, counted from the source (an fma is two); None where it cannot be seen.
        prepare: done before each run, untimed.
    """

    name: str
    run: Callable[[], object]
    bytes: int
    flops: int | None = None
    prepare: Callable[[], object] = _nothing


@dataclass(frozen=True, slots=True)
class Result:
    """What one contestant reached. Times in seconds; `ratios` are this median over the other's."""

    bench: str
    shape: dict[str, int]
    contestant: str
    median_s: float
    p10_s: float
    p90_s: float
    repeats: int
    bytes: int
    flops: int | None
    minor_faults: int
    peak_rss_bytes: int
    ratios: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> str:
        """One line, the fields of this class by name."""
        return json.dumps(asdict(self))

    @property
    def bytes_per_second(self) -> float:
        """Bytes read plus written, by the median."""
        return self.bytes / self.median_s


@dataclass(slots=True)
class _Timings:
    seconds: list[float] = field(default_factory=list)
    minor_faults: list[int] = field(default_factory=list)


def measure(
    bench: str,
    *,
    shape: Mapping[str, int],
    contestants: Sequence[Contestant],
    repeats: int,
    warm_ups: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Result]:
    """Runs every contestant `warm_ups` times unrecorded, then `repeats` rounds; results in the contestants' order.

    `clock` gives seconds; `time.process_time` those that this process computed, whatever else the machine does.
    Raises ValueError where there is nothing to measure.
    """
    if repeats < 1 or not contestants:
        raise ValueError(
            f"{bench}: expected at least one repeat and one contestant, found {repeats}, {len(contestants)}"
        )
    timings = {contestant.name: _Timings() for contestant in contestants}
    for round_number in range(-warm_ups, repeats):
        turn = round_number % len(contestants)
        for contestant in [*contestants[turn:], *contestants[:turn]]:
            seconds, faults = _time_once(contestant, clock)
            if round_number >= 0:
                timings[contestant.name].seconds.append(seconds)
                timings[contestant.name].minor_faults.append(faults)
    medians = {name: statistics.median(timing.seconds) for name, timing in timings.items()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB
    return [
        Result(
            bench=bench,
            shape=dict(shape),
            contestant=contestant.name,
            median_s=medians[contestant.name],
            p10_s=_quantile(timings[contestant.name].seconds, 0.1),
            p90_s=_quantile(timings[contestant.name].seconds, 0.9),
            repeats=repeats,
            bytes=contestant.bytes,
            flops=contestant.flops,
            minor_faults=int(statistics.median(timings[contestant.name].minor_faults)),
            peak_rss_bytes=peak,
            ratios={
                name: medians[contestant.name] / median for name, median in medians.items() if name != contestant.name
            },
        )
        for contestant in contestants
    ]


def print_table(results: Sequence[Result], *, unit: str, console: Console | None = None) -> None:
    """A table for people; `unit` names the entry of `shape` that times, bytes and operations are divided by.

    Beneath the rates that were reached stand the bytes and operations of one unit, as they were counted.
    """
    first = results[0]
    one = unit.removesuffix("s")
    count = first.shape[unit]
    fastest = min(result.median_s for result in results)
    shape = ", ".join(f"{name} {value:,}" for name, value in first.shape.items())
    counted = [f"counted per {one}"]
    table = Table(title=f"{first.bench}: {shape}; {first.repeats} interleaved repeats", caption_justify="left")
    table.add_column("contestant", no_wrap=True)
    for heading in ("median ms", "p10", "p90", f"ns/{one}", "GB/s", "Gop/s", "times"):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        reached = ""
        counted.append(f"{result.contestant}: {_short(result.bytes / count)} bytes")
        if result.flops is not None:
            counted[-1] += f", {_short(result.flops / count)} operations"
            reached = _short(result.flops / result.median_s / 1e9)
        table.add_row(
            result.contestant,
            _short(result.median_s * 1e3),
            _short(result.p10_s * 1e3),
            _short(result.p90_s * 1e3),
            _short(result.median_s / count * 1e9),
            _short(result.bytes_per_second / 1e9),
            reached,
            f"{result.median_s / fastest:.2f}",
        )
    table.caption = "\n".join(counted)
    (console or Console()).print(table)


def _short(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _time_once(contestant: Contestant, clock: Callable[[], float]) -> tuple[float, int]:
    contestant.prepare()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    start = clock()
    contestant.run()
    seconds = clock() - start
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults


def _quantile(values: Sequence[float], q: float) -> float:
    """Linear interpolation between the order statistics."""
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])
