"""What would lead data around clipping and noise is refused by name, and what is refused leaves the model as it was."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune

from lazydp.components.shared.errors import InputError
from lazydp.components.train.engine.dense import DenseOptimizer
from lazydp.components.train.mechanism.gradient_check import STEPS_LOOKED_AT, GradientCheck
from lazydp.components.train.mechanism.parameters import PrivacyParameters
from lazydp.components.train.private import PrivateTrainer, make_private
from lazydp.components.train.tables import schedules
from lazydp.components.train.tables.skip_ahead import EmbeddingSgd
from lazydp.kernels.noise_key import NoiseKey

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS, DIM, SIZE = 9, 4, 6
SGD = DenseOptimizer.named("sgd", learning_rate=schedules.constant(0.1))


def ids_of(seed: int) -> Tensor:
    return torch.randint(0, ROWS, (SIZE, 2), generator=torch.Generator().manual_seed(seed))


def trainer_of(model: nn.Module, *, noise_multiplier: float = 1.0, **more: Any) -> PrivateTrainer:
    settings: dict[str, Any] = {"dense": SGD, "key": NoiseKey.for_tests(0)}
    return make_private(
        model,
        privacy=PrivacyParameters(
            noise_multiplier=noise_multiplier, max_grad_norm=1.0, expected_batch_size=float(SIZE)
        ),
        embeddings=EmbeddingSgd(schedules.constant(0.5)),
        **{**settings, **more},
    )


class Scores(nn.Module):
    """Two rows, a hidden layer and a norm; everything that a test needs is done to it from outside."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rows = nn.Embedding(ROWS, DIM)
        self.hidden = nn.Linear(DIM, DIM)
        self.norm = nn.LayerNorm(DIM)
        self.top = nn.Linear(DIM, 1)

    def scores(self, read: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
        return self.top(self.norm(torch.tanh(self.hidden(read(ids[:, 0]) * read(ids[:, 1]))))).squeeze(1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.scores(self.rows, ids)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


# --- tables that are reached in another way than by an attribute ---------------------------------------------------


class Kept(Scores):
    """Reads its table through a list, a dict, a closure, or a second name."""

    def __init__(self, how: str) -> None:
        super().__init__()
        rows = self.rows
        self.tables, self.by_name = [rows], {"rows": rows}
        if how == "second name":
            self.again = rows
        self.read: Callable[[Tensor], Tensor] = {
            "list": lambda ids: self.tables[0](ids),  # noqa: PLW0108
            "dict": lambda ids: self.by_name["rows"](ids),  # noqa: PLW0108
            "closure": lambda ids: rows(ids),  # noqa: PLW0108 - a closure is what is tested
            "second name": lambda ids: self.again(ids),  # noqa: PLW0108 - not there in the others
            "attribute": lambda ids: self.rows(ids),  # noqa: PLW0108
            "keyword": lambda ids: self.rows(input=ids),
        }[how]

    def forward(self, ids: Tensor) -> Tensor:
        return self.scores(self.read, ids)


def trained(how: str) -> dict[str, Tensor]:
    model = Kept(how)
    trainer = trainer_of(model)
    for step in range(3):
        trainer.step(lambda step=step: model(ids_of(step)).square())  # type: ignore[misc]
    trainer.flush()
    return state(model)


@pytest.mark.parametrize("how", ["list", "dict", "closure", "second name", "keyword"])
def test_a_table_is_read_with_its_noise_however_it_is_reached(how: str) -> None:
    expected, found = trained("attribute"), trained(how)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    initial = Scores().rows.weight
    assert all(bool((row != before).any()) for row, before in zip(found["rows.weight"], initial, strict=True))


def test_the_layer_stays_what_it_was_to_others() -> None:
    model = Scores()
    calls = []
    model.rows.register_forward_hook(lambda *arguments: calls.append(1))
    trainer = trainer_of(model)
    assert isinstance(model.rows, nn.Embedding)
    assert (model.rows.num_embeddings, model.rows.embedding_dim) == (ROWS, DIM)
    shapes = []

    def losses() -> Tensor:
        shapes.append((model.rows.weight.shape, model.rows.weight.device, model.rows.weight.dtype))
        return model(ids_of(0)).square()

    trainer.step(losses)
    assert set(shapes) == {(torch.Size([ROWS, DIM]), torch.device("cpu"), torch.float32)}
    assert calls


def test_no_kept_reference_reads_what_is_trained() -> None:
    """Not the parameter, a method, nor a view: on the code before, all of them saw rows without their noise."""
    model = Scores()
    weight, bound = model.rows.weight, model.rows.forward
    initial = weight.detach().clone()
    trainer = trainer_of(model)
    for read in (
        lambda ids: weight[ids],
        lambda ids: functional.embedding(ids, weight),
        lambda ids: torch.stack([weight])[0][ids],
    ):
        with pytest.raises(InputError, match="the parameter that was the weight of embedding layer 'rows' is used"):
            trainer.step(lambda read=read: model.scores(read, ids_of(0)).square())  # type: ignore[misc]
    with pytest.raises(InputError, match="weight of embedding layer 'rows' is read during a step"):
        trainer.step(lambda: model.scores(bound, ids_of(0)).square())
    with pytest.raises(InputError, match="the parameter that was the weight"):
        torch.optim.SGD([weight], lr=0.1).zero_grad()
    assert trainer.steps_done == 0

    model = Scores()
    views = [model.rows.weight.detach(), model.rows.weight.detach().numpy(), model.rows.weight.detach()[2:]]
    trainer = trainer_of(model)
    for step in range(4):
        trainer.step(lambda step=step: model(ids_of(step)).square())  # type: ignore[misc]
    trainer.flush()
    assert not torch.equal(model.rows.weight, initial)
    assert torch.equal(torch.as_tensor(views[0]), initial)
    assert torch.equal(torch.as_tensor(views[1]), initial)
    assert torch.equal(torch.as_tensor(views[2]), initial[2:])


@pytest.mark.parametrize("kind", ["tensor", "view", "array"])
def test_a_reference_taken_between_steps_is_seen(kind: str) -> None:
    """Through it the losses would read rows past their noise; the table is named, and is as it was."""
    model = Scores()
    model.other = nn.EmbeddingBag(ROWS, DIM, mode="sum")
    trainer = trainer_of(model)
    kept = {"tensor": model.rows.weight, "view": model.rows.weight[:, :], "array": model.rows.weight.numpy()}[kind]
    before = model.rows.weight.clone()

    def losses() -> Tensor:
        return (
            model(ids_of(0)) + torch.as_tensor(kept)[ids_of(0)[:, 0]].sum(1) + model.other(ids_of(0)).sum(1)  # type: ignore[operator]
        ).square()

    with pytest.raises(InputError, match="rows of embedding layer 'rows' reach the losses past the layer's call"):
        trainer.step(losses)
    assert trainer.steps_done == 0
    assert torch.equal(model.rows.weight, before)
    trainer.step(lambda: (model(ids_of(0)) + model.other(ids_of(0)).sum(1)).square())  # type: ignore[operator]  # noqa: PLW0108 - the control


# --- weights that are used past their layer's call -----------------------------------------------------------------


def linear_past(model: Scores) -> Tensor:
    return functional.linear(model.norm(model.rows(ids_of(0)[:, 0])), model.hidden.weight).sum(1).square()


def penalty(model: Scores) -> Tensor:
    return model(ids_of(0)).square() + 0.01 * model.hidden.weight.square().sum()


def norm_past(model: Scores) -> Tensor:
    return model(ids_of(0)).square() + (model.norm.bias * torch.arange(DIM)).sum()


def gradient_penalty(model: Scores) -> Tensor:
    inputs = torch.randn(SIZE, DIM, requires_grad=True)
    hidden = torch.tanh(model.hidden(inputs)).sum()
    (slope,) = torch.autograd.grad(hidden, inputs, create_graph=True)
    return model(ids_of(0)).square() + slope.square().sum(1)


@pytest.mark.parametrize(
    ("losses", "name"),
    [
        (linear_past, "hidden.weight"),
        (penalty, "hidden.weight"),
        (norm_past, "norm.bias"),
        (gradient_penalty, "hidden.weight"),
    ],
)
def test_a_weight_used_past_its_layer_is_refused(
    losses: Callable[[Scores], Tensor], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Scores()
    trainer = trainer_of(model)
    with pytest.raises(InputError, match=rf"the gradient of '{name}' has norm .* used past its layer's call"):
        trainer.step(lambda: losses(model))
    assert trainer.steps_done == 0
    frozen = Scores()
    frozen.get_parameter(name).requires_grad_(False)  # a constant may be used anywhere
    trainer_of(frozen).step(lambda: losses(frozen))
    # The control: without the look it was accepted, and the weight moved by its noise alone.
    monkeypatch.setattr(GradientCheck, "looks_at", lambda *arguments, **options: False)
    trainer_of(unseen := Scores()).step(lambda: losses(unseen))


def test_the_look_comes_in_each_of_the_first_steps_and_for_one_example() -> None:
    model = Scores()
    trainer = trainer_of(model)
    for _ in range(STEPS_LOOKED_AT - 1):
        trainer.step(lambda: model(ids_of(0)).square())
    with pytest.raises(InputError, match="used past its layer's call"):
        trainer.step(lambda: penalty(model))
    alone = Scores()
    trainer = trainer_of(alone)
    with pytest.raises(InputError, match="used past its layer's call"):
        trainer.step(lambda: alone(ids_of(0)[:1]).square() + 0.01 * alone.hidden.weight.square().sum())


class Positions(nn.Module):
    """Bags, weights of lookups, several positions and calls of one layer: all that the look has to account for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.EmbeddingBag(ROWS, DIM, mode="sum")
        self.tags = nn.EmbeddingBag(ROWS, DIM, mode="mean")
        self.tokens = nn.Embedding(ROWS, DIM)
        self.layer = nn.Sequential(nn.Linear(DIM, 3 * DIM), nn.LayerNorm(3 * DIM), nn.ReLU(), nn.Dropout(0.3))
        self.top = nn.Linear(3 * DIM, 1, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        weights = torch.linspace(-1e3, 1e3, ids.numel()).view(ids.shape)
        pooled = self.words(ids, per_sample_weights=weights) * 1e-3 + self.tags(ids)
        sequence = self.layer(self.tokens(ids) + pooled.unsqueeze(1)).mean(1) + self.layer(pooled)
        return self.top(sequence).squeeze(1)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("seed", range(3))
def test_rounding_is_no_difference(scale: float, seed: int) -> None:
    model = Positions()
    trainer = trainer_of(model)
    for step in range(STEPS_LOOKED_AT):
        trainer.step(lambda step=step: scale * model(ids_of(10 * seed + step)).square())  # type: ignore[misc]
    assert trainer.steps_done == STEPS_LOOKED_AT


# --- layers whose parameters are not those of the rule -------------------------------------------------------------


def extra(layer: nn.Linear) -> nn.Linear:
    layer.gain = nn.Parameter(torch.ones(()))
    return layer


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (nn.utils.weight_norm, r"'hidden\.weight_g' makes another tensor"),
        (nn.utils.spectral_norm, r"'hidden\.weight_orig'"),
        (lambda layer: prune.random_unstructured(layer, "weight", 0.5), r"'hidden\.weight_orig'"),
        (extra, "'gain'"),
        (parametrizations.weight_norm, r"'hidden\.parametrizations\.weight\.original0'.*remove_parametrizations"),
    ],
)
def test_reparametrised_layers_are_refused_by_name(change: Callable[[nn.Module], nn.Module], found: str) -> None:
    model = Scores()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates two of them
        model.hidden = change(model.hidden)  # type: ignore[assignment]
    with pytest.raises(InputError, match=found):
        trainer_of(model)


# --- what is refused leaves the model as it was --------------------------------------------------------------------


def norm_over_the_batch(model: Scores) -> dict[str, Any]:
    model.norm = nn.BatchNorm1d(DIM)  # type: ignore[assignment]
    return {}


def option(model: Scores) -> dict[str, Any]:
    model.more = nn.Embedding(ROWS, DIM, max_norm=1.0)
    return {}


def optimizer(model: Scores) -> dict[str, Any]:
    return {"dense": DenseOptimizer(lambda parameters: 1 / 0)}  # type: ignore[arg-type,return-value]


def destroyed_key(model: Scores) -> dict[str, Any]:
    key = NoiseKey.for_tests(1)
    key.destroy()
    return {"key": key}


@pytest.mark.parametrize("reason", [norm_over_the_batch, option, optimizer, destroyed_key])
def test_a_refusal_changes_nothing(reason: Callable[[Scores], dict[str, Any]]) -> None:
    model = Scores()
    rows, weight = model.rows, model.rows.weight
    settings = reason(model)
    before, names = copy.deepcopy(model.state_dict()), [name for name, _ in model.named_parameters()]
    for _ in range(2):
        with pytest.raises((InputError, ZeroDivisionError, ValueError)):
            trainer_of(model, **settings)
        assert model.rows is rows
        assert type(rows) is nn.Embedding
        assert rows.weight is weight
        assert type(weight) is nn.Parameter
        assert [name for name, _ in model.named_parameters()] == names
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.norm = nn.LayerNorm(DIM)
    model.more = nn.Identity()
    trainer_of(model).step(lambda: model(ids_of(0)).square())


def test_a_model_has_one_trainer() -> None:
    """On the code before, a second one took the flushed tables for constants."""
    model = Scores()
    trainer = trainer_of(model)
    trainer.step(lambda: model(ids_of(0)).square())
    for flushed in (False, True):
        if flushed:
            trainer.flush()
        for again in (model, nn.Sequential(model, nn.Flatten(0))):
            with pytest.raises(InputError, match="belongs to a trainer already: make_private takes a model once"):
                trainer_of(again)
    with pytest.raises(InputError, match="belongs to a trainer already"):
        trainer_of(copy.deepcopy(model))
    dense = nn.Sequential(nn.Linear(2, 1), nn.Flatten(0))
    trainer_of(dense)
    with pytest.raises(InputError, match="the model has a trainer already"):
        trainer_of(dense)
    trainer.step(lambda: model(ids_of(0)).square())  # the first goes on


# --- buffers that move ---------------------------------------------------------------------------------------------


class Running(Scores):
    """Keeps a running mean of its inputs, in a buffer or in an attribute, in place or by another tensor."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("mean", torch.zeros(()))
        self.kept = torch.zeros(())

    def forward(self, ids: Tensor) -> Tensor:
        if self.how == "in place":
            self.mean.add_(ids.float().mean())  # type: ignore[has-type]
        elif self.how == "another tensor":
            self.mean = 0.9 * self.mean + ids.float().mean()  # type: ignore[has-type]
        elif self.how == "attribute":
            self.kept = ids.float().mean()
        return super().forward(ids)


@pytest.mark.parametrize(
    ("how", "name"), [("in place", "mean"), ("another tensor", "mean"), ("attribute", "kept"), ("none", "")]
)
def test_a_buffer_that_the_forward_moves_is_refused(how: str, name: str) -> None:
    """In whatever step; what it took in of the batch is gone again."""
    model = Running("none")
    trainer = trainer_of(model)
    for step in range(5):
        trainer.step(lambda step=step: model(ids_of(step)).square())  # type: ignore[misc]
    model.mean.fill_(3.0)  # the caller's own doing, between steps
    model.kept = torch.full((), 3.0)
    model.how = how
    if how == "none":
        trainer.step(lambda: model(ids_of(0)).square())
        return
    with pytest.raises(InputError, match=f"buffer '{name}' changes in the forward pass.*allow_moving_buffers=True"):
        trainer.step(lambda: model(ids_of(0)).square())
    assert trainer.steps_done == 5
    assert float(model.mean) == float(model.kept) == 3.0
    model.how = "none"
    trainer.step(lambda: model(ids_of(0)).square())
    allowed = Running(how)
    trainer_of(allowed, allow_moving_buffers=True).step(lambda: allowed(ids_of(0)).square())
    assert float(getattr(allowed, name)) != 0.0


class Unversioned(nn.Module):
    """Writes the mean of its inputs where autograd keeps no version: by `.data`, or by NumPy."""

    mean: Tensor

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.layer = nn.Linear(2, 1)
        self.register_buffer("mean", torch.tensor([0.0, float("nan")]))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.how == "data":
            self.mean.data[0] += inputs.mean()
        if self.how == "numpy":
            self.mean.numpy()[0] += float(inputs.mean())
        losses: Tensor = self.layer(inputs).squeeze(1)
        return losses


@pytest.mark.parametrize("how", ["data", "numpy", "none"])
def test_a_buffer_that_moves_without_a_version_is_refused(how: str) -> None:
    model, inputs = Unversioned(how), torch.ones(SIZE, 2)
    trainer = trainer_of(model)
    for _ in range(2):
        if how == "none":
            trainer.step(lambda: model(inputs).square())
        else:
            with pytest.raises(InputError, match="buffer 'mean' changes in the forward pass"):
                trainer.step(lambda: model(inputs).square())
    assert float(model.mean[0]) == 0.0
