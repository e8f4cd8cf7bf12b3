"""The smallest delta and the smallest noise that the accounting computes with."""

from __future__ import annotations

# Convolutions by FFT leave an absolute error of about 1e-16 in probabilities; a delta must stand far above it.
SMALLEST_DELTA = 1e-12

# Noise below this part of the sensitivity gives no privacy: see `accounting.epsilon`.
SMALLEST_NOISE = 0.01
