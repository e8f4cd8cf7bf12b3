"""A release asked as its users will ask it, before it goes anywhere: the service on it must answer well."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow.parquet as pq

from lazydp.components.bundle.manifest import BundleManifest
from lazydp.components.shared.errors import InputError, LazyDPError
from lazydp.components.shared.running_service import running_service

_REQUEST_S = 30.0
# Each answer is made anew: none is kept.
_SETTINGS = {"LAZYDP_SERVE_CACHE_ENTRIES": "0"}
_HISTORY, _ITEMS, _REPEATS = 3, 5, 30
_log = logging.getLogger("lazydp.validate")


class ReleaseRefusedError(LazyDPError):
    """The service does not answer on this bundle as it must."""


@dataclass(frozen=True, slots=True)
class Validation:
    """What was asked and how it went.

    Attributes:
        queries: how many different ones.
        median_ms: of their latency, on a warm service.
        slowest_ms: the 95th percentile.
    """

    queries: int
    median_ms: float
    slowest_ms: float


def validate(bundle: Path, *, queries: Sequence[dict[str, Any]] = (), max_latency_ms: float) -> Validation:
    """Start the service on `bundle` and ask it.

    Args:
        bundle: what export released.
        queries: bodies of POST /v1/recommendations that must be answered; without any, one is made of each of the
            first items, for somebody who took it.
        max_latency_ms: the 95th percentile that is tolerated, one request at a time; for machines like this one.

    Raises:
        ReleaseRefusedError: an answer is wrong, or too late, or of another version.
        UnavailableError: the service does not start.
        InputError: a latency that is no bound, or no queries for a bundle without a catalogue.
    """
    if not max_latency_ms > 0:
        raise InputError(f"max_latency_ms: expected a positive number, found {max_latency_ms:g}")
    manifest = BundleManifest.load(bundle)
    asked = list(queries) or _golden(bundle)
    with (
        running_service(bundle, settings=_SETTINGS) as url,
        httpx.Client(base_url=url, timeout=_REQUEST_S) as client,
    ):
        _check_version(client, manifest)
        for query in asked:
            _check(query, client.post("/v1/recommendations", json=query))
        seconds = [_timed(client, asked[turn % len(asked)]) for turn in range(_REPEATS)]
    median, slowest = (float(np.quantile(seconds, part)) * 1e3 for part in (0.5, 0.95))
    if slowest > max_latency_ms:
        raise ReleaseRefusedError(
            f"the service answers in {slowest:.0f} ms (95th percentile of {_REPEATS}), and {max_latency_ms:g} ms are "
            "tolerated: give it more CPU, or raise max_latency_ms"
        )
    _log.info("%d queries answered; median %.1f ms, 95th percentile %.1f ms", len(asked), median, slowest)
    return Validation(len(asked), median, slowest)


def _golden(bundle: Path) -> list[dict[str, Any]]:
    if not (bundle / "items.parquet").exists():
        raise InputError(f"bundle {bundle} has no catalogue to make queries of: give some")
    items = pq.read_table(bundle / "items.parquet", columns=["item"]).column(0).slice(0, _HISTORY).to_pylist()
    return [{"history": [str(item)], "k": _ITEMS, "exclude_seen": True} for item in items]


def _check_version(client: httpx.Client, manifest: BundleManifest) -> None:
    answer = client.get("/v1/models")
    answer.raise_for_status()
    if manifest.version not in answer.text:
        raise ReleaseRefusedError(f"the service does not say that it serves version {manifest.version}: {answer.text}")


def _check(query: dict[str, Any], answer: httpx.Response) -> None:
    """Refuse what is no ranking: not k different items, or a score that is no number, or out of order."""
    told = json.dumps(query)
    if answer.status_code != httpx.codes.OK:
        raise ReleaseRefusedError(f"the service answers {told} with status {answer.status_code}: {answer.text[:300]}")
    items = answer.json()["items"]
    scores = [item["score"] for item in items]
    if not items or len({item["id"] for item in items}) != len(items) or len(items) > query.get("k", len(items)):
        raise ReleaseRefusedError(f"the service answers {told} with {len(items)} items, or with one of them twice")
    if not all(math.isfinite(score) for score in scores) or scores != sorted(scores, reverse=True):
        raise ReleaseRefusedError(f"the service answers {told} with scores that are no ranking: {scores}")
    if query.get("exclude_seen") and {item["id"] for item in items} & set(query.get("history", ())):
        raise ReleaseRefusedError(f"the service answers {told} with an item of the history")


def _timed(client: httpx.Client, query: dict[str, Any]) -> float:
    began = time.monotonic()
    client.post("/v1/recommendations", json=query).raise_for_status()
    return time.monotonic() - began
