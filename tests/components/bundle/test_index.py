"""The approximate index finds what exact search finds, says how well, and steps aside where it can't."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest

from lazydp.components.bundle import index as index_module
from lazydp.components.bundle.index import DEPTHS, TARGET_RECALL, ApproximateIndex, Matrix
from lazydp.components.bundle.query import CategoryCap, Condition, Query, Ranking
from lazydp.components.bundle.reader import Bundle
from lazydp.components.bundle.scoring.base import Scorer
from lazydp.components.bundle.scoring.make import make_scorer
from lazydp.components.bundle.untrained import write_untrained
from lazydp.components.shared.errors import UnavailableError

pytest.importorskip("faiss", reason="the extra lazydp[ann] is not installed")

ITEMS = 12_000


def gaussian(rows: int, *, seed: int, dim: int = 32) -> Matrix:
    return np.random.default_rng(seed).standard_normal((rows, dim), dtype=np.float32)


def clustered(rows: int, *, seed: int) -> Matrix:
    centres = gaussian(40, seed=7)
    chosen = np.random.default_rng(seed).integers(0, len(centres), rows)
    return centres[chosen] + np.float32(0.3) * gaussian(rows, seed=seed)


def recall(index: ApproximateIndex, vectors: Matrix, queries: Matrix) -> float:
    """Recall at 100 by a plain sort."""
    best = np.argsort(-(queries @ vectors[1:].T), axis=1)[:, :100] + 1
    found = index.search(queries, DEPTHS[0])
    return float(np.mean([len(set(row) & set(codes)) / 100 for row, codes in zip(best, found, strict=True)]))


@pytest.mark.parametrize("draw", [gaussian, clustered])
def test_the_stated_recall_is_the_recall(draw: object) -> None:
    assert callable(draw)
    vectors, queries = draw(ITEMS + 1, seed=1), draw(64, seed=2)
    index = ApproximateIndex.build(vectors, queries)
    assert index.recall >= TARGET_RECALL
    assert index.recall == pytest.approx(recall(index, vectors, queries), abs=1e-9)
    # Of queries that it was not tuned to.
    assert recall(index, vectors, draw(64, seed=3)) > TARGET_RECALL - 0.01


def test_fewer_lists_are_read_where_vectors_form_clusters() -> None:
    spread = ApproximateIndex.build(gaussian(ITEMS + 1, seed=1), gaussian(64, seed=2))
    dense = ApproximateIndex.build(clustered(ITEMS + 1, seed=1), clustered(64, seed=2))
    assert dense.num_probed[DEPTHS[0]] < spread.num_probed[DEPTHS[0]] <= spread.num_lists


def test_recall_can_be_low() -> None:
    """The control: an index that reads too few lists is found out by the same measure."""
    vectors, queries = gaussian(ITEMS + 1, seed=1), gaussian(64, seed=2)
    index = ApproximateIndex.build(vectors, queries)
    index = dataclasses.replace(index, num_probed={DEPTHS[0]: 1})
    assert recall(index, vectors, queries) < 0.8


def test_equal_vectors_give_equal_indexes() -> None:
    import faiss

    vectors, queries = gaussian(ITEMS + 1, seed=1), gaussian(8, seed=2)
    first, second = (ApproximateIndex.build(vectors, queries) for _ in range(2))
    assert faiss.serialize_index(first._lists).tobytes() == faiss.serialize_index(second._lists).tobytes()


def test_a_query_finds_the_same_in_company() -> None:
    vectors, queries = gaussian(ITEMS + 1, seed=1), gaussian(64, seed=2)
    index = ApproximateIndex.build(vectors, queries)
    together = index.search(queries, DEPTHS[0])
    for number in (0, 1, 40):
        alone = index.search(queries[number : number + 1], DEPTHS[0])[0]
        assert set(alone) == set(together[number])


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp("index") / "bundle"
    write_untrained(path, num_items=ITEMS, dim=16)
    return Bundle.open(path, allow_test_key=True)


@pytest.fixture(scope="module")
def approximate(bundle: Bundle) -> Scorer:
    return make_scorer(bundle, approximate_from=ITEMS)


@pytest.fixture(scope="module")
def exact(bundle: Bundle) -> Scorer:
    return make_scorer(bundle, approximate_from=ITEMS + 1)


def overlap(one: Ranking, other: Ranking) -> float:
    return len(set(one.codes) & set(other.codes)) / max(1, len(other.codes))


def test_the_size_of_the_catalogue_decides(approximate: Scorer, exact: Scorer) -> None:
    assert exact.index == "exact"
    assert exact.recall is None
    assert approximate.index.startswith("approximate: ")
    assert approximate.recall is not None
    assert approximate.recall >= TARGET_RECALL
    assert f"recall at 100 is {int(approximate.recall * 1e4) / 1e4:.4f}" in approximate.index


HISTORY = tuple(str(n) for n in range(0, 200, 10))
FOUND_BY_INDEX = [
    Query(user_id="3", k=100),
    Query(history=HISTORY, k=100),
    Query(user_id="4", history=HISTORY, exclude=[str(n) for n in range(500)], k=20),
    Query(user_id="5", k=1000),
    Query(user_id="6", k=50, offset=50),
]
FOUND_EXACTLY = [
    Query(user_id="3", k=10, filters={"genre": Condition(any_of=["Drama"])}),
    Query(user_id="3", k=10, candidates=("5", "6", "7")),
    Query(user_id="3", k=10, cap=CategoryCap(attribute="genre", limit=2)),
    Query(user_id="3", k=1000, offset=5000),
]


def test_what_the_index_finds_is_what_exact_search_finds(approximate: Scorer, exact: Scorer) -> None:
    for query, answer, wanted in zip(
        FOUND_BY_INDEX, approximate.rank(FOUND_BY_INDEX), exact.rank(FOUND_BY_INDEX), strict=True
    ):
        assert overlap(answer, wanted) >= TARGET_RECALL - 0.02, query
        assert answer.more
        assert (answer.approximate, wanted.approximate) == (True, False)
        assert answer.source == wanted.source
        assert (np.diff(answer.scores) <= 0).all()
        assert answer.scores[0] == pytest.approx(wanted.scores[0], rel=1e-4)
        assert not {approximate.items.code(item) for item in (*query.history, *query.exclude)} & set(answer.codes)


def test_choices_and_deep_pages_are_exact(approximate: Scorer, exact: Scorer) -> None:
    for answer, wanted in zip(approximate.rank(FOUND_EXACTLY), exact.rank(FOUND_EXACTLY), strict=True):
        assert answer.codes == wanted.codes


def test_mixed_company_changes_no_answer(approximate: Scorer) -> None:
    queries = [query for pair in zip(FOUND_BY_INDEX, FOUND_EXACTLY, strict=False) for query in pair]
    for query, answer in zip(queries, approximate.rank(queries), strict=True):
        # All but what the last bit of a score decides.
        assert overlap(approximate.rank([query])[0], answer) >= 0.995


def test_pages_fit_together(approximate: Scorer) -> None:
    whole = approximate.rank([Query(user_id="3", k=100)])[0].codes
    pages = [approximate.rank([Query(user_id="3", k=25, offset=offset)])[0].codes for offset in range(0, 100, 25)]
    assert [code for page in pages for code in page] == whole


def test_without_the_library_search_is_exact_and_says_so(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UnavailableError, match="faiss is not installed"):
        ApproximateIndex.build(gaussian(100, seed=1), gaussian(8, seed=2))
    scorer = make_scorer(bundle, approximate_from=1)
    assert scorer.index.startswith("exact (faiss is not installed")
    assert scorer.rank([Query(user_id="3", k=5)])[0].codes


def test_below_the_target_search_is_exact_and_says_so(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "_CANDIDATES_PER_ITEM", 1)
    scorer = make_scorer(bundle, approximate_from=1)
    assert scorer.index.startswith("exact (an approximate index found only 0.")
    assert scorer.recall is None


def test_tiny_catalogues_can_be_indexed(tmp_path: Path) -> None:
    write_untrained(tmp_path / "tiny", num_items=40)
    bundle = Bundle.open(tmp_path / "tiny", allow_test_key=True)
    query = Query(user_id="3", k=100)
    assert make_scorer(bundle, approximate_from=1).rank([query])[0].codes == make_scorer(bundle).rank([query])[0].codes
