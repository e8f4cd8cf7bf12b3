"""What the service says of an approximate index."""

import sys
from pathlib import Path
from typing import Any

import pytest
import structlog

from lazydp.components.bundle.untrained import write_untrained


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "bundle"
    write_untrained(path, num_items=5_000)
    return path


def test_the_measured_recall_is_stated_in_answers_and_logs(start: Any, large: Path) -> None:
    pytest.importorskip("faiss", reason="the extra lazydp[ann] is not installed")
    with structlog.testing.capture_logs() as logs, start(large, approximate_from=5_000) as client:
        model = client.get("/v1/models").json()["models"][0]
        answer = client.get("/v1/users/7/recommendations", params={"k": 20}).json()
    assert model["recall"] >= 0.99
    assert model["index"].startswith("approximate: ")
    assert [log["index"] for log in logs if log["event"] == "model served"] == [model["index"]]
    assert len(answer["items"]) == 20


def test_a_smaller_catalogue_is_searched_exactly(start: Any, large: Path) -> None:
    with start(large, approximate_from=5_001) as client:
        model = client.get("/v1/models").json()["models"][0]
    assert model["index"] == "exact"
    assert model["recall"] is None


def test_without_the_library_search_is_exact_and_the_log_says_so(
    start: Any, large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with structlog.testing.capture_logs() as logs, start(large, approximate_from=1) as client:
        assert client.get("/v1/users/7/recommendations").status_code == 200
    (line,) = [log for log in logs if log["event"] == "model served"]
    assert line["index"].startswith("exact (faiss is not installed")
