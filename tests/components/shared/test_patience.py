"""What does not answer is asked again; what refuses is not."""

import pytest

from lazydp.components.shared.errors import BudgetExceededError, LazyDPError, UnavailableError
from lazydp.components.shared.patience import patiently


class Ledger:
    def __init__(self, *errors: LazyDPError) -> None:
        self.errors = list(errors)
        self.asked = 0

    def answer(self) -> str:
        self.asked += 1
        if self.errors:
            raise self.errors.pop(0)
        return "yes"


def test_until_it_answers() -> None:
    ledger = Ledger(UnavailableError("down"), UnavailableError("down"))
    assert patiently(ledger.answer, wait_s=0) == "yes"
    assert ledger.asked == 3


def test_not_for_ever_and_never_after_a_refusal() -> None:
    down = Ledger(*[UnavailableError("down")] * 9)
    with pytest.raises(UnavailableError):
        patiently(down.answer, tries=4, wait_s=0)
    assert down.asked == 4
    refusing = Ledger(BudgetExceededError("too much"))
    with pytest.raises(BudgetExceededError):
        patiently(refusing.answer, wait_s=0)
    assert refusing.asked == 1
