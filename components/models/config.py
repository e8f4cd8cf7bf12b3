"""What a model is made of, as the user states it: validated once, stored in the bundle, rebuilt from there."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from lazydp.components.shared.frozen_model import FrozenModel

Loss = Literal["bce", "sampled_softmax"]
# More layers than anybody trains: a configuration of thousands would take minutes to refuse.
Widths = Annotated[tuple[PositiveInt, ...], Field(max_length=64)]


class _ModelConfig(FrozenModel):
    """What every model has.

    `seed` is public: initial weights come from it alone, never from data or from the noise key.
    """

    embedding_dim: PositiveInt = 32
    """Columns of every table."""
    embedding_init_std: PositiveFloat = 0.05
    """Standard deviation of a table's initial weights."""
    seed: int = Field(default=0, ge=0)


class DlrmConfig(_ModelConfig):
    """Deep learning recommendation model (Naumov et al. 2019, arXiv 1906.00091)."""

    kind: Literal["dlrm"] = "dlrm"
    bottom_widths: Widths = (64,)
    """Hidden widths of the network over dense features; its output has `embedding_dim` columns."""
    top_widths: Widths = (128, 64)
    """Hidden widths of the network over the interactions; its output is one logit."""
    loss: Loss = "bce"


class TwoTowerConfig(_ModelConfig):
    """Two towers whose vectors meet in a dot product, so that items are indexed once and users scored fast."""

    kind: Literal["two_tower"] = "two_tower"
    user_widths: Widths = ()
    """Hidden widths of the user tower; empty: one linear layer."""
    item_widths: Widths = ()
    """Hidden widths of the item tower; empty: one linear layer."""
    temperature: PositiveFloat = 1.0
    """Divides the dot product: a public constant, not a parameter."""
    loss: Loss = "sampled_softmax"
    user: Literal["features", "history"] = "features"
    """What a user is a function of: all example-side features, through towers; or the user's own `history` alone. Then
    there are no towers and no table of users: the user's vector is the pooled rows of the history, an item's vector is
    its row of the same table."""
    prior: bool = False
    """Whether the logit begins with the logarithm of the item's noised count, which is never trained."""

    @model_validator(mode="after")
    def _history_has_no_towers(self) -> Self:
        if self.user == "history" and (self.user_widths or self.item_widths):
            raise ValueError("user: history has no towers: leave user_widths and item_widths out")
        return self


ModelConfig = Annotated[DlrmConfig | TwoTowerConfig, Field(discriminator="kind")]
