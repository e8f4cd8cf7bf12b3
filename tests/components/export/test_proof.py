"""The exporter's proof accepts the right flush and rejects every wrong one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lazydp.components.export.proof import SAMPLED_ROWS, PendingRows, backward_moments, prove_flushed
from lazydp.components.shared.errors import PendingNoiseError
from lazydp.components.train.tables.schedules import linear
from lazydp.components.train.tables.skip_ahead import EmbeddingSgd, SkipAhead
from lazydp.kernels import ops
from lazydp.kernels.noise_key import NoiseKey

STEPS, NOISE_SCALE = 25, 0.3
KEY = NoiseKey.for_tests(4)
OPTIMIZERS = {
    "sgd": EmbeddingSgd(linear(0.5, steps=STEPS, warmup_steps=3)),
    "decay": EmbeddingSgd(linear(0.5, steps=STEPS), weight_decay=0.05),
    "momentum": EmbeddingSgd(linear(0.5, steps=STEPS), momentum=0.8, weight_decay=0.05),
}
Tables = dict[str, dict[str, Any]]


def tables(optimizer: EmbeddingSgd) -> Tables:
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, rows in (("item", 200), ("user", 70)):
        made[name] = {
            "weight": torch.randn(rows, 6, generator=generator),
            "last": torch.randint(0, STEPS + 1, (rows,), generator=generator, dtype=torch.int32),
            "momentum": torch.randn(rows, 6, generator=generator) if optimizer.momentum else None,
        }
    return made


def skip_ahead(optimizer: EmbeddingSgd, noise_scale: float = NOISE_SCALE) -> SkipAhead:
    ahead = SkipAhead(optimizer, noise_scale=noise_scale)
    for _ in range(STEPS):
        ahead.advance()
    return ahead


def flush(made: Tables, ahead: SkipAhead, *, first_table: int = 0, key: NoiseKey = KEY) -> None:
    for number, table in enumerate(made.values(), start=first_table):
        ops.flush_(
            table["weight"],
            table["last"],
            key.tensor(),
            table=number,
            step=STEPS,
            transition=ahead.transition,
            factor=ahead.factor,
            momentum=table["momentum"],
        )


def prove(made: Tables, pending: dict[str, PendingRows], optimizer: EmbeddingSgd) -> dict[str, int]:
    return prove_flushed(made, pending, optimizer=optimizer, noise_scale=NOISE_SCALE, key=KEY, step=STEPS)


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_the_right_flush_is_accepted(name: str) -> None:
    made = tables(OPTIMIZERS[name])
    pending = {table: PendingRows.of(value, step=STEPS) for table, value in made.items()}
    flush(made, skip_ahead(OPTIMIZERS[name]))
    assert prove(made, pending, OPTIMIZERS[name]) == {"item": STEPS, "user": STEPS}


def marks_only(made: Tables, optimizer: EmbeddingSgd) -> None:
    for table in made.values():
        table["last"].fill_(STEPS)


def misses_a_row(made: Tables, optimizer: EmbeddingSgd) -> None:
    kept = int(made["item"]["last"].argmin())
    before = made["item"]["weight"][kept].clone()
    flush(made, skip_ahead(optimizer))
    made["item"]["weight"][kept] = before


def adds_noise_to_a_part(made: Tables, optimizer: EmbeddingSgd) -> None:
    before = made["item"]["weight"].clone()
    flush(made, skip_ahead(optimizer))
    made["item"]["weight"][:-2] = before[:-2]  # 1 % have theirs


def comes_twice(made: Tables, optimizer: EmbeddingSgd) -> None:
    before = {name: table["last"].clone() for name, table in made.items()}
    flush(made, skip_ahead(optimizer))
    for name, last in before.items():
        made[name]["last"].copy_(last)
    flush(made, skip_ahead(optimizer))


def another_key(made: Tables, optimizer: EmbeddingSgd) -> None:
    flush(made, skip_ahead(optimizer), key=NoiseKey.for_tests(5))


def half_the_noise(made: Tables, optimizer: EmbeddingSgd) -> None:
    flush(made, skip_ahead(optimizer, NOISE_SCALE / 2))


def noise_of_another_table(made: Tables, optimizer: EmbeddingSgd) -> None:
    flush(made, skip_ahead(optimizer), first_table=1)


def no_weight_decay(made: Tables, optimizer: EmbeddingSgd) -> None:
    flush(made, skip_ahead(EmbeddingSgd(optimizer.learning_rate, momentum=optimizer.momentum, weight_decay=0.5)))


NONE = "has none of its noise"
OTHER = "has other noise than the run's"
FAULTS: dict[Callable[[Tables, EmbeddingSgd], None], str] = {
    marks_only: NONE,
    misses_a_row: NONE,
    adds_noise_to_a_part: NONE,
    comes_twice: "has its noise twice",
    another_key: rf"{OTHER}, of (0.9\d*|1(\.0\d*)?) times",
    half_the_noise: rf"{OTHER}, of 0.\d+ times",
    noise_of_another_table: OTHER,
    no_weight_decay: OTHER,
}


@pytest.mark.parametrize("name", list(OPTIMIZERS))
@pytest.mark.parametrize("wrong", FAULTS)
def test_a_wrong_flush_is_rejected_and_named(wrong: Callable[[Tables, EmbeddingSgd], None], name: str) -> None:
    made = tables(OPTIMIZERS[name])
    pending = {table: PendingRows.of(value, step=STEPS) for table, value in made.items()}
    wrong(made, OPTIMIZERS[name])
    with pytest.raises(PendingNoiseError, match=FAULTS[wrong]):
        prove(made, pending, OPTIMIZERS[name])


def test_where_nothing_is_pending_there_is_nothing_to_sample() -> None:
    made = tables(OPTIMIZERS["sgd"])
    made["item"]["last"].fill_(STEPS)
    assert PendingRows.of(made["item"], step=STEPS) == PendingRows(0, ())
    made["item"]["last"][7] = STEPS - 1
    assert PendingRows.of(made["item"], step=STEPS).count == 1


def test_a_pending_row_is_named() -> None:
    made = tables(OPTIMIZERS["sgd"])
    pending = {table: PendingRows.of(value, step=STEPS) for table, value in made.items()}
    flush(made, skip_ahead(OPTIMIZERS["sgd"]))
    made["user"]["last"][13] = 7
    with pytest.raises(PendingNoiseError, match=f"table 'user', row 13: its noise is applied up to step 7 of {STEPS}"):
        prove(made, pending, OPTIMIZERS["sgd"])


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_backwards_and_forwards_agree(name: str) -> None:
    transition, covariance = backward_moments(OPTIMIZERS[name], noise_scale=NOISE_SCALE, step=STEPS)
    moments = skip_ahead(OPTIMIZERS[name]).state_dict()["moments"]
    size = transition.shape[1]
    torch.testing.assert_close(transition.flatten(1), moments[:, : size * size])
    lower = [(0, 0)] if size == 1 else [(0, 0), (1, 0), (1, 1)]
    for column, (row, other) in enumerate(lower, start=size * size):
        torch.testing.assert_close(covariance[:, row, other], moments[:, column])


@pytest.mark.parametrize("name", list(OPTIMIZERS))
@pytest.mark.parametrize("rate", [1e-2, 1e-4])
def test_a_flush_that_only_marks_rows_is_rejected_however_small_the_noise(name: str, rate: float) -> None:
    given = OPTIMIZERS[name]
    optimizer = EmbeddingSgd(linear(rate, steps=STEPS), momentum=given.momentum, weight_decay=given.weight_decay)
    made = tables(optimizer)
    pending = {table: PendingRows.of(value, step=STEPS) for table, value in made.items()}
    marks_only(made, optimizer)
    with pytest.raises(PendingNoiseError, match=NONE):
        prove(made, pending, optimizer)
    made = tables(optimizer)
    flush(made, skip_ahead(optimizer))
    prove(made, pending, optimizer)


def test_a_fault_in_half_a_percent_of_a_large_table_is_seen() -> None:
    """More rows than are looked at; missed with probability 2e-36."""
    rows = 2 * SAMPLED_ROWS
    made: Tables = {"item": {"weight": torch.ones(rows, 1), "last": torch.zeros(rows, dtype=torch.int32)}}
    made["item"]["momentum"] = None
    pending = {"item": PendingRows.of(made["item"], step=STEPS)}
    assert pending["item"].count == rows
    flush(made, skip_ahead(OPTIMIZERS["sgd"]))
    prove(made, pending, OPTIMIZERS["sgd"])
    made["item"]["weight"][torch.randperm(rows)[: rows // 200]] = 1.0
    with pytest.raises(PendingNoiseError, match=f"{NONE}.* of {SAMPLED_ROWS} rows"):
        prove(made, pending, OPTIMIZERS["sgd"])
