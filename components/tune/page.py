"""What a sweep found: settings and score of its best trial, and nothing of the others. Private until charged."""

from __future__ import annotations

from lazydp.components.shared.page import Facts, page
from lazydp.components.tune.sweep import HeldOut, Sweep
from lazydp.components.tune.tune import Tuned


def sweep_page(sweep: Sweep, found: Tuned) -> str:
    """The page.

    Args:
        sweep: what was asked for.
        found: the best trial.
    """
    score = sweep.score
    scored_on = f"held-out rows, noise {score.noise_multiplier:g}" if isinstance(score, HeldOut) else "public data"
    return page(
        f"Sweep {found.run_id}",
        audience="private",
        summary="The best trial. How many there were, and how the others did, is told nowhere.",
        sections=[
            Facts("Settings that won", [(name, str(value)) for name, value in found.settings.items()]),
            Facts(
                "Mechanism",
                [
                    ("number of trials", f"{sweep.distribution} distribution of mean {sweep.mean_trials:g}"),
                    ("metric", sweep.metric),
                    ("scored on", scored_on),
                    ("score of the best", f"{found.score:.6g}"),
                ],
            ),
        ],
    )
