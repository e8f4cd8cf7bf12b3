"""The one-page report for a review: what was spent over time, what is left, what was released, and whether it verifies.

One HTML file without outside assets and without scripts.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
from collections.abc import Sequence

from markupsafe import Markup

from lazydp.components.budget.report.claim import ModelCard
from lazydp.components.budget.report.overview import LedgerOverview
from lazydp.components.budget.report.templates import environment
from lazydp.components.shared.page import style
from lazydp.components.shared.version import release


def report(overview: LedgerOverview | None, *, source: str, models: Sequence[ModelCard] = ()) -> str:
    """The page.

    Args:
        overview: of the ledger; None where it cannot be read.
        source: where the ledger was read, without a password, or why it was not.
        models: that a service has loaded, where it is the service that reports.
    """
    now = datetime.datetime.now(datetime.UTC)
    sheet = style()
    digest = base64.b64encode(hashlib.sha256(sheet.encode()).digest()).decode()
    template = environment().get_template("report.html")
    return template.render(
        source=source,
        made_at=now.isoformat(),
        until=now.timestamp(),
        version=release(),
        overview=overview,
        models=models,
        style=Markup(sheet),  # noqa: S704 - a file of ours
        policy=f"default-src 'none'; style-src 'sha256-{digest}'",
    )
