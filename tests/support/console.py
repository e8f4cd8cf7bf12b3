"""What the console's tests and its screenshots show: two models of made-up films, and a ledger with a year behind it.

Every figure that the ledger holds was composed by the ledger itself; only its clock and its data are made up.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import random
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal
from unittest import mock

import pyarrow as pa

from lazydp.components.budget.accounting.epsilon import epsilon
from lazydp.components.budget.accounting.events import dpsgd_event
from lazydp.components.budget.ledger import writing
from lazydp.components.budget.ledger.ledger import Ledger
from lazydp.components.budget.statement import (
    DEFAULT_NOT_COVERED,
    DEFAULT_PUBLIC,
    AuditResult,
    PrivacyStatement,
    StepEpsilon,
)
from lazydp.components.bundle.manifest import BundleManifest, Lineage
from lazydp.components.bundle.untrained import feature_spec
from lazydp.components.bundle.writer import write_bundle
from lazydp.components.features.catalogue import catalogue_table
from lazydp.components.features.vocabulary import Vocabularies
from lazydp.components.models.build import build_model
from lazydp.components.models.config import DlrmConfig, TwoTowerConfig
from lazydp.components.models.recommender import initial_tables
from lazydp.service.http.metrics import Metrics
from lazydp.service.http.traffic import Traffic

DELTA = 1e-6
DATASET, UNKNOWN = "d" * 64, "e" * 64
HOSTILE = "<img src=x onerror=alert(1)>\"'&"
_STEPS, _SAMPLING = 100, 1.0
_FIRST = ("Quiet", "Paper", "Distant", "Amber", "Winter", "Second", "Hollow", "Northern")
_SECOND = ("Harbour", "Letters", "Orchard", "Signal", "Crossing", "Garden", "Meridian", "Lantern")
_GENRES = ("Drama", "Comedy", "Documentary", "Thriller", "Romance")


@dataclass(frozen=True, slots=True)
class Console:
    """Bundles to serve, and the ledger of one of them."""

    bundles: tuple[Path, ...]
    ledger: str


def event(noise_multiplier: float) -> Any:
    return dpsgd_event(noise_multiplier=noise_multiplier, sampling_prob=_SAMPLING, steps=_STEPS)


def cost(noise_multiplier: float) -> float:
    """Epsilon of one run."""
    return epsilon(event(noise_multiplier), delta=DELTA)


@contextlib.contextmanager
def clock(start: datetime.datetime) -> Iterator[SimpleNamespace]:
    """A ledger that takes the attribute `now` for the time."""
    at = SimpleNamespace(now=start)
    stub = SimpleNamespace(now=lambda _: at.now)
    with mock.patch.object(writing, "datetime", SimpleNamespace(datetime=stub, UTC=datetime.UTC)):
        yield at


def statement(noise_multiplier: float, **changes: Any) -> PrivacyStatement:
    """Of a run of so much noise, per person unless `changes` say otherwise."""
    claimed = cost(noise_multiplier)
    fields: dict[str, Any] = {
        "private": True,
        "epsilon": claimed,
        "delta": DELTA,
        "accountant": "PLD",
        "accountant_version": "dp-accounting 0.6.0",
        "privacy_unit": "user",
        "sampler": "Poisson",
        "noise_multiplier": noise_multiplier,
        "max_grad_norm": 1.0,
        "expected_batch_size": 256.0,
        "sampling_prob": _SAMPLING,
        "steps": _STEPS,
        "epsilon_without_amplification": None,
        "epsilon_user_level": None,
        "epsilon_over_steps": tuple(
            StepEpsilon(
                step=step,
                epsilon=epsilon(
                    dpsgd_event(noise_multiplier=noise_multiplier, sampling_prob=_SAMPLING, steps=step), delta=DELTA
                ),
            )
            for step in (25, 50, 100)
        ),
        "assumed_public": DEFAULT_PUBLIC,
        "not_covered": DEFAULT_NOT_COVERED,
        "code_version": "made up",
    }
    return PrivacyStatement.model_validate(fields | changes)


def films(count: int) -> pa.Table:
    """Made-up films with genres, years and pictures; the last one has a hostile title."""
    titles = [f"The {_FIRST[n % 8]} {_SECOND[(n // 8 + n) % 8]}" for n in range(count)]
    return pa.table(
        {
            "item": [str(n) for n in range(count)],
            "title": [*titles[:-1], HOSTILE],
            "genre": [f"{_GENRES[n % 5]}|{_GENRES[(n + 1) % 5]}" if n % 3 else _GENRES[n % 5] for n in range(count)],
            "year": [1950 + 7 * n % 75 for n in range(count)],
            "image": [_poster(n) for n in range(count)],
        }
    )


def _poster(number: int) -> str:
    hue = 47 * number % 360
    x, y, radius = 16 + 5 * number % 32, 20 + 3 * number % 24, 10 + number % 9
    drawing = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 64 64">'
        f'<rect width="64" height="64" fill="hsl({hue} 45% 35%)"/>'
        f'<circle cx="{x}" cy="{y}" r="{radius}" fill="hsl({(hue + 40) % 360} 60% 65%)"/>'
        f'<path d="M0 64V{40 + number % 14}L64 {36 + number % 20}V64z" fill="hsl({hue} 50% 20%)"/></svg>'
    )
    return "data:image/svg+xml," + urllib.parse.quote(drawing)


def write_films(
    path: Path,
    *,
    name: str,
    dataset: str,
    claimed: PrivacyStatement,
    kind: Literal["two_tower", "dlrm"] = "two_tower",
    run_id: str = "run-films",
    pictures: bool = True,
    seed: int = 0,
) -> BundleManifest:
    """A bundle of 64 films with initial weights that carries the statement `claimed`."""
    item = {
        "column": "item",
        "vocabulary": {"kind": "integer", "size": 64},
        "title": "title",
        "metadata": ["genre", "year", *(["image"] if pictures else [])],
    }
    spec = feature_spec(num_users=50, num_items=64, item=item)
    vocabularies = Vocabularies(spec, {})
    sizes: dict[str, Any] = {"embedding_dim": 16, "seed": seed, "embedding_init_std": 1.0}
    model = build_model(spec, TwoTowerConfig(**sizes) if kind == "two_tower" else DlrmConfig(**sizes))
    tables = initial_tables(model)
    return write_bundle(
        path,
        name=name,
        mode="lazydp",
        test_key=claimed.test_key,
        step=claimed.steps,
        model=model,
        table_weights=tables,
        flushed_steps=dict.fromkeys(tables, claimed.steps),
        spec=spec,
        vocabularies=vocabularies,
        statement=claimed,
        lineage=Lineage(
            run_id=run_id, dataset=dataset, config="none", code_version="none", created="2026-10-05T08:12:00Z"
        ),
        items=catalogue_table(spec, vocabularies, films(64)),
    )


def write_console(folder: Path) -> Console:
    """Two models beside each other: the dataset of the first has a budget in the ledger, that of the second has not."""
    audit = AuditResult(epsilon_lower_bound=0.6 * cost(23.0), confidence=0.95, method="planted examples, one run")
    first = write_films(
        folder / "films", name="films", dataset=DATASET, claimed=statement(23.0, audit=audit), run_id="run-2026-10"
    )
    loose = statement(12.0, privacy_unit="example", epsilon_user_level=61.27, not_covered=DEFAULT_NOT_COVERED[:2])
    write_films(folder / "trial", name="films-trial", dataset=UNKNOWN, claimed=loose, run_id="run-trial", seed=1)
    url = f"sqlite:///{folder / 'ledger.db'}"
    write_ledger(url, release=first.version)
    return Console((folder / "films", folder / "trial"), url)


def write_ledger(url: str, *, release: str) -> None:
    """A year of a dataset: a budget that was raised, five releases, a run that was voided and one that is open."""
    with clock(datetime.datetime(2026, 1, 12, 9, 30, tzinfo=datetime.UTC)) as at, Ledger.open(url) as ledger:

        def on(month: int, day: int, hour: int = 9) -> None:
            at.now = datetime.datetime(2026, month, day, hour, 17, 3, 250_000, tzinfo=datetime.UTC)

        def run(month: int, day: int, noise_multiplier: float, *, by: str, purpose: str = "training") -> str:
            on(month, day)
            run_id = f"run-2026-{month:02}"
            ledger.reserve(
                dataset="films-2026",
                event=event(noise_multiplier),
                run_id=run_id,
                privacy_unit="user",
                by=by,
                purpose=purpose,
                code_version="made up",
            )
            return run_id

        ledger.register_dataset(DATASET, name="films-2026", by="A. Turing")
        ledger.set_budget(
            "films-2026", epsilon=6.0, delta=DELTA, privacy_unit="user", by="A. Turing", reason="privacy review 12"
        )
        for month, noise_multiplier, by in ((2, 33.0, "G. Hopper"), (4, 30.0, "G. Hopper"), (6, 33.0, "B. Liskov")):
            run_id = run(month, 3, noise_multiplier, by=by)
            on(month, 3 + month, 15)
            digest = hashlib.sha256(run_id.encode()).hexdigest()[:12]
            ledger.commit(run_id, event=event(noise_multiplier), release=digest, step=_STEPS, by=by)
        run_id = run(7, 2, 30.0, by="B. Liskov")
        on(7, 20)
        ledger.void(run_id, by="B. Liskov", reason="the machine failed; its checkpoints were deleted")
        on(9, 1)
        ledger.set_budget(
            "films-2026",
            epsilon=8.0,
            delta=DELTA,
            privacy_unit="user",
            by="A. Turing",
            reason="decision 7 of the board",
        )
        run_id = run(10, 1, 23.0, by="G. Hopper")
        on(10, 5, 8)
        ledger.commit(run_id, event=event(23.0), release=release, step=_STEPS, by="G. Hopper")
        run(11, 16, 35.0, by="B. Liskov")


def simulate_hour(metrics: Metrics, traffic: Traffic, *, now: float) -> None:
    """An hour of made-up requests before `now`, with a slow quarter and some that failed."""
    drawn = random.Random(0)
    traffic.take(now - 3600)
    for minute in range(59, 0, -1):
        slow = 20 <= minute < 30
        for _ in range(drawn.randrange(40, 90) + 5 * (60 - minute)):
            route = drawn.choice(("/v1/recommendations", "/v1/recommendations", "/v1/items/{item_id}/similar"))
            status = 503 if slow and drawn.random() < 0.04 else 404 if drawn.random() < 0.02 else 200
            metrics.observe(route, "POST", status, drawn.lognormvariate(-7, 0.5) * (4 if slow else 1))
            metrics.answered("films", drawn.choice(("user", "user", "history", "item")))
        traffic.take(now - 60 * (minute - 1) - 1)
