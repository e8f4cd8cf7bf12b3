"""The contestants of `lazydp bench step` run, do the same work, and are counted alike."""

import itertools
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from click.testing import CliRunner

from lazydp.components.bench import cli, modules, step
from lazydp.components.bench.dataset_workload import DatasetWorkload
from lazydp.components.bench.embeddings import OurEmbeddings, TorchEmbeddings
from lazydp.components.bench.shapes import SHAPES, shape_of
from lazydp.components.bench.trainers import TorchSgd, engine
from lazydp.components.shared.bench_harness import Result
from lazydp.components.shared.errors import InputError
from lazydp.components.train.device.placement import Placement

SMALL = shape_of("small")


def test_every_contestant_runs() -> None:
    pytest.importorskip("opacus")
    results = step.run(step.named("small"), repeats=2)
    assert [result.contestant for result in results] == list(step.CONTESTANTS)
    for result in results:
        document = json.loads(result.to_json())
        assert document["bench"] == "step"
        assert document["median_s"] > 0
        assert document["shape"]["examples"] == SMALL.batch_size
        assert document["ratios"].keys() == set(step.CONTESTANTS) - {result.contestant}


def test_the_two_without_privacy_take_the_same_step() -> None:
    """Otherwise their times would not compare."""
    tables = [SMALL.weights(), SMALL.weights()]
    plain, ours = TorchSgd(SMALL, tables[0]), engine(SMALL, tables[1], "sgd")
    for seed in range(3):
        plain.step([SMALL.examples(seed)])
        ours.step([SMALL.examples(seed)])
    for name, weight in ours.table_weights().items():
        assert not torch.equal(weight, SMALL.weights()[name])
        torch.testing.assert_close(plain.bags[name].weight.detach(), weight, rtol=1e-5, atol=1e-7)  # type: ignore[operator]
    for expected, found in zip(plain.model.parameters(), ours.model.parameters(), strict=True):
        torch.testing.assert_close(expected, found, rtol=1e-5, atol=1e-7)


def test_the_embedding_parts_without_privacy_move_the_rows_alike() -> None:
    tables = [SMALL.weights(), SMALL.weights()]
    plain, ours = TorchEmbeddings(SMALL, tables[0]), OurEmbeddings(SMALL, tables[1], "sgd")
    for number in range(3):
        plain.step(SMALL.batch(number))
        ours.step(SMALL.batch(number))
    for name, weight in SMALL.weights().items():
        assert not torch.equal(weight, tables[0][name])
        torch.testing.assert_close(tables[0][name], tables[1][name], rtol=1e-5, atol=1e-7)


def test_the_embedding_part_has_its_contestants() -> None:
    results = step.run(step.named("small"), repeats=1, part="embeddings", contestants=("torch_sgd", "sgd", "lazydp"))
    assert [result.contestant for result in results] == ["torch_sgd", "sgd", "lazydp"]


def test_growth_sets_ours_beside_itself_on_smaller_tables() -> None:
    results = step.run(step.named("small"), repeats=1, contestants=("torch_sgd", "lazydp", "dpsgd"), growth=4)
    by_name = {result.contestant: result for result in results}
    assert list(by_name) == ["torch_sgd", "lazydp", "dpsgd", "lazydp/4", "dpsgd/4"]
    assert by_name["dpsgd"].bytes == 4 * by_name["dpsgd/4"].bytes
    assert "lazydp/4" in by_name["lazydp"].ratios


@pytest.mark.parametrize("on_data", [False, True])
def test_the_breakdown_adds_up_to_the_step(tiny: Any, *, on_data: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that moves one second each time it is read: what is in no phase shows as readings outside."""
    ticks = itertools.count()
    monkeypatch.setattr("time.perf_counter", lambda: float(next(ticks)))
    spent = step.breakdown(DatasetWorkload.open(tiny.dataset) if on_data else step.named("small"), repeats=3)
    phases = list(spent.phases)
    assert phases[:5] == ["sampling", "lookups", "catch-up", "gather", "forward"]
    assert {"backward", "norms", "weighted products", "scatter", "dense noise", "optimizer"} <= spent.phases.keys()
    assert sum(spent.parts().values()) == pytest.approx(spent.step_s)
    assert all(seconds >= 1.0 for seconds in spent.phases.values())
    # One second between the end of a phase and the start of the next: phases neither overlap nor are counted twice.
    assert spent.between == pytest.approx(sum(spent.phases.values()) + 1.0)


def test_opacus_stays_out_where_its_copies_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "available_memory", lambda: SMALL.table_bytes * 3)
    results = step.run(SMALL, repeats=1, contestants=("sgd", "opacus"))
    assert [result.contestant for result in results] == ["sgd"]
    reason = step.left_out("opacus", SMALL)
    assert reason is not None
    fitting = int(reason.rpartition("--rows ")[2])
    assert step.left_out("opacus", replace(SMALL, rows=fitting)) is None
    assert step.left_out("opacus", replace(SMALL, rows=fitting + 2)) is not None


def test_the_users_own_data(tiny: Any) -> None:
    workload = DatasetWorkload.open(tiny.dataset)
    results = step.run(workload, repeats=2)
    assert [result.contestant for result in results] == ["torch_sgd", "sgd", "lazydp", "dpsgd"]
    tables = workload.model().tables
    assert workload.table_bytes == 4 * sum(shape.num_rows * shape.dim for shape in tables.values())
    assert results[0].shape["tables"] == len(tables)
    assert step.answer(results).startswith("Noise is")  # whether or not is a matter of time
    assert "opacus is left out" in str(step.left_out("opacus", workload))


def test_both_without_privacy_take_the_same_step_on_data(tiny: Any) -> None:
    """Shared tables, mean pooling, candidates: what the named shapes do not have."""
    workload = DatasetWorkload.open(tiny.dataset)
    tables = [workload.weights(), workload.weights()]
    plain, ours = TorchSgd(workload, tables[0]), engine(workload, tables[1], "sgd")
    for number in (1, 2):
        plain.step(workload.batch(number))
        ours.step(workload.batch(number))
    for name, weight in workload.weights().items():
        assert not torch.equal(weight, tables[0][name])
        torch.testing.assert_close(tables[0][name], tables[1][name], rtol=1e-4, atol=1e-7)


def test_a_configuration_decides_batch_and_model(tiny: Any, tmp_path: Path) -> None:
    settings = tiny.config(mode="lazydp", sampling_prob=0.25, expected_batch_size=9.0, negatives=3)
    path = tmp_path / "train.yaml"
    path.write_text(settings.model_dump_json(exclude_none=True))  # JSON is YAML
    workload = DatasetWorkload.open(tiny.dataset, path)
    assert workload.expected_batch_size == 9.0
    assert workload.batch(1)[0].num_candidates == 4
    with pytest.raises(InputError, match="growth is measured on a named shape"):
        step.run(workload, repeats=1, growth=16)


@pytest.mark.parametrize(
    ("lazy", "eager", "wanted"),
    [
        (0.010, 0.100, "Noise is the bottleneck here: 90% of an eager DP-SGD step (100 ms)"),
        (0.080, 0.100, "Noise is not the bottleneck here: 20%"),
        (0.101, 0.100, "takes no longer than a lazy one (101 ms)"),
    ],
)
def test_the_answer(lazy: float, eager: float, wanted: str) -> None:
    def result(name: str, seconds: float) -> Result:
        return Result("step", {"examples": 1}, name, seconds, seconds, seconds, 1, 0, None, 0, 0)

    text = step.answer([result("sgd", 0.008), result("lazydp", lazy), result("dpsgd", eager)])
    assert wanted in text
    assert "8 ms" in text
    assert "takes lazydp, dpsgd and one" in step.answer([result("lazydp", lazy)])


def test_the_command_writes_lines_and_a_picture(tiny: Any, tmp_path: Path) -> None:
    picture = tmp_path / "step.svg"
    arguments = ["--data", str(tiny.dataset), "--repeats", "1", "--json", "--plot", str(picture)]
    done = CliRunner().invoke(cli.step, arguments)
    assert done.exit_code == 0, done.output
    *results, last = (json.loads(line) for line in done.stdout.splitlines())
    assert [document["contestant"] for document in results] == ["torch_sgd", "sgd", "lazydp", "dpsgd"]
    assert all("minor_faults" in document for document in results)
    assert sum(last["breakdown"]["phases_s"].values()) == pytest.approx(last["breakdown"]["step_s"])
    root = ElementTree.fromstring(picture.read_text())
    words = " ".join(root.itertext())
    assert all(name in words for name in ("torch_sgd", "dpsgd", "catch-up", "Noise is"))
    assert "href" not in picture.read_text()  # nothing from outside


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [(["--config", __file__], "--config belongs to --data"), (["--data", ".", "--rows", "5"], "--rows belongs to")],
)
def test_options_that_do_not_go_together(arguments: list[str], wanted: str) -> None:
    done = CliRunner().invoke(cli.step, arguments)
    assert done.exit_code == 2
    assert wanted in done.output


def test_tables_shrink_to_memory_unless_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "available_memory", lambda: 1 << 30)
    fitted = step.named("mlperf")
    assert fitted.table_bytes <= 1 << 29
    assert step.named("mlperf", rows=123).rows == 123


def test_counts_by_hand() -> None:
    small = SHAPES["small"]
    # bottom 13-16-8, top (8 + 6)-16-1, interaction of 4 vectors of 8; 64 examples
    multiplied = 13 * 16 + 16 * 8 + 14 * 16 + 16 * 1
    assert small.matmul_flops() == 2 * 64 * (3 * multiplied - 13 * 16 + 2 * 4 * 4 * 8)
    distinct = 3 * round(1000 * (1 - (1 - 1 / 1000) ** 128))
    assert small.embedding_bytes() == (3 * 128 + 2 * distinct) * 8 * 4


def test_unknown_names_are_refused() -> None:
    with pytest.raises(InputError, match="no shape 'huge'"):
        step.named("huge")
    with pytest.raises(InputError, match="no contestant 'jax'"):
        step.run(SMALL, contestants=("jax",))


@pytest.mark.parametrize("part", ["whole", "embeddings"])
@pytest.mark.parametrize("where", [("cuda", None), ("cuda", "cpu")], ids=["on the GPU", "tables in host memory"])
def test_contestants_run_where_they_are_put(simulated_gpu: Any, where: tuple[str, str | None], part: Any) -> None:
    placement = Placement.of(*where)
    assert step.left_out("opacus", SMALL, "whole", placement) == "opacus is left out: it is measured on the CPU alone"
    results = step.run(SMALL, repeats=1, part=part, placement=placement)
    assert [result.contestant for result in results] == ["torch_sgd", *step.OURS]
    assert results[0].shape["tables_on_gpu"] == (1 if where[1] is None else 0)
    on_gpu = part == "whole" or where[1] is None
    assert bool(simulated_gpu.launches) == on_gpu
    spent = step.breakdown(SMALL, repeats=1, placement=placement)
    assert spent.phases["scatter"] > 0.0


def test_the_command_takes_a_device(simulated_gpu: Any) -> None:
    given = ["--shape", "small", "--repeats", "1", "--contestant", "lazydp", "--contestant", "sgd", "--json"]
    ran = CliRunner().invoke(cli.step, [*given, "--device", "cuda", "--table-device", "cpu"], catch_exceptions=False)
    assert json.loads(ran.stdout.splitlines()[0])["shape"]["layers_on_gpu"] == 1
    assert "layers_on_gpu" not in json.loads(CliRunner().invoke(cli.step, given).stdout.splitlines()[0])["shape"]


def test_a_plot_is_named_as_what_it_is(tmp_path: Path) -> None:
    refused = CliRunner().invoke(cli.step, ["--shape", "small", "--plot", str(tmp_path / "step.png")])
    assert refused.exit_code == 2
    assert f"name it so, as {tmp_path / 'step.svg'}" in " ".join(refused.output.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("kind", modules.KINDS)
def test_modules_of_ones_own_are_measured(kind: str) -> None:
    results = modules.run(kind, rows=50, repeats=1, batch_size=9, contestants=("torch_sgd", "lazydp"))
    assert [result.contestant for result in results] == ["torch_sgd", "lazydp"]
    assert all(result.shape == {"examples": 9, "rows": 50} and result.bytes > 0 for result in results)


def test_a_module_takes_the_contestants_and_options_that_it_has() -> None:
    with pytest.raises(InputError, match="no contestant 'opacus' for a module: choose from torch_sgd, lazydp, dpsgd"):
        modules.run("dcn", rows=50, repeats=1, contestants=("opacus",))
    refused = CliRunner().invoke(cli.step, ["--shape", "dcn", "--breakdown"])
    assert "measured as a whole, on the CPU" in refused.output
    assert set(modules.KINDS) == set(cli._MODULES)


def test_opacus_takes_neither_module_as_it_stands() -> None:
    """If it ever does, it is a contestant."""
    pytest.importorskip("opacus")
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer
    from opacus.validators import ModuleValidator

    assert any("MultiheadAttention" in str(error) for error in ModuleValidator.validate(modules.SequenceModel(9)))
    model = modules.CrossModel(9)
    for layer in model.tables:
        layer.sparse = False  # type: ignore[assignment]
    module = GradSampleModule(model)
    optimizer = DPOptimizer(
        torch.optim.SGD(module.parameters(), lr=0.1), noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=2
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module(torch.zeros(2, 26, dtype=torch.int64)).mean().backward()
    with pytest.raises(ValueError, match="Per sample gradient is not initialized"):
        optimizer.step()
