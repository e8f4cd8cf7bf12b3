"""The key derives, destroys, and never shows its bytes."""

from __future__ import annotations

import copy
import hashlib
import hmac
import logging
import pickle
import traceback

import pytest
import torch

from lazydp.kernels import ops
from lazydp.kernels.noise_key import NoiseKey


def test_generated_keys_differ_and_are_not_test_keys() -> None:
    keys = {NoiseKey.generate().to_bytes() for _ in range(20)}
    assert len(keys) == 20
    assert not NoiseKey.generate().is_test


def test_test_keys_are_fixed_and_say_so() -> None:
    assert NoiseKey.for_tests(1) == NoiseKey.for_tests(1)
    assert NoiseKey.for_tests(1) != NoiseKey.for_tests(2)
    assert NoiseKey.for_tests(1).is_test
    assert NoiseKey.for_tests(1).derive("noise").is_test


def test_derivation_is_hkdf_and_labels_are_independent() -> None:
    secret = bytes(range(32))
    derived = NoiseKey.from_bytes(secret, is_test=False).derive("noise").to_bytes()
    extracted = hmac.new(b"lazydp noise key v1", secret, hashlib.sha256).digest()
    assert derived == hmac.new(extracted, b"noise\x01", hashlib.sha256).digest()
    key = NoiseKey.generate()
    assert len({key.to_bytes(), key.derive("noise").to_bytes(), key.derive("sampling").to_bytes()}) == 3
    assert not key.derive("noise").is_test


def test_bytes_round_trip() -> None:
    key = NoiseKey.generate()
    assert NoiseKey.from_bytes(key.to_bytes(), is_test=False) == key
    assert key.tensor().dtype == torch.uint8
    assert bytes(key.tensor().tolist()) == key.to_bytes()


@pytest.mark.parametrize("secret", [b"", bytes(31), bytes(33), bytes(32)])
def test_wrong_bytes_are_refused(secret: bytes) -> None:
    with pytest.raises(ValueError, match="a noise key"):
        NoiseKey.from_bytes(secret, is_test=False)


def test_destroyed_key_is_gone_everywhere() -> None:
    key = NoiseKey.generate()
    tensor = key.tensor()
    key.destroy()
    key.destroy()
    assert not tensor.any()
    for use in (key.to_bytes, key.tensor, lambda: key.derive("noise")):
        with pytest.raises(ValueError, match="destroyed"):
            use()
    with pytest.raises(ValueError, match="all bytes are zero"):
        ops.normal_(torch.empty(2, 2), tensor, table=0, first_row=0, step=0)
    assert "destroyed" in repr(key)


def shows(key: NoiseKey, text: str) -> bool:
    secret = key.to_bytes()
    forms = [secret.hex(), repr(secret)[2:-1], str(list(secret))[1:-1], secret.decode("latin-1")]
    return any(form in text for form in forms)


def test_nothing_that_prints_shows_the_bytes(caplog: pytest.LogCaptureFixture) -> None:
    key = NoiseKey.generate()
    logging.getLogger("lazydp").warning("key %s %r", key, key)
    try:
        key.derive(0)  # type: ignore[arg-type]  # fails in a frame that holds the key
    except AttributeError as error:
        trace = "".join(traceback.TracebackException.from_exception(error, capture_locals=True).format())
    for text in (repr(key), str(key), f"{key}", repr({"key": key}), caplog.text, trace):
        assert not shows(key, text)
    assert shows(key, key.to_bytes().hex()), "the check would see the bytes if they were there"


@pytest.mark.parametrize("copied", [pickle.dumps, copy.copy, copy.deepcopy])
def test_keys_are_not_pickled_or_copied(copied: object) -> None:
    with pytest.raises(TypeError, match="not pickled"):
        copied(NoiseKey.generate())  # type: ignore[operator]
    with pytest.raises(TypeError, match="unhashable"):
        hash(NoiseKey.generate())


def test_a_commitment_is_of_one_key_and_of_none_that_draws() -> None:
    keys = [NoiseKey.for_tests(seed) for seed in range(200)]
    commitments = {key.commitment() for key in keys}
    assert len(commitments) == len(keys)
    assert keys[0].commitment() == NoiseKey.from_bytes(keys[0].to_bytes(), is_test=False).commitment()
    drawing = {key.derive(label).to_bytes().hex() for key in keys for label in ("noise", "sampling", "negatives")}
    assert not commitments & (drawing | {key.to_bytes().hex() for key in keys})
