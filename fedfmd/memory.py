"""How the C library handles memory that was freed (glibc; nothing happens with others)."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
NEVER = 2**30


def keep_freed() -> None:
    """Let this process keep what it frees: training asks for the same memory again in every step.

    Otherwise tensors above 32 MB go back to the system at once, to be mapped and cleared anew, which takes a good
    part of a step of a large network (`experiments/benchmarks/step.py`).
    """
    _call("mallopt", M_MMAP_THRESHOLD, NEVER)
    _call("mallopt", M_TRIM_THRESHOLD, NEVER)


def trim() -> None:
    """Return to the system what was freed."""
    _call("malloc_trim", 0)


def _call(function: str, *arguments: int) -> None:
    if sys.platform == "linux" and (call := getattr(ctypes.CDLL(None), function, None)):
        call(*arguments)
