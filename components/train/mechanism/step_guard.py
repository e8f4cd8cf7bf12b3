"""A step ends, or its trainer stops: one noise never covers two batches."""

from __future__ import annotations

from lazydp.components.shared.errors import UnfinishedStepError


class StepGuard:
    """Knows whether a change of the weights began that did not end.

    Interrupted in between (Ctrl-C in a notebook, an error in an optimizer), the weights hold part of a step. Another
    step would then draw the same noise for another batch, and the difference between the two gives the noise away.

    What begins is not ended by an exception, of whatever kind: so there is no `with` and no `finally` here.
    """

    def __init__(self) -> None:
        self._changing = False

    def begin(self) -> None:
        """Weights change from here on."""
        self._changing = True

    def end(self) -> None:
        """They are those after a whole step again."""
        self._changing = False

    def refuse_unfinished(self) -> None:
        """Refuse to go on with part of a step.

        Raises:
            UnfinishedStepError: a change began and did not end.
        """
        if self._changing:
            raise UnfinishedStepError(
                "a step (or a load) was interrupted while it changed the weights, and its noise must not be used again "
                "on another batch: load a state that was saved before it, with load_state_dict, or begin anew with a "
                "new key"
            )
