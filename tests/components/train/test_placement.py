"""Training on another device: the same weights, nothing across the border but what must cross, and no needless wait."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lazydp.components.export.export import export
from lazydp.components.models.build import build_model
from lazydp.components.models.config import DlrmConfig, TwoTowerConfig
from lazydp.components.shared.errors import InputError, UnavailableError
from lazydp.components.train import crossing, schedules, tables
from lazydp.components.train.checkpoint import RunFolder
from lazydp.components.train.checkpoint import _copy as to_host
from lazydp.components.train.dense import DenseOptimizer
from lazydp.components.train.engine import Engine
from lazydp.components.train.examples import Examples
from lazydp.components.train.lookups import lookups_of
from lazydp.components.train.mechanism import GroupNorms, PrivacyParameters
from lazydp.components.train.placement import CPU, HOST, Placement, moved
from lazydp.components.train.private import PrivateTrainer, make_private
from lazydp.components.train.report import StepReport
from lazydp.components.train.skip_ahead import EmbeddingSgd
from lazydp.components.train.train import train
from lazydp.kernels import ops
from lazydp.kernels.noise_key import NoiseKey

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS = {
    "dlrm": DlrmConfig(embedding_dim=4, bottom_widths=(5,), top_widths=(6,), embedding_init_std=0.5),
    "two tower": TwoTowerConfig(embedding_dim=4, user_widths=(6,), item_widths=(5,), embedding_init_std=0.5),
}
PLACEMENTS = {"on the GPU": ("cuda", None), "tables in host memory": ("cuda", "cpu")}


def engine_of(world: Any, placement: Placement, *, model: str = "dlrm", **changes: Any) -> Engine:
    settings: dict[str, Any] = {
        "mode": "lazydp",
        "privacy": PrivacyParameters(noise_multiplier=0.7, max_grad_norm=0.3, expected_batch_size=4.0),
        "embeddings": EmbeddingSgd(schedules.warmup_cosine(0.5, steps=20), 0.0, 0.01),
        "dense": DenseOptimizer.named("adam", learning_rate=schedules.constant(0.01)),
        "key": NoiseKey.for_tests(5),
    }
    return Engine(build_model(world.layout, MODELS[model]), placement=placement, **{**settings, **changes})


def batches_of(world: Any, *, users: bool = False) -> list[list[Examples]]:
    """Steps of none, one and two micro-batches."""
    steps = [[world.examples(5, seed=1)], [], [world.examples(4, seed=2), world.examples(3, seed=3)]]
    steps += [[world.examples(6, seed=4)], [world.examples(2, seed=5), world.examples(6, seed=6)]]
    sizes = {2: [2], 3: [1, 2], 4: [1, 1, 2], 5: [1, 2, 2], 6: [2, 2, 2]}
    if not users:
        return steps
    return [[replace(e, user_sizes=torch.tensor(sizes[e.size])) for e in step] for step in steps]


def trained(engine: Engine, steps: list[list[Examples]]) -> tuple[dict[str, Tensor], list[StepReport]]:
    """Weights after `steps` and a flush, on the CPU; and the report of each step."""
    reports = [engine.step(step) for step in steps]
    engine.flush()
    dense = {f"dense {name}": p.detach().cpu() for name, p in engine.model.named_parameters()}
    return dense | {f"table {name}": weight.cpu() for name, weight in engine.tables.weights().items()}, reports


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


USER = PrivacyParameters(noise_multiplier=0.7, max_grad_norm=0.3, expected_batch_size=4.0, user_gradient="mean")
VARIANTS: dict[str, dict[str, Any]] = {
    "lazy": {},
    "two towers": {"model": "two tower"},
    "eager": {"mode": "dpsgd"},
    "without privacy": {"mode": "sgd"},
    "momentum": {"embeddings": EmbeddingSgd(schedules.constant(0.3), 0.6, 0.02)},
    "ones for noise": {"noise": "ones"},
    "a norm for each group": {
        "privacy": replace(USER, user_gradient=None, max_grad_norm=GroupNorms(dense=0.2, embeddings=0.5))
    },
    "users, mean": {"privacy": USER},
    "users, sum": {"privacy": replace(USER, user_gradient="sum")},
    "users without privacy": {"privacy": USER, "mode": "sgd"},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("place", PLACEMENTS)
def test_every_placement_trains_the_weights_of_the_cpu(
    world: Any, simulated_gpu: Any, place: str, variant: str
) -> None:
    made = world(pooling="mean")
    changes = VARIANTS[variant]
    steps = batches_of(made, users=changes.get("privacy", USER).user_gradient is not None and "privacy" in changes)
    expected, on_cpu = trained(engine_of(made, HOST, **changes), steps)
    found, reports = trained(engine_of(made, Placement.of(*PLACEMENTS[place]), **changes), steps)
    assert_same(found, expected)
    for ours, theirs in zip(reports, on_cpu, strict=True):
        assert (ours.size, ours.units, ours.clipped) == (theirs.size, theirs.units, theirs.clipped)
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-5, nan_ok=True)
        assert ours.mean_norm == pytest.approx(theirs.mean_norm, rel=1e-5, nan_ok=True)


def test_a_gradient_that_is_not_finite_counts_zero_without_a_look(world: Any, simulated_gpu: Any) -> None:
    made = world()
    examples = made.examples(5, seed=1)
    examples.dense[2] = math.nan
    expected, (on_cpu,) = trained(engine_of(made, HOST), [[examples]])
    assert on_cpu.non_finite == 1
    for names in PLACEMENTS.values():
        engine = engine_of(made, Placement.of(*names))
        found, (report,) = trained(engine, [[examples]])
        assert report.non_finite == 1
        assert_same(found, expected)


def packed(*tensors: Tensor) -> int:
    """Bytes of a pack: every tensor begins at a multiple of 256."""
    return sum(-(-tensor.numel() * tensor.element_size() // 256) * 256 for tensor in tensors)


def dense_of(examples: Examples) -> tuple[Tensor, ...]:
    return examples.labels, examples.dense, examples.item_dense


def watched(engine: Engine, gpu: Any, step: list[Examples]) -> None:
    """One step, watched, after one that was not: the first initialises."""
    engine.step(step)
    gpu.reset()
    engine.step(step)


@pytest.mark.parametrize("mode", ["lazydp", "dpsgd", "sgd"])
@pytest.mark.parametrize("size", [1, 2])
def test_on_the_gpu_a_step_sends_the_batch_and_waits_for_its_report_alone(
    world: Any, simulated_gpu: Any, mode: str, size: int
) -> None:
    made = world(pooling="mean")
    step = [made.examples(5, seed=seed) for seed in range(size)]
    engine = engine_of(made, Placement.of("cuda"), mode=mode)
    watched(engine, simulated_gpu, step)
    assert simulated_gpu.reads == []
    assert simulated_gpu.waits == 1
    assert not any(crossing.blocking for crossing in simulated_gpu.crossings)
    reads = [lookups for e in step for lookups in lookups_of(made.layout, e).values()]
    lookups = packed(*(part for read in reads for part in read.tensors()))
    batch = lookups + packed(*(part for e in step for part in dense_of(e)))
    # Transition and factor, float32 [steps + 1, 1] each, once a step.
    assert simulated_gpu.sent() == batch + 2 * 256
    # Losses, and with clipping two squared norms and two coefficients of each example.
    assert simulated_gpu.brought() == size * 5 * 4 * (1 if mode == "sgd" else 5)


@pytest.mark.parametrize("mode", ["lazydp", "dpsgd", "sgd"])
@pytest.mark.parametrize("size", [1, 2])
def test_with_tables_in_host_memory_pooled_rows_go_and_their_gradients_come(
    world: Any, simulated_gpu: Any, mode: str, size: int
) -> None:
    made = world(pooling="mean")
    step = [made.examples(5, seed=seed) for seed in range(size)]
    engine = engine_of(made, Placement.of("cuda", "cpu"), mode=mode)
    watched(engine, simulated_gpu, step)
    assert simulated_gpu.reads == []
    assert simulated_gpu.waits == size, "once for each micro-batch, when its gradients come back"
    assert not any(crossing.blocking for crossing in simulated_gpu.crossings)
    pooled = [torch.empty(read.num_bags, 4) for e in step for read in lookups_of(made.layout, e).values()]
    coefficients = [torch.empty(5)] * size if mode != "sgd" else []
    assert simulated_gpu.sent() == packed(*pooled, *coefficients, *(part for e in step for part in dense_of(e)))
    gradients = sum(rows.numel() * 4 for rows in pooled)
    # Beside the gradients the losses, and with clipping the squared norms of the dense part.
    assert simulated_gpu.brought() == gradients + size * 5 * 4 * (1 if mode == "sgd" else 2)


def test_users_on_the_gpu_need_no_wait_either(world: Any, simulated_gpu: Any) -> None:
    made = world(pooling="mean")
    engine = engine_of(made, Placement.of("cuda"), privacy=USER)
    watched(engine, simulated_gpu, batches_of(made, users=True)[2])
    assert (simulated_gpu.waits, simulated_gpu.reads) == (1, [])
    assert not any(crossing.blocking for crossing in simulated_gpu.crossings)


def test_on_the_cpu_nothing_is_sent(world: Any, simulated_gpu: Any) -> None:
    made = world()
    engine = engine_of(made, HOST)
    watched(engine, simulated_gpu, [made.examples(5, seed=1)])
    assert simulated_gpu.crossings == []
    assert simulated_gpu.launches == []
    tensors = [torch.ones(3), torch.arange(4)]
    assert all(found is given for found, given in zip(moved(tensors, CPU), tensors, strict=True))
    step = [made.examples(5, seed=1)]
    reads = [lookups_of(made.layout, step[0])]
    assert crossing.send_examples(step, CPU) is step
    assert crossing.send_lookups(reads, CPU) is reads


# What the harness must see, or the tests above mean nothing.


def test_an_operation_across_the_border_is_seen(
    world: Any, simulated_gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels that stay behind, row numbers that stay behind, a gradient that stays behind."""
    made = world()
    for hook, names in (("send_examples", ("cuda", "cpu")), ("send_lookups", ("cuda",))):
        with monkeypatch.context() as patch:
            patch.setattr(f"lazydp.components.train.engine.{hook}", lambda kept, device: kept)
            with pytest.raises((RuntimeError, ValueError), match=r"same device|expected a tensor on cuda"):
                engine_of(made, Placement.of(*names)).step(made.examples(3, seed=1))
    stays = torch.ones(2, device="cuda")
    with pytest.raises(RuntimeError, match="same device"):
        stays + torch.ones(2)
    with pytest.raises(ValueError, match="key: expected a CPU tensor"):
        ops.normal_(torch.empty(2, 2, device="cuda"), torch.ones(32, dtype=torch.uint8, device="cuda"), **WHERE)
    with pytest.raises(ValueError, match="offsets: expected a tensor on cuda"):
        ops.bag_sum(torch.ones(2, 2, device="cuda"), torch.ones(1).long().to("cuda"), torch.tensor([0, 1]))


WHERE = {"table": 1, "first_row": 0, "step": 1}


def test_a_wait_is_seen(world: Any, simulated_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = world()
    bag_ids = ops.bag_ids
    monkeypatch.setattr(tables.ops, "bag_ids", lambda offsets, num_lookups: bag_ids(offsets))
    watched(engine_of(made, Placement.of("cuda")), simulated_gpu, [made.examples(3, seed=1)])
    assert len(simulated_gpu.reads) == 2 * 3, "a check of the lengths and an unknown size, for each of three tables"
    value = torch.ones(3, device="cuda")
    for read in (
        lambda: float(value.sum()),
        lambda: bool(value.any()),
        value.tolist,
        value.nonzero,
        lambda: value[value > 0],
    ):
        simulated_gpu.reset()
        read()
        assert len(simulated_gpu.reads) == 1
    simulated_gpu.reset()
    value.cpu()
    assert [crossing.blocking for crossing in simulated_gpu.crossings] == [True]


def test_a_copy_that_is_read_before_the_wait_is_seen(
    world: Any, simulated_gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = world()
    steps = batches_of(made)
    expected, _ = trained(engine_of(made, HOST), steps)
    monkeypatch.setattr("lazydp.components.train.placement.wait", lambda device: None)

    def compare() -> None:
        assert_same(trained(engine_of(made, Placement.of("cuda", "cpu")), steps)[0], expected)

    with pytest.raises((AssertionError, RuntimeError, ValueError, RuntimeWarning)):
        compare()


def test_a_pinned_buffer_that_is_written_too_soon_is_seen(simulated_gpu: Any) -> None:
    buffer = torch.zeros(4, pin_memory=True)
    sent = buffer.to("cuda", non_blocking=True)
    buffer.fill_(1.0)
    with pytest.raises(AssertionError, match="in flight"):
        sent.cpu()


def test_a_pack_keeps_values_types_and_alignment(simulated_gpu: Any) -> None:
    given = [
        torch.arange(5),
        torch.rand(3, 4).t(),
        torch.zeros(0, 7),
        torch.tensor([True, False]),
        torch.rand(()),
        torch.arange(3, dtype=torch.int32),
    ]
    sent = moved(given, torch.device("cuda", 0))
    assert len(simulated_gpu.crossings) == 1
    for tensor, original in zip(sent, given, strict=True):
        assert tensor.is_cuda
        assert tensor.is_contiguous()
        assert tensor.storage_offset() * tensor.element_size() % 256 == 0
        assert (tensor.dtype, tensor.shape) == (original.dtype, original.shape)
    for tensor, original in zip(moved(sent, CPU), given, strict=True):
        assert torch.equal(tensor, original)
    assert moved(sent, torch.device("cuda", 0))[0] is sent[0]


# Checkpoints, release, whole runs.


@pytest.mark.parametrize("place", PLACEMENTS)
def test_a_checkpoint_has_no_device(world: Any, simulated_gpu: Any, place: str) -> None:
    """Written on one placement it goes on elsewhere; on the same one, to the same bits."""
    made = world()
    steps = batches_of(made)
    changes = {"embeddings": EmbeddingSgd(schedules.constant(0.3), 0.6, 0.02)}
    placement = Placement.of(*PLACEMENTS[place])
    whole = engine_of(made, placement, **changes)
    expected, _ = trained(whole, steps)
    begun = engine_of(made, placement, **changes)
    for step in steps[:3]:
        begun.step(step)
    for elsewhere in (placement, HOST):
        resumed = engine_of(made, elsewhere, **changes)
        resumed.load_state_dict(to_host(begun.state_dict()))  # optimizers go on with the very tensors they load
        assert resumed.pending() == begun.pending() > 0
        found, _ = trained(resumed, steps[3:])
        if elsewhere is placement:
            assert all(torch.equal(found[name], value) for name, value in expected.items())
        assert_same(found, expected)


def killed_at(stop: int, step: Any) -> Any:
    def killed(engine: Engine, examples: Any) -> Any:
        if engine.steps_done == stop:
            raise KeyboardInterrupt
        return step(engine, examples)

    return killed


@pytest.mark.parametrize("place", PLACEMENTS)
def test_a_run_trains_resumes_and_is_released(
    tiny: Any, tmp_path: Path, simulated_gpu: Any, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, table_device = PLACEMENTS[place]
    where = {"device": device, "table_device": table_device}
    given = {"dataset": tiny.dataset, "ledger": tiny.ledger()}
    weights = {}
    for name, config in (("cpu", tiny.config()), ("gpu", tiny.config(**where)), ("parts", tiny.config(**where))):
        run = {**given, "config": config, "out": tmp_path / name, "key": NoiseKey.for_tests(3)}
        if name == "parts":
            monkeypatch.setattr(Engine, "step", killed_at(17, Engine.step))
            with pytest.raises(KeyboardInterrupt):
                train(**run)
            monkeypatch.undo()
        train(**run, resume=name == "parts")
        with RunFolder.locked(tmp_path / name) as folder:
            checkpoint = folder.latest()
        assert checkpoint is not None
        embeddings, dense = checkpoint.state["embeddings"]["tables"], checkpoint.state["dense"]["model"]
        weights[name] = dense | {table: state["weight"] for table, state in embeddings.items()}
    assert all(torch.equal(weights["parts"][name], value) for name, value in weights["gpu"].items())
    assert_same(weights["gpu"], weights["cpu"])
    manifest = export(run=tmp_path / "gpu", dataset=tiny.dataset, out=tmp_path / "bundle", ledger=given["ledger"])
    assert manifest.step == 30


def test_a_run_on_the_gpu_releases_snapshots(tiny: Any, tmp_path: Path, simulated_gpu: Any) -> None:
    from lazydp.components.export.publish import Snapshots

    ledger = tiny.ledger()
    train(
        dataset=tiny.dataset,
        config=tiny.config(device="cuda", publish_every=10),
        out=tmp_path / "run",
        ledger=ledger,
        publish=Snapshots(tmp_path / "snapshots", ledger).release,
    )
    assert [folder.name for folder in sorted((tmp_path / "snapshots").glob("step-*"))] == [
        "step-000000010",
        "step-000000020",
    ]


def test_a_run_that_goes_on_elsewhere_says_so(
    tiny: Any, tmp_path: Path, simulated_gpu: Any, caplog: pytest.LogCaptureFixture
) -> None:
    from lazydp.components.export.publish import Snapshots

    given = {"dataset": tiny.dataset, "ledger": tiny.ledger()}
    train(**given, config=tiny.config(device="cuda", table_device="cpu"), out=tmp_path / "run")
    caplog.clear()
    train(**given, config=tiny.config(device="cuda", table_device="cpu"), out=tmp_path / "run", resume=True)
    assert "rounded" not in caplog.text
    with caplog.at_level(logging.WARNING):
        assert train(**given, config=tiny.config(), out=tmp_path / "run", resume=True).step == 30
    assert "began with device cuda, table_device cpu; given were cpu, cpu" in caplog.text
    publish = Snapshots(tmp_path / "snapshots", given["ledger"]).release
    train(**given, config=tiny.config(publish_every=10), out=tmp_path / "published", publish=publish)
    elsewhere = tiny.config(publish_every=10, device="cuda")
    with pytest.raises(InputError, match="releases snapshots goes on where it began"):
        train(**given, config=elsewhere, out=tmp_path / "published", publish=publish, resume=True)


# Modules of one's own.


class Bags(nn.Module):
    """Rows one by one and bags of both poolings; with `across`, embeddings on the host and the rest on the GPU."""

    def __init__(self, *, across: bool = False) -> None:
        super().__init__()
        self.across = across
        self.tokens = nn.Embedding(9, 4)
        self.tags = nn.EmbeddingBag(9, 4, mode="mean")
        self.words = nn.EmbeddingBag(9, 4, mode="sum")
        self.top = nn.Sequential(nn.Linear(16, 8), nn.LayerNorm(8), nn.ReLU(inplace=True), nn.Linear(8, 1))

    def forward(self, ids: Tensor) -> Tensor:
        starts = torch.arange(0, ids.numel(), ids.shape[1], device=ids.device)
        parts = [self.tokens(ids).tanh().sum(dim=1), self.tags(ids), self.words(ids)]
        pooled = torch.cat([*parts, self.tags(ids.reshape(-1), starts)], dim=1)
        return self.top(pooled.to("cuda") if self.across else pooled).squeeze(1)  # type: ignore[no-any-return]


def own_trainer(model: nn.Module, **changes: Any) -> PrivateTrainer:
    privacy = PrivacyParameters(noise_multiplier=0.5, max_grad_norm=0.3, expected_batch_size=4.0)
    return make_private(
        model,
        privacy=changes.get("privacy", privacy),
        embeddings=EmbeddingSgd(schedules.constant(0.3), 0.5),
        dense=DenseOptimizer.named("sgd", learning_rate=schedules.constant(0.1)),
        key=NoiseKey.for_tests(2),
    )


def own_run(place: str, *, users: bool = False, steps: int = 3) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = Bags(across=place == "embeddings on the host")
    if place == "gpu":
        model.to("cuda")
    elif model.across:
        model.top.to("cuda")
    trainer = own_trainer(model, **({"privacy": USER} if users else {}))
    for number in range(steps):
        ids = torch.randint(0, 9, (6, 5), generator=torch.Generator().manual_seed(number))
        ids = ids.to("cuda") if place == "gpu" else ids
        sizes = [torch.tensor([1, 2]), torch.tensor([3])] if users else None
        trainer.step(lambda: model(ids[:3]).square(), lambda: model(ids[3:]).square(), user_sizes=sizes)  # noqa: B023
    trainer.flush()
    assert trainer.model(ids).device == (CPU if place == "cpu" else torch.device("cuda", 0))
    return {name: value.cpu() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("users", [False, True])
@pytest.mark.parametrize("place", ["gpu", "embeddings on the host"])
def test_make_private_trains_where_the_model_is(simulated_gpu: Any, place: str, users: bool) -> None:
    assert_same(own_run(place, users=users), own_run("cpu", users=users))


def test_make_private_on_the_gpu_waits_for_the_report_alone(simulated_gpu: Any) -> None:
    model = Bags().to("cuda")
    trainer = own_trainer(model)
    ids = torch.randint(0, 9, (6, 5)).to("cuda")
    for _ in range(2):
        simulated_gpu.reset()
        trainer.step(lambda: model(ids[:3]).square(), lambda: model(ids[3:]).square())
    assert (simulated_gpu.waits, simulated_gpu.reads) == (1, [])
    assert not any(crossing.blocking for crossing in simulated_gpu.crossings)


def test_a_model_that_is_trained_stays_where_it_is(simulated_gpu: Any) -> None:
    model = Bags()
    own_trainer(model)
    assert model.to("cpu") is model
    for move in (lambda: model.to("cuda"), model.double):
        with pytest.raises(InputError, match="'tokens' cannot be moved or converted"):
            move()
    scattered = Bags()
    scattered.tags.to("cuda")
    with pytest.raises(InputError, match="embedding layers are trained on one device, found cpu, cuda:0"):
        own_trainer(scattered)
    upside_down = Bags()
    for layer in (upside_down.tokens, upside_down.tags, upside_down.words):
        layer.to("cuda")
    with pytest.raises(InputError, match="tables live with the dense layers or in host memory"):
        own_trainer(upside_down)


# What is refused.


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused_in_one_line(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        UnavailableError, match=r"^device cuda was asked for, and torch finds no NVIDIA GPU here: use cpu$"
    ):
        Placement.of("cuda", "cpu")
    with pytest.raises(UnavailableError):
        train(dataset=tiny.dataset, config=tiny.config(device="cuda"), out=tmp_path / "run", ledger=tiny.ledger())
    assert not (tmp_path / "run").exists(), "refused before anything was reserved or written"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UnavailableError, match="built without CUDA: build it with LAZYDP_CUDA=1"):
        Placement.of("cuda:0")


def test_devices_are_checked(simulated_gpu: Any) -> None:
    assert Placement.of("cuda") == Placement.of("cuda:0", "cuda") == Placement.of(torch.device("cuda", 0))
    assert Placement.of() == HOST == Placement.of("cpu", "cpu")
    with pytest.raises(UnavailableError, match="there are 1 GPUs"):
        Placement.of("cuda:3")
    for name in ("gpu", "mps", "meta"):
        with pytest.raises(InputError, match="expected cpu, cuda or cuda:N"):
            Placement.of(name)
    with pytest.raises(InputError, match="expected table_device cpu or cpu, found cuda:0"):
        Placement.of("cpu", "cuda")


def test_the_configuration_says_where_and_its_digest_does_not(tiny: Any) -> None:
    assert tiny.config().digest() == tiny.config(device="cuda", table_device="cpu").digest()
    assert tiny.config().differences(tiny.config(device="cuda:1")) == []
    assert tiny.config().placement() == HOST
    for wrong, message in (
        ({"device": "gpu"}, "device: .* 'gpu'"),
        ({"device": "cuda", "table_device": "cuda:1"}, "tables live on cuda, with the dense layers, or on the cpu"),
        ({"table_device": "cuda"}, "tables live on cpu"),
    ):
        with pytest.raises(InputError, match=message):
            tiny.config(**wrong)


@pytest.mark.parametrize(("backend", "names"), [(torch.backends.mkldnn, ("cpu",)), (torch.backends.cuda, ("cuda",))])
def test_products_in_fewer_bits_are_refused(
    world: Any, simulated_gpu: Any, backend: Any, names: tuple[str, ...]
) -> None:
    made = world()
    engine = engine_of(made, Placement.of(*names))
    before = backend.matmul.fp32_precision
    try:
        backend.matmul.fp32_precision = "tf32"
        with pytest.raises(InputError, match="set to tf32: norms would fall short"):
            engine.step(made.examples(3, seed=1))
    finally:
        backend.matmul.fp32_precision = before
    engine.step(made.examples(3, seed=1))
