"""Which feature reads which table, and what else reaches a model: shared by every model, by training and by serving."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Self

from lazydp.components.features.spec import HISTORY, ITEM, EmbeddedFeature, FeatureSpec
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
        ordered: whether a history stands in order of time, so that its latest items are known.
    """

    example: tuple[EmbeddedFeature, ...]
    candidate: tuple[EmbeddedFeature, ...]
    num_dense: int = 0
    num_item_dense: int = 0
    ordered: bool = False

    @classmethod
    def of(cls, spec: FeatureSpec) -> Self:
        """The layout that `spec` describes."""
        return cls(
            example=tuple(spec.example_features()),
            candidate=tuple(spec.item_features()),
            num_dense=spec.num_dense,
            num_item_dense=spec.num_item_dense,
            ordered=spec.timestamp is not None,
        )

    def history_only(self) -> Self:
        """The layout of a model of histories: the user's history on one side, the item itself on the other.

        A history is pooled to the scale of one item (`features.pooling`), the latest items first where they are known;
        a spec that asks for one of these two poolings itself has its way.

        Raises:
            InputError: there is no history.
        """
        history = next((feature for feature in self.example if feature.name == HISTORY), None)
        item = next((feature for feature in self.candidate if feature.name == ITEM), None)
        if history is None or item is None:
            raise InputError(
                "user: history needs the items that a user took before: give the feature spec a "
                "`history: {max_length: 200}`, or train with user: features"
            )
        if history.pooling not in ("sqrt", "recent"):
            history = replace(history, pooling="recent" if self.ordered else "sqrt")
        return type(self)(example=(history,), candidate=(item,), ordered=self.ordered)

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
