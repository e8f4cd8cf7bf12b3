"""Placement: what it refuses, what a step sends across and waits for, and that the tests of it can fail."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lazydp.components.shared.errors import InputError, UnavailableError
from lazydp.components.train.data.examples import Examples
from lazydp.components.train.device.placement import CPU, HOST, Placement, moved
from lazydp.components.train.engine import transfers as crossing
from lazydp.components.train.engine.step import Engine
from lazydp.components.train.mechanism.parameters import PrivacyParameters
from lazydp.components.train.tables import embedding_tables as tables
from lazydp.components.train.tables import schedules
from lazydp.components.train.tables.lookups import lookups_of
from lazydp.components.train.tables.skip_ahead import EmbeddingSgd
from lazydp.kernels import ops

pytestmark = pytest.mark.usefixtures("one_thread")

PLACEMENTS = {"on the GPU": ("cuda", None), "tables in host memory": ("cuda", "cpu")}


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
def test_on_the_gpu_a_step_sends_the_batch_and_waits_for_its_figures_alone(
    world: Any, placed_engine: Any, simulated_gpu: Any, mode: str, size: int
) -> None:
    made = world(pooling="mean")
    step = [made.examples(5, seed=seed) for seed in range(size)]
    engine = placed_engine(made, Placement.of("cuda"), mode=mode)
    watched(engine, simulated_gpu, step)
    assert simulated_gpu.reads == []
    assert simulated_gpu.waits == (1 if mode == "sgd" else 2), "for the report, and for the sizes of the rows"
    assert not any(crossing.blocking for crossing in simulated_gpu.crossings)
    reads = [lookups for e in step for lookups in lookups_of(made.layout, e).values()]
    lookups = packed(*(part for read in reads for part in read.tensors()))
    batch = lookups + packed(*(part for e in step for part in dense_of(e)))
    # Transition and factor, float32 [steps + 1, 1] each, once a step.
    assert simulated_gpu.sent() == batch + 2 * 256
    # Losses, and with clipping two squared norms and two coefficients of each example, in float64.
    sizes = 0 if mode == "sgd" else len(engine.tables.names) * 3 * 4
    assert simulated_gpu.brought() == sizes + size * 5 * (4 if mode == "sgd" else 4 + 4 * 8)


@pytest.mark.parametrize("mode", ["lazydp", "dpsgd", "sgd"])
@pytest.mark.parametrize("size", [1, 2])
def test_with_tables_in_host_memory_pooled_rows_go_and_their_gradients_come(
    world: Any, placed_engine: Any, simulated_gpu: Any, mode: str, size: int
) -> None:
    made = world(pooling="mean")
    step = [made.examples(5, seed=seed) for seed in range(size)]
    engine = placed_engine(made, Placement.of("cuda", "cpu"), mode=mode)
    watched(engine, simulated_gpu, step)
    assert simulated_gpu.reads == []
    assert simulated_gpu.waits == size, "once for each micro-batch, when its gradients come back"
    assert not any(crossing.blocking for crossing in simulated_gpu.crossings)
    pooled = [torch.empty(read.num_bags, 4) for e in step for read in lookups_of(made.layout, e).values()]
    coefficients = [torch.empty(5)] * size if mode != "sgd" else []
    assert simulated_gpu.sent() == packed(*pooled, *coefficients, *(part for e in step for part in dense_of(e)))
    gradients = sum(rows.numel() * 4 for rows in pooled)
    # Beside the gradients the losses, and with clipping the squared norms of the dense part.
    assert simulated_gpu.brought() == gradients + size * 5 * (4 if mode == "sgd" else 4 + 8)


def test_users_on_the_gpu_need_no_further_wait(world: Any, placed_engine: Any, simulated_gpu: Any) -> None:
    made = world(pooling="mean")
    privacy = PrivacyParameters(noise_multiplier=0.7, max_grad_norm=0.3, expected_batch_size=4.0, user_gradient="mean")
    engine = placed_engine(made, Placement.of("cuda"), privacy=privacy)
    examples = replace(made.examples(6, seed=1), user_sizes=torch.tensor([1, 2, 3]))
    watched(engine, simulated_gpu, [examples, examples])
    assert (simulated_gpu.waits, simulated_gpu.reads) == (2, [])
    assert not any(crossing.blocking for crossing in simulated_gpu.crossings)


def test_on_the_cpu_nothing_is_sent(world: Any, placed_engine: Any, simulated_gpu: Any) -> None:
    made = world()
    engine = placed_engine(made, HOST)
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
    world: Any, placed_engine: Any, simulated_gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels that stay behind, row numbers that stay behind, a gradient that stays behind."""
    made = world()
    for hook, names in (("send_examples", ("cuda", "cpu")), ("send_lookups", ("cuda",))):
        with monkeypatch.context() as patch:
            patch.setattr(f"lazydp.components.train.engine.step.{hook}", lambda kept, device: kept)
            with pytest.raises((RuntimeError, ValueError), match=r"same device|expected a tensor on cuda"):
                placed_engine(made, Placement.of(*names)).step(made.examples(3, seed=1))
    stays = torch.ones(2, device="cuda")
    with pytest.raises(RuntimeError, match="same device"):
        stays + torch.ones(2)
    with pytest.raises(ValueError, match="key: expected a CPU tensor"):
        ops.normal_(torch.empty(2, 2, device="cuda"), torch.ones(32, dtype=torch.uint8, device="cuda"), **WHERE)
    with pytest.raises(ValueError, match="offsets: expected a tensor on cuda"):
        ops.bag_sum(torch.ones(2, 2, device="cuda"), torch.ones(1).long().to("cuda"), torch.tensor([0, 1]))


WHERE = {"table": 1, "first_row": 0, "step": 1}


def test_a_wait_is_seen(world: Any, placed_engine: Any, simulated_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = world()
    bag_ids = ops.foreach_bag_ids
    monkeypatch.setattr(tables.ops, "foreach_bag_ids", lambda offsets, num_lookups: bag_ids(offsets))  # type: ignore[attr-defined]
    watched(placed_engine(made, Placement.of("cuda")), simulated_gpu, [made.examples(3, seed=1)])
    assert len(simulated_gpu.reads) == 2 * 3, "a check of the lengths and an unknown size, for each of three tables"
    value = torch.ones(3, device="cuda")
    for read in (
        lambda: float(value.sum()),
        lambda: bool(value.any()),
        value.tolist,
        value.nonzero,
        lambda: value[value > 0],
        lambda: torch.where(value > 0, value, 0.0),
    ):
        simulated_gpu.reset()
        read()
        assert len(simulated_gpu.reads) == 1
    simulated_gpu.reset()
    value.cpu()
    assert [crossing.blocking for crossing in simulated_gpu.crossings] == [True]


def test_a_copy_that_is_read_before_the_wait_is_seen(
    world: Any, placed_engine: Any, simulated_gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = world()
    monkeypatch.setattr("lazydp.components.train.device.placement.wait", lambda device: None)
    labels = torch.ones(3).to("cuda")
    assert not torch.equal(moved([labels], CPU)[0], torch.ones(3))
    engine = placed_engine(made, Placement.of("cuda", "cpu"), mode="sgd")
    assert engine.step(made.examples(3, seed=1)).loss < 0.0, "what garbage happens to mean"


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


# What is refused.


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused_in_one_line(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        UnavailableError, match=r"^device cuda was asked for, and torch finds no NVIDIA GPU here: use cpu$"
    ):
        Placement.of("cuda", "cpu")
    from lazydp.components.train.run.train import train

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


def test_tables_live_on_one_device(simulated_gpu: Any) -> None:
    weights = {"here": torch.zeros(2, 3), "there": torch.zeros(2, 3, device="cuda")}
    with pytest.raises(InputError, match="tables live on one device, found them on cpu, cuda:0"):
        tables.EmbeddingTables(
            weights, mode="sgd", optimizer=EmbeddingSgd(schedules.constant(1.0)), noise_scale=0.0, key=None
        )


def test_the_configuration_says_where_and_its_digest_does_not(tiny: Any) -> None:
    assert tiny.config().digest() == tiny.config(device="cuda", table_device="cpu").digest()
    assert tiny.config().differences(tiny.config(device="cuda:1")) == []
    assert tiny.config().placement() == HOST
    for wrong, message in (
        ({"device": "gpu"}, "device: expected cpu, cuda or cuda:N, found 'gpu'"),
        ({"device": "cuda", "table_device": "cuda:1"}, "expected cuda or cpu, found cuda:1"),
        ({"table_device": "cuda"}, "expected cpu or cpu, found cuda"),
    ):
        with pytest.raises(InputError, match=message):
            tiny.config(**wrong)


@pytest.mark.parametrize(("backend", "names"), [(torch.backends.mkldnn, ("cpu",)), (torch.backends.cuda, ("cuda",))])
def test_products_in_fewer_bits_are_refused(
    world: Any, placed_engine: Any, simulated_gpu: Any, backend: Any, names: tuple[str, ...]
) -> None:
    made = world()
    engine = placed_engine(made, Placement.of(*names))
    before = backend.matmul.fp32_precision
    try:
        backend.matmul.fp32_precision = "tf32"
        with pytest.raises(InputError, match="set to tf32: norms would fall short"):
            engine.step(made.examples(3, seed=1))
    finally:
        backend.matmul.fp32_precision = before
    engine.step(made.examples(3, seed=1))
