"""The comparison of a release with popularity and, where there is one, with the model without privacy. Private."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lazydp.components.shared.page import Facts, Figures, page

_RANKING = {"auc": "AUC", "hr_at_10": "HR@10", "ndcg_at_10": "NDCG@10", "recall_at_20": "Recall@20"}


def comparison_page(report: Mapping[str, Any], *, without_privacy: Mapping[str, Any] | None = None) -> str:
    """The page.

    Args:
        report: of the release, as `Evaluation.to_json` writes it.
        without_privacy: the same of the model without privacy.
    """
    rows = [("with privacy", _figures(report["model"]))]
    if without_privacy is not None:
        rows.append(("without privacy", _figures(without_privacy["model"])))
    rows.append(("popularity", _figures(report["popularity"])))
    labels = [("with privacy", [report["label_auc"]])]
    if without_privacy is not None:
        labels.append(("without privacy", [without_privacy["label_auc"]]))
    epsilon = report["epsilon"]
    return page(
        f"Evaluation of version {report['bundle']}",
        audience="private",
        sections=[
            Figures("Ranking of held-out items", list(_RANKING.values()), rows),
            Figures("Scores against labels", ["AUC"], labels if report["label_auc"] is not None else []),
            Facts("Release", [("epsilon", "none is claimed" if epsilon is None else f"{epsilon:.4g}")]),
        ],
    )


def _figures(metrics: Mapping[str, float] | None) -> list[float | None]:
    return [None if metrics is None else metrics[name] for name in _RANKING]
