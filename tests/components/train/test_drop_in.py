"""A model that `make_private` took is the model it was: attributes, hooks, habits, padding, types."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lazydp.components.shared.errors import InputError
from lazydp.components.train.engine.dense import DenseOptimizer
from lazydp.components.train.mechanism.parameters import PrivacyParameters
from lazydp.components.train.private import PrivateTrainer, make_private
from lazydp.components.train.replacements import fix
from lazydp.components.train.tables.skip_ahead import EmbeddingSgd
from lazydp.kernels.noise_key import NoiseKey

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS, DIM, SIZE, LENGTH, NORM = 7, 4, 5, 6, 0.5
IDS = torch.randint(0, ROWS, (SIZE, LENGTH), generator=torch.Generator().manual_seed(5))


def trainer_of(model: nn.Module, *, noise_multiplier: float = 0.0, **more: Any) -> PrivateTrainer:
    return make_private(
        model,
        privacy=PrivacyParameters(
            noise_multiplier=noise_multiplier, max_grad_norm=NORM, expected_batch_size=float(SIZE)
        ),
        embeddings=EmbeddingSgd(1.0),
        dense=DenseOptimizer.named("sgd", learning_rate=1.0),
        key=NoiseKey.for_tests(0),
        **more,
    )


def losses_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids).square().flatten(1).sum(dim=1)


def check_step(model: nn.Module, ids: Tensor = IDS, one: Callable[[int], Tensor] | None = None) -> PrivateTrainer:
    """A step of the private model is the clipped sum of what autograd finds in the plain one, example by example."""
    plain = copy.deepcopy(model)
    expected = {name: torch.zeros_like(parameter) for name, parameter in plain.named_parameters()}
    for example in range(SIZE):
        some = ids[example : example + 1].long()
        gradients = torch.autograd.grad(losses_of(plain, some).sum(), list(plain.parameters()), allow_unused=True)
        found = {name: g for name, g in zip(expected, gradients, strict=True) if g is not None}
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in found.values()))
        for name, gradient in found.items():
            expected[name] += gradient * min(1.0, NORM / norm)
    trainer = trainer_of(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert before.keys() == plain.state_dict().keys()
    trainer.step(lambda: losses_of(model, ids))
    after = model.state_dict()
    for name, gradient in expected.items():
        torch.testing.assert_close((before[name] - after[name]) * SIZE, gradient, rtol=1e-3, atol=2e-5)
    return trainer


class Rows(nn.Module):
    """One table, what is done to its rows, and a layer over them."""

    def __init__(self, change: Callable[[Tensor], Tensor] = lambda rows: rows, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rows = nn.Embedding(ROWS, DIM, **options)
        self.top = nn.Linear(DIM, 3)
        self.change = change

    def forward(self, ids: Tensor) -> Tensor:
        return self.top(self.change(self.rows(ids)))


def test_a_table_is_an_embedding_with_its_attributes() -> None:
    class Asks(Rows):
        def forward(self, ids: Tensor) -> Tensor:
            tables = [child for child in self.children() if isinstance(child, nn.Embedding)]
            rows = tables[0](input=ids.to(self.rows.weight.device)) * self.rows.embedding_dim**0.5
            assert self.rows.num_embeddings == self.rows.weight.shape[0] == self.rows.weight.size(0)
            return self.top(input=rows.to(self.rows.weight.dtype))

    check_step(Asks(sparse=True))


IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "multiplied": lambda rows: rows.mul_(2.0),
    "positions added": lambda rows: rows.add_(torch.linspace(0, 1, LENGTH).unsqueeze(1)),
    "an activation": lambda rows: functional.relu(rows, inplace=True),
    "masked": lambda rows: rows.masked_fill_(rows.detach() > 0.5, 0.0),
    "a part": lambda rows: rows[:, 0].zero_() * 0 + rows[:, 1],
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_rows_may_be_changed_in_place(name: str) -> None:
    """They were views of a leaf of autograd, which refuses it; with one position, and with several."""
    check_step(Rows(IN_PLACE[name]))


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_bags_may_be_changed_in_place(mode: str) -> None:
    class Doubles(nn.Module):
        def forward(self, pooled: Tensor) -> Tensor:
            pooled *= 2.0
            return pooled

    torch.manual_seed(0)
    check_step(nn.Sequential(nn.EmbeddingBag(ROWS, DIM, mode=mode), Doubles(), nn.Linear(DIM, 2)))


def test_hooks_stay_and_see_what_they_saw() -> None:
    seen: list[str] = []
    model = Rows()
    model.rows.register_forward_pre_hook(lambda layer, inputs: (inputs[0].flip(1),))
    model.rows.register_forward_hook(lambda layer, inputs, output: output * 3.0)
    model.top.register_forward_pre_hook(lambda layer, inputs: seen.append("before"))
    model.top.register_forward_hook(lambda layer, inputs, output: output.square())
    model.top.register_full_backward_hook(lambda layer, before, after: seen.append("back"))
    check_step(model)
    assert {"before", "back"} <= set(seen)


def test_one_table_in_several_places_is_one() -> None:
    class Places(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.query = self.document = nn.Embedding(ROWS, DIM)
            self.listed = nn.ModuleList([self.query, self.query])
            self.top = nn.Linear(DIM, 2)

        def forward(self, ids: Tensor) -> Tensor:
            rows = self.query(ids) * self.document(ids.flip(1)) + self.listed[0](ids) * self.listed[1](ids.flip(1))
            return self.top(rows)

    check_step(Places())


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_ids_and_offsets_may_be_int32(mode: str) -> None:
    torch.manual_seed(0)
    check_step(Rows(), IDS.int())
    model = nn.Sequential(nn.EmbeddingBag(ROWS, DIM, mode=mode), nn.Linear(DIM, 1), nn.Flatten(0))
    twin = copy.deepcopy(model)
    ends = torch.arange(0, SIZE * LENGTH, LENGTH)
    for made, kind in ((model, torch.int32), (twin, torch.int64)):
        ids, offsets = IDS.reshape(-1).to(kind), ends.to(kind)
        trainer_of(made).step(lambda made=made, ids=ids, offsets=offsets: made[1:](made[0](ids, offsets)).square())  # type: ignore[misc]
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in model.state_dict().items())
    with pytest.raises(InputError, match=r"'0': indices are int64 or int32, found torch\.float32"):
        model[0](IDS.float())


def test_types_that_cannot_be_private_are_refused_before_training() -> None:
    for kind in (torch.float64, torch.bfloat16, torch.float16):
        with pytest.raises(InputError, match=rf"'rows' .* found {kind}: call model\.float\(\) first"):
            trainer_of(Rows().to(kind))
        mixed = Rows()
        mixed.top.to(kind)
        with pytest.raises(InputError, match=rf"'top\.weight' is {kind}.*call model\.float\(\) first"):
            trainer_of(mixed)
    with pytest.raises(InputError, match=r"torch\.autocast \(torch\.bfloat16\)"), torch.autocast("cpu"):
        trainer_of(Rows())
    model = Rows()
    trainer = trainer_of(model)
    with pytest.raises(InputError, match=r"'top' \(Linear\) computes in torch\.bfloat16"), torch.autocast("cpu"):
        trainer.step(lambda: losses_of(model, IDS))
    assert trainer.steps_done == 0
    trainer.step(lambda: losses_of(model, IDS))


@pytest.mark.parametrize("padding", [0, -1, 3])
def test_padding_is_a_constant(padding: int) -> None:
    torch.manual_seed(0)
    model = Rows(padding_idx=padding)
    with torch.no_grad():
        model.rows.weight[padding] = 0.25  # rows of padding need not be zero
    check_step(model)


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_padding_is_left_out_of_bags(mode: str) -> None:
    torch.manual_seed(0)
    ids = IDS.clone()
    ids[2] = 3  # nothing but padding
    check_step(nn.Sequential(nn.EmbeddingBag(ROWS, DIM, mode=mode, padding_idx=3), nn.Linear(DIM, 2)), ids)


@pytest.mark.parametrize("mode", ["lazydp", "dpsgd"])
def test_the_row_of_padding_gets_no_noise(mode: Any) -> None:
    model = Rows(padding_idx=2)
    trainer = trainer_of(model, noise_multiplier=1.0, mode=mode)
    before = model.rows.weight.clone()
    for _ in range(2):
        trainer.step(lambda: losses_of(model, IDS))
        trainer.flush()
    changed = model.rows.weight.ne(before).any(dim=1)
    assert changed.tolist() == [row != 2 for row in range(ROWS)]
    torch.testing.assert_close(model(torch.full((1, 1), 2)), model.top(before[2]).view(1, 1, 3))


class Named(nn.Embedding):
    """As many code bases have it: a constructor and a helper, the same forward."""

    def __init__(self, rows: int) -> None:
        super().__init__(rows, DIM, padding_idx=0)

    def largest(self) -> int:
        return self.num_embeddings - 1


class Scaled(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2.0


def test_a_subclass_with_the_same_forward_is_a_table() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Named(ROWS), nn.Linear(DIM, 2))
    trainer = check_step(model)
    assert isinstance(model[0], Named)
    assert model[0].largest() == ROWS - 1
    assert trainer.tables.names == ("0",)
    again = pickle.loads(pickle.dumps(model[0]))
    assert isinstance(again, Named)
    assert torch.equal(again(IDS), model[0](IDS))
    with pytest.raises(InputError, match=r"'0' \(Scaled\) changes forward.*hold an nn\.Embedding in a module"):
        trainer_of(nn.Sequential(Scaled(ROWS, DIM), nn.Linear(DIM, 2)))


def test_a_checkpoint_of_the_plain_model_goes_in_and_comes_back() -> None:
    plain, model = Rows(padding_idx=1), Rows(padding_idx=1)
    trainer = trainer_of(model, noise_multiplier=1.0)
    with torch.no_grad():
        plain.rows.weight.add_(1.0)
    model.load_state_dict(plain.state_dict())
    torch.testing.assert_close(model(IDS), plain(IDS))
    trainer.step(lambda: losses_of(model, IDS))
    trainer.flush()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain(IDS), model(IDS))
    assert torch.equal(plain.rows.weight[1], torch.ones(DIM))


class Positions(nn.Module):
    """A table of positions that is read once for all examples, in a model that has a bare parameter or has none."""

    def __init__(self, *, bare: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.items, self.positions = nn.Embedding(ROWS, DIM), nn.Embedding(LENGTH, DIM)
        self.bag = nn.EmbeddingBag(ROWS, DIM, mode="mean", padding_idx=0)
        self.top = nn.Linear(DIM, 2)
        self.bias = nn.Parameter(torch.ones(DIM)) if bare else torch.ones(DIM)

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.items(ids)
        rows += self.positions(torch.arange(ids.shape[1]))
        return self.top(torch.tanh(rows).sum(dim=1) * self.bag(ids) + self.bias)


def test_tables_inside_a_module_that_runs_example_by_example(caplog: pytest.LogCaptureFixture) -> None:
    trainer = check_step(Positions(bare=True))
    assert trainer.slow_paths == ("bias",)
    assert "slow path (per-example gradients are formed): bias" in caplog.text
    model = Positions(bare=False)
    with pytest.raises(InputError, match=r"'positions' read 6 bags in a batch of 5.*positions\.expand\(B, L\)"):
        trainer_of(model).step(lambda: losses_of(model, IDS))


def test_fix_replaces_what_it_can_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    norm = nn.BatchNorm1d(4)
    model = nn.Sequential(
        nn.Linear(4, 4),
        norm,
        nn.ReLU(inplace=True),
        nn.Linear(4, 4),
        norm,
        nn.ModuleDict({"image": nn.BatchNorm2d(48)}),
    )
    model.append(nn.InstanceNorm1d(3, affine=True, bias=True, track_running_stats=True))
    with torch.no_grad():
        norm.weight.fill_(3.0)
    model.eval()
    assert fix(model) is model
    assert capsys.readouterr().out.splitlines() == [
        "fix: 1: BatchNorm1d(4, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)"
        " -> GroupNorm(1, 4, eps=1e-05, affine=True, bias=True)",
        "fix: 2: ReLU(inplace=True) -> inplace=False",
        "fix: 4: BatchNorm1d(4, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)"
        " -> GroupNorm(1, 4, eps=1e-05, affine=True, bias=True)",
        "fix: 6: InstanceNorm1d(3, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)"
        " -> InstanceNorm1d(3, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=False)",
        "fix: 5.image: BatchNorm2d(48, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)"
        " -> GroupNorm(16, 48, eps=1e-05, affine=True, bias=True)",
    ]
    assert model[1] is model[4]
    assert not any(module.training for module in model.modules())
    inputs = torch.randn(3, 4)
    torch.testing.assert_close(model[1](inputs), functional.layer_norm(inputs, (4,), torch.full((4,), 3.0)))
    assert fix(model) is model
    assert not capsys.readouterr().out  # nothing is left to be replaced
    assert isinstance(fix(nn.BatchNorm3d(2, affine=False)), nn.GroupNorm)
    with pytest.raises(InputError, match="LazyBatchNorm1d has no shape yet"):
        fix(nn.Sequential(nn.LazyBatchNorm1d()))
