"""The command `lazydp recommend`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from lazydp.service import schemas

_KEY_VARIABLE = "LAZYDP_API_KEY"
_FILTER = re.compile(r"(?P<attribute>[^!<>=]+)(?P<operator>!=|>=|<=|=|>|<)(?P<operand>.*)", re.DOTALL)
_BOOST = re.compile(r"(?P<matching>.+):(?P<operator>[*+-])(?P<amount>[^:*+]+)", re.DOTALL)
_BOUNDS = {">=": "gte", ">": "gt", "<=": "lte", "<": "lt"}


@click.command("recommend", epilog="Example: lazydp recommend --history 50 --history 181 --filter 'year>=1980' -k 5")
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="The service.")
@click.option("--model", help="Name of the model; the default one if left out.")
@click.option("--user", "user_id", metavar="ID", help="A user that the model knows.")
@click.option("--history", multiple=True, metavar="ID", help="An item that the person took, oldest first; repeatable.")
@click.option("--half-life", type=float, help="So many items back, an item of the history counts half.")
@click.option("--similar-to", multiple=True, metavar="ID", help="Answer with items like this one; repeatable.")
@click.option("--filter", "filters", multiple=True, metavar="EXPRESSION", help="genre=War,Drama genre!=War year>=1980.")
@click.option(
    "--boost", "boosts", multiple=True, metavar="EXPRESSION", help="genre=Drama:*1.5 year>=1980:+0.2 year:+0.001."
)
@click.option("--exclude", multiple=True, metavar="ID", help="An item to leave out; repeatable.")
@click.option("--query", "further", default="{}", metavar="JSON", help="Other members of POST /v1/recommendations.")
@click.option("-k", type=click.IntRange(1, 1000), default=10, show_default=True, help="Items wanted, or of a page.")
@click.option("--all", "all_pages", is_flag=True, help="Every page, to the end of the ranking.")
@click.option("--json", "as_json", is_flag=True, help="Answers as JSON, one a line.")
def command(url: str, model: str | None, further: str, all_pages: bool, as_json: bool, **given: Any) -> None:
    """Ask a running service for recommendations, or for items like others.

    The key of a service that asks for one is read from the environment variable LAZYDP_API_KEY.
    """
    query = _query(further, given)
    from lazydp.service.client import Client

    with Client(url, api_key=os.environ.get(_KEY_VARIABLE)) as client:
        pages = client.pages(query, model=model) if all_pages else iter([client.recommend(query, model=model)])
        for line in _json_lines(pages) if as_json else _lines(pages):
            click.echo(line)


def _query(further: str, given: dict[str, Any]) -> schemas.RecommendationQuery:
    from pydantic import ValidationError

    from lazydp.service import schemas

    members = {name: value for name, value in given.items() if value not in (None, ())}
    for name, read in (("filters", _filters), ("boosts", _boosts)):
        if name in members:
            members[name] = read(members[name])
    try:
        own = json.loads(further)
    except ValueError as error:
        raise click.BadParameter(f"expected JSON: {error}", param_hint="--query") from None
    if not isinstance(own, dict):
        raise click.BadParameter("expected a JSON object", param_hint="--query")
    try:
        return schemas.RecommendationQuery.model_validate_json(json.dumps(own | members))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = "/".join(str(part) for part in first["loc"])
        raise click.UsageError(f"the query is not valid: {where}: {first['msg']}") from None


def _filters(expressions: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`year>=1980` and the like, joined by attribute."""
    found: dict[str, dict[str, Any]] = {}
    for expression in expressions:
        match = _FILTER.fullmatch(expression)
        if match is None:
            detail = (
                f"expected NAME=VALUE,VALUE or NAME!=..., NAME>=NUMBER, NAME>..., NAME<=..., NAME<...: {expression!r}"
            )
            raise click.BadParameter(detail, param_hint="--filter")
        member, operand = _member(match["operator"], match["operand"])
        condition = found.setdefault(match["attribute"], {})
        if member in condition:
            raise click.BadParameter(f"given twice: {expression!r}", param_hint="--filter")
        condition[member] = operand
    return found


def _member(operator: str, operand: str) -> tuple[str, Any]:
    """The member of a condition that `operator` stands for, and its value."""
    if operator not in _BOUNDS:
        return ("any_of" if operator == "=" else "not"), operand.split(",")
    return _BOUNDS[operator], _number(operand, "--filter")


def _number(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise click.BadParameter(f"expected a number, found {text!r}", param_hint=option) from None


def _boosts(expressions: Sequence[str]) -> list[dict[str, Any]]:
    """`genre=Drama:*1.5`, `year>=1980:+0.2`, `year:+0.001`."""
    found = []
    for expression in expressions:
        match = _BOOST.fullmatch(expression)
        if match is None:
            detail = f"expected FILTER:*FACTOR, FILTER:+AMOUNT or NAME:+AMOUNT, found {expression!r}"
            raise click.BadParameter(detail, param_hint="--boost")
        amount = _number(match["amount"], "--boost")
        change = (
            {"multiply": amount}
            if match["operator"] == "*"
            else {"add": -amount if match["operator"] == "-" else amount}
        )
        if _FILTER.fullmatch(match["matching"]) is None:
            found.append({"attribute": match["matching"], **change})
        else:
            found += [
                {"attribute": name, "matching": condition, **change}
                for name, condition in _filters([match["matching"]]).items()
            ]
    return found


def _json_lines(pages: Iterable[schemas.Recommendations]) -> Iterator[str]:
    return (page.model_dump_json(exclude_unset=True) for page in pages)


def _lines(pages: Iterable[schemas.Recommendations]) -> Iterator[str]:
    """A line for each item, below what the answer rests on."""
    place = 0
    for number, page in enumerate(pages):
        if not number:
            yield f"{page.model.name} {page.model.version}, by {page.source}, {page.search} search"
            if page.notice is not None:
                yield page.notice
            if page.unknown_items:
                yield f"unknown items: {', '.join(page.unknown_items)}"
        for item in page.items:
            place += 1
            because = f"  because of {', '.join(item.because)}" if item.because else ""
            yield f"{place:4}  {item.score:9.4f}  {item.id}  {item.title or ''}{because}".rstrip()
