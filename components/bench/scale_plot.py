"""The picture of `bench scale`: throughput relative to plain torch's eager step, against the size of the tables."""

from __future__ import annotations

import io
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lazydp.components.bench.scale import CONTESTANTS, Scale

_NAMES = {
    "torch_sgd": "without privacy, plain torch",
    "torch_eager": "eager, plain torch",
    "dpsgd": "eager, lazydp's kernels",
    "lazydp": "lazy, flush counted in",
}


def draw(results: Sequence[Scale]) -> bytes:
    """An SVG: one panel for each batch size and access, both axes logarithmic."""
    panels = list(dict.fromkeys((result.batch_size, result.access) for result in results))
    figure = Figure(figsize=(4.2 * len(panels), 4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for panel, (batch_size, access) in zip(axes, panels, strict=True):
        _panel(panel, [one for one in results if (one.batch_size, one.access) == (batch_size, access)])
        panel.set_title(f"batch {batch_size:,}, {access}")
    axes[0].set_ylabel("throughput relative to eager noise in plain torch")
    axes[0].legend(fontsize=7)
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _panel(axes: Axes, results: Sequence[Scale]) -> None:
    results = sorted(results, key=lambda result: result.gib)
    sizes = [result.gib for result in results]
    for contestant in CONTESTANTS:
        speeds = [result.step_s("torch_eager") / result.step_s(contestant) for result in results]
        axes.plot(sizes, speeds, marker="o", label=_NAMES[contestant])
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
    axes.set_xlabel("GiB of tables")
