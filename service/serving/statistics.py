"""What the calls of one version's inference came to, as the statistics of the Open Inference Protocol count it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass(slots=True)
class Duration:
    """So many, and how long they took together."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int) -> None:
        """One more."""
        self.count += 1
        self.ns += ns


@dataclass(slots=True)
class Statistics:
    """Counted on the event loop, so that no lock is needed.

    Attributes:
        success: calls that were answered.
        fail: calls that were refused after their model was found.
        compute_input: reading the tensors of a call.
        compute_infer: ranking, the wait for other calls' ranking included.
        compute_output: writing the tensors of an answer.
        inference_count: rows that were answered.
        last_inference: milliseconds since 1970 of the latest answer, 0 before the first.
    """

    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    compute_input: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)
    inference_count: int = 0
    last_inference: int = 0

    def answered(self, *, rows: int, ns: int) -> None:
        """One call was answered."""
        self.success.add(ns)
        self.inference_count += rows
        self.last_inference = time.time_ns() // 1_000_000
