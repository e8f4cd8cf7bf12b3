"""A small module of one's own with its optimizer and loader, as `make_private_with_epsilon` takes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lazydp.components.budget.ledger.ledger import Ledger
from lazydp.components.train.accounted_trainer import AccountedTrainer
from lazydp.components.train.data.poisson_loader import PoissonLoader
from lazydp.components.train.private_with_epsilon import make_private_with_epsilon
from lazydp.kernels.noise_key import NoiseKey

EXAMPLES, ROWS, Q, EPOCHS, BATCH = 40, 9, 0.25, 2, 10


def module() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.EmbeddingBag(ROWS, 4, mode="sum"), nn.Linear(4, 1), nn.Flatten(0))


def examples() -> TensorDataset:
    """Three ids, and the number of the example."""
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randint(0, ROWS, (EXAMPLES, 3), generator=generator), torch.arange(EXAMPLES))


def sgd(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.5, **options})


def prepared(model: nn.Module | None = None, **changes: Any) -> tuple[AccountedTrainer, PoissonLoader]:
    """Two passes of four steps, to epsilon 2; `changes` are arguments of `make_private_with_epsilon`."""
    model = model if model is not None else module()
    given: dict[str, Any] = {
        "module": model,
        "optimizer": changes.pop("optimizer", None) or sgd(model),
        "data_loader": DataLoader(examples(), batch_size=BATCH, shuffle=True),
        "target_epsilon": 2.0,
        "target_delta": 1e-5,
        "epochs": EPOCHS,
        "sampling_prob": Q,
        "max_grad_norm": 1.0,
        "key": NoiseKey.for_tests(3),
    }
    return make_private_with_epsilon(**{**given, **changes})


def losses_of(model: nn.Module, ids: Tensor) -> Callable[[], Tensor]:
    return lambda: torch.square(model(ids) - 1.0)


def trained(trainer: AccountedTrainer, loader: PoissonLoader, *, passes: int = EPOCHS) -> list[list[int]]:
    """The members of every batch of that many passes."""
    found = []
    for _ in range(passes):
        for ids, numbers in loader:
            trainer.step(losses_of(trainer.model, ids))
            found.append(numbers.tolist())
    return found


def ledger_of_clicks(folder: Path, *, epsilon: float = 2.5, name: str = "ledger.db") -> str:
    """URL of a new ledger that knows one dataset, `clicks`, with a budget per example."""
    url = f"sqlite:///{folder / name}"
    with Ledger.open(url) as ledger:
        ledger.register_dataset("the clicks of 2026", name="clicks", family="customers")
        ledger.set_budget("clicks", epsilon=epsilon, delta=1e-5, privacy_unit="example")
    return url
