"""Starts the service on a bundle, asks it what a person would ask, and stops it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from lazydp.components.shared.files import PRIVATE_FILE, write_bytes
from lazydp.components.shared.running_service import running_service

_K = 5
_BUDGET = "GET /v1/privacy/budget"


@dataclass(frozen=True, slots=True)
class Answers:
    """What the service said.

    Attributes:
        user_id: of the user who was asked about.
        questions: request -> answer, of all that was asked.
    """

    user_id: str
    questions: Mapping[str, dict[str, Any]]

    @property
    def recommendations(self) -> dict[str, Any]:
        """Those of the user: the first that was asked for."""
        return next(iter(self.questions.values()))

    @property
    def budget(self) -> dict[str, Any]:
        """Budget and spending by dataset, and the statement of the served model."""
        return self.questions[_BUDGET]

    def save(self, path: Path) -> None:
        """Write all of them as JSON, for the owner alone: a question holds a person's history."""
        text = json.dumps(self.questions, indent=2, ensure_ascii=False) + "\n"
        write_bytes(path, text.encode(), mode=PRIVATE_FILE)


def ask_service(bundle: Path, ledger_url: str, *, user_id: str, history: list[str]) -> Answers:
    """What a user gets, with the history and without it, and, where counts were released, an unknown user; the budget.

    Where the model reads histories, the user who gives one is asked about first.
    """
    manifest = json.loads((bundle / "manifest.json").read_text())
    queries: list[dict[str, Any]] = [{"user_id": user_id, "history": history, "k": _K, "exclude_seen": True}]
    if manifest["privacy"].get("popularity"):
        queries.append({"k": _K})
    bodies: dict[str, dict[str, Any] | None] = {f"POST /v1/recommendations {json.dumps(one)}": one for one in queries}
    alone: dict[str, dict[str, Any] | None] = {f"GET /v1/users/{quote(user_id, safe='')}/recommendations?k={_K}": None}
    bodies = bodies | alone if manifest["features"].get("history") else alone | bodies
    bodies[_BUDGET] = None
    answers = {}
    with running_service(bundle, ledger_url=ledger_url) as url, httpx.Client(base_url=url, timeout=30) as client:
        for question, body in bodies.items():
            method, path = question.split(" ")[:2]
            answer = client.request(method, path, json=body)
            answer.raise_for_status()
            answers[question] = answer.json()
    return Answers(user_id, answers)
