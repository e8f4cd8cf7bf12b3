"""One version of one model, ready to answer: scorer, batches, and answers as bytes."""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterable
from concurrent.futures import Executor
from typing import cast

import orjson

from lazydp.components.bundle.query import Query, Ranking
from lazydp.components.bundle.reader import Bundle
from lazydp.components.bundle.scoring.base import Scorer
from lazydp.components.bundle.scoring.make import make_scorer
from lazydp.components.bundle.scoring.two_tower import TwoTowerScorer
from lazydp.service.serving.answer_cache import AnswerCache
from lazydp.service.serving.batcher import Batcher
from lazydp.service.serving.statistics import Statistics

# Below this a query is ranked on the event loop; above it, other requests would notice the wait.
_INLINE_SECONDS = 0.002
_WARM_ROUNDS = 3
_WARM_CANDIDATES = 1000
_ANSWER = (
    b'%b"source":"%b","user_known":%b,"retriever":%b,"search":"%b","items":[%b],"next_offset":%b,"next_cursor":%b,'
    b'"unknown_items":%b,"notice":%b}'
)
_KNOWN = {None: b"null", "yes": b'"yes"', "no": b'"no"', "cannot tell": b'"cannot tell"'}
# Ends the item before the one that a fragment begins.
_CLOSE = b"},"


class ServedVersion:
    """A bundle with everything that its answers need. Built off the event loop; never changes afterwards.

    Attributes:
        bundle: what it answers from.
        name: that it is served by: the model's own, or another that the settings give it.
        version: of the bundle.
        scorer: ranks.
        batcher: ranks together what arrives together.
        ranks_whole: whether a request that names no candidates is answered from the whole catalogue.
        cache: the latest answers.
        statistics: of its inference calls.
        model: name and version as JSON.
        loaded: when it was built, ISO 8601, UTC.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        name: str,
        executor: Executor,
        cache: AnswerCache,
        approximate_from: int | None,
        rank_whole_up_to: int,
    ) -> None:
        self.bundle = bundle
        self.name = name
        self.version = bundle.manifest.version
        self.scorer: Scorer = make_scorer(bundle, approximate_from=approximate_from)
        self.ranks_whole = isinstance(self.scorer, TwoTowerScorer) or self.scorer.num_items <= rank_whole_up_to
        self.inline = _warm_seconds(self.scorer, whole=self.ranks_whole) < _INLINE_SECONDS
        self.batcher = Batcher(self.scorer, executor=None if self.inline else executor)
        self.cache = cache
        self.statistics = Statistics()
        self.loaded = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.model = orjson.dumps({"name": self.name, "version": self.version})
        self._head = b'{"model":' + self.model + b","
        # What an answer says of each item code up to its score; made when first asked for.
        self._fragments: list[bytes | None] = [None] * (self.scorer.num_items + 1)

    def answer(
        self, query: Query, ranking: Ranking, *, retriever: ServedVersion | None = None, cursor: str | None = None
    ) -> bytes:
        """A ranking of what `retriever` found, or of the whole catalogue, as JSON (`schemas.Recommendations`)."""
        items = self._items(ranking, explain=query.explain)
        following = b"%d" % (query.offset + len(ranking.codes)) if ranking.more else b"null"
        unknown = orjson.dumps(ranking.unknown_items) if ranking.unknown_items else b"[]"
        notice = b"null" if ranking.notice is None else orjson.dumps(ranking.notice)
        return _ANSWER % (
            self._head,
            ranking.source.encode(),
            _KNOWN[ranking.user_known],
            b"null" if retriever is None else retriever.model,
            b"approximate" if ranking.approximate else b"exact",
            items,
            following,
            b"null" if cursor is None else orjson.dumps(cursor),
            unknown,
            notice,
        )

    def _items(self, ranking: Ranking, *, explain: bool) -> bytes:
        """The items of a ranking as JSON objects joined by commas."""
        if not ranking.codes:
            return b""
        # Joining ready parts is several times faster than building fifty objects to serialise, and so is writing
        # the scores as one array that is split again.
        scores = orjson.dumps(ranking.scores, option=orjson.OPT_SERIALIZE_NUMPY)
        written = scores[1:-1].split(b",")
        if explain:
            ids = self.scorer.items.ids
            reasons = (orjson.dumps([ids[near - 1] for near in nearest]) for nearest in ranking.reasons)
            written = [b'%b,"because":%b' % both for both in zip(written, reasons, strict=True)]
        parts = [b""] * (2 * len(written))
        made = self._fragments
        fragments = list(map(made.__getitem__, ranking.codes))
        if None in fragments:
            fragments = [made[code] or self._fragment(code) for code in ranking.codes]
        parts[0::2] = cast(list[bytes], fragments)
        parts[1::2] = written
        # Every fragment closes the object before it.
        return b"".join(parts)[len(_CLOSE) :] + b"}"

    def _fragment(self, code: int) -> bytes:
        items = self.scorer.items
        named = orjson.dumps({"id": items.ids[code - 1], "title": items.title(code)})
        self._fragments[code] = made = _CLOSE + named[:-1] + b',"score":'
        return made


def joined(results: Iterable[bytes], *, by: ServedVersion | None) -> bytes:
    """Answers to a batch as JSON (`schemas.RecommendationResults`), all `by` one version, or by several."""
    return b'{"model":%b,"results":[%b]}' % (b"null" if by is None else by.model, b",".join(results))


def _warm_seconds(scorer: Scorer, *, whole: bool) -> float:
    """Touch every page a request needs, and say how long one query takes then."""
    candidates = None if whole else scorer.items.ids[:_WARM_CANDIDATES]
    query = Query(user_id="0", history=scorer.items.ids[:5], k=50, candidates=candidates)
    scorer.warm(query)
    best = float("inf")
    for _ in range(_WARM_ROUNDS):
        started = time.perf_counter()
        scorer.rank([query])
        best = min(best, time.perf_counter() - started)
    return best
