"""The latest answers of one version."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from lazydp.components.bundle.query import Source


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer as JSON, and what it rests on."""

    body: bytes
    source: Source


class AnswerCache:
    """The latest answers of one version by request. An answer is a function of version and request alone.

    Bounded by number and by size, the requests' own included: a request may be a megabyte long.
    """

    def __init__(self, entries: int, *, max_bytes: int) -> None:
        self._entries = entries
        self._max_bytes = max_bytes
        self._bytes = 0
        self._answers: OrderedDict[bytes, Answer] = OrderedDict()

    def get(self, key: bytes) -> Answer | None:
        """The answer kept for a request."""
        found = self._answers.get(key)
        if found is not None:
            self._answers.move_to_end(key)
        return found

    def put(self, key: bytes, answer: Answer) -> None:
        """Keep an answer, and let the oldest go; one that is larger than all may be is not kept."""
        size = len(key) + len(answer.body)
        if not self._entries or size > self._max_bytes:
            return
        before = self._answers.pop(key, None)
        if before is not None:
            self._bytes -= len(key) + len(before.body)
        self._answers[key] = answer
        self._bytes += size
        while len(self._answers) > self._entries or self._bytes > self._max_bytes:
            oldest, dropped = self._answers.popitem(last=False)
            self._bytes -= len(oldest) + len(dropped.body)
