"""From a module, an optimizer and a `DataLoader` to private training for a target epsilon, in one call.

trainer, loader = make_private_with_epsilon(
    module=model, optimizer=optimizer, data_loader=loader, target_epsilon=8, target_delta=1e-5,
    epochs=3, sampling_prob=0.05, max_grad_norm=1.0)
for epoch in range(3):
    for ids, labels in loader:                                # a true Poisson sample, sometimes empty
        trainer.step(lambda: criterion(model(ids), labels))   # one loss an example, [B]
trainer.close()                                               # flush, and destroy the key
print(trainer.epsilon(1e-5))
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lazydp.components.budget.accounting.epsilon import calibrate_noise_multiplier
from lazydp.components.shared.errors import FormatError, InputError
from lazydp.components.train.accounted_trainer import AccountedTrainer, TrainingKey
from lazydp.components.train.callers_optimizer import GroupRates, check_parameters, embedding_rates, without_tables
from lazydp.components.train.charge import Mechanism, reserve
from lazydp.components.train.data.poisson_loader import PoissonLoader, check_loader, empty_batch
from lazydp.components.train.data.sampler import PoissonSampler, poisson_dp_event
from lazydp.components.train.engine.dense import DenseOptimizer
from lazydp.components.train.mechanism.layers import trained_layers
from lazydp.components.train.mechanism.parameters import GroupNorms, PrivacyParameters
from lazydp.components.train.private import make_private
from lazydp.components.train.tables.embedding_layers import trained_embeddings
from lazydp.components.train.tables.embedding_tables import Mode
from lazydp.components.train.tables.skip_ahead import EmbeddingSgd
from lazydp.kernels.noise_key import NoiseKey


def make_private_with_epsilon(
    *,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    data_loader: DataLoader[Any],
    target_epsilon: float,
    target_delta: float,
    max_grad_norm: float | GroupNorms,
    epochs: int | None = None,
    steps: int | None = None,
    sampling_prob: float | None = None,
    population: int | None = None,
    expected_batch_size: float | None = None,
    embeddings: EmbeddingSgd | None = None,
    mode: Mode = "lazydp",
    key: NoiseKey | None = None,
    state: Mapping[str, Any] | None = None,
    ledger: str | None = None,
    dataset: str | None = None,
    run_id: str | None = None,
    by: str | None = None,
    allow_moving_buffers: bool = False,
    allow_unrepeatable_losses: bool = False,
) -> tuple[AccountedTrainer, PoissonLoader]:
    """Prepare `module` for private training to a target epsilon per example, in place; give trainer and batches.

    What is refused leaves module and optimizer as they were.

    Args:
        module: as for `make_private`.
        optimizer: of all trained parameters of the module. It stays the caller's object, with its groups and the
            schedulers that are attached to it. The embedding tables leave it: plain SGD (with momentum, weight decay,
            and whatever rate a scheduler sets) trains them with delayed noise; for another optimizer give `embeddings`.
            A schedule must not look at losses or metrics.
        data_loader: says what the examples are (a map-style dataset), how they become a batch (`collate_fn`) and how
            they are fetched (workers). Which examples make a batch is drawn anew.
        target_epsilon: what all steps spend at most, by the PLD accountant.
        target_delta: its delta.
        max_grad_norm: C, or one for each group of parameters.
        epochs: how long to train: `round(1 / q)` steps for each epoch, in which an example is drawn once on average.
        steps: T, instead of `epochs`; the loader then gives all of them in one pass.
        sampling_prob: q, public: chosen, never counted from the data.
        population: instead of q, a public number of examples; q is then `expected_batch_size / population`.
        expected_batch_size: b, the fixed divisor, public; the loader's `batch_size` where None.
        embeddings: optimizer of the tables, instead of what the optimizer says.
        mode: `lazydp` or `dpsgd`.
        key: a noise key that the caller keeps, to go on in another process; None: one that nobody else has.
        state: of `AccountedTrainer.state_dict`, to go on from; with the `key` of that training.
        ledger: URL of the ledger in which the training is reserved; None for the default one.
        dataset: whose budget is reserved before the first step: identifier or name of a dataset that the ledger knows
            (`lazydp budget set --dataset NAME --name NAME ... --privacy-unit example`). None: nothing is reserved.
        run_id: of the training, in the ledger; a new one where None.
        by: who reserves; the operator by default.
        allow_moving_buffers: as for `make_private`.
        allow_unrepeatable_losses: as for `make_private`.

    Returns:
        The trainer, and a loader of Poisson batches: one `trainer.step` for each.

    Raises:
        InputError: a loader, optimizer, layer or setting that cannot be used, with the reason; or something public is
            missing, which would have to be counted from the private data.
        BudgetExceededError: the dataset's budget does not admit the training.
        PrivacyError: the dataset has no budget, or the run_id is bound to another key.
    """
    check_loader(data_loader)
    empty = empty_batch(data_loader)
    divisor = _divisor(data_loader, expected_batch_size)
    q = _sampling_prob(sampling_prob, population, divisor)
    per_pass, total = _steps(epochs, steps, q)
    embedding_layers = trained_embeddings(module)
    trained_layers(module, without=embedding_layers.values())
    tables: dict[str, Tensor] = {name: layer.weight for name, layer in embedding_layers.items()}
    check_parameters(module, optimizer, tables=tables, may_lack=embeddings is not None)
    rates: GroupRates | None = None
    if embeddings is None:
        embeddings, rates = embedding_rates(optimizer, tables) if tables else (EmbeddingSgd(0.0), None)
    sigma = calibrate_noise_multiplier(
        target_epsilon=target_epsilon,
        target_delta=target_delta,
        make_event=lambda sigma: poisson_dp_event(
            noise_multiplier=sigma, sampling_prob=q, steps=total, max_examples_per_user=None
        ),
    )
    mechanism = Mechanism(
        privacy=PrivacyParameters(noise_multiplier=sigma, max_grad_norm=max_grad_norm, expected_batch_size=divisor),
        sampling_prob=q,
        steps=total,
        target_epsilon=target_epsilon,
        target_delta=target_delta,
    )
    own = TrainingKey(key, _nonce(key, state))
    claim = None
    if dataset is not None:
        name = run_id or f"run-{uuid.uuid4().hex[:16]}"
        claim = reserve(ledger, dataset=dataset, run_id=name, mechanism=mechanism, commitment=own.commitment, by=by)
    elif ledger is not None or run_id is not None:
        raise InputError("ledger and run_id belong to a reservation: say whose budget is charged with dataset")
    steps_of = make_private(
        module,
        privacy=mechanism.privacy,
        embeddings=embeddings,
        dense=DenseOptimizer(lambda _: optimizer),
        key=own.key,
        steps=total,
        mode=mode,
        allow_moving_buffers=allow_moving_buffers,
        allow_unrepeatable_losses=allow_unrepeatable_losses,
    )
    without_tables(optimizer, tables)
    loader = PoissonLoader(
        data_loader,
        empty=empty,
        sampler=PoissonSampler(own.key, population=len(data_loader.dataset), sampling_prob=q),  # type: ignore[arg-type]
        steps=total,
        steps_per_pass=per_pass,
        steps_done=lambda: steps_of.steps_done,
    )
    trainer = AccountedTrainer(
        steps_of, loader=loader, key=own, mechanism=mechanism, optimizer=optimizer, rates=rates, claim=claim
    )
    if state is not None:
        trainer.load_state_dict(state)
    return trainer, loader


def _divisor(data_loader: DataLoader[Any], given: float | None) -> float:
    divisor = data_loader.batch_size if given is None else given
    assert divisor is not None
    return float(divisor)


def _sampling_prob(given: float | None, population: int | None, divisor: float) -> float:
    """q, of public numbers only."""
    if (given is None) == (population is None):
        found = "both were given" if given is not None else "none was given"
        raise InputError(
            f"give either sampling_prob or population, {found}. 1 / len(data_loader) is counted from the data, and the "
            "number of examples is private: choose sampling_prob, or give a public number of examples as population "
            "(sampling_prob is then expected_batch_size / population)"
        )
    q = given if given is not None else divisor / population if population and population > 0 else 0.0
    if not 0.0 < q <= 1.0:
        raise InputError(
            f"sampling_prob must be in (0, 1], found {q:g}"
            + ("" if population is None else f", of expected_batch_size {divisor:g} and population {population}")
        )
    return q


def _steps(epochs: int | None, steps: int | None, q: float) -> tuple[int, int]:
    """Steps of a pass over the loader, and of all passes."""
    if (epochs is None) == (steps is None):
        raise InputError(f"give either epochs or steps, found epochs={epochs} and steps={steps}")
    given, what = (epochs, "epochs") if epochs is not None else (steps, "steps")
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise InputError(f"{what} must be a whole number of at least 1, found {given!r}")
    if epochs is None:
        return given, given
    per_pass = max(1, round(1.0 / q))
    return per_pass, per_pass * given


def _nonce(key: NoiseKey | None, state: Mapping[str, Any] | None) -> bytes | None:
    if state is None:
        return None
    if key is None:
        raise InputError("to go on from a state give the key of its training as well: make it before, and keep it")
    try:
        return bytes.fromhex(state["training"])
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"the state is none of AccountedTrainer.state_dict(): it lacks {error}") from error
