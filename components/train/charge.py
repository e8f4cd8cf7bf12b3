"""What a training of a module of one's own costs, and its claim on a budget."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lazydp.components.budget.ledger.ledger import Ledger
from lazydp.components.shared.errors import PrivacyError
from lazydp.components.train.data.sampler import poisson_dp_event
from lazydp.components.train.mechanism.parameters import PrivacyParameters

if TYPE_CHECKING:
    from dp_accounting import DpEvent


@dataclass(frozen=True, slots=True, kw_only=True)
class Mechanism:
    """The mechanism of a whole training: Poisson-sampled DP-SGD, per example. All of it is public.

    Attributes:
        privacy: noise, clipping and divisor of a step.
        sampling_prob: q.
        steps: T.
        target_epsilon: that the noise was calibrated for.
        target_delta: the delta of every epsilon.
    """

    privacy: PrivacyParameters
    sampling_prob: float
    steps: int
    target_epsilon: float
    target_delta: float

    def event(self, steps: int | None = None) -> DpEvent:
        """What the first `steps` steps are, for the accountant; all of them where None."""
        return poisson_dp_event(
            noise_multiplier=self.privacy.noise_multiplier,
            sampling_prob=self.sampling_prob,
            steps=self.steps if steps is None else steps,
            max_examples_per_user=None,
        )

    def settings(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    def digest(self) -> str:
        """SHA-256 of the settings, hexadecimal."""
        return hashlib.sha256(json.dumps(self.settings(), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Claim:
    """A reservation in a ledger.

    Attributes:
        url: of the ledger; None for the default one.
        ledger: which ledger it is (`Ledger.name`).
        dataset: identifier of the dataset that is charged.
        run_id: of the training.
        late: whether it was made when the training was over.
    """

    url: str | None
    ledger: str
    dataset: str
    run_id: str
    late: bool = False

    def open(self) -> Ledger:
        """The ledger of the reservation.

        Raises:
            PrivacyError: another ledger lies there now.
        """
        ledger = Ledger.open(self.url)
        if ledger.name() != self.ledger:
            ledger.close()
            raise PrivacyError(
                f"training {self.run_id} was reserved in another ledger (whose first entry is {self.ledger[:12]}) than "
                f"{ledger.url} now is: bring that ledger back"
            )
        return ledger


def reserve(
    url: str | None,
    *,
    dataset: str,
    run_id: str,
    mechanism: Mechanism,
    commitment: str,
    by: str | None,
    late: bool = False,
) -> Claim:
    """Reserve what the whole training may spend; a training that holds its reservation already keeps it.

    Args:
        url: of the ledger; None for the default one.
        dataset: identifier, its first characters, or name of a dataset that the ledger knows.
        run_id: names the training for good.
        mechanism: of all its steps.
        commitment: public commitment to its key.
        by: who asks; the operator by default.
        late: whether the training is over.

    Raises:
        BudgetExceededError: the budget of the dataset does not admit the training.
        PrivacyError: the dataset has no budget, or one per user; or the run is closed, or bound to another key.
        InputError: the ledger does not know the dataset, or the run_id was used for something else.
    """
    event = mechanism.event()
    with Ledger.open(url) as ledger:
        identifier = ledger.state().resolve(dataset)
        ledger.reserve(
            dataset=identifier,
            event=event,
            run_id=run_id,
            privacy_unit="example",
            config_digest=mechanism.digest(),
            key=commitment,
            by=by,
        )
        ledger.require_reservation(run_id, dataset=identifier, event=event, key=commitment)
        return Claim(url, ledger.name(), identifier, run_id, late)
