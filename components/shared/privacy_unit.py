"""The words of the option `--privacy-unit`, for every command that has it."""

from __future__ import annotations

from typing import Any

import click

PERSON = "person"
"""Taken for `user`: it is the word in *epsilon per person* (docs/glossary.md)."""


class PrivacyUnitOption(click.Choice[str]):
    """`user` or `example`, the words of a training configuration; `person` is taken for `user`."""

    def __init__(self) -> None:
        super().__init__(["user", "example"])

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """As `click.Choice`, one word more accepted."""
        return super().convert("user" if value == PERSON else value, param, ctx)
