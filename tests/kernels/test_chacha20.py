"""ChaCha20 against RFC 8439, in the operators and in the reference."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch

from lazydp.kernels import ops, reference

Words = npt.NDArray[np.uint32]


def words_of(text: str) -> Words:
    return np.array([int(word, 16) for word in text.split()], dtype=np.uint32)


def state(key: bytes, counter: int, nonce: bytes) -> Words:
    return np.frombuffer(b"expand 32-byte k" + key + counter.to_bytes(4, "little") + nonce, dtype="<u4").astype(
        np.uint32
    )


# RFC 8439, section 2.3.2, and appendix A.1, test vectors 1 to 5.
VECTORS = {
    "2.3.2": (
        state(bytes(range(32)), 1, bytes.fromhex("000000090000004a00000000")),
        words_of(
            "e4e7f110 15593bd1 1fdd0f50 c47120a3 c7f4d1c7 0368c033 9aaa2204 4e6cd4c3"
            " 466482d2 09aa9f07 05d7c214 a2028bd9 d19c12b5 b94e16de e883d0cb 4e3c50a2"
        ),
    ),
    "A.1 1": (
        state(bytes(32), 0, bytes(12)),
        words_of(
            "ade0b876 903df1a0 e56a5d40 28bd8653 b819d2bd 1aed8da0 ccef36a8 c70d778b"
            " 7c5941da 8d485751 3fe02477 374ad8b8 f4b8436a 1ca11815 69b687c3 8665eeb2"
        ),
    ),
    "A.1 2": (
        state(bytes(32), 1, bytes(12)),
        words_of(
            "bee7079f 7a385155 7c97ba98 0d082d73 a0290fcb 6965e348 3e53c612 ed7aee32"
            " 7621b729 434ee69c b03371d5 d539d874 281fed31 45fb0a51 1f0ae1ac 6f4d794b"
        ),
    ),
    "A.1 3": (
        state(bytes(31) + b"\x01", 1, bytes(12)),
        words_of(
            "2452eb3a 9249f8ec 8d829d9b ddd4ceb1 e8252083 60818b01 f38422b8 5aaa49c9"
            " bb00ca8e da3ba7b4 c4b592d1 fdf2732f 4436274e 2561b3c8 ebdd4aa6 a0136c00"
        ),
    ),
    "A.1 4": (
        state(b"\x00\xff" + bytes(30), 2, bytes(12)),
        words_of(
            "fb4dd572 4bc42ef1 df922636 327f1394 a78dea8f 5e269039 a1bebbc1 caf09aae"
            " a25ab213 48a6b46c 1b9d9bcb 092c5be6 546ca624 1bec45d5 87f47473 96f0992e"
        ),
    ),
    "A.1 5": (
        state(bytes(32), 0, bytes(11) + b"\x02"),
        words_of(
            "374dc6c2 3736d58c b904e24a cd3f93ef 88228b1a 96a4dfb3 5b76ab72 c727ee54"
            " 0e0e978a f3145c95 1b748ea8 f786c297 99c28f5f 628314e8 398a19fa 6ded1b53"
        ),
    ),
}

Block = Callable[[Words], Words]


def operator(inputs: Words) -> Words:
    return ops.chacha20_blocks(torch.from_numpy(inputs.view(np.int32))).numpy().view(np.uint32)


@pytest.mark.parametrize("name", VECTORS)
def test_reference_passes_the_rfc_vectors(name: str) -> None:
    given, expected = VECTORS[name]
    np.testing.assert_array_equal(reference.chacha20_block(given), expected)


@pytest.mark.parametrize("name", VECTORS)
def test_operator_passes_the_rfc_vectors(name: str, simd_level: str) -> None:
    given, expected = VECTORS[name]
    np.testing.assert_array_equal(operator(given[None])[0], expected)


def test_every_lane_of_the_operator_is_the_reference(simd_level: str) -> None:
    inputs = np.random.default_rng(1).integers(0, 2**32, size=(77, 16), dtype=np.uint32)
    inputs[:, :4] = VECTORS["2.3.2"][0][:4]
    inputs[0, 12:] = 0xFFFFFFFF
    np.testing.assert_array_equal(operator(inputs), reference.chacha20_block(inputs))


def test_constants_are_asked_for() -> None:
    with pytest.raises(ValueError, match=r"inputs\[0\].*RFC 8439"):
        ops.chacha20_blocks(torch.zeros(1, 16, dtype=torch.int32))
