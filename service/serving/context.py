"""Everything that one service holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lazydp.components.bundle.query import Query
from lazydp.service.http.metrics import Metrics
from lazydp.service.http.problems import Problem
from lazydp.service.http.traffic import Traffic
from lazydp.service.serving.background import Background
from lazydp.service.serving.budget import BudgetSource
from lazydp.service.serving.ranker import Ranker
from lazydp.service.serving.registry import Registry
from lazydp.service.serving.served_version import ServedVersion
from lazydp.service.serving.shadow import Shadow
from lazydp.service.serving.split import Split
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
        split: deals requests that name no model to several versions; None for none.
        shadow: ranks copies of these requests; None for none.
        draining: whether it is about to stop and should get no more traffic.
    """

    settings: Settings
    registry: Registry
    budget: BudgetSource
    metrics: Metrics
    traffic: Traffic
    background: Background
    split: Split | None = None
    shadow: Shadow | None = None
    draining: bool = False

    def model_called(self, name: str) -> str:
        """The model's own name, where `name` is one of its further ones."""
        if self.registry.get(name) is not None:
            return name
        if name == self.settings.name and self.registry.default is not None:
            return self.registry.default
        return self.settings.aliases.get(name, name)

    def is_open(self, name: str | None) -> bool:
        """Whether `name` leaves to the settings which model answers."""
        return name is None or name == self.settings.name

    def dealt(self, name: str | None, key: str | None) -> str | None:
        """The name that answers a request with `key` for the model `name`."""
        if self.split is None or not self.is_open(name):
            return name
        return self.split.choose(key, self.registry.names()) or name

    def versions(self, name: str) -> list[str]:
        """Versions that answer for the model `name` by a split; none where there is none."""
        if self.split is None or not self.is_open(name):
            return []
        return [found.version for part in self.split.names if (found := self.registry.get(part)) is not None]

    def deals(self, name: str | None) -> bool:
        """Whether a request for the model `name` has to be read to say who answers it, or who gets a copy."""
        return (self.split is not None or self.shadow is not None) and self.is_open(name)

    def copied(self, name: str | None, query: Callable[[], Query]) -> None:
        """Have a request for the model `name` ranked by the shadow version too, where there is one."""
        if self.shadow is not None and self.is_open(name):
            self.shadow.copy(query())

    def served(self, name: str | None = None, version: str | None = None) -> ServedVersion:
        """The version that answers.

        Args:
            name: of the model, or a further name of it; None for the default one.
            version: the one that must be served; None for whichever is.

        Raises:
            Problem: 404 for a model or version that is not served, 503 where there is none at all.
        """
        if version is not None and self.split is not None and self.is_open(name):
            of_split = [self.registry.get(part) for part in self.split.names]
            name = next((part.name for part in of_split if part is not None and part.version == version), name)
        name = self.dealt(name, None)
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
