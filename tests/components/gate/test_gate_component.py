"""The pipeline's gate: called as Kubeflow would, on a small dataset."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from lazydp.components.budget.ledger.ledger import Ledger
from lazydp.components.gate.component import budget_gate
from lazydp.components.ingest.ingest import ingest
from lazydp.components.sample.sample import SampleSize, make_sample
from lazydp.components.shared.errors import BudgetExceededError, InputError, PrivacyError
from lazydp.components.tune.component import tune

CONFIG = """
model: {kind: two_tower, embedding_dim: 8}
privacy_unit: example
sampling_prob: 0.01
expected_batch_size: 20
steps: 50
noise_multiplier: 1.0
target_delta: 1.0e-5
"""


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'ledger.db'}"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("gate")
    make_sample(folder / "sample", size=SampleSize(users=60, items=40, interactions=600))
    sample = folder / "sample"
    ingest([str(sample / "interactions.parquet")], str(sample / "spec.yaml"), folder / "dataset")
    return SimpleNamespace(path=str(folder / "dataset"))


def test_the_gate(dataset: SimpleNamespace, sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAZYDP_OPERATOR", "")  # put back afterwards: the gate sets it for its own process
    page = SimpleNamespace(path=str(tmp_path / "page"))
    common = {"dataset": dataset, "config": CONFIG, "ledger_url": sqlite_url, "page": page}
    with pytest.raises(PrivacyError, match="has no budget"):
        budget_gate.python_func(job_id="one", **common)
    first = {"budget_epsilon": 1.0, "budget_delta": 1e-5, "operator": "pipeline"}
    assert budget_gate.python_func(job_id="one", **common, **first) == "run-one"
    assert "stay for others" in (tmp_path / "page").read_text()
    # A retry is the same run, and the budget of a dataset that has one is left as it is.
    assert budget_gate.python_func(job_id="one", **common, **(first | {"budget_epsilon": 100.0})) == "run-one"
    with Ledger.open(sqlite_url, read_only=True) as ledger:
        [shown] = ledger.budgets()
        [run] = ledger.runs()
    assert (shown.epsilon, shown.reserved_runs, run.reserved_by) == (1.0, 1, "pipeline")
    with pytest.raises(BudgetExceededError):
        budget_gate.python_func(job_id="two", **(common | {"config": CONFIG.replace("50", "5000")}))
    with pytest.raises(InputError, match="of family sample, and the pipeline is for family others"):
        budget_gate.python_func(job_id="two", **common, family="others")
    # Without privacy there is nothing to reserve; export marks what comes of it.
    assert budget_gate.python_func(job_id="three", **common, mode="sgd") == "run-three"


def test_the_ledger_holds_no_more_than_it_should(dataset: SimpleNamespace, sqlite_url: str, tmp_path: Path) -> None:
    """No path, no user, no count of examples: the ledger is public."""
    budget_gate.python_func(
        dataset=dataset,
        config=CONFIG,
        job_id="one",
        page=SimpleNamespace(path=str(tmp_path / "page")),
        ledger_url=sqlite_url,
        budget_epsilon=1.0,
        budget_delta=1e-5,
    )
    text = Path(sqlite_url.removeprefix("sqlite:///")).read_bytes().decode(errors="replace")
    for secret in (dataset.path, "u000", "interactions.parquet"):
        assert secret not in text


SWEEP = """
distribution: geometric
mean_trials: 1
metric: auc
score: {kind: held_out, noise_multiplier: 5.0}
settings: {embeddings.learning_rate: [0.5, 1.0]}
"""


def test_a_sweep_is_reserved_as_a_whole_and_then_tried(
    dataset: SimpleNamespace, sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAZYDP_OPERATOR", "")
    page = SimpleNamespace(path=str(tmp_path / "page"))
    config = CONFIG.replace("steps: 50", "steps: 2")
    common = {"dataset": dataset, "config": config, "ledger_url": sqlite_url, "page": page, "sweep": SWEEP}
    with pytest.raises(BudgetExceededError):
        budget_gate.python_func(job_id="small", **common, budget_epsilon=0.01)
    with Ledger.open(sqlite_url) as ledger:
        [budget] = ledger.budgets()
        more = {"by": "ada", "reason": "a sweep needs more"}
        ledger.set_budget(budget.dataset, epsilon=20.0, delta=1e-5, privacy_unit="example", **more)
    run_id = budget_gate.python_func(job_id="one", **common)
    assert run_id == "run-one"
    with pytest.raises(InputError, match="steps is part of the mechanism"):
        budget_gate.python_func(job_id="two", **{**common, "sweep": SWEEP.replace("[0.5, 1.0]", "[0.5], steps: [1]")})
    runs = {"runs_folder": str(tmp_path / "runs"), "run_id": run_id}
    best = tune.python_func(**common, **runs)
    assert best == tune.python_func(**common, **runs) == "run-one/best"
    (tmp_path / "runs" / "run-one").rename(tmp_path / "runs" / "run-two")
    with pytest.raises(InputError, match="holds another sweep"):
        tune.python_func(**common, **{**runs, "run_id": "run-two"})
    with Ledger.open(sqlite_url, read_only=True) as ledger:
        [run] = ledger.runs()
    assert (run.run_id, run.purpose, run.status) == ("run-one", "tuning", "reserved")
    assert "Settings that won" in (tmp_path / "page").read_text()
