"""A step on several ranks: the bits of one process, whoever owns a row."""

from __future__ import annotations

import functools
import itertools
import threading
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from lazydp.components.models.build import build_model
from lazydp.components.models.config import DlrmConfig, TwoTowerConfig
from lazydp.components.models.recommender import addressed_tables
from lazydp.components.train.data.examples import Examples
from lazydp.components.train.data.share import Share
from lazydp.components.train.engine.dense import DenseOptimizer
from lazydp.components.train.engine.step import Engine
from lazydp.components.train.mechanism import contributions
from lazydp.components.train.mechanism.parameters import GroupNorms, PrivacyParameters
from lazydp.components.train.ranks.places import Arrangement, shard
from lazydp.components.train.ranks.ranks import Ranks
from lazydp.components.train.tables.lookups import lookups_of
from lazydp.components.train.tables.skip_ahead import EmbeddingSgd
from lazydp.kernels.noise_key import NoiseKey
from support.ranks_in_threads import together

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS = {
    "two tower": TwoTowerConfig(embedding_dim=4, user_widths=(6,), item_widths=(5,), embedding_init_std=0.5),
    "dlrm": DlrmConfig(embedding_dim=4, bottom_widths=(5,), top_widths=(6,), embedding_init_std=0.5),
}
STEPS = 4
SGD = EmbeddingSgd(0.5)
MOMENTUM = EmbeddingSgd(0.1, 0.9, 0.01)
NORMS = (0.3, GroupNorms(dense=0.3, embeddings=0.2))
# Torch's generator is one for all threads.
_BUILDING = threading.Lock()


@dataclass(frozen=True)
class Training:
    """Some steps of a world, whatever the number of ranks."""

    world: Any
    model: str = "dlrm"
    users: bool = False
    norms: float | GroupNorms = 0.3
    embeddings: EmbeddingSgd = SGD
    arrangement: Arrangement = "spread"
    lanes: int = 4
    micro_batches: int = 1
    noise: Literal["gaussian", "ones"] = "gaussian"
    noise_multiplier: float = 0.7
    mode: Literal["lazydp", "dpsgd"] = "lazydp"
    largest_batch: int = 9

    def engine(self, ranks: Ranks) -> Engine:
        with _BUILDING:
            model = build_model(self.world.layout, MODELS[self.model])  # type: ignore[arg-type]
        own = {name: shard(shape.num_rows, rank=ranks.rank, ranks=ranks.size) for name, shape in model.tables.items()}
        return Engine(
            model,
            mode=self.mode,
            privacy=PrivacyParameters(
                noise_multiplier=self.noise_multiplier,
                max_grad_norm=self.norms,
                expected_batch_size=4.0,
                user_gradient="mean" if self.users else None,
            ),
            embeddings=self.embeddings,
            dense=DenseOptimizer.named("adam", learning_rate=0.01),
            key=NoiseKey.for_tests(5),
            tables=addressed_tables(model, own),
            noise=self.noise,
            ranks=ranks,
            arrangement=self.arrangement,
        )

    def share(self, step: int, ranks: Ranks | Placed) -> Share:
        """Lanes of unequal size; some are empty, and in step 3 all but one."""
        each = self.lanes // ranks.size
        own = range(ranks.rank * each, (ranks.rank + 1) * each)
        lanes = [self._lane(step, lane) for lane in range(self.lanes)]
        examples = sum(part.size for lane in lanes for part in lane)
        return Share(lanes[own.start : own.stop], own.start, examples, max(map(len, lanes)))

    def _lane(self, step: int, lane: int) -> list[Examples]:
        size = (step * 7 + lane * 5) % (self.largest_batch + 1) if step != 3 or lane == 1 else 0
        if not size:
            return []
        made = []
        for part in range(self.micro_batches):
            examples = self.world.examples(size, seed=100 * step + 10 * lane + part)
            if self.users:
                one = size // 2
                sizes = torch.tensor([1] * one + [size - one] * (size > one))
                examples = Examples(**{**vars_of(examples), "user_sizes": sizes})
            made.append(examples)
        return made

    def run(self, size: int) -> dict[str, Tensor]:
        """Everything that the ranks hold after the steps, tables put together."""

        def work(ranks: Ranks) -> tuple[dict[str, Tensor], dict[str, Tensor], list[Any]]:
            engine = self.engine(ranks)
            reports = [engine.step(self.share(step, ranks)) for step in range(1, STEPS + 1)]
            engine.flush()
            dense = {f"dense {name}": value.detach() for name, value in engine.model.named_parameters()}
            tables = {
                f"{name} {part}": value
                for name, table in engine.tables.state_dict()["tables"].items()
                for part, value in table.items()
                if isinstance(value, Tensor)
            }
            return dense, tables, reports

        found = together(size, work)
        for dense, _, reports in found:
            assert all(torch.equal(dense[name], value) for name, value in found[0][0].items())
            assert repr(reports) == repr(found[0][2])
        tables = {name: torch.cat([of[1][name] for of in found]) for name in found[0][1]}
        sizes = torch.tensor([[of.size, of.units, of.non_finite] for of in found[0][2]])
        return {**found[0][0], **tables, "sizes": sizes}


def vars_of(examples: Examples) -> dict[str, Any]:
    return {name: getattr(examples, name) for name in Examples.__slots__}


def assert_equal_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


CASES = list(itertools.product(MODELS, (False, True), NORMS, (SGD, MOMENTUM)))


@pytest.mark.parametrize(("model", "users", "norms", "embeddings"), CASES)
def test_any_number_of_ranks_gives_the_same_bits(
    *, world: Any, model: str, users: bool, norms: float | GroupNorms, embeddings: EmbeddingSgd
) -> None:
    training = Training(world(), model, users, norms, embeddings)
    assert_equal_bits(training.run(2), training.run(1))


@pytest.mark.slow
@pytest.mark.parametrize(("model", "users", "norms", "embeddings"), CASES)
def test_so_do_four_ranks(
    *, world: Any, model: str, users: bool, norms: float | GroupNorms, embeddings: EmbeddingSgd
) -> None:
    training = Training(world(), model, users, norms, embeddings)
    assert_equal_bits(training.run(4), training.run(1))


@pytest.mark.parametrize(
    "changes",
    [
        {"micro_batches": 3},
        {"mode": "dpsgd"},
        {"arrangement": "ordered"},
        {"noise": "ones", "noise_multiplier": 0.0},
        {"lanes": 2, "largest_batch": 60},
        {"embeddings": EmbeddingSgd(1e-6)},  # two floats from the start
    ],
    ids=repr,
)
def test_so_in_every_other_setting(world: Any, changes: dict[str, Any]) -> None:
    training = Training(world(), **changes)
    expected = training.run(1)
    for size in (2, 4)[: training.lanes // 2]:
        assert_equal_bits(training.run(size), expected)


def test_a_table_that_outgrows_one_float_does_so_on_all_ranks(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(world())
    begun: list[int] = []

    def run(size: int) -> dict[str, Tensor]:
        made = training.engine

        def engine(self: Training, ranks: Ranks) -> Engine:
            engine = made(ranks)
            begun.append(sum(bool(of["began_with_two"]) for of in engine.tables.state_dict()["tables"].values()))
            for name, table in engine.tables.state_dict()["tables"].items():
                if name == "item" and ranks.rank == ranks.size - 1:
                    table["weight"][-1] = 5000.0
            return engine

        with monkeypatch.context() as patch:
            patch.setattr(Training, "engine", engine)
            return training.run(size)

    expected = run(1)
    assert begun == [0]
    assert "item rest" in expected
    assert "user rest" not in expected
    for size in (2, 4):
        assert_equal_bits(run(size), expected)


def test_one_lane_on_one_rank_is_the_step_of_a_run_that_is_not_distributed(world: Any) -> None:
    training = Training(world(), lanes=1, arrangement="ordered", micro_batches=2)
    engine = training.engine(together(1, lambda ranks: ranks)[0])
    for step in range(1, STEPS + 1):
        engine.step([part for lane in training.share(step, together(1, lambda ranks: ranks)[0]).lanes for part in lane])
    engine.flush()
    found = training.run(1)
    for name, weight in engine.table_weights().items():
        assert torch.equal(weight, found[f"{name} weight"])


def test_lanes_change_rounding_and_nothing_else(world: Any) -> None:
    """The same examples in other lanes: what differs is rounded otherwise. (Adam would amplify it.)"""
    several = Training(world(), lanes=4)
    engines = [Training(world(), lanes=lanes).engine(together(1, lambda ranks: ranks)[0]) for lanes in (1, 4)]
    alone = together(1, lambda ranks: ranks)[0]
    for step in range(1, 3):
        share = several.share(step, alone)
        engines[0].step(list(share))
        engines[1].step(share)
    for engine in engines:
        engine.flush()
    weights = [engine.table_weights() for engine in engines]
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-4, atol=1e-4)


@functools.cache
def sent(world: Any, size: int) -> Any:
    training = Training(world, lanes=4, largest_batch=30)

    def work(ranks: Ranks) -> Any:
        engine = training.engine(ranks)
        before = ranks.traffic.bytes.total(), ranks.traffic.messages.total()
        engine.step(training.share(1, ranks))
        parameters = sum(p.numel() for p in engine.model.parameters())
        return ranks.traffic, before, parameters

    return together(size, work)


@pytest.mark.parametrize("size", [2, 4])
def test_messages_of_a_step(world: Any, size: int) -> None:
    for traffic, (_, before), _ in sent(world(), size):
        # counts, ids, rows, gradients; the dense sums twice; sizes of rows; the report
        assert traffic.messages.total() - before == 8 * (size - 1)


@pytest.mark.parametrize("size", [2, 4])
def test_bytes_of_the_dense_sums(world: Any, size: int) -> None:
    for traffic, _, parameters in sent(world(), size):
        part = -(-parameters // size)
        assert traffic.bytes["dense sums"] == 2 * 8 * part * (size - 1)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("users", [False, True])
def test_bytes_of_a_step_are_those_of_the_formula(world: Any, size: int, users: bool) -> None:
    """By the table in docs/distributed.md, from the lookups alone."""
    training = Training(world(), lanes=4, largest_batch=40, users=users, arrangement="ordered")
    step = 2

    def work(ranks: Ranks) -> Any:
        engine = training.engine(ranks)
        before = ranks.traffic.bytes.total()
        engine.step(training.share(step, ranks))
        parameters = sum(p.numel() for p in engine.model.parameters())
        return ranks.traffic.bytes.total() - before, engine.model, parameters

    found = together(size, work)
    asked = torch.zeros(size, size, dtype=torch.int64)  # rows, times 4 D: by who owns them, by who asks
    expected = torch.zeros(size, dtype=torch.int64)
    for rank, (_, model, parameters) in enumerate(found):
        num_tables = len(model.tables)
        expected[rank] += (size - 1) * (32 * num_tables + 16 * -(-parameters // size) + 24 * num_tables + 96)
        reads = [lookups_of(model.layout, examples) for examples in training.share(step, Placed(rank, size))]
        for name, shape in model.tables.items():
            for owner in range(size):
                own = shard(shape.num_rows, rank=owner, ranks=size)
                rows: set[int] = set()
                lookups = weights = bags = 0
                for read in (of[name] for of in reads if name in of):
                    of_bag = torch.repeat_interleave(read.offsets.diff())
                    here = (read.indices >= own.start) & (read.indices < own.stop)
                    rows |= set(read.indices[here].tolist())
                    lookups += int(here.sum())
                    bags += len(of_bag[here].unique())
                    weights += int(here.sum()) if read.weights is not None else 0
                if owner != rank:
                    expected[rank] += 4 * (len(rows) + 2 * lookups) + 4 * (shape.dim + 1) * bags + 4 * weights
                    asked[owner, rank] += 4 * shape.dim * len(rows)
    expected += asked.sum(1)
    assert [sent for sent, _, _ in found] == expected.tolist()


@dataclass(frozen=True)
class Placed:
    """Which rank is meant, where nothing is sent."""

    rank: int
    size: int


def moved(world: Any, size: int, model: str, scale: float, lane: int) -> float:
    """By how much one example moves the sums of a step on `size` ranks, over C; its rows lie on several ranks."""
    training = Training(
        world, model, norms=0.3, embeddings=EmbeddingSgd(1.0), noise_multiplier=0.0, largest_batch=30, lanes=4
    )
    unit = world.examples(1, seed=7)
    unit = replace(unit, dense=scale * unit.dense, item_dense=scale * unit.item_dense, labels=torch.ones(1))

    def work(ranks: Ranks, with_unit: bool) -> tuple[Tensor, Tensor]:
        engine = training.engine(ranks)
        before = {name: of["weight"].double() for name, of in engine.tables.state_dict()["tables"].items()}
        share = training.share(1, ranks)
        lanes = [list(of) for of in share.lanes]
        if with_unit and 0 <= lane - share.first_lane < len(lanes):
            lanes[lane - share.first_lane].append(unit)
        engine.step(Share(lanes, share.first_lane, share.examples + with_unit, 2))
        tables = [
            (before[name] - of["weight"].double()).view(-1) for name, of in engine.tables.state_dict()["tables"].items()
        ]
        dense = [p.grad.double().view(-1) for p in engine.model.parameters() if p.grad is not None]
        return torch.cat(tables), torch.cat(dense)

    found = [together(size, functools.partial(work, with_unit=given)) for given in (True, False)]
    tables, dense = (torch.cat([one[part] - other[part] for one, other in zip(*found, strict=True)]) for part in (0, 1))
    # Every rank has the dense sums; each row is on one rank.
    squares = tables.square().sum() + dense.square().sum() / size
    return float(squares.sqrt()) * 4.0 / 0.3


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("size", [2, 4])
def test_one_unit_moves_a_step_of_ranks_by_the_norm_at_most(world: Any, size: int, model: str) -> None:
    factors = [moved(world(), size, model, scale, lane) for scale in (1.0, 1e6, 1e30) for lane in (0, 3)]
    print(f"{model} on {size} ranks: the largest factor is {max(factors):.6f}")
    assert 0.5 < max(factors) <= 1.001


def test_the_adversary_would_see_a_unit_that_is_not_clipped(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def as_it_is(sq_norms: Tensor, *, max_grad_norm: float) -> Tensor:
        del max_grad_norm
        return torch.ones_like(sq_norms)

    monkeypatch.setattr(contributions, "clip_coefficients", as_it_is)
    assert moved(world(), 2, "dlrm", 100.0, 0) > 1.001
