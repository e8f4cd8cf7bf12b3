"""The key of the noise: 256 bits from the operating system. Whoever knows it can subtract the noise.

It lives in memory and in private checkpoints only. Nothing that prints or pickles a `NoiseKey` shows its bytes;
`to_bytes` is the one way out, for the checkpoint, and `destroy` the end of it, at export.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import hmac
import os
from typing import NoReturn

import torch
from torch import Tensor

KEY_BYTES = 32
_NONCE_BYTES = 16
_TEST_SALT = b"lazydp test key, not private"
_DERIVE_SALT = b"lazydp noise key v1"


def _keep_in_memory(secret: bytearray) -> None:
    """Ask that the bytes are never written to swap; a limit on locked memory may forbid it, and that is accepted."""
    with contextlib.suppress(OSError, AttributeError):
        address = ctypes.addressof(ctypes.c_char.from_buffer(secret))
        ctypes.CDLL(None).mlock(ctypes.c_void_p(address), ctypes.c_size_t(len(secret)))


class NoiseKey:
    """256 secret bits, and whether they were made for a test.

    What was trained under a test key is not private: `is_test` travels with every derived key, into the checkpoint and
    into the bundle's manifest.
    """

    __slots__ = ("_bytes", "_is_test", "_of_trainers", "_trainers")

    def __init__(self, secret: bytes, *, is_test: bool) -> None:
        """Use `generate`, `for_tests` or `from_bytes`.

        Raises ValueError unless `secret` is 32 bytes, not all zero (zero bytes are what `destroy` leaves).
        """
        if len(secret) != KEY_BYTES:
            raise ValueError(f"a noise key has {KEY_BYTES} bytes, found {len(secret)}")
        if not any(secret):
            raise ValueError("a noise key must not be all zero: that is what a destroyed key leaves behind")
        self._bytes: bytearray | None = bytearray(secret)
        _keep_in_memory(self._bytes)
        self._is_test = is_test
        self._trainers = 0
        self._of_trainers: list[NoiseKey] = []

    @classmethod
    def generate(cls) -> NoiseKey:
        """A new secret key from the operating system's generator."""
        return cls(os.urandom(KEY_BYTES), is_test=False)

    @classmethod
    def for_tests(cls, seed: int) -> NoiseKey:
        """The key that belongs to `seed`: known to everyone, so what it makes is marked as not private."""
        return cls(hashlib.sha256(_TEST_SALT + str(int(seed)).encode()).digest(), is_test=True)

    @classmethod
    def from_bytes(cls, secret: bytes, *, is_test: bool) -> NoiseKey:
        """A key read back from a private checkpoint; raises ValueError unless `secret` is 32 bytes, not all zero."""
        return cls(secret, is_test=is_test)

    @property
    def is_test(self) -> bool:
        """Whether the key, or the key it was derived from, came from `for_tests`."""
        return self._is_test

    def derive(self, label: str) -> NoiseKey:
        """An independent key for another use: HKDF-SHA256 (RFC 5869) with `label` as info. `is_test` is inherited."""
        pseudorandom_key = hmac.new(_DERIVE_SALT, self._secret(), hashlib.sha256).digest()
        derived = hmac.new(pseudorandom_key, label.encode() + b"\x01", hashlib.sha256).digest()
        return NoiseKey(derived, is_test=self._is_test)

    def commitment(self) -> str:
        """What may be published of the key: 64 hexadecimal digits that only this key has, and that tell nothing of it.

        They are an HKDF-SHA256 output under a label of its own. Binding: a second key with the same output is a
        collision of SHA-256. Hiding: the outputs of HKDF under different labels are as good as independent random
        strings to whoever lacks the key (HMAC-SHA256 as a pseudorandom function), and the key has 256 random bits, so
        neither the key nor the noise drawn under `derive("noise")` can be told from them, or tested by guessing.
        """
        return self.derive("public commitment").to_bytes().hex()

    def new_nonce(self) -> bytes:
        """16 bytes that no other trainer has: random, or for a test key the number of trainers that it serves."""
        self._trainers += 1
        return self._trainers.to_bytes(_NONCE_BYTES, "big") if self._is_test else os.urandom(_NONCE_BYTES)

    def for_trainer(self, nonce: bytes) -> NoiseKey:
        """The key of one trainer. Two trainers under one key would draw the same noise, which can then be subtracted.

        It is destroyed together with this key.
        """
        derived = self.derive(f"trainer {nonce.hex()}")
        self._of_trainers.append(derived)
        return derived

    def tensor(self) -> Tensor:
        """The key as the operators take it: uint8 [32] on the CPU. It shares the key's memory: `destroy` zeroes it."""
        return torch.frombuffer(self._secret(), dtype=torch.uint8)

    def to_bytes(self) -> bytes:
        """The 32 secret bytes. For private checkpoints only."""
        return bytes(self._secret())

    def destroy(self) -> None:
        """Overwrites the bytes, also those of `tensor()` and `for_trainer()`. Any later use raises ValueError."""
        if self._bytes is not None:
            self._bytes[:] = bytes(KEY_BYTES)
            self._bytes = None
        for derived in self._of_trainers:
            derived.destroy()

    def __repr__(self) -> str:
        state = "destroyed" if self._bytes is None else "test key" if self._is_test else "secret"
        return f"NoiseKey(<{state}>)"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, NoiseKey):
            return NotImplemented
        return self._is_test == other._is_test and hmac.compare_digest(self._secret(), other._secret())

    __hash__ = None  # type: ignore[assignment]  # a hash of a secret would end up in places that print it

    def __reduce__(self) -> NoReturn:
        raise TypeError("a NoiseKey is not pickled or copied: write to_bytes() to the private checkpoint instead")

    def _secret(self) -> bytearray:
        if self._bytes is None:
            raise ValueError("this noise key was destroyed; nothing can be drawn under it any more")
        return self._bytes
