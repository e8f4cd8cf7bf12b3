"""The report that `lazydp budget export --html` writes; `tests/service/console` opens it in a browser."""

import base64
import hashlib
import re

from lazydp.components.budget.accounting.events import dpsgd_event
from lazydp.components.budget.ledger.ledger import Ledger
from lazydp.components.budget.ledger.verify import verify
from lazydp.components.budget.report.overview import LedgerOverview
from lazydp.components.budget.report.report import report
from lazydp.components.budget.storage.entries import Entry


def gaussian(noise_multiplier: float):
    return dpsgd_event(noise_multiplier=noise_multiplier, sampling_prob=1.0, steps=1)


def page_of(entries: tuple[Entry, ...], **options) -> str:
    return report(LedgerOverview.of(entries, verify(entries, **options)), source="sqlite:///x.db")


def test_figures_stand_in_the_page(sqlite_url: str) -> None:
    with Ledger.open(sqlite_url) as ledger:
        ledger.register_dataset("a" * 64, name="shop <i>all of 2026</i>")
        ledger.set_budget("a" * 64, epsilon=3.0, delta=1e-5, by="A. Turing", reason="privacy review 12")
        ledger.register_dataset("b" * 64, name="shop, December", parents=["a" * 64])
        ledger.set_budget("b" * 64, epsilon=2.5, delta=1e-5, by="A. Turing")
        for number in range(4):
            run = f"run-{number:016x}"
            ledger.reserve(dataset="a" * 64, event=gaussian(9.0 + number), run_id=run)
            if number < 2:
                ledger.commit(run, event=gaussian(9.0 + number), release="c" * 64, step=1000)
        ledger.void(f"run-{3:016x}", by="A. Turing", reason="the machine burnt down")
        page = page_of(ledger.entries())
    assert "The chain is verified" in page
    assert re.search(r"\d+ epsilons were computed anew, and agree", page)
    assert "privacy review 12" in page
    assert re.search(r"UTC, A. Turing: reservation of run-0{15}3 given back \(the machine burnt down\)\.", page)
    assert page.count("A. Turing: budget set to epsilon ") == 2
    assert page.count("the open runs cost at most") == 2
    assert "<i>" not in page
    assert "shop &lt;i&gt;all of 2026" in page
    # Two releases and one open reservation, in each dataset of the family.
    assert page.count('data-name="When"') == 4
    assert page.count('data-name="Since"') == 2
    for drawn in re.findall(r'(?s)<svg class="chart".*?</svg>', page):
        assert "epsilon per interaction, at delta 0.00001</text>" in drawn
        assert re.search(r"time \(UTC\), \d\d \w{3} \d{4} to", drawn)
        assert {"committed", "reserved", "limit"} <= set(re.findall(r'<(?:rect|line) class="(\w+)"', drawn))


def test_one_release_costs_no_less_than_itself(sqlite_url: str) -> None:
    with Ledger.open(sqlite_url) as ledger:
        ledger.register_dataset("a" * 64, name="shop")
        ledger.set_budget("a" * 64, epsilon=3.0, delta=1e-5)
        ledger.reserve(dataset="a" * 64, event=gaussian(9.0), run_id="run")
        ledger.commit("run", event=gaussian(9.0), release="c" * 64)
        page = page_of(ledger.entries(), recompute=False)
    assert re.search(r"all releases together cost [\d.]+\.</p>", page)
    assert "Changes of the budget" in page
    assert "given back (" not in page


def test_only_its_own_style_is_let_through(sqlite_url: str) -> None:
    page = report(None, source="nowhere")
    (sheet,) = re.findall(r"(?s)<style>(.*?)</style>", page)
    digest = base64.b64encode(hashlib.sha256(sheet.encode()).digest()).decode()
    assert f"content=\"default-src 'none'; style-src 'sha256-{digest}'\"" in page.replace("&#39;", "'")
    assert not re.search(r"<script|<link|<img|@import|url\(|https?://|\sstyle=|\son\w+=", page)


def test_epsilons_that_were_not_recomputed_are_not_said_to_be(sqlite_url: str) -> None:
    with Ledger.open(sqlite_url) as ledger:
        ledger.register_dataset("a" * 64, name="shop")
        ledger.set_budget("a" * 64, epsilon=3.0, delta=1e-5)
        entries = ledger.entries()
    assert "The epsilons were not computed anew here" in page_of(entries, recompute=False)
    assert verify(entries, recompute=False).epsilons == 0
    changed = (*entries[:1], Entry(**{**{n: getattr(entries[1], n) for n in Entry.__slots__}, "recorded_by": "x"}))
    assert verify(changed, recompute=False).problems


def test_a_tampered_ledger_is_reported_as_such(sqlite_url: str) -> None:
    with Ledger.open(sqlite_url) as ledger:
        ledger.register_dataset("a" * 64, name="shop")
        page = page_of(ledger.entries(), expect_head="1:" + "0" * 64)
    assert "This ledger does not verify." in page
    assert "The chain is verified" not in page


def test_an_empty_ledger_has_a_page() -> None:
    assert "No dataset yet." in page_of(())
