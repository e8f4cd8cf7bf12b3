"""`lazydp budget` as a person types it."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from lazydp.components.budget.accounting.events import dpsgd_event
from lazydp.components.budget.cli import command
from lazydp.components.budget.ledger.ledger import Ledger
from lazydp.components.budget.ledger.secret import LedgerSecret
from lazydp.components.shared.errors import InputError, IntegrityError, LazyDPError

EVENT = dpsgd_event(noise_multiplier=10.0, sampling_prob=1.0, steps=1)


def call(url: str, *words: str) -> Result:
    return CliRunner().invoke(command, [*words, "--ledger", url])


def lines(url: str, *words: str) -> str:
    result = call(url, *words)
    assert result.exit_code == 0, result.output + str(result.exception)
    return result.output


def refusal(url: str, *words: str) -> LazyDPError:
    result = call(url, *words)
    assert isinstance(result.exception, LazyDPError), result.output
    return result.exception


def dataset_folder(path: Path) -> Path:
    path.mkdir()
    document = {"format_version": 1, "fingerprint": "d" * 64, "spec": {"name": "shop"}, "source": {"digest": "s"}}
    (path / "dataset.json").write_text(json.dumps(document))
    return path


def test_the_life_of_a_budget(sqlite_url: str, tmp_path: Path) -> None:
    folder = dataset_folder(tmp_path / "dataset")
    size = ["--epsilon", "3", "--delta", "1e-5", "--privacy-unit", "example"]
    out = lines(sqlite_url, "set", "--dataset", str(folder), *size, "--by", "officer")
    assert out == "shop: epsilon 3 at delta 1e-05 per example; charged 0, remaining 3\n"
    with Ledger.open(sqlite_url) as ledger:
        [known] = ledger.state().datasets.values()
        secret = LedgerSecret.of(sqlite_url)
        assert known.identifier == secret.identifier("dataset", "d" * 64)
        assert known.sources == (secret.identifier("source", "s"),)
        ledger.reserve(dataset="shop", event=EVENT, run_id="one")
        ledger.commit("one", event=EVENT, release="bundle")
        ledger.reserve(dataset="shop", event=EVENT, run_id="two")
    shown = lines(sqlite_url, "show")
    assert "1 reserved, 1 committed" in shown
    [found] = json.loads(lines(sqlite_url, "show", "--dataset", "shop", "--json"))
    assert (found["epsilon"], found["releases"], found["privacy_unit"]) == (3.0, 1, "example")

    raise_it = ["set", "--dataset", "shop", "--epsilon", "4", "--delta", "1e-5", "--privacy-unit", "example"]
    assert "name and a reason" in str(refusal(sqlite_url, *raise_it, "--by", "officer"))
    assert "epsilon 4" in lines(sqlite_url, *raise_it, "--by", "officer", "--reason", "new season")

    assert "name and a reason" in str(refusal(sqlite_url, "void", "two", "--by", "", "--reason", "crashed"))
    assert lines(sqlite_url, "void", "two", "--by", "officer", "--reason", "crashed") == "run two is voided\n"
    history = lines(sqlite_url, "history", "--dataset", "shop")
    assert "officer" in history
    assert "crashed" in history
    assert [entry["kind"] for entry in json.loads(lines(sqlite_url, "history", "--json"))] == [
        "dataset", "budget", "reserved", "committed", "reserved", "budget", "voided",
    ]  # fmt: skip
    verified = json.loads(lines(sqlite_url, "verify", "--json"))
    assert verified["ok"]
    assert lines(sqlite_url, "verify", "--expect-head", verified["head"]).startswith("7 entries, ")


def test_a_budget_is_per_person_unless_said_otherwise(sqlite_url: str, tmp_path: Path) -> None:
    folder = dataset_folder(tmp_path / "dataset")
    out = lines(sqlite_url, "set", "--dataset", str(folder), "--epsilon", "3", "--delta", "1e-5", "--by", "officer")
    assert out.startswith("shop: epsilon 3 at delta 1e-05 per user")


def test_verify_fails_where_something_does_not_hold(sqlite_url: str) -> None:
    with Ledger.open(sqlite_url) as ledger:
        ledger.register_dataset("d" * 64, name="shop")
    result = call(sqlite_url, "verify", "--expect-head", "1:" + "0" * 64)
    assert isinstance(result.exception, IntegrityError)
    assert "entry 1" in result.output


def test_a_dataset_that_is_new_needs_a_folder_or_a_name(sqlite_url: str) -> None:
    words = ["set", "--dataset", "e" * 64, "--epsilon", "3", "--delta", "1e-5"]
    assert isinstance(refusal(sqlite_url, *words), InputError)
    lines(sqlite_url, *words, "--name", "month")
    lines(
        sqlite_url,
        "set",
        "--dataset",
        "f" * 64,
        "--name",
        "next",
        "--parent",
        "month",
        "--epsilon",
        "2",
        "--delta",
        "1e-5",
    )
    with Ledger.open(sqlite_url, read_only=True) as ledger:
        assert ledger.show("next").family == (ledger.show("month").dataset,)
        # What is given is the private fingerprint; the folder, ingested again, is the same dataset.
        assert "e" * 64 not in str(ledger.entries())


def test_export(sqlite_url: str, tmp_path: Path) -> None:
    with Ledger.open(sqlite_url) as ledger:
        ledger.register_dataset("d" * 64, name="<script>alert(1)</script>")
        head = ledger.head()
    page, archive = tmp_path / "budget.html", tmp_path / "entries.jsonl"
    lines(sqlite_url, "export", "--html", str(page), "--entries", str(archive))
    text = page.read_text()
    assert head in text
    assert "<script>" not in text
    assert "http://" not in text
    assert "https://" not in text
    assert [json.loads(line)["number"] for line in archive.read_text().splitlines()] == [1]
    assert call(sqlite_url, "export").exit_code == 2
    assert "cannot write" in str(refusal(sqlite_url, "export", "--html", str(tmp_path / "none" / "x.html")))


def test_control_characters_do_not_reach_the_terminal(sqlite_url: str) -> None:
    with Ledger.open(sqlite_url) as ledger:
        ledger.register_dataset("d" * 64, name="shop\x1b[2J")
    assert "\x1b" not in lines(sqlite_url, "show")


def test_no_ledger_yet(tmp_path: Path) -> None:
    assert "lazydp budget set" in str(refusal(f"sqlite:///{tmp_path / 'none.db'}", "show"))


def test_show_loads_nothing_heavy(sqlite_url: str) -> None:
    with Ledger.open(sqlite_url) as ledger:
        ledger.register_dataset("d" * 64, name="shop")
        ledger.set_budget("shop", epsilon=3.0, delta=1e-5)
    code = (
        "import sys; from lazydp.pipelines.cli import main\n"
        f"try: main(['budget', 'show', '--ledger', {sqlite_url!r}])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'scipy', 'numpy', 'dp_accounting', 'sqlalchemy', 'pyarrow', 'pydantic', 'matplotlib'}\n"
        "print('HEAVY', sorted(heavy & set(sys.modules)))"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "HEAVY []" in done.stdout, f"{done.stdout} in {time.monotonic() - started:.2f} s"


@pytest.mark.parametrize("words", [["show"], ["history"], ["set"], ["void"], ["verify"], ["export"], ["migrate"]])
def test_help_has_an_example(words: list[str]) -> None:
    assert "Example: lazydp budget" in CliRunner().invoke(command, [*words, "--help"]).output
