"""Which feature reads which table, and what else reaches a model: shared by every model, by training and by serving."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from lazydp.components.features.spec import EmbeddedFeature, FeatureSpec
from lazydp.components.shared.errors import InputError


@dataclass(frozen=True, slots=True)
class TableShape:
    """Rows and columns of one embedding table."""

    num_rows: int
    dim: int


@dataclass(frozen=True, slots=True)
class FeatureLayout:
    """The inputs of a model.

    Attributes:
        example: embedded features of an example (user, context, history); one bag an example.
        candidate: embedded features of a candidate item; one bag a candidate.
        num_dense: dense features of an example.
        num_item_dense: dense features of an item.
    """

    example: tuple[EmbeddedFeature, ...]
    candidate: tuple[EmbeddedFeature, ...]
    num_dense: int = 0
    num_item_dense: int = 0

    @classmethod
    def of(cls, spec: FeatureSpec) -> Self:
        """The layout that `spec` describes."""
        return cls(
            example=tuple(spec.example_features()),
            candidate=tuple(spec.item_features()),
            num_dense=spec.num_dense,
            num_item_dense=spec.num_item_dense,
        )

    @property
    def features(self) -> tuple[EmbeddedFeature, ...]:
        """Every embedded feature, the example's first."""
        return self.example + self.candidate

    def tables(self, dim: int) -> dict[str, TableShape]:
        """Name and shape of every table, in the order in which features first read them.

        Raises:
            InputError: two features give one table different numbers of rows, or two features share a name.
        """
        _refuse_duplicates(feature.name for feature in self.features)
        shapes: dict[str, TableShape] = {}
        for feature in self.features:
            shape = shapes.setdefault(feature.table, TableShape(feature.num_rows, dim))
            if shape.num_rows != feature.num_rows:
                raise InputError(
                    f"table {feature.table!r} has {shape.num_rows} rows for one feature and {feature.num_rows} for "
                    f"{feature.name!r}: features that share a table must share a vocabulary"
                )
        return shapes


def _refuse_duplicates(names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise InputError(f"two embedded features are called {name!r}: give each feature its own name")
        seen.add(name)
