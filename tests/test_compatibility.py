"""What earlier versions wrote opens, serves and verifies with today's code (tests/data/v0/README.md)."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lazydp.components.shared.errors import LazyDPError
from lazydp.pipelines.cli import cli
from support.service import running

V0 = Path(__file__).parent / "data" / "v0"
EXPECTED: dict[str, Any] = json.loads((V0 / "expected.json").read_text())
LEDGERS = ("ledger.db", "ledger-v1.db", "ledger-mixed.db")
KINDS = ("two_tower", "dlrm")


@pytest.fixture
def v0(tmp_path: Path) -> Path:
    """A copy that the test may change, with the modes that Git does not keep."""
    shutil.copytree(V0, tmp_path / "v0")
    for path in [tmp_path / "v0", *(tmp_path / "v0").rglob("*")]:
        path.chmod(0o700 if path.is_dir() else 0o600)
    return tmp_path / "v0"


def lazydp(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """What the command prints."""
    capsys.readouterr()
    cli.main([str(word) for word in words], standalone_mode=False)
    return capsys.readouterr().out


def spent(capsys: pytest.CaptureFixture[str], ledger: Path) -> dict[str, list[float]]:
    budgets = json.loads(lazydp(capsys, "budget", "show", "--json", "--ledger", f"sqlite:///{ledger}"))
    return {budget["name"]: [budget["charged_epsilon"], budget["committed_epsilon"]] for budget in budgets}


def test_the_dataset_opens_and_trains(v0: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lazydp.components.ingest.dataset import EncodedDataset

    assert EncodedDataset.open(v0 / "dataset").manifest.fingerprint == EXPECTED["fingerprint"]
    (v0 / "config.yaml").write_text(
        "{model: {kind: two_tower, embedding_dim: 8}, privacy_unit: example, sampling_prob: 0.05, steps: 3,\n"
        " expected_batch_size: 24, noise_multiplier: 4.0, target_delta: 1.0e-5, max_grad_norm: 0.5,\n"
        " embeddings: {learning_rate: 1.0}}\n"
    )
    ledger = f"sqlite:///{v0 / 'ledger.db'}"
    common = ["--dataset", v0 / "dataset", "--ledger", ledger]
    printed = lazydp(capsys, "train", *common, "--config", v0 / "config.yaml", "--out", v0 / "run")  # type: ignore[arg-type]
    assert "3 steps done" in printed
    # Charged to the budget that the dataset had before: it is the same dataset in the same ledger.
    assert list(spent(capsys, v0 / "ledger.db")) == ["shop"]
    assert spent(capsys, v0 / "ledger.db")["shop"][0] > EXPECTED["ledger.db"]["spent"]["shop"][0]


def test_a_second_ingest_meets_the_budget_that_its_rows_had(v0: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = v0 / "source"
    lazydp(
        capsys,
        *("ingest", "--input", source / "interactions.parquet", "--spec", source / "spec.yaml"),
        *("--out", v0 / "again"),
    )
    lazydp(
        capsys,
        *("budget", "set", "--dataset", v0 / "again", "--epsilon", "50", "--delta", "1e-5"),
        *("--privacy-unit", "example", "--ledger", f"sqlite:///{v0 / 'ledger.db'}"),
    )
    for charged, committed in spent(capsys, v0 / "ledger.db").values():
        assert [charged, committed] == pytest.approx(EXPECTED["ledger.db"]["spent"]["shop"], rel=1e-6)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_bundle_is_served_with_the_same_answers_and_its_ledger(v0: Path, kind: str) -> None:
    ledger = f"sqlite:///{v0 / 'ledger.db'}"
    # A bundle under a noise key of its own: served without allowing those made for tests.
    with running(v0 / f"bundle-{kind}", ledger=ledger, allow_test_key=False) as client:
        answer = client.get("/v1/users/u3/recommendations", params={"k": 5})
        assert answer.status_code == 200, answer.text
        items = answer.json()["items"]
        budget = client.get("/v1/privacy/budget").json()
        releases = client.get("/v1/privacy/releases").json()
        assert client.get("/").status_code == 200
    expected = EXPECTED[f"bundle-{kind}"]
    assert [(item["id"], item["title"]) for item in items] == [(name, title) for name, title, _ in expected]
    assert [item["score"] for item in items] == pytest.approx([score for _, _, score in expected], abs=1e-5)
    charged, committed = EXPECTED["ledger.db"]["spent"]["shop"]
    shop = budget["datasets"][0]
    assert shop["epsilon_spent"] == pytest.approx(committed, rel=1e-6)
    assert shop["epsilon_reserved"] == pytest.approx(charged - committed, rel=1e-6)
    released = {entry["run_id"] for entry in releases["entries"] if entry["kind"] == "committed"}
    assert released == {"run-two_tower", "run-dlrm"}


def test_a_bundle_is_evaluated(v0: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = v0 / f"bundle-{kind}"
    lazydp(capsys, "evaluate", "--bundle", bundle, "--dataset", v0 / "dataset", "--out", v0 / "metrics.json")
    assert 0 < json.loads((v0 / "metrics.json").read_text())["model"]["auc"] < 1


@pytest.mark.parametrize("name", LEDGERS)
def test_a_ledger_verifies_with_the_same_figures(v0: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    expected = EXPECTED[name]
    url = f"sqlite:///{v0 / name}"
    printed = lazydp(capsys, "budget", "verify", "--ledger", url, "--expect-head", expected["head"])
    assert expected["head"] in printed
    found = spent(capsys, v0 / name)
    assert found.keys() == expected["spent"].keys()
    for dataset, figures in expected["spent"].items():
        assert found[dataset] == pytest.approx(figures, rel=1e-6), dataset


@pytest.mark.parametrize("name", LEDGERS)
def test_a_ledger_goes_on(v0: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Its open runs can be voided, and the chain holds across both versions of entries."""
    url = f"sqlite:///{v0 / name}"
    run = "run-stopped" if name == "ledger.db" else "run-open"
    lazydp(capsys, "budget", "void", run, "--by", "ada", "--reason", "checkpoints deleted", "--ledger", url)
    lazydp(capsys, "budget", "verify", "--ledger", url, "--expect-head", EXPECTED[name]["head"])
    before = next(iter(EXPECTED[name]["spent"].values()))
    charged, committed = next(iter(spent(capsys, v0 / name).values()))
    assert charged < before[0]
    assert committed == pytest.approx(before[1], rel=1e-6)


def test_a_changed_entry_shows(v0: Path) -> None:
    """Negative control: verification of an old ledger reads its entries."""
    content = (v0 / "ledger-v1.db").read_bytes()
    assert content.count(b"crashed; checkpoints deleted") == 1
    (v0 / "ledger-v1.db").write_bytes(content.replace(b"crashed;", b"mislaid;"))
    with pytest.raises(LazyDPError, match="entry 8"):
        cli.main(["budget", "verify", "--ledger", f"sqlite:///{v0 / 'ledger-v1.db'}"], standalone_mode=False)


@pytest.mark.parametrize("command", ["resume", "export"])
def test_a_run_goes_on_or_is_refused_in_one_line(v0: Path, command: str) -> None:
    common = ["--dataset", str(v0 / "dataset"), "--ledger", f"sqlite:///{v0 / 'ledger.db'}"]
    config = v0 / "config.yaml"
    stopped = v0 / "run-stopped"
    config.write_text(json.dumps(json.loads((stopped / "run.json").read_text())["config"]))
    words = {
        "resume": ["train", *common, "--config", str(config), "--out", str(stopped), "--resume"],
        "export": ["export", *common, "--run", str(v0 / "run-finished"), "--out", str(v0 / "bundle")],
    }[command]
    try:
        cli.main(words, standalone_mode=False)
    except LazyDPError as refused:
        message = str(refused)
        assert "\n" not in message
        # What is expected, what was found, and what to do.
        assert "code" in message or "version" in message
        assert "run" in message
    else:
        assert command == "resume" or (v0 / "bundle" / "manifest.json").exists()
