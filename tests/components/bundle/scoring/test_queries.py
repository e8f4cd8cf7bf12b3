"""Filters, boosts, lists, pages, sessions and similar items against a reference that looks at every item."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lazydp.components.bundle.query import Boost, CategoryCap, Condition, Position, Query
from lazydp.components.bundle.reader import Bundle
from lazydp.components.bundle.scoring.base import Scorer
from lazydp.components.bundle.scoring.make import make_scorer
from lazydp.components.bundle.untrained import feature_spec, write_untrained
from lazydp.components.features.spec import HISTORY, USER
from lazydp.components.models.two_tower import TwoTower
from lazydp.components.shared.errors import InputError

ITEMS = 60
KINDS = ["two_tower", "approximate", "dlrm"]


@pytest.fixture(scope="module")
def scorers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scorer]:
    folder = tmp_path_factory.mktemp("bundles")
    write_untrained(folder / "towers", num_items=ITEMS, dim=8)
    write_untrained(folder / "dlrm", kind="dlrm", num_items=ITEMS, dim=8)
    towers = Bundle.open(folder / "towers", allow_test_key=True)
    found = {"two_tower": make_scorer(towers), "dlrm": make_scorer(Bundle.open(folder / "dlrm", allow_test_key=True))}
    return {**found, "approximate": make_scorer(towers, approximate_from=1)}


def meets(scorer: Scorer, code: int, attribute: str, condition: Condition) -> bool:
    text = scorer.items.metadata(code)[attribute]
    values = [] if text is None else list(dict.fromkeys(text.split("|")))
    numbers = [float(value) for value in values if value.replace(".", "", 1).isdigit()]
    held = condition.any_of is None or any(value in condition.any_of for value in values)
    if condition.is_range:
        held &= any(
            (condition.gte is None or number >= condition.gte)
            and (condition.gt is None or number > condition.gt)
            and (condition.lte is None or number <= condition.lte)
            and (condition.lt is None or number < condition.lt)
            for number in numbers
        )
    return held and (condition.without is None or not meets(scorer, code, attribute, condition.without))


def boosted(scorer: Scorer, code: int, score: float, boost: Boost) -> float:
    amount = boost.amount
    if boost.matching is not None:
        if not meets(scorer, code, boost.attribute, boost.matching):
            return score
    else:
        text = scorer.items.metadata(code)[boost.attribute]
        if text is None or not text.isdigit():
            return score
        amount *= float(text)
        if boost.multiply and amount <= 0:
            return score
    if not boost.multiply:
        return score + amount
    return score * amount if score >= 0 else score / amount


def reference(scorer: Scorer, query: Query) -> list[tuple[int, float]]:
    """Code and score of the page, by one look at every item."""
    who = Query(
        user_id=query.user_id,
        history=query.history,
        history_weights=query.history_weights,
        half_life=query.half_life,
        similar_to=query.similar_to,
        similar_weights=query.similar_weights,
        exclude_seen=False,
        k=ITEMS,
        alone=True,
    )
    (everything,) = scorer.rank([who])
    items = scorer.items
    left_out = {*query.exclude, *query.similar_to, *(query.history if query.exclude_seen else ())}
    kept = []
    for code, raw in zip(everything.codes, everything.scores.tolist(), strict=True):
        score = raw
        for boost in query.boosts:
            score = boosted(scorer, code, score, boost)
        name = items.ids[code - 1]
        allowed = query.candidates is None or name in query.candidates
        if allowed and name not in left_out and all(meets(scorer, code, *each) for each in query.filters.items()):
            kept.append((code, float(np.float32(score))))
    kept.sort(key=lambda pair: (-pair[1], pair[0]))
    if query.cap is not None:
        kept = capped(scorer, kept, query.cap)
    if query.after is not None:
        place = (-query.after.score, query.after.code)
        kept = [(code, score) for code, score in kept if (-score, code) > place]
    return kept[query.offset : query.offset + query.k]


def capped(scorer: Scorer, ranked: Sequence[tuple[int, float]], cap: CategoryCap) -> list[tuple[int, float]]:
    taken: dict[str, int] = {}
    kept = []
    for code, score in ranked:
        categories = (scorer.items.metadata(code)[cap.attribute] or "").split("|")
        if all(taken.get(category, 0) < cap.limit for category in categories):
            taken |= {category: taken.get(category, 0) + 1 for category in categories}
            kept.append((code, score))
    return kept


IDS = st.integers(-1, ITEMS + 2).map(str)
YEARS = st.floats(1945, 2025, allow_nan=False) | st.integers(1945, 2025).map(float)
FLAT = {
    "genre": st.builds(Condition, any_of=st.lists(st.sampled_from(["Action", "Comedy", "Drama", "Opera"]), max_size=3)),
    "year": st.builds(
        Condition, **{bound: st.none() | YEARS for bound in ("gte", "gt", "lte", "lt")}, any_of=st.none()
    ),
}
CONDITIONS = {
    name: flat | st.builds(lambda own, other: replace(own, without=other), flat | st.just(Condition()), flat)
    for name, flat in FLAT.items()
}
AMOUNTS = st.floats(0.01, 100)
BOOSTS = st.one_of(
    *(
        st.builds(Boost, attribute=st.just(name), matching=CONDITIONS[name], multiply=st.booleans(), amount=AMOUNTS)
        for name in FLAT
    ),
    st.builds(Boost, attribute=st.just("year"), matching=st.none(), multiply=st.booleans(), amount=AMOUNTS),
    st.builds(Boost, attribute=st.just("genre"), matching=st.none(), multiply=st.just(False), amount=AMOUNTS),
)
WEIGHTS = st.floats(1e-6, 1e6)


@st.composite
def queries(draw: st.DrawFn) -> Query:
    changes: dict[str, Any] = {
        "k": draw(st.integers(1, ITEMS)),
        "offset": draw(st.integers(0, 20)),
        "exclude": draw(st.lists(IDS, max_size=5)),
        "exclude_seen": draw(st.booleans()),
        "candidates": draw(st.none() | st.lists(IDS, max_size=40)),
        "filters": draw(st.fixed_dictionaries({}, optional=CONDITIONS)),
        "boosts": draw(st.lists(BOOSTS, max_size=3)),
        "cap": draw(st.none() | st.builds(CategoryCap, attribute=st.just("genre"), limit=st.integers(1, 9))),
        "after": draw(st.none() | st.builds(Position, score=st.floats(-2, 2, width=32), code=st.integers(0, ITEMS))),
    }
    some = draw(st.lists(IDS, min_size=1, max_size=6))
    weights = draw(st.none() | st.lists(WEIGHTS, min_size=len(some), max_size=len(some)))
    if draw(st.booleans()):
        who: dict[str, Any] = {"similar_to": [*some, "5"], "similar_weights": weights and [*weights, 1.0]}
    else:
        who = {"user_id": "7", "history": some, "history_weights": weights}
        who["half_life"] = draw(st.none() | st.floats(0.01, 100))
    return Query(**changes, **who, alone=True)


@pytest.mark.parametrize("kind", KINDS)
@given(query=queries())
@settings(max_examples=80, deadline=None)
def test_every_query_is_what_a_look_at_every_item_gives(scorers: dict[str, Scorer], kind: str, query: Query) -> None:
    scorer = scorers[kind]
    (answer,) = scorer.rank([query])
    wanted = reference(scorer, query)
    if kind == "dlrm" and query.candidates is not None:
        # Candidates go through the network in a batch of another size, which may change the last bit of a score.
        np.testing.assert_allclose(sorted(answer.scores), sorted(score for _, score in wanted), rtol=1e-4, atol=1e-4)
        return
    assert list(zip(answer.codes, answer.scores.tolist(), strict=True)) == wanted
    assert not answer.approximate


def test_the_reference_tells_wrong_answers(scorers: dict[str, Scorer]) -> None:
    """A negative control: without what a query asks for, the answer is another."""
    query = Query(user_id="7", k=ITEMS, alone=True)
    plain = reference(scorers["two_tower"], query)
    for changes in (
        {"filters": {"year": Condition(gte=1980, lt=1990)}},
        {"filters": {"genre": Condition(without=Condition(any_of=["Drama"]))}},
        {"boosts": [Boost(attribute="genre", matching=Condition(any_of=["Drama"]), multiply=True, amount=3)]},
        {"history": ["1", "2"], "exclude_seen": False, "history_weights": [1, 9]},
        {"after": Position(score=plain[4][1], code=plain[4][0])},
    ):
        assert reference(scorers["two_tower"], replace(query, **changes)) != plain


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cap", [None, CategoryCap(attribute="genre", limit=8)])
def test_pages_by_position_are_the_ranking_though_all_scores_tie(
    scorers: dict[str, Scorer], kind: str, cap: CategoryCap | None
) -> None:
    scorer = scorers[kind]
    # A great amount for every item swallows its score: all are equal.
    tie = Boost(attribute="year", matching=Condition(gte=0), multiply=False, amount=1e30)
    query = Query(user_id="7", k=ITEMS, boosts=[tie], cap=cap, alone=True)
    whole = scorer.rank([query])[0]
    assert len(set(whole.scores.tolist())) == 1
    assert whole.codes == sorted(whole.codes)
    page, codes = scorer.rank([replace(query, k=7)])[0], []
    for _ in range(ITEMS):
        codes += page.codes
        if not page.more:
            break
        after = Position(score=float(page.scores[-1]), code=page.codes[-1])
        page = scorer.rank([replace(query, k=7, after=after)])[0]
    assert codes == whole.codes


@pytest.mark.parametrize("kind", ["two_tower", "dlrm"])
def test_a_query_that_is_ranked_alone_has_the_same_bits_in_any_company(scorers: dict[str, Scorer], kind: str) -> None:
    scorer = scorers[kind]
    query = Query(user_id="7", history=["1", "2"], k=ITEMS, alone=True)
    (alone,) = scorer.rank([query])
    for others in (1, 7, 31):
        company = [Query(user_id=str(number), history=["3"]) for number in range(others)]
        again = scorer.rank([*company, query, *company])[others]
        assert again.codes == alone.codes
        assert again.scores.tobytes() == alone.scores.tobytes()


def test_a_session_is_the_weighted_mean_of_its_items(scorers: dict[str, Scorer]) -> None:
    scorer = scorers["two_tower"]
    model = scorer.bundle.model
    assert isinstance(model, TwoTower)
    history, weights, half_life = ["3", "unknown", "9", "3"], [2.0, 50.0, 0.5, 1.0], 2.0
    codes = scorer.encoder.item_codes(history)
    shares = np.array([2.0, 0.5, 1.0]) * 0.5 ** (np.array([2, 1, 0]) / half_life)
    table = next(feature.table for feature in model.layout.example if feature.name == HISTORY)
    rows = scorer.bundle.tables[table][codes].numpy()
    pooled = {HISTORY: torch.from_numpy((shares / shares.sum() @ rows).astype(np.float32))[None]}
    dim = rows.shape[1]
    pooled |= {feature.name: torch.zeros(1, dim) for feature in model.layout.example if feature.name == USER}
    query = Query(history=history, history_weights=weights, half_life=half_life, k=ITEMS, exclude_seen=False)
    encoded = scorer.encoder.encode([query])
    others = scorer.encoder.encode([Query(history=["3"])])
    for name, bags in others.bags.items():
        if name not in pooled:
            feature = next(feature for feature in model.layout.example if feature.name == name)
            pooled[name] = scorer.bundle.tables[feature.table][bags.values]
    wanted = model.user_vector(pooled, encoded.dense) / model.config.temperature
    found = scorer.user_vectors([query])  # type: ignore[attr-defined]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["two_tower", "dlrm"])
def test_only_ratios_of_weights_matter_and_equal_ones_change_nothing(scorers: dict[str, Scorer], kind: str) -> None:
    def scores(**changes: Any) -> Any:
        (answer,) = scorers[kind].rank([Query(history=["3", "9", "11"], k=ITEMS, alone=True, **changes)])
        return answer.codes, answer.scores

    plain, equal = scores(), scores(history_weights=[7.0, 7.0, 7.0])
    small, large = scores(history_weights=[1e-6, 2e-6, 4e-6]), scores(history_weights=[1e5, 2e5, 4e5])
    halved = scores(half_life=1.0)
    for one, other in ((plain, equal), (small, large), (small, halved)):
        assert one[0] == other[0]
        np.testing.assert_allclose(one[1], other[1], rtol=1e-4, atol=1e-5)
    assert plain[0] != small[0]


@pytest.mark.parametrize("kind", KINDS)
@given(liked=st.lists(st.tuples(IDS, st.floats(1e-3, 1e3)), min_size=1, max_size=8), weighed=st.booleans())
@settings(max_examples=40, deadline=None)
def test_similar_items_have_the_greatest_mean_cosine(
    scorers: dict[str, Scorer], kind: str, liked: list[tuple[str, float]], weighed: bool
) -> None:
    scorer = scorers[kind]
    ids = [item for item, _ in liked]
    query = Query(similar_to=ids, similar_weights=[weight for _, weight in liked] if weighed else None, k=ITEMS)
    (answer,) = scorer.rank([query])
    known = [(scorer.items.code(item), weight if weighed else 1.0) for item, weight in liked if scorer.items.code(item)]
    if not known:
        assert answer.source == "none"
        assert answer.notice is not None
        return
    vectors = scorer._item_vectors().astype(np.float64)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-18)
    mean = sum(weight * (unit @ unit[code]) for code, weight in known) / sum(weight for _, weight in known)
    assert answer.source == "item"
    assert sorted(answer.codes) == sorted(set(range(1, ITEMS + 1)) - {code for code, _ in known})
    np.testing.assert_allclose(answer.scores, [mean[code] for code in answer.codes], atol=1e-5)
    assert (np.diff(answer.scores) <= 0).all()


def test_similar_items_say_which_of_the_items_they_are_like(scorers: dict[str, Scorer]) -> None:
    (answer,) = scorers["two_tower"].rank([Query(similar_to=["3", "9"], k=4, explain=True)])
    assert all(set(near) == {scorers["two_tower"].items.code(name) for name in ("3", "9")} for near in answer.reasons)


def test_boosts_stay_finite_and_raise_what_is_negative(scorers: dict[str, Scorer]) -> None:
    scorer = scorers["two_tower"]
    every = Condition(gte=0)
    plain = scorer.rank([Query(user_id="7", k=ITEMS, alone=True)])[0]
    assert min(plain.scores) < 0 < max(plain.scores)
    raised = scorer.rank(
        [
            Query(
                user_id="7",
                k=ITEMS,
                alone=True,
                boosts=[Boost(attribute="year", matching=every, multiply=True, amount=2)],
            )
        ]
    )[0]
    before = dict(zip(plain.codes, plain.scores.tolist(), strict=True))
    assert all(score > before[code] for code, score in zip(raised.codes, raised.scores.tolist(), strict=True))
    for multiply in (True, False):
        huge = [Boost(attribute="year", matching=None, multiply=multiply, amount=1e6)] * 32
        answer = scorer.rank([Query(user_id="7", k=ITEMS, boosts=huge)])[0]
        assert len(answer.codes) == ITEMS
        assert all(math.isfinite(score) for score in answer.scores)


def test_weights_that_do_not_fit_are_refused(scorers: dict[str, Scorer]) -> None:
    for query in (Query(history=["1", "2"], history_weights=[1.0]), Query(similar_to=["1"], similar_weights=[])):
        with pytest.raises(InputError, match="expected a weight for each"):
            scorers["two_tower"].rank([query])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *(("1.5", 1.5), ("-2e3", -2000.0), (" 7 ", 7.0), (".5", 0.5)),
        *((text, None) for text in ("1_000", "nan", "1e999", "٣", "", "0x10", "Infinity")),
    ],
)
def test_numbers_are_those_of_json_and_csv(text: str, number: float | None) -> None:
    from lazydp.components.bundle.attributes import number_of

    assert number_of(text) == number


def test_users_of_a_public_vocabulary_are_told_apart_and_hashed_ones_are_not(
    scorers: dict[str, Scorer], tmp_path: Path
) -> None:
    asked = [Query(user_id="7"), Query(user_id="nobody"), Query(user_id="nobody", history=["3"]), Query(history=["3"])]
    known = [answer.user_known for answer in scorers["two_tower"].rank(asked)]
    assert known == ["yes", "no", "no", None]
    user = {"column": "user", "vocabulary": {"kind": "hashed", "buckets": 64, "salt": "s"}}
    hashed = feature_spec(num_users=50, num_items=ITEMS, user=user)
    write_untrained(tmp_path / "hashed", spec=hashed, num_items=ITEMS)
    answers = make_scorer(Bundle.open(tmp_path / "hashed", allow_test_key=True)).rank(asked)
    assert [(answer.source, answer.user_known) for answer in answers] == [
        ("user", "cannot tell"),
        ("user", "cannot tell"),
        ("user+history", "cannot tell"),
        ("history", None),
    ]
    unread = feature_spec(num_users=50, num_items=ITEMS, user={**user, "embed": False})
    write_untrained(tmp_path / "unread", spec=unread, num_items=ITEMS)
    (answer,) = make_scorer(Bundle.open(tmp_path / "unread", allow_test_key=True)).rank([asked[2]])
    assert (answer.source, answer.user_known) == ("history", None)
