"""Each of ten public models keeps its claim in an audit, which sees each of two planted faults."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from adversary.module_audit import OTHERS, audit
from torch import Tensor

from lazydp.components.train.mechanism.calls import Pair
from lazydp.components.train.mechanism.capture import Capture
from lazydp.components.train.mechanism.double_sums import LayerSums
from lazydp.components.train.mechanism.parameters import PrivacyParameters
from support.public_models import PUBLIC_MODELS

CANARIES = 240
ERROR = 1e-4
"""Of one audit, so that ten audits of right code raise one alarm in a thousand runs of this file."""


def half_of_the_noise(patch: pytest.MonkeyPatch) -> None:
    promised = PrivacyParameters.noise_scale
    patch.setattr(PrivacyParameters, "noise_scale", lambda self, group: promised(self, group) / 2)


def one_layer_without_clipping(patch: pytest.MonkeyPatch) -> None:
    """The layer with the largest gradients adds them as they are."""
    add_weighted = Capture.add_weighted

    def size(pair: Pair) -> float:
        return float(pair.rule.sq_norms(pair.calls.layer, tuple(pair.calls.parameters), pair.inputs, pair.grads).sum())

    def unclipped(self: Capture, scale: Tensor) -> None:
        pair = max(self._pairs, key=size)
        into = LayerSums(self._sums, pair.calls.parameters, pair.rows)
        self._add(pair, 1 / OTHERS - scale, into, None)
        add_weighted(self, scale)

    patch.setattr(Capture, "add_weighted", unclipped)


FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "half of the noise": half_of_the_noise,
    "one layer without clipping": one_layer_without_clipping,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLIC_MODELS)
def test_a_public_model_keeps_its_claim(name: str) -> None:
    found = audit(PUBLIC_MODELS[name], canaries=CANARIES, error=ERROR)
    assert not found.contradicts, found


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", PUBLIC_MODELS)
def test_a_planted_fault_is_seen(name: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    FAULTS[fault](monkeypatch)
    found = audit(PUBLIC_MODELS[name], canaries=CANARIES, error=ERROR)
    assert found.contradicts, found
    if fault == "half of the noise":
        assert found.refutes_the_claim, found
        assert found.wrong_noise == found.noise.keys(), found
