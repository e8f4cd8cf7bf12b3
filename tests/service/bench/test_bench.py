"""`lazydp bench serve` measures every contestant and prints what the documentation promises; no figure is judged."""

import json

import pytest
from click.testing import CliRunner

from lazydp.service.bench import cost
from lazydp.service.bench import serve as bench
from lazydp.service.bench.cli import command

SERVERS = ["lazydp", "lazydp_cached", "bare_route"]
PRODUCTS = ["bare_matmul", "bare_matmul_together"]


@pytest.fixture(scope="module")
def results() -> list[bench.ServeResult]:
    return bench.run(items=200, k=5, dim=8, requests=20, repeats=1)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, results: list[bench.ServeResult]) -> None:
    monkeypatch.setattr(bench, "run", lambda **_: results)


@pytest.mark.usefixtures("measured")
def test_every_contestant_is_there_with_its_figures() -> None:
    lines = CliRunner().invoke(command, ["--json"]).output.splitlines()
    found = {result["contestant"]: result for result in map(json.loads, lines)}
    assert list(found) == SERVERS + PRODUCTS
    for name, result in found.items():
        assert result["ratios"].keys() == found.keys() - {name}
        assert (result["p99_s"] is not None) == (result["rss_bytes"] is not None) == (name in SERVERS)


@pytest.mark.usefixtures("measured")
def test_a_person_reads_rate_shares_latency_and_memory() -> None:
    lines = CliRunner().invoke(command, []).output.splitlines()
    (line,) = [line for line in lines if line.startswith("lazydp ") and "requests/s" in line]
    for words in ("of bare_route", "of bare_matmul", "of bare_matmul_together", "p99", "MiB"):
        assert words in line


def test_cpu_time_of_a_request_is_told_by_contestant_and_part(monkeypatch: pytest.MonkeyPatch) -> None:
    found = cost.run(items=200, k=5, dim=8, requests=16, repeats=1)
    monkeypatch.setattr(cost, "run", lambda **_: found)
    lines = CliRunner().invoke(command, ["--shape", "cpu"]).output.splitlines()
    names = [line.split("  ")[0] for line in lines]
    assert names[:5] == [*SERVERS, "bare_protocol", "bare_matmul"]
    assert all(name.startswith("part: ") for name in names[5:])
    assert "of bare_route" in lines[0]
    assert all(0 < result.median_s < 1 for result in found)
