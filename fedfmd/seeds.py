"""Where all randomness comes from: independent streams named by (seed, purpose, round, client)."""

from __future__ import annotations

import zlib

import numpy as np


def derive_seed(seed: int, purpose: str, *parts: int) -> int:
    """Return a 63-bit seed that depends on every argument and on nothing else.

    NumPy's SeedSequence mixes the parts, so that neighbouring rounds and clients share no stream
    (https://numpy.org/doc/stable/reference/random/bit_generators/generated/numpy.random.SeedSequence.html).
    """
    sequence = np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), *parts])
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)
