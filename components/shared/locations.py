"""Several locations as one text: what a parameter of a Kubeflow component carries."""

from __future__ import annotations

import json
from collections.abc import Sequence

from lazydp.components.shared.errors import InputError


def join_locations(locations: Sequence[str]) -> str:
    """One location as it is, several as a JSON list: a path may hold a comma."""
    return locations[0] if len(locations) == 1 and not locations[0].startswith("[") else json.dumps(list(locations))


def split_locations(text: str) -> list[str]:
    """Read back `join_locations`.

    Raises:
        InputError: it begins as a JSON list and is none of texts.
    """
    if not text.startswith("["):
        return [text]
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(location, str) for location in found):
        raise InputError(f"expected a location or a JSON list of locations, found {text!r:.100}")
    return found
