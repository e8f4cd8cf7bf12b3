"""Scores: what the scorer answers is what the model says, in the right order."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lazydp.components.bundle.query import CategoryCap, Condition, Query
from lazydp.components.bundle.reader import Bundle
from lazydp.components.bundle.scoring import two_tower as scorer_module
from lazydp.components.bundle.scoring.base import Scorer
from lazydp.components.bundle.scoring.make import make_scorer
from lazydp.components.bundle.scoring.two_tower import TwoTowerScorer
from lazydp.components.bundle.topk import in_order, top_k, top_k_rows
from lazydp.components.bundle.untrained import write_untrained
from lazydp.components.features.batch import Bags
from lazydp.components.features.request import encode_requests
from lazydp.components.features.spec import USER
from lazydp.components.models.recommender import ModelInputs, pool
from lazydp.components.shared.errors import InputError

QUERIES = [
    Query(user_id="3"),
    Query(history=("1", "2", "unknown", "2")),
    Query(user_id="4", history=tuple(str(n) for n in range(25)), features={"device": "tablet", "age": 30}),
    Query(user_id="unknown", features={"device": "unknown", "age": 1000.5}),
    Query(history=("9",), features={"age": None}),
]


@pytest.fixture(scope="module", params=["two_tower", "dlrm"])
def scorer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    path = tmp_path_factory.mktemp("bundle") / request.param
    write_untrained(path, kind=request.param, num_items=80, dim=8)
    return make_scorer(Bundle.open(path, allow_test_key=True))


def oracle(bundle: Bundle, query: Query) -> np.ndarray:
    """Scores of every item by the model's own forward, with inputs encoded as ingest encodes them."""
    batch = encode_requests(
        bundle.spec, bundle.vocabularies, users=[query.user_id], histories=[query.history], features=[query.features]
    )
    bags = dict(batch.bags)
    code = int(bags[USER].values[0])
    if code == 0:
        bags[USER] = Bags(torch.empty(0, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
    assert bundle.catalogue is not None
    dense, item_bags = bundle.catalogue.take(torch.arange(bundle.catalogue.num_items + 1))
    layout = bundle.model.layout
    candidate = {name: v.unsqueeze(0) for name, v in pool(layout.candidate, bundle.tables, item_bags).items()}
    with torch.inference_mode():
        logits = bundle.model(
            ModelInputs(
                example=pool(layout.example, bundle.tables, bags),
                candidate=candidate,
                dense=batch.dense,
                item_dense=dense.unsqueeze(0),
            )
        )
    return logits[0].numpy()


@pytest.mark.parametrize("query", QUERIES)
def test_scores_are_the_models(scorer: Scorer, query: Query) -> None:
    expected = oracle(scorer.bundle, query)
    answer = scorer.rank([Query(**{name: getattr(query, name) for name in ("user_id", "history", "features")}, k=80)])[
        0
    ]
    np.testing.assert_allclose(answer.scores, expected[answer.codes], rtol=2e-4, atol=2e-4)
    seen = {scorer.items.code(item) for item in query.history} - {0}
    assert set(answer.codes) == set(range(1, 81)) - seen
    assert (np.diff(answer.scores) <= 0).all()


def test_a_batch_is_what_each_query_is(scorer: Scorer) -> None:
    together = scorer.rank(QUERIES)
    for query, answer in zip(QUERIES, together, strict=True):
        alone = scorer.rank([query])[0]
        assert alone.codes == answer.codes
        np.testing.assert_allclose(alone.scores, answer.scores, rtol=1e-4, atol=1e-4)


def test_a_batch_of_every_kind_is_what_each_query_is(scorer: Scorer) -> None:
    queries = [
        Query(user_id="3", k=5),
        Query(user_id="4", k=80),
        Query(user_id="5", k=5, cap=CategoryCap(attribute="genre", limit=1)),
        Query(user_id="6", k=5, offset=3, exclude=("7", "8")),
        Query(user_id="unknown"),
        Query(user_id="7", k=5, filters={"genre": Condition(any_of=["Drama"])}),
        Query(user_id="8", k=5, candidates=("1", "2")),
        Query(user_id="9", k=200),
    ]
    together = scorer.rank(queries)
    for query, answer in zip(queries, together, strict=True):
        alone = scorer.rank([query])[0]
        assert (alone.codes, alone.source, alone.more) == (answer.codes, answer.source, answer.more), query
        np.testing.assert_allclose(alone.scores, answer.scores, rtol=1e-4, atol=1e-4)
    assert scorer.rank([]) == []


def test_every_item_of_a_long_history_is_left_out(scorer: Scorer) -> None:
    # More than the model reads, and more than any page holds.
    history = tuple(str(number) for number in range(75))
    rest = {scorer.items.code(str(number)) for number in range(75, 80)}
    for query in (
        Query(history=history, k=80),
        Query(history=history[::-1], k=5),
        Query(user_id="3", history=history, k=3),
    ):
        [answer] = scorer.rank([query])
        assert set(answer.codes) <= rest
        assert len(answer.codes) == min(query.k, len(rest))
    [answer] = scorer.rank([Query(history=history, k=80, exclude_seen=False)])
    assert len(answer.codes) == 80


def test_candidates_alone_are_scored_alike(scorer: Scorer) -> None:
    whole = scorer.rank([Query(user_id="3", k=80)])[0]
    some = scorer.rank([Query(user_id="3", k=80, candidates=("5", "6", "7"))])[0]
    scores = dict(zip(whole.codes, whole.scores, strict=True))
    np.testing.assert_allclose(some.scores, [scores[code] for code in some.codes], rtol=1e-4, atol=1e-4)


def test_similar_items_by_hand(scorer: Scorer) -> None:
    drama_alone = {"genre": Condition(any_of=["Drama"])}
    (answer,) = scorer.rank([Query(similar_to=["5"], k=3, filters=drama_alone)])
    vectors = scorer._item_vectors()
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosine = unit @ unit[6]
    drama = [code for code in range(1, 81) if (code - 1) % 5 == 2 or (code - 1) % 3 == 2]
    expected = sorted((code for code in drama if code != 6), key=lambda code: -cosine[code])[:3]
    assert answer.codes == expected
    assert scorer.rank([Query(similar_to=["unknown"], k=3)])[0].source == "none"


def test_names_that_are_not_there(scorer: Scorer) -> None:
    with pytest.raises(InputError, match="no feature 'nonsense'"):
        scorer.rank([Query(user_id="3", features={"nonsense": 1})])
    with pytest.raises(InputError, match="no item attribute 'nonsense'"):
        scorer.rank([Query(user_id="3", filters={"nonsense": Condition(any_of=["x"])})])


def test_a_cap_takes_the_best_of_each_category(scorer: Scorer) -> None:
    ranked = scorer.rank([Query(user_id="3", k=80)])[0].codes
    taken: dict[str, int] = {}
    expected = []
    for code in ranked:
        categories = scorer.items.columns.values("genre", code)
        if all(taken.get(category, 0) < 2 for category in categories):
            expected.append(code)
            for category in categories:
                taken[category] = taken.get(category, 0) + 1
    cap = CategoryCap(attribute="genre", limit=2)
    assert scorer.rank([Query(user_id="3", k=80, cap=cap)])[0].codes == expected


@given(
    st.lists(st.sampled_from([0.0, 1.0, -1.0, 2.5, -np.inf, 3.25, 1e30]), min_size=1, max_size=300),
    st.integers(1, 320),
)
@settings(max_examples=200, deadline=None)
def test_top_k_is_a_stable_sort(values: list[float], k: int) -> None:
    scores = np.asarray(values, dtype=np.float32)
    expected = [index for index in np.argsort(-scores, kind="stable") if scores[index] > -np.inf]
    assert top_k(scores, k).tolist() == expected[:k]
    assert list(in_order(scores)) == expected
    # Longer answers begin with shorter ones, so pages fit together.
    assert top_k(scores, k + 7).tolist()[:k] == top_k(scores, k).tolist()


@given(
    st.integers(1, 6),
    st.integers(1, 600),
    st.integers(1, 120),
    st.sampled_from([2, 5, 1000]),
    st.integers(0, 2**31 - 1),
)
@settings(max_examples=100, deadline=None)
def test_top_k_of_rows_is_that_of_each_row(rows: int, n: int, k: int, values: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    # Few values, so that ties lie at the edge; some rows hold nothing but what is excluded.
    scores = generator.integers(0, values, (rows, n)).astype(np.float32)
    scores[generator.random((rows, n)) < generator.choice([0.0, 0.3, 1.0], (rows, 1))] = -np.inf
    found = top_k_rows(scores, k)
    assert len(found) == rows
    for row, codes in zip(scores, found, strict=True):
        expected = [index for index in np.argsort(-row, kind="stable") if row[index] > -np.inf]
        assert codes.tolist() == expected[:k]


def test_no_item_is_answered_that_is_the_unknown_one(scorer: Scorer) -> None:
    assert 0 not in scorer.rank([Query(user_id="3", k=1000)])[0].codes


def test_bundles_without_items_cannot_recommend(tmp_path: Path, scorer: Scorer) -> None:
    import dataclasses

    with pytest.raises(InputError, match="no items"):
        make_scorer(dataclasses.replace(scorer.bundle, items=None))


def test_kept_vectors_of_users_are_those_of_the_tower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_untrained(tmp_path / "bundle", num_items=80, dim=8)
    bundle = Bundle.open(tmp_path / "bundle", allow_test_key=True)
    kept = make_scorer(bundle)
    monkeypatch.setattr(scorer_module, "_MAX_USER_BYTES", 0)
    made = make_scorer(bundle)
    assert isinstance(kept, TwoTowerScorer)
    assert isinstance(made, TwoTowerScorer)
    assert kept._users is not None
    assert made._users is None
    for user in ("0", "3", "49"):
        queries = [Query(user_id=user), Query(user_id=user, history=("1",)), Query(user_id=user, features={"age": 3})]
        alone = kept.user_vectors(queries[:1])
        torch.testing.assert_close(alone, made.user_vectors(queries[:1]))
        # What is read beside the id is not left out, alone or in company.
        for query in queries[1:]:
            torch.testing.assert_close(kept.user_vectors([query]), made.user_vectors([query]))
            assert not torch.equal(kept.user_vectors([query]), alone)
        torch.testing.assert_close(kept.user_vectors(queries), made.user_vectors(queries))
