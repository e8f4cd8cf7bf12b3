"""The privacy card of a release: its statement, for the page of the run that made it. Public."""

from __future__ import annotations

from typing import Any

from lazydp.components.budget.statement import PrivacyStatement
from lazydp.components.bundle.manifest import BundleManifest
from lazydp.components.shared.page import Facts, Line, page

_ELSEWHERE = {"epsilon_over_steps"}


def privacy_card(manifest: BundleManifest, statement: PrivacyStatement) -> str:
    """The page.

    Args:
        manifest: of the bundle.
        statement: of the bundle.
    """
    document = statement.model_dump(mode="json")
    told = [(name.replace("_", " "), _text(value)) for name, value in document.items() if name not in _ELSEWHERE]
    lineage = manifest.lineage
    return page(
        f"{manifest.name}, version {manifest.version}",
        audience="public",
        summary=statement.line(),
        sections=[
            Line(
                f"Epsilon over the steps, at delta {statement.delta:g}",
                "epsilon",
                [(point.step, point.epsilon) for point in statement.epsilon_over_steps],
            ),
            Facts("Privacy statement", [(name, text) for name, text in told if text]),
            Facts(
                "Lineage",
                [
                    ("run", lineage.run_id),
                    ("dataset, as the ledger names it", lineage.dataset),
                    ("configuration", lineage.config),
                    ("code version", lineage.code_version),
                    ("released", lineage.created),
                ],
            ),
        ],
    )


def _text(value: Any) -> str:
    if value is None or value in ([], ""):
        return ""
    if isinstance(value, list):
        return "; ".join(_text(part) for part in value)
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {_text(part)}" for name, part in value.items() if _text(part))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
