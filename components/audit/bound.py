"""Whether guesses about one training run refute a trade-off curve (Mahloujifar, Melis and Chaudhuri 2024).

Each of m canaries is in or out of the training data by its own fair coin. From what was released somebody guesses
r of the coins (and abstains from the rest), and v guesses are right. Let p_i be the probability of exactly i right
guesses and

    right_i = sum over j >= i of (j / m) p_j          wrong_i = sum over j >= i of ((r - j) / m) p_j.

A guess that is right turns wrong where its canary's coin is turned, so a mechanism with the symmetric trade-off curve f
for adding or removing one canary has wrong_{i-1} >= f(1 - right_i) (arXiv 2410.22235, theorem 3.2), and all
probabilities add up to right_0 + wrong_0 = r / m. If v or more right guesses had probability `error`, right_v and
wrong_v would add up to error r / m, and the recursion from i = v down to 0 gives the least that right_0 + wrong_0 can
be. Where that exceeds r / m the probability is below `error`: the guesses refute f at confidence 1 - error.

The number of guesses r has to be settled before the run is looked at; which coins are guessed may depend on it.
"""

from __future__ import annotations

from lazydp.components.audit.trade_off import TradeOff
from lazydp.components.shared.errors import InputError


def refutes(curve: TradeOff, *, canaries: int, guesses: int, correct: int, error: float) -> bool:
    """Whether `correct` or more right guesses have a probability below `error` under `curve`.

    Args:
        curve: the hypothesis.
        canaries: m.
        guesses: r, at most m.
        correct: v, at most r.
        error: in (0, 1), the probability of refuting a curve that holds.

    Raises:
        InputError: a value out of range.
    """
    if not 0 <= correct <= guesses <= canaries:
        raise InputError(
            f"expected 0 <= correct <= guesses <= canaries, found {correct} correct, {guesses} guesses, "
            f"{canaries} canaries"
        )
    if not 0 < error < 1:
        raise InputError(f"error must be in (0, 1), found {error}")
    whole = guesses / canaries
    right, wrong = error * correct / canaries, error * (guesses - correct) / canaries
    for number in range(correct - 1, -1, -1):
        before = max(wrong, curve(1.0 - right))
        right += number / (guesses - number) * (before - wrong)
        wrong = before
        if right + wrong > whole:
            return True
    return False
