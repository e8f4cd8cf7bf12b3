"""What a model is made of, as the user states it: validated once, stored in the bundle, rebuilt from there."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

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


ModelConfig = Annotated[DlrmConfig | TwoTowerConfig, Field(discriminator="kind")]
