"""What answers one request: a model's version, with the version of another model that finds what it ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lazydp.components.bundle.query import Query, Ranking
from lazydp.service.http.problems import Problem
from lazydp.service.serving import cursors
from lazydp.service.serving.served_version import ServedVersion


@dataclass(frozen=True, slots=True)
class Ranker:
    """One version, taken once for a request and kept to its end.

    A model that scores pairs (DLRM) ranks a small catalogue whole. Of a large one it ranks, in one batch, the
    candidates of the request, or else the best items by its retriever.

    Attributes:
        served: ranks.
        retriever: finds candidates; None where there is none, or where it is not needed.
        retrieved: candidates that it finds.
    """

    served: ServedVersion
    retriever: ServedVersion | None
    retrieved: int

    @property
    def identity(self) -> str:
        """What an answer is a function of, beside the request."""
        own = f"{self.served.name} {self.served.version}"
        return own if self.retriever is None else f"{own} {self.retriever.name} {self.retriever.version}"

    @property
    def is_quick(self) -> bool:
        """Whether any query is ranked on the event loop, by one model."""
        return self.retriever is None and self.served.inline and self.served.ranks_whole

    async def rank(self, query: Query) -> Ranking:
        """The best items for one query, ranked together with others that arrive now.

        Raises:
            InputError: a feature that the model does not have.
            Problem: 422 where the request must name candidates.
        """
        if self.retriever is not None and _is_open(query):
            found = await self.retriever.batcher.rank(self._wide(self.retriever, query))
            if found.source == "none":
                return found
            query = self._narrow(self.retriever, query, found)
        self._refuse_too_many(query)
        return await self.served.batcher.rank(query)

    async def rank_all(self, queries: Sequence[Query]) -> list[Ranking]:
        """The best items for queries that came together; raises as `rank` does."""
        if self.retriever is None:
            for query in queries:
                self._refuse_too_many(query)
            return await self.served.batcher.rank_all(queries)
        open_ = [number for number, query in enumerate(queries) if _is_open(query)]
        wide = [self._wide(self.retriever, queries[number]) for number in open_]
        found = dict(zip(open_, await self.retriever.batcher.rank_all(wide), strict=True))
        nothing = {number: ranking for number, ranking in found.items() if ranking.source == "none"}
        narrow = {
            number: self._narrow(self.retriever, query, found[number]) if number in found else query
            for number, query in enumerate(queries)
            if number not in nothing
        }
        ranked = await self.served.batcher.rank_all(list(narrow.values()))
        answers = nothing | dict(zip(narrow, ranked, strict=True))
        return [answers[number] for number in range(len(queries))]

    def rank_here(self, query: Query) -> Ranking:
        """As `rank`, in the thread of the caller and with no other query."""
        if self.retriever is not None and _is_open(query):
            (found,) = self.retriever.scorer.rank([self._wide(self.retriever, query)])
            if found.source == "none":
                return found
            query = self._narrow(self.retriever, query, found)
        self._refuse_too_many(query)
        return self.served.scorer.rank([query])[0]

    def found_by(self, query: Query) -> ServedVersion | None:
        """The model that chose what `query` was answered from; None for the whole catalogue or given candidates."""
        return self.retriever if _is_open(query) else None

    def answer(self, query: Query, ranking: Ranking) -> bytes:
        """What `query` is answered with, as JSON (`schemas.Recommendations`)."""
        cursor = cursors.following(self.identity, query, ranking) if query.alone else None
        return self.served.answer(query, ranking, retriever=self.found_by(query), cursor=cursor)

    def _wide(self, retriever: ServedVersion, query: Query) -> Query:
        """`query` for as many candidates as are ranked, of what the retriever can read and filter by."""
        scorer = retriever.scorer
        return replace(
            query,
            k=self.retrieved,
            offset=0,
            features={name: value for name, value in query.features.items() if name in scorer.encoder.features},
            filters={name: values for name, values in query.filters.items() if name in scorer.items.attributes},
            # What is added is in units of the other model's scores.
            boosts=[boost for boost in query.boosts if boost.multiply and boost.attribute in scorer.items.attributes],
            after=None,
            cap=None,
            explain=False,
        )

    def _narrow(self, retriever: ServedVersion, query: Query, found: Ranking) -> Query:
        ids, known = retriever.scorer.items.ids, self.served.scorer.items.code
        return replace(query, candidates=[ids[code - 1] for code in found.codes if known(ids[code - 1])])

    def _refuse_too_many(self, query: Query) -> None:
        if _is_open(query) and not self.served.ranks_whole:
            detail = "this model's catalogue is too large to rank whole: name candidates, or configure a retriever"
            raise Problem(422, "candidates-needed", detail)


def _is_open(query: Query) -> bool:
    """Whether somebody else may choose what is ranked: cosines of items need no user, and are those of the ranker."""
    return query.candidates is None and not query.similar_to
