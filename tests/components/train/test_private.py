"""make_private: any module, the same guarantees."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lazydp.components.shared.errors import BudgetExceededError, FormatError, InputError, PendingNoiseError
from lazydp.components.train.engine.dense import DenseOptimizer
from lazydp.components.train.mechanism.parameters import PrivacyParameters
from lazydp.components.train.private import PrivateTrainer, make_private
from lazydp.components.train.tables import schedules
from lazydp.components.train.tables.skip_ahead import EmbeddingSgd
from lazydp.kernels.noise_key import NoiseKey

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS, DIM, SIZE, LENGTH = 7, 4, 5, 6


class Model(nn.Module):
    """Rows one by one, bags of both poolings, a layer read twice, and a normalised network over them."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(ROWS, DIM)
        self.tags = nn.EmbeddingBag(ROWS, DIM, mode="mean")
        self.words = nn.EmbeddingBag(ROWS, DIM, mode="sum", include_last_offset=True)
        self.top = nn.Sequential(nn.Linear(4 * DIM, 8), nn.LayerNorm(8), nn.ReLU(inplace=True), nn.Linear(8, 1))

    def forward(self, ids: Tensor) -> Tensor:
        offsets = torch.arange(0, ids.numel() + 1, ids.shape[1])
        parts = [
            torch.tanh(self.tokens(ids)).sum(dim=1),
            self.tags(ids),
            self.words(ids.reshape(-1), offsets),
            self.tags(ids.reshape(-1), offsets[:-1]),
        ]
        return self.top(torch.cat(parts, dim=1)).squeeze(1)


def ids_of(seed: int, size: int = SIZE) -> Tensor:
    return torch.randint(0, ROWS, (size, LENGTH), generator=torch.Generator().manual_seed(seed))


def losses_of(model: nn.Module, ids: Tensor) -> Callable[[], Tensor]:
    def losses() -> Tensor:
        return (model(ids) - ids[:, 0] / ROWS).square()

    return losses


def trainer_of(model: nn.Module, *, noise_multiplier: float = 0.0, max_grad_norm: float = 0.5, **more: Any) -> Any:
    torch.manual_seed(1)
    return make_private(
        model,
        privacy=PrivacyParameters(
            noise_multiplier=noise_multiplier, max_grad_norm=max_grad_norm, expected_batch_size=float(SIZE)
        ),
        embeddings=more.pop("embeddings", EmbeddingSgd(schedules.constant(1.0))),
        dense=DenseOptimizer.named("sgd", learning_rate=schedules.constant(1.0)),
        key=NoiseKey.for_tests(0),
        **more,
    )


def fresh() -> Model:
    torch.manual_seed(0)
    return Model()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def clipped_sum(model: nn.Module, ids: Tensor, max_grad_norm: float) -> dict[str, Tensor]:
    """Example by example, by autograd."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for row in ids:
        model.zero_grad()
        losses_of(model, row.unsqueeze(0))().sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
        for name, gradient in gradients.items():
            total[name] += gradient * min(1.0, max_grad_norm / norm)
    return total


@pytest.mark.parametrize("max_grad_norm", [0.05, 0.5, 100.0])
def test_a_step_is_the_clipped_sum_of_per_example_gradients(max_grad_norm: float) -> None:
    model = fresh()
    expected = clipped_sum(copy.deepcopy(model), ids_of(3), max_grad_norm)
    trainer = trainer_of(model, max_grad_norm=max_grad_norm)
    before = state(model)
    report = trainer.step(losses_of(model, ids_of(3)))
    after = state(model)
    assert report.size == SIZE
    for name, gradient in expected.items():
        torch.testing.assert_close((before[name] - after[name]) * SIZE, gradient, rtol=1e-3, atol=5e-5)


def test_the_model_behaves_as_before_and_keeps_its_keys() -> None:
    model = fresh()
    original = copy.deepcopy(model)
    trainer_of(model)
    assert model.state_dict().keys() == original.state_dict().keys()
    torch.testing.assert_close(model(ids_of(0)), original(ids_of(0)))
    assert {name for name, _ in model.named_parameters()} == {
        name for name, _ in original.named_parameters() if name.startswith("top")
    }


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_lazy_equals_eager_with_ones_for_noise(momentum: float) -> None:
    results = []
    for mode in ("lazydp", "dpsgd"):
        model = fresh()
        optimizer = EmbeddingSgd(schedules.warmup_cosine(0.2, steps=8), momentum, 0.01)
        trainer: PrivateTrainer = trainer_of(model, noise_multiplier=0.3, mode=mode, noise="ones", embeddings=optimizer)
        for step in range(6):
            ids = ids_of(step, size=step % 4)
            trainer.step(losses_of(model, ids[:2]), losses_of(model, ids[2:]))
        trainer.flush()
        assert trainer.pending() == 0
        assert trainer.steps_done == 6
        results.append(state(model))
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-4, atol=1e-5)


def test_a_repeated_id_contributes_no_more_than_the_norm_bound() -> None:
    model = fresh()
    trainer = trainer_of(model, max_grad_norm=1e-3)
    before = state(model)
    trainer.step(losses_of(model, torch.full((1, LENGTH), 3)))
    after = state(model)
    squares = sum(float(((before[name] - after[name]).double() * SIZE).square().sum()) for name in before)
    assert math.sqrt(squares) == pytest.approx(1e-3, rel=2e-2)


@pytest.mark.parametrize("micro_batches", [0, 1, 2])
def test_no_example_is_noise_alone(micro_batches: int) -> None:
    model = fresh()
    trainer = trainer_of(model, noise_multiplier=1.0, noise="ones")
    before = state(model)
    assert trainer.step(*[losses_of(model, ids_of(0, size=0))] * micro_batches).size == 0
    assert trainer.pending() == 3 * ROWS
    trainer.flush()
    for name, value in state(model).items():
        torch.testing.assert_close(before[name] - value, torch.full_like(value, 0.5 / SIZE), rtol=1e-3, atol=1e-5)


def test_a_non_finite_example_counts_zero() -> None:
    model = fresh()
    trainer = trainer_of(model)
    factors = torch.tensor([1.0, math.nan, 1.0, 1.0, 1.0])
    report = trainer.step(lambda: model(ids_of(0)).square() * factors)
    assert report.non_finite == 1
    assert all(bool(torch.isfinite(value).all()) for value in model.state_dict().values())


def test_rows_that_owe_noise_stay_inside() -> None:
    model = fresh()
    trainer = trainer_of(model, noise_multiplier=1.0)
    assert trainer.pending() == 0
    trainer.step(losses_of(model, ids_of(0)))
    leaks: dict[str, Callable[[], object]] = {
        "is read outside a step": lambda: model(ids_of(0)),
        "enters a state dict": model.state_dict,
        "is pickled or copied": lambda: copy.deepcopy(model),
    }
    for what, leak in leaks.items():
        with pytest.raises(PendingNoiseError, match=rf"'tokens' {what} .* flush\(\) first"):
            leak()
    with pytest.raises(PendingNoiseError, match="is pickled"):
        torch.save(model, io.BytesIO())
    trainer.flush()
    for leak in leaks.values():
        leak()
    trainer.step(losses_of(model, ids_of(0)))
    with pytest.raises(PendingNoiseError):
        model(ids_of(0))


def test_nothing_is_pending_where_every_row_gets_it_at_once() -> None:
    model = fresh()
    trainer_of(model, noise_multiplier=1.0, mode="dpsgd").step(losses_of(model, ids_of(0)))
    model.state_dict()


class Tied(nn.Module):
    """Scores every row of its table by the table itself, read directly or through a layer."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.rows = nn.Embedding(ROWS, DIM)
        self.layer = nn.Linear(DIM, DIM)
        if how == "a layer":
            self.out = nn.Linear(DIM, ROWS, bias=False)
            self.out.weight = self.rows.weight
        elif how == "a view kept as attribute":
            self.kept = self.rows.weight.detach()[1:, :2]
        elif how == "a buffer":
            self.register_buffer("kept", self.rows.weight.detach())

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.layer(self.rows(ids[:, 0]))
        if self.how == "directly":
            return (hidden @ self.rows.weight.t()).logsumexp(dim=1)
        return self.out(hidden).logsumexp(dim=1) if self.how == "a layer" else hidden.sum(dim=1)


def test_a_table_that_a_step_reads_directly_is_refused() -> None:
    """The read saw rows without their noise, and its gradient was lost."""
    model = Tied("directly")
    plain = model(ids_of(0))
    trainer = trainer_of(model, noise_multiplier=1.0)
    torch.testing.assert_close(model(ids_of(0)), plain)  # between steps, while nothing is pending, it is a table
    with pytest.raises(InputError, match=r"weight of embedding layer 'rows' is read during a step.*tied weights"):
        trainer.step(losses_of(model, ids_of(0)))
    assert trainer.steps_done == 0
    control = Tied("not at all")
    trainer_of(control, noise_multiplier=1.0).step(losses_of(control, ids_of(0)))


@pytest.mark.parametrize(
    ("how", "found"),
    [("a layer", "out.weight"), ("a view kept as attribute", "kept"), ("a buffer", "kept")],
)
def test_what_shares_memory_with_a_table_is_refused(how: str, found: str) -> None:
    with pytest.raises(InputError, match=rf"^{found} shares memory with the weight of embedding layer 'rows'"):
        trainer_of(Tied(how))
    control = Tied("not at all")
    control.kept = control.rows.weight.detach().clone()
    trainer_of(control)


def test_no_weight_shows_rows_that_owe_noise() -> None:
    model = Tied("not at all")
    trainer = trainer_of(model, noise_multiplier=1.0)
    before = model.rows.weight.clone()
    trainer.step(losses_of(model, ids_of(0)))
    with pytest.raises(PendingNoiseError, match=r"'rows' shows its weight while its rows have pending noise"):
        _ = model.rows.weight
    with pytest.raises(PendingNoiseError):
        model(ids_of(0)) @ model.rows.weight.t()
    assert not list(model.buffers())
    assert {name for name, _ in model.named_parameters()} == {"layer.weight", "layer.bias"}
    trainer.flush()
    assert bool((model.rows.weight != before).all())  # the control: every row had noise to come


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_goes_into_the_rows_that_are_trained(assign: bool) -> None:
    """Loaded weights are what the next step moves, not a tensor beside it."""
    model, donor = fresh(), Model()
    trainer = trainer_of(model)
    model.tokens.load_state_dict(donor.tokens.state_dict(), assign=assign)
    assert torch.equal(model.tokens.weight, donor.tokens.weight)
    trainer.step(losses_of(model, ids_of(0)))
    assert not torch.equal(model.tokens.weight, donor.tokens.weight)
    torch.testing.assert_close(model.state_dict()["tokens.weight"], model.tokens.weight)
    with pytest.raises(RuntimeError, match=r"size mismatch for tokens\.weight"):
        model.load_state_dict({**donor.state_dict(), "tokens.weight": torch.zeros(2, DIM)})
    with pytest.raises(RuntimeError, match=r"Missing key.*tokens\.weight"):
        model.load_state_dict({name: value for name, value in donor.state_dict().items() if name != "tokens.weight"})


def resumable(*, max_grad_norm: float = 0.5, mode: Any = "lazydp") -> tuple[Model, PrivateTrainer]:
    model = fresh()
    trainer: PrivateTrainer = make_private(
        model,
        privacy=PrivacyParameters(noise_multiplier=0.7, max_grad_norm=max_grad_norm, expected_batch_size=4.0),
        embeddings=EmbeddingSgd(schedules.constant(0.1), momentum=0.5),
        dense=DenseOptimizer(lambda parameters: torch.optim.Adam(parameters, lr=1e-2)),
        key=NoiseKey.for_tests(3),
        mode=mode,
    )
    return model, trainer


def test_training_goes_on_in_copies_of_a_state() -> None:
    _, donor = resumable()
    donor.step(losses_of(donor.model, ids_of(0)))
    saved = copy.deepcopy(donor.state_dict())
    kept = copy.deepcopy(saved)
    model, trainer = resumable()
    trainer.load_state_dict(saved)
    trainer.step(losses_of(model, ids_of(1)))
    moments, kept_moments = saved["dense"]["optimizer"]["state"][0], kept["dense"]["optimizer"]["state"][0]
    assert torch.equal(moments["exp_avg"], kept_moments["exp_avg"])
    assert not torch.equal(trainer.state_dict()["dense"]["optimizer"]["state"][0]["exp_avg"], moments["exp_avg"])


def test_no_step_is_taken_beyond_the_last() -> None:
    """An empty one counts, and so do those before a restart; without a number nothing stops it (the control)."""
    model = fresh()
    trainer = trainer_of(model, noise_multiplier=1.0, steps=3)
    trainer.step(losses_of(model, ids_of(0)))
    trainer.step()
    saved = copy.deepcopy(trainer.state_dict())
    trainer.step(losses_of(model, ids_of(1)))
    trainer.flush()
    before = state(model)
    for _ in range(2):
        with pytest.raises(BudgetExceededError, match=r"all 3 steps .* are done, and step 4 would spend more"):
            trainer.step(losses_of(model, ids_of(2)))
    assert trainer.steps_done == 3
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())

    model = fresh()
    resumed = trainer_of(model, noise_multiplier=1.0, steps=3)
    resumed.load_state_dict(saved)
    resumed.step(losses_of(model, ids_of(1)))
    with pytest.raises(BudgetExceededError, match="all 3 steps"):
        resumed.step()
    for steps in (4, None):
        with pytest.raises(FormatError, match=f"steps is 3, this trainer's {steps}"):
            trainer_of(fresh(), noise_multiplier=1.0, steps=steps).load_state_dict(saved)

    model = fresh()
    unlimited = trainer_of(model, noise_multiplier=1.0)
    for step in range(5):
        unlimited.step(losses_of(model, ids_of(step)))
    assert unlimited.steps_done == 5


@pytest.mark.parametrize("flushed", [False, True])
def test_a_resumed_trainer_ends_in_the_same_bits(flushed: bool) -> None:
    """Through a file, and with a scheduler of torch on the dense optimizer."""
    ends = []
    for stop in (None, 4):
        model, trainer = resumable()
        scheduler = torch.optim.lr_scheduler.ExponentialLR(trainer.optimizer, 0.5)  # type: ignore[arg-type]
        for step in range(8):
            if step == 4 and flushed:
                trainer.flush()
            if step == stop:
                file = io.BytesIO()
                torch.save({"trainer": trainer.state_dict(), "scheduler": scheduler.state_dict()}, file)
                model, trainer = resumable()
                scheduler = torch.optim.lr_scheduler.ExponentialLR(trainer.optimizer, 0.5)  # type: ignore[arg-type]
                saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
                trainer.load_state_dict(saved["trainer"])
                scheduler.load_state_dict(saved["scheduler"])
                if not flushed:
                    with pytest.raises(PendingNoiseError):
                        model(ids_of(0))
            trainer.step(losses_of(model, ids_of(step)))
            scheduler.step()
        assert trainer.optimizer is not None
        assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * 0.5**8)
        trainer.flush()
        ends.append(state(model))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_state_brings_the_nonce_of_its_noise() -> None:
    """Another trainer under the same key goes on to the same bits; under its own nonce it would not (the control)."""
    key = NoiseKey.generate()

    def trained(steps: range, saved: dict[str, Any] | None) -> tuple[Model, PrivateTrainer]:
        model = fresh()
        trainer: PrivateTrainer = make_private(
            model,
            privacy=PrivacyParameters(noise_multiplier=0.7, max_grad_norm=1.0, expected_batch_size=4.0),
            embeddings=EmbeddingSgd(schedules.constant(0.1)),
            dense=DenseOptimizer.named("sgd", learning_rate=schedules.constant(0.1)),
            key=key,
        )
        if saved is not None:
            trainer.load_state_dict(saved)
        for step in steps:
            trainer.step(losses_of(model, ids_of(step)))
        return model, trainer

    half = copy.deepcopy(trained(range(2), None)[1].state_dict())
    ends = []
    for saved in (half, half, {**half, "nonce": "00"}):
        model, trainer = trained(range(2, 4), saved)
        trainer.flush()
        ends.append(state(model))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert not any(torch.equal(ends[0][name], ends[2][name]) for name in ends[0])
    for nonce in ({}, {"nonce": "no number"}):
        with pytest.raises(FormatError, match="lacks the nonce"):
            trained(range(0), {**{name: value for name, value in half.items() if name != "nonce"}, **nonce})
    key.destroy()
    with pytest.raises(ValueError, match="destroyed"):
        trainer.step()


def test_indices_may_be_views() -> None:
    model = nn.Sequential(nn.EmbeddingBag(ROWS, DIM, mode="sum"), nn.Linear(DIM, 1), nn.Flatten(0))
    wide = torch.randint(0, ROWS, (LENGTH, 2))
    trainer = trainer_of(model)
    offsets = torch.arange(2 * SIZE).view(SIZE, 2)[:, 0].clamp(max=LENGTH)
    trainer.step(lambda: model[2](model[1](model[0](wide[:, 1], offsets))).square())
    trainer.step(lambda: model(ids_of(0).t().contiguous().t()).square())


def test_a_state_of_another_trainer_is_refused() -> None:
    saved = resumable()[1].state_dict()
    with pytest.raises(FormatError, match="mode is 'lazydp'"):
        resumable(mode="dpsgd")[1].load_state_dict(saved)
    with pytest.raises(FormatError, match=r"privacy is .*'max_grad_norm': 0\.5"):
        resumable(max_grad_norm=1.0)[1].load_state_dict(saved)
    with pytest.raises(FormatError, match="has tables"):
        trainer_of(Coupled("nowhere"), noise_multiplier=0.7).load_state_dict(
            {**saved, "privacy": {**saved["privacy"], "expected_batch_size": float(SIZE)}}
        )


def test_gradients_that_somebody_cleared_come_back() -> None:
    model = fresh()
    trainer = trainer_of(model)
    model.zero_grad(set_to_none=True)
    assert trainer.step(losses_of(model, ids_of(0))).size == SIZE


@pytest.mark.parametrize("user_gradient", ["sum", "mean"])
def test_users_are_clipped_as_a_whole(user_gradient: Any) -> None:
    model = fresh()
    sizes = [3, 1, 2]
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for ids in ids_of(7, size=6).split(sizes):
        weight = len(ids) if user_gradient == "mean" else 1
        gradients = clipped_sum(copy.deepcopy(model), ids, math.inf)
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values())) / weight
        for name, gradient in gradients.items():
            expected[name] += gradient / weight * min(1.0, 0.1 / norm)
    trainer = make_private(
        model,
        privacy=PrivacyParameters(
            noise_multiplier=0.0, max_grad_norm=0.1, expected_batch_size=float(SIZE), user_gradient=user_gradient
        ),
        embeddings=EmbeddingSgd(schedules.constant(1.0)),
        dense=DenseOptimizer.named("sgd", learning_rate=schedules.constant(1.0)),
        key=NoiseKey.for_tests(0),
    )
    before = state(model)
    ids = ids_of(7, size=6)
    with pytest.raises(InputError, match="came with no user_sizes"):
        trainer.step(losses_of(model, ids))
    with pytest.raises(InputError, match="2 micro-batches came with the user_sizes of 1"):
        trainer.step(losses_of(model, ids), losses_of(model, ids), user_sizes=[torch.tensor(sizes)])
    report = trainer.step(
        losses_of(model, ids[:4]),
        losses_of(model, ids[4:]),
        user_sizes=[torch.tensor(sizes[:2]), torch.tensor(sizes[2:])],
    )
    after = state(model)
    assert (report.size, report.units) == (6, 3)
    for name, gradient in expected.items():
        torch.testing.assert_close((before[name] - after[name]) * SIZE, gradient, rtol=1e-3, atol=5e-5)


class Coupled(nn.Module):
    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        self.rows = nn.EmbeddingBag(ROWS, DIM, mode="sum")
        self.layer = nn.Linear(DIM, 1)

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.rows(ids)
        if self.where == "rows":
            rows = rows - rows.mean(dim=0)
        logits = self.layer(rows).squeeze(1)
        return logits - logits.mean() if self.where == "logits" else logits


def test_examples_that_read_each_other_are_refused() -> None:
    for where, layer in (("rows", "rows"), ("logits", "layer")):
        model = Coupled(where)
        trainer = trainer_of(model)
        with pytest.raises(InputError, match=f"depends on other examples through layer '({layer}|rows)'"):
            trainer.step(losses_of(model, ids_of(0)))
    model = Coupled("nowhere")
    trainer_of(model).step(losses_of(model, ids_of(0)))


def test_in_batch_negatives_are_refused() -> None:
    model = Coupled("nowhere")
    trainer = trainer_of(model)
    with pytest.raises(InputError, match="depends on other examples"):
        trainer.step(lambda: -torch.log_softmax(model(ids_of(0)), dim=0))


@pytest.mark.parametrize(
    ("layer", "option"),
    [
        (nn.EmbeddingBag(ROWS, DIM, mode="max"), r"max.*amax\(dim=1\)"),
        (nn.Embedding(ROWS, DIM, max_norm=1.0), r"max_norm.*functional\.normalize"),
        (nn.EmbeddingBag(ROWS, DIM, scale_grad_by_freq=True, mode="sum"), "scale_grad_by_freq.*leave it out"),
        (nn.Embedding(ROWS, DIM).half(), r"float16: call model\.float\(\) first"),
    ],
)
def test_options_without_a_plain_gradient_are_refused(layer: nn.Module, option: str) -> None:
    with pytest.raises(InputError, match=f"layer '0'.*{option}"):
        trainer_of(nn.Sequential(layer, nn.Linear(DIM, 1)))


def test_what_cannot_be_private_is_refused_before_training() -> None:
    with pytest.raises(InputError, match="BatchNorm1d"):
        trainer_of(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    with pytest.raises(InputError, match="train the model itself"):
        trainer_of(fresh(), mode="sgd")
    with pytest.raises(InputError, match="steps must be at least 1, found 0"):
        trainer_of(fresh(), steps=0)
    with pytest.raises(InputError, match="bare embedding"):
        trainer_of(nn.Embedding(ROWS, DIM))
    tied = nn.ModuleDict({"a": nn.Embedding(ROWS, DIM), "b": nn.Embedding(ROWS, DIM)})
    tied["b"].weight = tied["a"].weight
    with pytest.raises(InputError, match="'a' and 'b' share a weight"):
        trainer_of(tied)
    model = fresh()
    trainer = trainer_of(model)
    with pytest.raises(InputError, match="one loss an example"):
        trainer.step(lambda: model(ids_of(0)).sum())
