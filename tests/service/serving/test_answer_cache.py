"""What the service keeps of its answers is bounded, and never anything but what it would answer anew."""

import os
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from lazydp.service.serving.answer_cache import Answer, AnswerCache


def test_the_oldest_go_first_and_use_keeps_young() -> None:
    cache = AnswerCache(2, max_bytes=100)
    one, two, three = (Answer(body, "user") for body in (b"1", b"2", b"3"))
    cache.put(b"a", one)
    cache.put(b"b", two)
    assert cache.get(b"a") == one
    cache.put(b"c", three)
    assert [cache.get(key) for key in (b"a", b"b", b"c")] == [one, None, three]


def test_nothing_is_kept_where_nothing_may_be() -> None:
    for cache in (AnswerCache(0, max_bytes=100), AnswerCache(10, max_bytes=0), AnswerCache(10, max_bytes=1)):
        cache.put(b"a", Answer(b"1", "user"))
        assert cache.get(b"a") is None


@given(
    st.lists(st.tuples(st.binary(min_size=1, max_size=3), st.binary(max_size=40)), max_size=60),
    st.integers(1, 6),
    st.integers(1, 120),
)
def test_it_never_holds_more_than_it_may(given: list[tuple[bytes, bytes]], entries: int, max_bytes: int) -> None:
    cache = AnswerCache(entries, max_bytes=max_bytes)
    for key, answer in given:
        cache.put(key, Answer(answer, "user"))
        held = [(other, found.body) for other in {key for key, _ in given} if (found := cache.get(other)) is not None]
        assert len(held) <= entries
        assert sum(len(key) + len(answer) for key, answer in held) <= max_bytes
        if len(key) + len(answer) <= max_bytes:
            assert cache.get(key) == Answer(answer, "user")


def test_large_requests_do_not_fill_the_memory(start: Any, bundles: dict[str, Path]) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def ask(number: int) -> None:
        # A megabyte each, and no two alike: the ids are not known, so the answer is short.
        content = b'{"user_id":"7","exclude":["%d"]%s}' % (number, b" " * 1_000_000)
        response = client.post("/v1/recommendations", content=content, headers={"content-type": "application/json"})
        assert response.status_code == 200

    with start(bundles["towers"], cache_bytes=2**22) as client:
        for number in range(30):
            ask(number)
        settled = resident()
        for number in range(30, 130):
            ask(number)
        assert resident() - settled < 32 * 2**20
