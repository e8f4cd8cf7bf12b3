"""Names in a query that a model may not have."""

from __future__ import annotations

from lazydp.components.bundle.query import Query
from lazydp.service.http.problems import unprocessable
from lazydp.service.serving.served_version import ServedVersion


def check_names(served: ServedVersion, query: Query, *, pointer: str) -> None:
    """Refuse names that the model does not have.

    Args:
        served: the model.
        query: may name attributes and features.
        pointer: where in the request the query stands.

    Raises:
        Problem: 422 that names the places and what the model has.
    """
    if not (query.filters or query.boosts or query.cap or query.features):
        return
    attributes, features = served.scorer.items.attributes, served.scorer.encoder.features
    unknown = [(f"{pointer}/filters", attributes) for name in query.filters if name not in attributes]
    unknown += [(f"{pointer}/boosts", attributes) for boost in query.boosts if boost.attribute not in attributes]
    unknown += [(f"{pointer}/features", features) for name in query.features if name not in features]
    if query.cap is not None and query.cap.attribute not in attributes:
        unknown.append((f"{pointer}/diversity/attribute", attributes))
    if unknown:
        raise unprocessable(
            [(where, f"the model has no such name; it has: {', '.join(known) or 'none'}") for where, known in unknown]
        )
