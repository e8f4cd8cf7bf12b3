"""The picture of `bench quality`: one panel a feature spec, quality against epsilon.

Where datasets of one spec differ in their number of users, it is against the number of users.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lazydp.components.bench.protocol import Quality

_NAMES = {"hr_at_10": "HR@10", "ndcg_at_10": "NDCG@10", "recall_at_20": "Recall@20"}


def draw(results: Sequence[Quality], *, metric: str) -> bytes:
    """An SVG: lines for private contestants, with bars of one standard deviation over seeds; levels for the others."""
    datasets = list(dict.fromkeys(result.dataset for result in results))
    figure = Figure(figsize=(5 * len(datasets), 4), layout="constrained")
    panels = figure.subplots(1, len(datasets), squeeze=False)[0]
    for panel, dataset in zip(panels, datasets, strict=True):
        own = [result for result in results if result.dataset == dataset]
        several = len({result.of_users for result in own}) > 1
        (_against_users if several else _against_epsilon)(panel, own, metric)
        panel.set_title(dataset)
        panel.set_xscale("log")
        panel.set_ylabel(_NAMES[metric])
        panel.set_ylim(bottom=0)
        panel.legend(fontsize=7)
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _against_epsilon(axes: Axes, results: Sequence[Quality], metric: str) -> None:
    private = [result for result in results if result.epsilon is not None]
    for contestant, unit in dict.fromkeys((result.contestant, result.privacy_unit) for result in private):
        line = sorted(
            (result.epsilon or 0.0, result.mean[metric], result.std[metric])
            for result in private
            if (result.contestant, result.privacy_unit) == (contestant, unit)
        )
        epsilons, means, deviations = zip(*line, strict=True)
        axes.errorbar(epsilons, means, yerr=deviations, marker="o", capsize=3, label=f"{contestant}, per {unit}")
    for number, result in enumerate(result for result in results if result.epsilon is None):
        style = ("-", "--", "-.", ":")[number % 4]
        label = f"{result.contestant}, without privacy"
        axes.axhline(result.mean[metric], color="grey", linestyle=style, linewidth=1, label=label)
    axes.set_xlabel("epsilon")


def _against_users(axes: Axes, results: Sequence[Quality], metric: str) -> None:
    for contestant, unit, epsilon in dict.fromkeys((one.contestant, one.privacy_unit, one.epsilon) for one in results):
        line = sorted(
            (result.of_users, result.mean[metric], result.std[metric])
            for result in results
            if (result.contestant, result.privacy_unit, result.epsilon) == (contestant, unit, epsilon)
        )
        users, means, deviations = zip(*line, strict=True)
        private = epsilon is not None
        label = f"{contestant}, per {unit}, epsilon {epsilon:g}" if private else f"{contestant}, without privacy"
        axes.errorbar(users, means, deviations, marker="o", capsize=3, linestyle="-" if private else "--", label=label)
    axes.set_xlabel("users")
