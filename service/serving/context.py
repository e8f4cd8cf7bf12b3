"""Everything that one service holds."""

from __future__ import annotations

from dataclasses import dataclass

from lazydp.service.http.metrics import Metrics
from lazydp.service.http.problems import Problem
from lazydp.service.http.traffic import Traffic
from lazydp.service.serving.background import Background
from lazydp.service.serving.budget import BudgetSource
from lazydp.service.serving.ranker import Ranker
from lazydp.service.serving.registry import Registry
from lazydp.service.serving.served_version import ServedVersion
from lazydp.service.settings import Settings


@dataclass(slots=True)
class Context:
    """Everything that one service holds.

    Attributes:
        settings: as started.
        registry: the models.
        budget: the ledger, read only.
        metrics: counters.
        traffic: what they said in the last hour.
        background: what goes on beside the requests.
        draining: whether it is about to stop and should get no more traffic.
    """

    settings: Settings
    registry: Registry
    budget: BudgetSource
    metrics: Metrics
    traffic: Traffic
    background: Background
    draining: bool = False

    def model_called(self, name: str) -> str:
        """The model's own name, where `name` is one of its further ones."""
        if self.registry.get(name) is not None:
            return name
        if name == self.settings.name and self.registry.default is not None:
            return self.registry.default
        return self.settings.aliases.get(name, name)

    def served(self, name: str | None = None, version: str | None = None) -> ServedVersion:
        """The version that answers.

        Args:
            name: of the model, or a further name of it; None for the default one.
            version: the one that must be served; None for whichever is.

        Raises:
            Problem: 404 for a model or version that is not served, 503 where there is none at all.
        """
        found = self.registry.get(None if name is None else self.model_called(name))
        if found is None:
            if name is None:
                raise Problem(503, "not-ready", "no model is loaded yet", headers={"retry-after": "1"})
            raise Problem(404, "unknown-model", "no such model is served; /v1/models lists those that are")
        if version is not None and version != found.version:
            raise Problem(404, "unknown-version", f"this version is not served; version {found.version} is")
        return found

    def ranker(self, name: str | None = None, version: str | None = None) -> Ranker:
        """What answers a request for recommendations by a model.

        Raises:
            Problem: as `served` does.
        """
        served = self.served(name, version)
        retriever = None if served.ranks_whole else self.registry.get(self.settings.retrievers.get(served.name, ""))
        return Ranker(served, retriever, self.settings.retrieved_items)
