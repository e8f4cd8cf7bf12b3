"""What somebody may have meant by a name that doesn't exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from types import ModuleType

from pydantic import BaseModel


def suggestion(name: object, known: Iterable[str]) -> str:
    """`; did you mean X?`, or nothing where no known name is close."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def field_names(*modules: ModuleType) -> set[str]:
    """The fields of every pydantic model in these modules."""
    values = [value for module in modules for value in vars(module).values()]
    models = [value for value in values if isinstance(value, type) and issubclass(value, BaseModel)]
    return {name for model in models for name in model.model_fields}
