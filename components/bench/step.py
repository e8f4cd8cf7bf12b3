"""A training step, private and not, in one interleaved run: what does privacy cost, and does it grow with the tables?

Contestants take turns on the same tables, so that tables may be as large as memory holds; each keeps its own dense
layers. `torch_sgd` is plain PyTorch; `sgd`, `lazydp` and `dpsgd` are one engine; `opacus` is Opacus with ghost
clipping, on the named shapes alone, and where its dense table gradients and noise fit into memory.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from lazydp.components.bench.embeddings import OurEmbeddings, TorchEmbeddings
from lazydp.components.bench.shapes import StepShape, shape_of
from lazydp.components.bench.trainers import OpacusGhost, TorchSgd, Trainer, engine
from lazydp.components.bench.workload import Workload
from lazydp.components.shared.bench_harness import Contestant, Result, measure
from lazydp.components.shared.errors import InputError
from lazydp.components.shared.memory import available_memory
from lazydp.components.train.data.examples import Examples
from lazydp.components.train.device.placement import HOST, Placement, wait
from lazydp.components.train.engine.timer import StepTimer
from lazydp.components.train.tables.embedding_tables import Mode

Part = Literal["whole", "embeddings"]
"""The whole step, or its embedding part by itself."""

UNIT = "examples"
OURS: tuple[Mode, ...] = ("sgd", "lazydp", "dpsgd")
CONTESTANTS = ("torch_sgd", *OURS, "opacus")
_BATCHES = 8
# Gradient, noise and the sum of both, each as large as the tables, beside the tables.
_OPACUS_COPIES = 4
_GIB = 2**30


@dataclass(frozen=True, slots=True)
class Breakdown:
    """Where a step of `lazydp` goes, in mean seconds: its phases in their order, and what lies between them."""

    phases: dict[str, float]
    step_s: float

    @property
    def between(self) -> float:
        """Seconds of the step in no phase: the interpreter, hooks, the report."""
        return self.step_s - sum(self.phases.values())

    def parts(self) -> dict[str, float]:
        """Phases and the rest; they add up to the step."""
        return {**self.phases, "between phases": self.between}


def named(shape: str, *, rows: int | None = None) -> StepShape:
    """The shape `mlperf`, `pooled` or `small`, tables of at most half of the available memory if `rows` is None.

    Raises:
        InputError: there is no such shape.
    """
    made = shape_of(shape, rows=rows)
    if rows is not None:
        return made
    fitting = made.rows * (available_memory() // 2) // made.table_bytes
    return replace(made, rows=max(1, min(made.rows, fitting)))


def run(
    workload: Workload,
    *,
    repeats: int = 9,
    contestants: Sequence[str] = CONTESTANTS,
    part: Part = "whole",
    growth: int | None = None,
    placement: Placement = HOST,
) -> list[Result]:
    """Measure a step of each contestant; results in their order.

    Args:
        workload: a named shape, or a dataset.
        repeats: rounds, each with one step of every contestant.
        contestants: names from `CONTESTANTS`; those that can't run the workload are left out (`left_out` says why).
        part: the whole step, or the embedding part.
        growth: also measure our own contestants on tables with so many times fewer rows, as `lazydp/16`: the ratio of
            the two is the growth of the step. Named shapes only.
        placement: where dense layers compute and tables live, for all contestants alike.

    Raises:
        InputError: an unknown contestant, or growth of a dataset's tables.
    """
    for name in contestants:
        if name not in CONTESTANTS:
            raise InputError(f"no contestant {name!r}: choose from {', '.join(CONTESTANTS)}")
    entering = [name for name in contestants if left_out(name, workload, part, placement) is None]
    if not entering:
        raise InputError(f"none of {', '.join(contestants)} can run this: choose others with --contestant")
    entered = _entered(workload, entering, part=part, placement=placement)
    if growth is not None:
        if not isinstance(workload, StepShape):
            raise InputError("growth is measured on a named shape: the tables of a dataset have the size they have")
        small = replace(workload, rows=max(1, workload.rows // growth))
        ours = [name for name in entering if name in OURS]
        entered += [
            replace(contestant, name=f"{contestant.name}/{growth}")
            for contestant in _entered(small, ours, part=part, placement=placement)
        ]
    shape = workload.figures() | _where(placement)
    return measure("step", shape=shape, contestants=entered, repeats=repeats, warm_ups=2)


def _where(placement: Placement) -> dict[str, int]:
    if placement == HOST:
        return {}
    return {"layers_on_gpu": 1, "tables_on_gpu": int(placement.table_device.type == "cuda")}


def left_out(name: str, workload: Workload, part: Part = "whole", placement: Placement = HOST) -> str | None:
    """Why a contestant cannot run a workload; None where it can."""
    if name != "opacus":
        return None
    if placement != HOST:
        return "opacus is left out: it is measured on the CPU alone"
    if part == "embeddings":
        return "opacus is left out: it has no embedding part of its own"
    if not isinstance(workload, StepShape):
        return "opacus is left out: it knows no bags of varying length; it runs on the named shapes (--shape)"
    needed, free = _OPACUS_COPIES * workload.table_bytes, available_memory()
    if needed < free:
        return None
    return (
        f"opacus is left out: gradient and noise of every row take {needed / _GIB:.1f} GiB beside the tables, "
        f"{free / _GIB:.1f} GiB are available; it fits with --rows {workload.rows * free // (needed + 1)}"
    )


def breakdown(workload: Workload, *, repeats: int = 9, placement: Placement = HOST) -> Breakdown:
    """Where the time of a `lazydp` step goes; drawing the batch comes first, as `sampling`.

    In training a thread draws the next batch meanwhile, so that sampling is off the path of the step. On a GPU the host
    waits at the end of each phase, which a step in training doesn't.
    """
    timer = StepTimer(lambda: wait(placement.device))
    trainer = engine(workload, workload.weights(), "lazydp", timer=timer, placement=placement)
    warm_ups = 2
    elapsed = 0.0
    for number in range(1, warm_ups + repeats + 1):
        if number == warm_ups + 1:
            timer.reset()
            elapsed = 0.0
        start = time.perf_counter()
        with timer.phase("sampling"):
            batch = workload.batch(number)
        trainer.step(batch)
        elapsed += time.perf_counter() - start
    return Breakdown({phase: seconds / repeats for phase, seconds in timer.seconds.items()}, elapsed / repeats)


def answer(results: Sequence[Result]) -> str:
    """Whether noise is the bottleneck, and what lazy noise gains, in one sentence.

    Says what can be said of the contestants that ran.
    """
    seconds = {result.contestant: result.median_s for result in results}
    plain = min((seconds[name] for name in ("torch_sgd", "sgd") if name in seconds), default=None)
    lazy, eager = seconds.get("lazydp"), seconds.get("dpsgd")
    if lazy is None or eager is None or plain is None:
        return "Whether noise is the bottleneck takes lazydp, dpsgd and one contestant without privacy to say."
    if lazy >= eager:
        return (
            f"Noise is not the bottleneck here: an eager DP-SGD step ({_ms(eager)}) takes no longer than a lazy one "
            f"({_ms(lazy)}), for the tables are small beside the batch; a step without privacy takes {_ms(plain)}."
        )
    share = 1.0 - lazy / eager
    bottleneck = "is" if share > 0.5 else "is not"  # more than half of the eager step
    return (
        f"Noise {bottleneck} the bottleneck here: {share:.0%} of an eager DP-SGD step ({_ms(eager)}) is noise on rows "
        f"that nobody reads; lazydp leaves it out and takes {_ms(lazy)}, {eager / lazy:.3g} times faster, "
        f"which is {lazy / plain:.3g} times a step without privacy ({_ms(plain)})."
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _entered(workload: Workload, names: Sequence[str], *, part: Part, placement: Placement) -> list[Contestant]:
    weights = {name: weight.to(placement.table_device) for name, weight in workload.weights().items()}
    make = _whole if part == "whole" else _embeddings
    makers = make(workload, weights, placement)
    return [_contestant(name, makers[name](), workload, part, placement) for name in names]


def _whole(workload: Workload, weights: Mapping[str, Tensor], placement: Placement) -> dict[str, Callable[[], Trainer]]:
    makers: dict[str, Callable[[], Trainer]] = {"torch_sgd": lambda: TorchSgd(workload, weights, placement)}
    for mode in OURS:
        makers[mode] = lambda mode=mode: engine(workload, weights, mode, placement=placement)  # type: ignore[misc]
    if isinstance(workload, StepShape):
        makers["opacus"] = lambda: OpacusGhost(workload, weights)
    return makers


def _embeddings(
    workload: Workload, weights: Mapping[str, Tensor], placement: Placement
) -> dict[str, Callable[[], Trainer]]:
    device = placement.table_device
    makers: dict[str, Callable[[], Trainer]] = {"torch_sgd": lambda: TorchEmbeddings(workload, weights, device)}
    for mode in OURS:
        makers[mode] = lambda mode=mode: OurEmbeddings(workload, weights, mode, device)  # type: ignore[misc]
    return makers


def _contestant(name: str, trainer: Trainer, workload: Workload, part: Part, placement: Placement) -> Contestant:
    batches = _batches(workload)

    def step() -> None:
        trainer.step(next(batches))
        wait(placement.device)

    # A table-wide step moves every weight; a sparse one the rows of the batch.
    moved = 2 * workload.table_bytes if name in ("dpsgd", "opacus") else workload.embedding_bytes()
    flops = workload.matmul_flops() if part == "whole" else None
    return Contestant(name, step, bytes=moved, flops=flops)


def _batches(workload: Workload) -> itertools.cycle[Sequence[Examples]]:
    return itertools.cycle([workload.batch(number) for number in range(1, _BATCHES + 1)])
