"""The pages that Kubeflow shows of a task: whole in themselves, readable in its sandboxed frame at two widths."""

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from kfp import dsl

from lazydp.components.shared.page import Bar, Facts, Figures, Line, Part, number, page
from support.browser import browser

__all__ = ["browser"]

SECTIONS = [
    Facts("Facts", [("<b>name</b>", "a & b"), ("long", "x" * 400)]),
    Figures("Figures", ["A", "B"], [("one", [0.5, None]), ("two", [1234567.0, math.nan])]),
    Line("Line", "loss", [(1, 2.0), (2, 1.0), (3, math.nan)]),
    Bar("Bar", 8.0, [Part("spent", 3.0, "committed"), Part("reserved", 1.0, "reserved")]),
    Facts("Nothing", []),
]


def test_a_page_needs_nothing_else_and_runs_nothing() -> None:
    text = page("A <title>", audience="private", sections=SECTIONS)  # type: ignore[arg-type]
    assert not re.search(r"<script|<link|<img|@import|url\(|https?://|\son\w+=", text)
    assert "<b>name" not in text
    assert "&lt;b&gt;name" in text
    assert "Private:" in text
    assert "Nothing" not in text, "a section without rows is left out"
    assert [number(value) for value in (None, 3.0, 0.12345, 1234567.0, math.inf)] == [
        "",
        "3",
        "0.1235",
        "1,234,567",
        "inf",
    ]


@pytest.fixture(scope="module")
def pages(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The pages of all tasks, made by the components."""
    from lazydp.components.evaluate.component import evaluate, evaluate_without_privacy
    from lazydp.components.export.component import export, export_without_privacy
    from lazydp.components.gate.component import budget_gate
    from lazydp.components.ingest.card import data_card
    from lazydp.components.ingest.dataset import EncodedDataset
    from lazydp.components.train.component import train
    from lazydp.components.tune.component import tune

    folder = tmp_path_factory.mktemp("pages")
    config = (
        "{model: {kind: two_tower, embedding_dim: 8}, sampling_prob: 0.1, expected_batch_size: 30, steps: 4, "
        "noise_multiplier: 20.0, target_delta: 1.0e-5, log_every: 1}"
    )
    dataset = SimpleNamespace(path=str(tiny_dataset))

    def made(kind: Any, name: str) -> Any:
        return kind(uri=str(folder / name))

    def shown(name: str) -> Any:
        return made(dsl.HTML, f"page-{name}")

    ledger = {"ledger_url": f"sqlite:///{folder / 'ledger.db'}"}
    run = budget_gate.python_func(
        dataset=dataset, config=config, job_id="one", page=shown("gate"), budget_epsilon=8.0, **ledger
    )
    common = {"dataset": dataset, "runs_folder": str(folder)}
    train.python_func(config=config, run_id=run, page=shown("train"), **common, **ledger)
    bundle, metrics = made(dsl.Model, "bundle"), made(dsl.Metrics, "metrics")
    export.python_func(run_id=run, bundle=bundle, page=shown("export"), metrics=metrics, **common, **ledger)
    report = made(dsl.Artifact, "report")
    evaluate.python_func(bundle=bundle, dataset=dataset, metrics=metrics, report=report, page=shown("evaluate"))
    plain, beside = made(dsl.Artifact, "plain"), made(dsl.Artifact, "beside")
    other = train.python_func(
        config=config, run_id=run, mode="sgd", variant="without-privacy", page=shown("plain"), **common
    )
    export_without_privacy.python_func(run_id=other, bundle=plain, **common)
    evaluate_without_privacy.python_func(
        bundle=plain, dataset=dataset, release=report, report=beside, page=shown("beside")
    )
    sweep = (
        "{mean_trials: 1, distribution: geometric, metric: auc, score: {kind: held_out, noise_multiplier: 5.0}, "
        "settings: {embeddings.learning_rate: [0.5]}}"
    )
    budget_gate.python_func(dataset=dataset, config=config, job_id="s", sweep=sweep, page=shown("gate"), **ledger)
    tune.python_func(config=config, sweep=sweep, run_id="run-s", page=shown("tune"), **common, **ledger)
    found = {path.name.removeprefix("page-"): path.read_text() for path in folder.glob("page-*")}
    return {**found, "ingest": data_card(EncodedDataset.open(tiny_dataset).manifest)}


def test_each_task_shows_what_it_did(pages: dict[str, str]) -> None:
    expected = {
        "ingest": ("private", "training examples"),
        "gate": ("public", "charged now"),
        "train": ("private", "Epsilon spent"),
        "tune": ("private", "Settings that won"),
        "export": ("public", "Privacy statement"),
        "evaluate": ("private", "popularity"),
        "beside": ("private", "without privacy"),
        "plain": ("private", "Loss"),
    }
    assert pages.keys() == expected.keys()
    for name, (audience, words) in expected.items():
        assert f'class="notice {audience}"' in pages[name], name
        assert words in pages[name], name
    assert pages["train"].count('<line class="first"') == 6, "between four points of loss and four of epsilon"


@pytest.mark.parametrize("width", [360, 1280])
def test_pages_in_kubeflows_frame(pages: dict[str, str], browser: Any, width: int) -> None:
    """A sandboxed iframe without scripts and without network: nothing is asked for, nothing runs out of the frame."""
    context = browser.new_context(viewport={"width": width, "height": 800}, offline=True)
    tab = context.new_page()
    asked: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    shown = {**pages, "all": page("All", audience="public", sections=SECTIONS)}  # type: ignore[arg-type]
    for name, text in shown.items():
        tab.set_content('<iframe sandbox="" style="width: 100%; height: 90vh; border: 0"></iframe>')
        tab.evaluate("text => { document.querySelector('iframe').srcdoc = text }", text)
        frame = tab.frame_locator("iframe")
        frame.locator("h1").wait_for()
        assert frame.locator("h1").is_visible(), name
        assert frame.locator(".notice").is_visible(), name
        handle = tab.query_selector("iframe").content_frame()
        wide = handle.evaluate("() => document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0, f"{name} runs {wide} pixels out of a frame {width} wide"
    assert [url for url in asked if not url.startswith(("about:", "data:"))] == []
    context.close()
