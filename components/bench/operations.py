"""Operations of the noise kernels, counted from `kernels/csrc/common` (an fma counts as two, a rotation as one)."""

from __future__ import annotations

NORMALS_PER_BLOCK = 12

# 10 double rounds of 8 quarter rounds of 4 additions, 4 exclusive ors and 4 rotations; 16 additions at the end.
CHACHA20_PER_BLOCK = 10 * 8 * 12 + 16
# Fine bits 3; distance to the end 3, with fma 4 more and a conversion; u and exponent 5; s and its terms 7;
# logarithm 6 fma, 2 fma and a product; its exponent and root 4; angle 3; sine 4 fma and a product; cosine 5 fma and
# the sign 2; two products.
BOX_MULLER_PER_PAIR = 3 + 8 + 5 + 7 + 17 + 4 + 3 + 9 + 12 + 2
# w = m w + l z
WAKE_PER_NORMAL = 3


def of_draw(rows: int, columns: int) -> int:
    """Operations to draw `columns` normals for each of `rows` rows: whole blocks of twelve."""
    blocks = rows * -(-columns // NORMALS_PER_BLOCK)
    return blocks * (CHACHA20_PER_BLOCK + BOX_MULLER_PER_PAIR * NORMALS_PER_BLOCK // 2)


def of_wake(rows: int, columns: int) -> int:
    """Operations to catch up `rows` rows of `columns` weights."""
    return of_draw(rows, columns) + WAKE_PER_NORMAL * rows * columns
