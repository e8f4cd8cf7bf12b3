"""`lazydp plan`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from lazydp.components.shared.privacy_unit import PrivacyUnitOption

if TYPE_CHECKING:
    from lazydp.components.onepass.rules import PrivacyUnit


@click.command(
    name="plan",
    epilog="Example: lazydp plan --users 100000 --items 20000 --epsilon 3 --delta 1e-6 > train.yaml",
)
@click.option("--users", type=click.IntRange(min=1), required=True, help="About how many users: a public number.")
@click.option("--items", type=click.IntRange(min=1), required=True, help="Items of the catalogue.")
@click.option("--epsilon", type=float, required=True, help="Of the whole release; inf for a model without privacy.")
@click.option("--delta", type=float, default=1e-5, show_default=True, help="Well below 1 / users.")
@click.option(
    "--privacy-unit",
    "--unit",
    "unit",
    type=PrivacyUnitOption(),
    default="user",
    show_default=True,
    help="What epsilon protects: all that one user (or: person) did, or one interaction.",
)
@click.option(
    "--features/--no-features", default=True, help="Whether the spec describes the items.  [default: features]"
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead.")
def command(
    users: int, items: int, epsilon: float, delta: float, unit: PrivacyUnit, features: bool, as_json: bool
) -> None:
    """Choose a method and its settings from public numbers; prints a training configuration.

    What it answers is what a configuration that names no steps does by default.
    """
    from lazydp.components.plan.plan import plan

    made = plan(users=users, items=items, epsilon=epsilon, delta=delta, unit=unit, features=features)
    click.echo(json.dumps(made.to_json(), indent=2) if as_json else made.text(), nl=as_json)
